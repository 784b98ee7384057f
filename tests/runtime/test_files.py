"""Nothing half-written is ever read, and nothing that was finished is lost."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dynat.errors import UserError
from dynat.runtime import files


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_halfway_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    files.write_atomically(path, b"old")
    with file_size_limit(1000), pytest.raises(UserError, match=r"metrics\.json: File too large"):
        files.write_atomically(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "can be written"), (errno.EACCES, "write permission")],
)
def test_a_full_or_closed_disk_is_one_line_with_the_path_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    def refuse(file: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError) as caught:
        files.write_atomically(tmp_path / "out.json", b"new")
    message = str(caught.value)
    assert str(tmp_path / "out.json") in message
    assert advice in message
    assert "\n" not in message
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".out.json.tmp").write_bytes(b"half")
    files.write_atomically(tmp_path / "out.json", b"whole")
    assert os.listdir(tmp_path) == ["out.json"]


def test_written_files_have_the_permissions_of_ordinary_ones(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "ours", b"")
    (tmp_path / "theirs").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_json_keeps_the_order_of_keys_and_ends_in_a_newline(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"z": 1, "a": {"ε": "8/255"}})
    assert (tmp_path / "a.json").read_text(
        encoding="utf-8"
    ) == '{\n "z": 1,\n "a": {\n  "ε": "8/255"\n }\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("-inf")])
def test_no_number_is_published_that_is_not_one(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"fine": 1})
    with pytest.raises(UserError, match=r"a\.json: not written, best\.1\.pgd20 is (nan|inf|-inf)"):
        files.write_json(path, {"best": [{"pgd20": 51.0}, {"pgd20": value}]})
    with pytest.raises(UserError, match=r"a\.csv: not written, 1\.loss is"):
        files.write_csv(tmp_path / "a.csv", [{"loss": 1.0}, {"loss": value}])
    assert json.loads(path.read_text()) == {"fine": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_csv_columns_come_in_order_of_appearance_and_numbers_to_the_last_bit(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "a.csv", [{"epoch": 0, "lr": 0.1}, {"epoch": 1, "lr": 1 / 3, "guide": 2.5}])
    assert (tmp_path / "a.csv").read_bytes() == b"epoch,lr,guide\n0,0.1,\n1,0.3333333333333333,2.5\n"


def test_a_digest_changes_with_every_part_and_not_with_their_order() -> None:
    parts = {"params": "a", "data": "b", "code": "c"}
    key = files.digest(parts)
    assert files.digest(dict(reversed(parts.items()))) == key
    others = [{**parts, name: "x"} for name in parts] + [
        {"params": "a"},
        {"params": "ab", "data": "", "code": "c"},
    ]
    assert len({key, *(files.digest(other) for other in others)}) == 6
