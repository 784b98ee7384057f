"""The repositories that the audit is tried on: a real, small pipeline, run and committed."""

from pathlib import Path

import pytest


@pytest.fixture
def finished(finished_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared one as the current folder, only to be read."""
    monkeypatch.chdir(finished_pipeline)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return finished_pipeline
