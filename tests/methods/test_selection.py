"""What params.yaml and the machine tell is told before any output is touched, in one line, by its key."""

import copy
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from pyautoattack import AutoAttack as Package

from dynat.config.params import Params, Study, parse
from dynat.data.sources import prepare
from dynat.errors import UserError
from dynat.evaluation import autoattack, whitebox
from dynat.evaluation.chunks import Chunks
from dynat.methods.selection import refuse_setting
from dynat.methods.setup import set_up
from dynat.methods.training import Training
from dynat.runtime import machine
from dynat.runtime.stage import Run, run_of_arguments
from stages import check

TREE = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
TREE["study"] = {"digits": TREE["study"]["digits"]}
TREE["study"]["digits"]["machine"] = {"device": "cpu"}
TREE["study"]["digits"]["autoattack"]["runs"] = [{"epsilon": 0.06, "n": [5, 30]}]
for recipe in TREE["recipes"].values():
    recipe.pop("per_study", None)


def edited(edits: dict[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    for key, value in edits.items():
        *heads, last = key.split(".")
        section = tree
        for head in heads:
            if not isinstance(section.get(head), dict):
                section[head] = {}
            section = section[head]
        section[last] = value
    return tree


def refusal(edits: dict[str, Any]) -> str | None:
    """The line with which the whole of these parameters is refused, if it is."""
    try:
        params = parse(edited(edits))
        for setting in params.settings:
            refuse_setting(params, setting)
    except UserError as error:
        return str(error).removeprefix("params.yaml: ")
    return None


def of(**study: Any) -> dict[str, Any]:
    return {f"study.digits.{key.replace('__', '.')}": value for key, value in study.items()}


CIFAR = {"source": "cifar10", "archive": "c.tar.gz", "md5": "0" * 32, "classes": 10}


@pytest.mark.parametrize(
    ("edits", "line"),
    [
        (of(train__batch=2000), "study.digits.train.batch: 2000 is larger than the 1297 training images"),
        (of(train__pad=8), "study.digits.train.pad: 8 must be below 8"),
        (of(train__batch=16, target__depth=4), "study.digits.target: .* more than one value per channel"),
        (of(target__depth=30), "study.digits.target: .*overflow"),
        (of(guide__width=100_000), "study.digits.guide: needs \\d+ GiB"),
        (of(target={"name": "wrn", "depth": 12}), "study.digits.target: depth is 12"),
        (of(target={"name": "resnet", "blocks": [1], "strides": [1, 2]}), "study.digits.target: blocks"),
        (of(train__mean=[0.5]), "study.digits.train.std: give mean and std together"),
        (of(train__mean=[0.5] * 3, train__std=[1] * 3), "study.digits.train.mean: must have 1 numbers"),
        (of(data__validation=5), "study.digits.data.validation: 5 of 1397"),
        (of(data__classes=9), "study.digits.data.classes: 9, but digits has 10"),
        (of(data__train=1398), "study.digits.data.train: 1398 is more than the 1397"),
        (of(attack__n=401), "study.digits.attack.n: 401 is more than the 400"),
        (of(autoattack__n=[401]), "study.digits.autoattack.n: 401 is more than the 400"),
        (of(machine__device="cuda"), "study.digits.machine.device: cuda, but there is no CUDA device"),
        (of(data=CIFAR, autoattack__n=[10_001]), "study.digits.autoattack.n: 10001 is more than the 10000"),
        (of(data=CIFAR | {"validation": 9}), "study.digits.data.validation: 9 of 50000"),
        (of(data=CIFAR | {"mirrors": ["ftp://x"]}), "study.digits.data.mirrors: "),
        (
            {"distilled": ["rslad"], "guides": ["trades"], "variants": [], **of(guide__width=100_000)},
            "study.digits.guide: needs \\d+ GiB",
        ),
        ({"launch": "torchrun --nproc-per-node=18"}, "study.digits.train.batch: .* last batch has 17 images"),
        ({"launch": "torchrun --nproc-per-node=0"}, "launch: --nproc-per-node=0 must be a number of proc"),
        ({"launch": "torchrun --nproc-per-node -1"}, "launch: --nproc-per-node -1 must be a number"),
        ({"launch": "torchrun --nproc-per-node=two"}, "launch: --nproc-per-node=two must be a number"),
        (of(autoattack__runs=[{"epsilon": 0.5, "n": [9, 401]}]), "study.digits.autoattack.runs.0.n: 401 is"),
        (
            of(autoattack__runs=[{"epsilon": 0.03, "n": [9]}, {"epsilon": 0.0300000001, "n": [7]}]),
            "study.digits.autoattack.runs: 0.03 and 0.0300000001 are both printed as 0.03; leave one out",
        ),
        (
            of(autoattack__runs=[{"epsilon": 0.1200000001, "n": [9]}]),
            "study.digits.autoattack.runs: 0.12 and",
        ),
        ({"recipes.dynat.inner.steps": 10**9}, "recipes.dynat.inner.steps: .*less than or equal to 1000"),
        (of(train__steps=1001), "study.digits.train.steps: .*less than or equal to 1000"),
        ({"recipes.dynat.batch_norm.guide": 10**9}, "recipes.dynat.batch_norm.guide: .*equal to 1000"),
        ({"launch": "torchrun --nproc_per_node=gpu"}, "launch: --nproc_per_node=gpu, but there is no CUDA"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused_by_its_key(
    edits: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = refusal(edits) or "nothing refused"
    assert re.match(line, found), found
    assert "\n" not in found
    assert len(found) < 300


def test_networks_that_fit_alone_and_not_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_of", lambda _: 2**30)
    assert refusal(of(target__width=2000)) is None
    assert refusal(of(guide__width=2000)) is None
    both = refusal(of(target__width=2000, guide__width=2000)) or "nothing refused"
    assert both.startswith("study.digits.guide: needs 2 GiB for weights, gradients and momentum so far")


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("rslad", "method 'rslad': with a frozen guide, and only then, .*as rslad-trades"),
        ("trades-pgd_at", "method 'trades-pgd_at': with a frozen guide, and only then"),
        ("rslad-trade", "method 'guide-trade' is not in params.yaml's recipes"),
        ("guide-trade", "method 'guide-trade' is not in params.yaml's recipes"),
        ("rslad-trades", None),
        ("guide-trades", None),
    ],
)
def test_a_method_is_named_after_its_guide_if_and_only_if_that_is_frozen(
    method: str, line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "digits", method, "0"])
    if line is None:
        assert run_of_arguments("").method == method
    else:
        with pytest.raises(UserError, match=line):
            run_of_arguments("")


def test_an_image_folder_without_its_hash_is_refused_whether_or_not_it_is_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(tmp_path))
    own = {"source": "image_folder", "archive": "mine", "classes": 10}
    assert (refusal(of(data=own)) or "").startswith("study.digits.data.sha256: needed")
    assert refusal(of(data=own | {"sha256": "0" * 64})) is None
    (tmp_path / "mine").write_bytes(b"other images")
    assert (refusal(of(data=own | {"sha256": "0" * 64})) or "").startswith("study.digits.data.archive: ")


@pytest.mark.parametrize(
    ("launch", "why"), [("pyton", "not a program"), ('python "x', "No closing quotation")]
)
def test_what_the_shell_could_not_launch_is_refused_before_anything_is_written(
    launch: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params.yaml").write_text(json.dumps(edited({"launch": launch})))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^params.yaml: launch: .*{why}"):
        check.stage()
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


# ---------------------------------------------------------------------------------------- drawn edits


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        found.append((f"{prefix}{key}", value))
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return found


KEYS = [(key, value) for key, value in leaves(TREE) if not key.startswith("recipes") or ".pgd_at." in key]
VALUES = (None, True, 0, 1, 2, 3, 7, 8, 16, 33, 401, -1, 0.5, 1e9, 1e40, "x", "1/0", "8/255", [], [1], [2, 2])
OF_NETWORKS = [{"name": name} for name in ("resnet", "preact_resnet", "wrn", "cnn", "vit")]


def drawn(chance: random.Random) -> dict[str, Any]:
    """One to three edits: of known keys mostly, to values of any type."""
    edits = {}
    for _ in range(chance.randint(1, 3)):
        key, value = chance.choice(KEYS)
        if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.5:
            value = chance.randint(0, 3 * value + 3)
        elif key.endswith(("target", "guide")) and isinstance(value, dict):
            value = chance.choice(OF_NETWORKS) | chance.choice(
                [{}, {"depth": 10}, {"width": 4}, {"widen": 1}]
            )
        else:
            value = chance.choice(VALUES)
        edits[key + chance.choice(["", "", "", "", "", "", "x"])] = value
    return edits


def names_a_key(line: str, edits: dict[str, Any]) -> bool:
    """Whether the line begins with a key that was typed, that is there, or that its section may have."""
    key = re.split(r"[ :=]", line, maxsplit=1)[0]
    known = {"", *(key for key, _ in leaves(edited(edits)))}
    return "\n" not in line and (key in known or key.rpartition(".")[0] in known)


@pytest.mark.slow
def test_of_thousands_of_drawn_edits_each_is_refused_by_a_key_or_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(autoattack, "Package", Short)
    chance, started, refused, evaluated = random.Random(0), 0, 0, 0
    for _ in range(2000):
        edits = drawn(chance)
        try:
            params = parse(edited(edits))
        except UserError as error:
            line = str(error).removeprefix("params.yaml: ")
            refused += 1
            assert names_a_key(line, edits), (line, edits)
            continue
        if params.settings != ["digits"] or chance.random() > 0.25:
            continue
        if line := refusal(edits):
            assert names_a_key(line, edits), (line, edits)
            refused += 1
            continue
        study = params.study["digits"]
        small = sum(spec.model_dump().get("width") or 16 for spec in (study.target, study.guide)) < 100
        shallow = all(
            (spec.depth or 1) <= 4 for spec in (study.target, study.guide)
        )  # each doubles the width
        if small and shallow and study.target.name == study.guide.name == "cnn":
            training = first_step(params)
            started += 1
            if any("attack." in key for key in edits):
                first_evaluations(params.study["digits"], training)
                evaluated += 1
    assert started > 40
    assert evaluated > 5
    assert refused > 500


class Short(Package):
    """AutoAttack with next to no steps and queries."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 2
        self.square.n_queries = 3


def first_step(params: Params) -> Training:
    """Data, networks and one step of the first method, as the stages make them."""
    prepare(params.study["digits"].data, Path("data/digits.safetensors"), "study.digits.data")
    run = Run("digits", (*params.baselines, *params.variants)[0], params.seeds[0], params)
    training, _, _ = set_up(run)
    training.engine.set_epoch(0)
    *_, last = training.batches(0)
    assert torch.isfinite(training.engine.step(last).target_loss) or params.recipe("digits", run.method)
    return training


def first_evaluations(study: Study, training: Training) -> None:
    """Both evaluations of a few images."""
    target = training.networks["target"].eval().requires_grad_(False)
    images, labels = training.data.test_images[:4], training.data.test_labels[:4]
    few = {"pgd": [min(each, 3) for each in study.attack.pgd], "cw_steps": 2, "apgd_steps": 3}
    found = whitebox.evaluate(target, images, labels, study.attack.model_copy(update=few), whitebox.ATTACKS)
    assert len(found["apgd-ce"].robust) == 4
    networks: Any = SimpleNamespace(images=images, labels=labels, load=lambda name: (target, 0))
    spec = study.autoattack.model_copy(update={"workers": 1})
    union = autoattack.evaluate_selected(networks, spec, Chunks()).union
    assert len(union) == sum(len(asked.n) for asked in spec.by_radius.values())
