"""A workspace with a small study, in which the tests of stages start, stop and kill them."""

import shutil
from pathlib import Path

import pytest
from stages_under_fire import Workspace, hashes, write_params


@pytest.fixture(scope="session")
def prepared(stage_server: str, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The workspace of this process of the tests, with prepared data."""
    found = Workspace(tmp_path_factory.mktemp("fire"), stage_server)
    write_params(found.folder)
    assert found.run("prepare", "mini") == 0, found.said()
    return found


@pytest.fixture(scope="session")
def pgd_at(prepared: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed training of pgd_at writes."""
    write_params(prepared.folder)
    assert prepared.run("train", "mini", "pgd_at", "0") == 0, prepared.said()
    return Path(shutil.move(prepared.folder / "models/mini/pgd_at/0", tmp_path_factory.mktemp("model")))


@pytest.fixture
def trained_files(pgd_at: Path) -> dict[str, str]:
    """The hashes of that."""
    return hashes(pgd_at)


@pytest.fixture
def stages(prepared: Workspace) -> Workspace:
    """That workspace with its parameters as they were, without results and resume state."""
    write_params(prepared.folder)
    for name in ("models", "metrics"):
        shutil.rmtree(prepared.folder / name, ignore_errors=True)
    for state in (prepared.folder / ".dvc/tmp/dynat").glob("?" * 64):
        shutil.rmtree(state)
    return prepared


@pytest.fixture
def trained(stages: Workspace, pgd_at: Path) -> Workspace:
    """That workspace with a trained network."""
    shutil.copytree(pgd_at, stages.folder / "models/mini/pgd_at/0")
    return stages
