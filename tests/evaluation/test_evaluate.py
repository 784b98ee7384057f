"""An evaluation that cannot give its number is refused before the first attack; its files fit together."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dynat.config.attack import Attack, AutoAttack
from dynat.config.params import load
from dynat.data.sources import prepare
from dynat.errors import UserError
from dynat.evaluation import evaluate
from dynat.evaluation.chunks import Chunks
from dynat.evaluation.evaluate import Evaluation, TrainedNetworks, run_evaluation, write_evaluation
from dynat.evaluation.evidence import Evidence
from dynat.evaluation.verdicts import accuracy, decode
from dynat.networks.weights import load_weights
from dynat.runtime import machine
from dynat.runtime.record import RunRecord
from dynat.runtime.stage import Run

PARAMS = load(Path(__file__).parents[2] / "params.yaml")


def never(networks: TrainedNetworks, spec: Attack | AutoAttack, chunks: Chunks) -> Evaluation:
    raise AssertionError("attacked all the same")


@pytest.mark.parametrize("kind", ["attack", "autoattack"])
def test_more_samples_than_test_images_are_refused_by_their_key(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an image folder, whose size params.yaml does not tell."""
    study = PARAMS.study["digits"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "device_of", lambda *_: torch.device("cpu"))
    prepare(study.data, Path("data/digits.safetensors"), "study.digits.data")
    more = {"attack": 401, "autoattack": [200, 401]}[kind]
    spec = getattr(study, kind).model_copy(update={"n": more})
    larger = study.model_copy(update={kind: spec})
    run = Run("digits", "pgd_at", 0, PARAMS.model_copy(update={"study": {"digits": larger}}))
    with pytest.raises(UserError, match=rf"^study\.digits\.{kind}\.n: 401 is more than the 400 test images"):
        run_evaluation(run, kind, spec, RunRecord(kind, run), never)


@pytest.mark.parametrize("kind", ["attack", "autoattack"])
def test_an_attack_that_gets_no_memory_names_the_batch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(networks: TrainedNetworks, spec: Attack | AutoAttack, chunks: Chunks) -> Evaluation:
        torch.empty(2**50)
        raise AssertionError("had the memory")

    monkeypatch.chdir(tmp_path)
    for name in ("data", "target.safetensors"):
        (tmp_path / name).write_bytes(b"")
    networks = SimpleNamespace(data=tmp_path / "data", folder=tmp_path)
    monkeypatch.setattr(evaluate, "trained_networks", lambda *_: networks)
    monkeypatch.setattr(machine, "device_of", lambda *_: torch.device("cpu"))
    run = Run("digits", "pgd_at", 0, PARAMS)
    line = rf"^study\.digits\.{kind}\.batch: out of memory, tried to allocate 4503599627370496 bytes; choose"
    with pytest.raises(UserError, match=line):
        run_evaluation(run, kind, getattr(run.study, kind), RunRecord(kind, run), hungry)


def test_metrics_verdicts_and_witness_hold_the_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    robust, image = torch.tensor([True, False, False]), torch.rand(1, 1, 2, 2)
    evidence = {
        "clean": Evidence(torch.tensor([True, True, False]), torch.zeros(0).long(), image[:0]),
        "square": Evidence(robust, torch.tensor([1]), image),
    }
    check = {"passed": False, "values": {}}
    union = {"n2": accuracy([True, False])}
    found = Evaluation(
        {"best": evidence}, {"warnings": ["masked?"]}, union, sanity={"checks": {"one": check}}
    )
    assert found.warnings == ["masked?", "FAILED one"]
    run = Run("digits", "pgd_at", 0, PARAMS)
    assert write_evaluation(run, "autoattack", {"epsilon": 0.1}, found) == {"n2": 50.0}
    base = tmp_path / "metrics/autoattack/digits/pgd_at"
    metrics = json.loads((base / "0.json").read_text())
    assert (metrics["epsilon"], metrics["aa"], metrics["best"]["clean"]["robust"]) == (0.1, union, 2)
    verdicts = json.loads((base / "0.verdicts.json").read_text())["best"]["square"]
    assert decode(verdicts["robust"], verdicts["n"]) == robust.tolist()
    witness, _ = load_weights(base / "0.witness.safetensors")
    assert set(witness) == {"best/square/indices", "best/square/images"}
    assert torch.equal(witness["best/square/images"], image)
    sanity = json.loads((tmp_path / "metrics/sanity/digits/pgd_at/0.json").read_text())
    assert sanity == {"epsilon": 0.1, "checks": {"one": check}}
    only = write_evaluation(run, "attack", {}, Evaluation({"best": evidence}, {}))
    assert only == {"clean": 66.6667, "square": 33.3333}
