"""Results on disk, recounted: every accuracy of every selected method and seed. No torch here.

Numbers are counted from the per-sample verdicts; the metrics beside them must agree, or nothing is tabulated.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dynat.config.params import Params
from dynat.errors import UserError
from dynat.evaluation.verdicts import accuracy, decode
from dynat.runtime.files import read_json
from dynat.runtime.lock import locked, read_lock


class Count(NamedTuple):
    """Robust samples among ``n``, of one attack on the network of one training seed."""

    seed: int
    robust: int
    n: int


@dataclass(frozen=True)
class Source:
    """The first ``n`` verdicts of an attack on a checkpoint, and the metric that states their accuracy."""

    seed: int  # of the training
    file: str  # metrics, relative to the repository
    pointer: str  # JSON pointer of the accuracy in it
    verdicts: str  # file
    checkpoint: str
    attack: str  # name in the verdicts; AutoAttack's union is its last attack, "square"
    n: int


@dataclass(frozen=True)
class Measurement:
    """One counted accuracy and the circumstances that a reader must know."""

    source: Source
    robust: int
    epsilon: float
    attack_seed: int
    caveats: tuple[str, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)  # "train: <file>" -> MD5, from dvc.lock

    @property
    def count(self) -> Count:
        """What the printed text is made of."""
        return Count(self.source.seed, self.robust, self.source.n)


@dataclass
class Result:
    """All that is known of one method and training seed; empty if it was not run.

    ``measured`` maps a column to its accuracy: ``pgd20`` of the selected checkpoint, ``last-pgd20`` of the
    last epoch, ``aa`` on the first of AutoAttack's sample sizes, ``aa-n<k>`` on a further one.
    """

    measured: dict[str, Measurement] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)  # "best", "last"
    failed_checks: list[str] = field(default_factory=list)  # of the sanity suite
    epsilon_curve: list[tuple[float, float]] = field(default_factory=list)  # (epsilon, accuracy in percent)
    epsilon_n: int = 0  # test images of that curve


Results = dict[tuple[str, str], dict[int, Result]]  # (setting, method) -> seed -> result


def read_results(params: Params, root: Path = Path()) -> Results:
    """Every selected result below ``root``; what was not run is an empty :class:`Result`.

    Raises :class:`UserError` on metrics that contradict their verdicts or each other's weights.
    """
    code = read_code(root)
    return {
        (setting, method): {seed: _read_result(root, setting, method, seed, code) for seed in params.seeds}
        for setting in params.settings
        for method in (*params.baselines, *params.variants)
    }


Code = dict[tuple[str, str], dict[str, str]]  # (stage, setting-method-seed) -> source file -> MD5


def read_code(root: Path) -> Code:
    """The versions of the code that ``dvc.lock`` says each stage ran with; none without such a file.

    A whole ``dvc repro`` brings all stages to one version. ``-s``, ``frozen`` and ``dvc commit`` need not.
    """
    return {
        (stage, cell): {
            path: md5 for path, md5 in locked(entry, "deps").items() if path.startswith("metrics/code/")
        }
        for name, entry in read_lock(root).items()
        for stage, _, cell in [re.sub(r"_(baseline|dynat)@", "@", name, count=1).partition("@")]
    }


def _read_result(root: Path, setting: str, method: str, seed: int, code: Code) -> Result:
    versions = {
        kind: {
            f"{stage}: {file}": md5
            for stage in ("train", kind)
            for file, md5 in code.get((stage, f"{setting}-{method}-{seed}"), {}).items()
        }
        for kind in ("attack", "autoattack")
    }
    name = f"{setting}/{method}/{seed}"
    files = {kind: f"metrics/{kind}/{name}.json" for kind in ("attack", "autoattack", "sanity")}
    attack, union, sanity = (read_json(root, file) for file in files.values())
    result = Result()
    try:
        if attack and union and attack["model_sha256"] != union["model_sha256"]:
            raise UserError(
                f"{files['autoattack']}: AutoAttack of other weights than those of {files['attack']}; "
                "run dvc repro"
            )
        if attack and sanity and attack["model_sha256"] != sanity["model_sha256"]:
            raise UserError(
                f"{files['sanity']}: checks of other weights than those of {files['attack']}; run dvc repro"
            )
        if attack:
            result.epochs = {checkpoint: attack[f"{checkpoint}_epoch"] for checkpoint in ("best", "last")}
            entries = {
                ("" if checkpoint == "best" else "last-") + name: (checkpoint, name, checkpoint, name)
                for checkpoint in ("best", "last")
                for name in attack[checkpoint]
            }
            result.measured |= _measure(root, files["attack"], attack, entries, seed, versions["attack"])
        if union:
            entries = {
                "aa" if rank == 0 else f"aa-{size}": ("aa", size, "best", "square")
                for rank, size in enumerate(union["aa"])
            }
            result.measured |= _measure(
                root, files["autoattack"], union, entries, seed, versions["autoattack"]
            )
        if sanity:
            result.failed_checks = [name for name, check in sanity["checks"].items() if not check["passed"]]
            result.epsilon_curve = [(epsilon, value) for epsilon, value in sanity.get("epsilon_curve", [])]
            result.epsilon_n = sanity.get("n", 0)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"metrics of {name}: not as the stages write them ({error!r}); run dvc repro"
        ) from None
    return result


def _measure(
    root: Path,
    file: str,
    metrics: dict[str, Any],
    entries: Mapping[str, tuple[str, str, str, str]],
    seed: int,
    code: Mapping[str, str],
) -> dict[str, Measurement]:
    """Count the verdicts (checkpoint, attack) behind each (block, entry) of the metrics."""
    companion = file.removesuffix(".json") + ".verdicts.json"
    verdicts = read_json(root, companion)
    if verdicts is None:
        raise UserError(f"{companion}: missing beside {file}; run dvc repro")
    caveats = [f"AutoAttack warned: {warning}" for warning in metrics.get("warnings", ())]
    if metrics.get("precision", "fp32") == "mixed":
        caveats.append("attack crafted in bf16, every success verified in fp32")
    if metrics.get("trained_in", "fp32") == "bf16":
        caveats.append("trained in bf16, the paper in fp32")
    measured = {}
    for column, (block, entry, checkpoint, attack) in entries.items():
        stated, evidence = metrics[block][entry], verdicts[checkpoint][attack]
        counted = accuracy(decode(evidence["robust"], evidence["n"])[: stated["n"]])
        if counted != stated:
            raise UserError(
                f"{file}: {block}/{entry} says {stated['accuracy']} % of {stated['n']}, but its verdicts "
                f"count {counted['accuracy']} % of {counted['n']}; restore both or run dvc repro -f"
            )
        source = Source(seed, file, f"/{block}/{entry}/accuracy", companion, checkpoint, attack, counted["n"])
        measured[column] = Measurement(
            source, counted["robust"], metrics["epsilon"], metrics["attack_seed"], tuple(caveats), code
        )
    return measured
