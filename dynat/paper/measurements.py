"""Results on disk, recounted: every accuracy of every selected method and seed in one frame. No torch here.

Numbers are counted from the per-sample verdicts; the metrics beside them must agree, or nothing is tabulated.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dynat.config.fields import radius
from dynat.config.params import Params
from dynat.errors import UserError
from dynat.evaluation.verdicts import accuracy, decode
from dynat.runtime.files import read_csv, read_json
from dynat.runtime.lock import locked, read_lock

RUN = ["setting", "method", "seed"]
TRAIN = "last-train-"
# of a column, by checkpoint; whatever looks for one in a column must ask for the longer first
PREFIXES = {"best": "", "last-train": TRAIN, "last": "last-", "ema": "ema-"}
IN_AA = "aa-apgd-ce"  # beside "apgd-ce" of stage attack, which has a radius and images of its own
CURVES = ["train_clean", "test_clean", "validation_robust"]
AGAIN = "its successes verified and its survivors attacked again in fp32"
# entries of the metrics, of precision by their stage -> a sentence that must stand beside their numbers
CAVEATS = {
    ("attack", "bf16"): "attack crafted in bf16, every success verified in fp32",
    ("attack", "tf32"): "attack crafted in TF32, every success verified in fp32",
    ("autoattack", "bf16"): f"APGD tried in bf16 first, {AGAIN}",
    ("autoattack", "tf32"): f"APGD tried in TF32 first, {AGAIN}",
    ("regime", "modern"): "trained under the modern regime (docs/methods.md, 18), not as its paper says",
    ("trained_in", "bf16"): "trained in bf16, the paper in fp32 or TF32",
    ("trained_in", "tf32"): "trained in TF32, as the published code where the GPU has it",
}
AVERAGE = "the moving average of the weights, which did no worse on held-out data than the weights"
ELSEWHERE = "weights trained elsewhere"
Texts = defaultdict[tuple[str, str], list[str]]  # by setting and method; nothing for what was not run


class Measurement(NamedTuple):
    """A row of ``Results.measurements``: the first ``n`` verdicts of an attack on a checkpoint, counted.

    ``column`` is that of the tables: ``pgd20`` of the best epoch, ``last-pgd20`` of the last, ``aa`` on the
    first of AutoAttack's sample sizes, ``aa-n<k>`` on a further one, ``aa@8-255-n<k>`` at another radius,
    :data:`IN_AA` its first attack alone.
    """

    setting: str
    method: str
    seed: int  # of the training
    kind: str  # the stage that measured: "attack" or "autoattack"
    column: str
    checkpoint: str  # "best", "last", "last-train" on training images, "ema": the average in the last epoch
    attack: str  # name in the verdicts; AutoAttack's union is its last attack, "square"
    robust: int  # samples
    n: int  # samples
    epsilon: str  # as people write it: "8/255"
    attack_seed: int
    file: str  # metrics, relative to the repository
    pointer: str  # JSON pointer of the accuracy in them
    verdicts: str  # file, relative to the repository
    caveats: tuple[str, ...]  # sentences that must stand beside the number
    train_code: str  # MD5 of the code that dvc.lock says the training ran with; empty if it does not say
    attack_code: str  # the same of the evaluation
    correct: NDArray[np.bool_]  # [n], the verdicts themselves


@dataclass(frozen=True)
class Results:
    """What is known of the selected runs, in their order; the frames have ``RUN``, and no rows of others."""

    measurements: pd.DataFrame  # a row per Measurement
    radii: pd.DataFrame  # accuracy in percent under PGD-20 of radius epsilon, on the first n test images
    histories: pd.DataFrame  # epoch and the CURVES in percent, as text, as the training wrote them
    epochs: Texts  # best and last epoch of each seed, "13 / 15"
    failed_checks: Texts  # footnotes, a failed check of the sanity suite each


def read_results(params: Params, root: Path = Path()) -> Results:
    """Every selected result; :class:`UserError` on metrics that contradict their verdicts or each other."""
    code = {  # output -> MD5; -s, frozen and dvc commit can leave stages of mixed versions
        output: md5
        for entry in read_lock(root).values()
        for path, md5 in locked(entry, "deps").items()
        if path.startswith("metrics/code/")
        for output in locked(entry, "outs")
    }
    measured, radii, histories = list[Measurement](), [], []
    epochs, failed = Texts(list), Texts(list)
    for run in params.runs:
        guide, _ = params.guide_run(run[1], run[2]) or ("", 0)
        elsewhere = guide in params.checkpoint
        notes = [f"learned from {ELSEWHERE}: {params.checkpoint[guide].origin}"] if elsewhere else []
        name = "/".join(map(str, run))
        try:
            metrics = _metrics(root, name)
            attack, sanity = metrics["attack"], metrics["sanity"] or {"checks": {}}
            for kind in ("attack", "autoattack"):
                measured += _measure(root, kind, run, metrics[kind], code, notes)
            radii += [(*run, *point, sanity["n"]) for point in sanity.get("epsilon_curve", ())]
            broken = [check for check, each in sanity["checks"].items() if not each["passed"]]
            failed[run[:2]] += [f"sanity check failed: {check} (seed {run[2]})" for check in broken]
            known = "best_epoch" in attack  # not of weights trained elsewhere
            epochs[run[:2]] += [f"{attack['best_epoch']} / {attack['last_epoch']}"] if known else []
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            text = f"metrics of {name}: not as the stages write them ({error!r}); run dvc repro"
            raise UserError(text) from None
        rows = read_csv(root, f"models/{name}/history.csv")
        histories += [dict(zip(RUN, run, strict=True)) | row for row in rows]
    return Results(
        pd.DataFrame(measured, columns=list(Measurement._fields)),
        pd.DataFrame(radii, columns=[*RUN, "epsilon", "accuracy", "n"]),
        pd.DataFrame(histories, columns=[*RUN, "epoch", *CURVES]).fillna(""),
        epochs,
        failed,
    )


def _metrics(root: Path, name: str) -> dict[str, dict[str, Any]]:
    """Metrics of attack, AutoAttack and sanity suite, empty if not run; all must be of the same weights."""
    files = {kind: f"metrics/{kind}/{name}.json" for kind in ("attack", "autoattack", "sanity")}
    found = {kind: read_json(root, file) or {} for kind, file in files.items()}
    for kind, each in found.items():
        if each and found["attack"] and each["model_sha256"] != found["attack"]["model_sha256"]:
            raise UserError(f"{files[kind]}: of other weights than {files['attack']}; run dvc repro")
    return found


def _measure(
    root: Path,
    kind: str,
    run: tuple[str, str, int],
    metrics: dict[str, Any],
    code: dict[str, str],
    notes: list[str],
) -> Iterator[Measurement]:
    """Count the verdicts behind each accuracy in the metrics of ``kind``; ``notes`` are the run's caveats."""
    if not metrics:
        return
    base = f"metrics/{kind}/{run[0]}/{run[1]}/{run[2]}"
    file, companion = f"{base}.json", f"{base}.verdicts.json"
    verdicts = read_json(root, companion)
    if verdicts is None:
        raise UserError(f"{companion}: missing beside {file}; run dvc repro")
    caveats = [*notes, *(f"AutoAttack warned: {warning}" for warning in metrics.get("warnings", ()))]
    caveats += metrics.get("data_notes", ())
    caveats += [f"{ELSEWHERE}: {metrics['origin']}"] if "origin" in metrics else []
    known = metrics | {kind: metrics.get("precision")}
    caveats += [text for (key, value), text in CAVEATS.items() if known.get(key) == value]
    trained = "" if "origin" in metrics else f"models/{run[0]}/{run[1]}/{run[2]}"
    versions = [code.get(output, "") for output in (trained, file)]
    for column, block, name, checkpoint, attack in _accuracies(kind, metrics):
        epsilon = attack.partition(" at ")[2].replace("-", "/") or radius(metrics["epsilon"])
        stated, evidence = metrics[block][name], verdicts[checkpoint][attack]
        correct = decode(evidence["robust"], evidence["n"])[: stated["n"]]
        counted = accuracy(correct)
        if counted != stated:
            text = f"{file}: {block}/{name} says {stated['accuracy']} % of {stated['n']}, but its verdicts "
            text += f"count {counted['accuracy']} % of {counted['n']}; restore both or run dvc repro -f"
            raise UserError(text)
        count = counted["robust"], counted["n"], epsilon, metrics["attack_seed"]
        files = file, f"/{block}/{name}/accuracy", companion
        average = (AVERAGE,) * (metrics.get("weights") == "average" and checkpoint == "best")
        judged = *files, (*caveats, *average), *versions, np.array(correct)
        yield Measurement._make((*run, kind, column, checkpoint, attack, *count, *judged))


def _accuracies(kind: str, metrics: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Column, block and name in the metrics, checkpoint and attack in the verdicts of each accuracy."""
    if kind == "autoattack":
        found = []
        for rank, name in enumerate(metrics["aa"]):
            size, at, radius = name.partition(" at ")
            column = f"aa@{radius}-{size}" if at else f"aa-{size}" if rank else "aa"
            found.append((column, "aa", name, "best", f"square{at}{radius}"))
        first = [(IN_AA, "best", "apgd-ce", "best", "apgd-ce")]
        return found + (first if "apgd-ce" in metrics["best"] else [])
    found = []
    for each, prefix in PREFIXES.items():
        found += [(prefix + name, each, name, each, name) for name in metrics.get(each, ())]
    return found
