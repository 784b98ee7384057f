"""Fixtures of several rooms. One thread per process: the networks of the tests are small, and the threads
of several tests would collide.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pipelines
import pytest
from stages_under_fire import Server, server, write_params


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests that all its processes see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def finished_pipeline(shared: Path) -> Path:
    """A repository with a finished pipeline, to be read and not changed; see ``pipelines.finished``."""
    return pipelines.finished(shared)


@pytest.fixture
def pipeline(finished_pipeline: Path, tmp_path: Path) -> Path:
    """A repository of its own with the finished pipeline."""
    return pipelines.duplicate(finished_pipeline, tmp_path / "repository")


@pytest.fixture(scope="session")
def stage_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A workspace with prepared data, in which stages start at once."""
    folder = tmp_path_factory.mktemp("fire")
    write_params(folder)
    with server(folder) as found:
        assert found.run("prepare", "mini") == 0, found.said()
        yield found


@pytest.fixture
def stages(stage_server: Server) -> Server:
    """That workspace with its parameters as they were, without results and resume state."""
    folder = stage_server.folder
    write_params(folder)
    for name in ("models", "metrics"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for state in (folder / ".dvc/tmp/dynat").glob("?" * 64):
        shutil.rmtree(state)
    return stage_server
