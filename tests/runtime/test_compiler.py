"""torch.compile asks for a compiler; a machine without one is told before the training."""

import sysconfig
from pathlib import Path

import pytest
import torch

from dynat.errors import UserError
from dynat.runtime.machine import compiler


def test_without_the_compiler_of_the_device_a_compiled_training_is_refused_by_its_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("gcc", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\necho clang version 1\necho more\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    assert compiler("key", torch.device("cuda")) == "clang version 1"
    with pytest.raises(UserError, match=r"^some\.key: found no compiler g\+\+; .* set some\.key=eager$"):
        compiler("some.key", torch.device("cpu"))
    monkeypatch.setenv("CXX", "clang++ -O1")
    assert compiler("key", torch.device("cpu")) == "clang version 1"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"^some\.key: Python\.h is not here; .* set some\.key=eager$"):
        compiler("some.key", torch.device("cpu"))
