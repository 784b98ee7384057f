"""Fixtures of several rooms. One thread per process: the networks of the tests are small, and the threads
of several tests would collide.
"""

import os
import re
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pipelines
import pytest
from stage_server import stand_in
from stages_under_fire import serving

MOST_PROCESSES = 8  # each imports torch


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All tests run on all cores, one or a few in this process; ``-n`` says otherwise."""
    cores = len(os.sched_getaffinity(0))
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    chosen = getattr(config.option, "numprocesses", 0) is not None  # without pytest-xdist there is no choice
    if whole and cores > 1 and not chosen and "PYTEST_XDIST_WORKER" not in os.environ:
        config.option.numprocesses, config.option.dist = min(cores, MOST_PROCESSES), "worksteal"


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


@pytest.fixture
def repository(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That repository as the current folder, its MLflow store the default one."""
    monkeypatch.chdir(pipeline)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return pipeline


@pytest.fixture(scope="session")
def stage_server() -> Iterator[str]:
    """The socket of a server that forks stages, one for each process of the tests."""
    with TemporaryDirectory() as folder, serving(f"{folder}/socket") as socket:  # its name must be short
        yield socket


@pytest.fixture(scope="session")
def quick_path(stage_server: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH whose ``python`` has stages forked, for ``pipelines.dvc(..., PATH=quick_path)``."""
    folder = tmp_path_factory.mktemp("bin")
    stand_in(folder, stage_server)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


# ------------------------------------------------------------------------------------------------- skips


MAY_SKIP = (  # why a test may be left out on some machine; any other reason fails it where CI is set
    "no CUDA device",
    "needs ../shared",
    "the transcription of the paper is not beside this repository",
    r"torch.compile needs g\+\+ and Python.s headers, which are not here",
    "no Chromium",
    r"no Python \d\.\d+ on this machine",
    "only root can mount a small disk",
    "this machine lets nobody mount a small disk",
    "needs namespaces, which this machine does not let us make",
)


def refused(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip for a reason that is not listed into a failure."""
    if not report.skipped or hasattr(report, "wasxfail") or "CI" not in os.environ:
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(re.search(each, reason) for each in MAY_SKIP):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: {reason}; no reason of MAY_SKIP in tests/conftest.py"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    refused(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    refused(report)
    return report
