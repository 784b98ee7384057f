"""A publication of the run `digits/dynat/0` of the finished pipeline."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dynat.publish.__main__ import publish

RUN = "digits/dynat/0"


@pytest.fixture
def published(repository: Path, tmp_path: Path) -> Callable[..., Path]:
    """Publishes in a format, and returns the folder."""

    def run(form: str, *options: str) -> Path:
        folder = tmp_path / "out" / form
        publish([RUN, "--as", form, str(folder), *options])
        return folder

    return run
