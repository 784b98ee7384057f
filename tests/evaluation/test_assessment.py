"""An evaluation that cannot give its number is refused before the first attack."""

from pathlib import Path

import pytest
import torch

from dynat.config.params import load
from dynat.data.sources import prepare
from dynat.errors import UserError
from dynat.evaluation.assessment import Model, Outcome, assess
from dynat.evaluation.pieces import Pieces
from dynat.runtime import machine as environment
from dynat.runtime.stage import Run, RunRecord

PARAMS = load(Path(__file__).parents[2] / "params.yaml")


def never(model: Model, pieces: Pieces) -> Outcome:
    raise AssertionError("attacked all the same")


@pytest.mark.parametrize("kind", ["attack", "autoattack"])
def test_more_samples_than_test_images_are_refused_by_their_key(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an image folder, whose size params.yaml does not tell."""
    study = PARAMS.study["digits"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "device_of", lambda machine: torch.device("cpu"))
    prepare(study.data, Path("data/digits.safetensors"), "study.digits.data")
    record = RunRecord(kind, Run("digits", "pgd_at", 0, PARAMS))
    more = {"attack": 401, "autoattack": [200, 401]}[kind]
    spec = getattr(study, kind).model_copy(update={"n": more})
    with pytest.raises(UserError, match=rf"^study\.digits\.{kind}\.n: 401 is more than the 400 test images"):
        assess(record, spec, study.machine, never)
