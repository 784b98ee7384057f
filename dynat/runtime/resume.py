"""The resume state of one stage.

Nothing is unpickled: state is read by ``torch.load(weights_only=True)`` after its SHA-256 has been checked.
"""

import hashlib
import io
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import torch
from filelock import FileLock, Timeout

from dynat.errors import UserError
from dynat.runtime import distributed
from dynat.runtime.files import atomic, explained, root, write_atomically

DIGEST_BYTES = hashlib.sha256().digest_size
LOCK_S = 1.0  # how long a lock is waited for: the workers of a process that was killed end a moment later


class ResumeStore:
    """Resume state of one stage in ``$DVC_ROOT/.dvc/tmp/dynat/<key>/``; ``key`` names all its bits need.

    In a ``with`` it belongs to one stage, to all processes of it; a second one is refused with the pid of the
    first. In a temporary workspace of DVC that gets a folder of its own, ``<key>-2``: two experiments of a
    queue may need the same stage. ``token`` is a random name that the folder keeps from the first start until
    :meth:`clear`, ``resumed`` counts the starts after it; both are known to the first process.
    """

    def __init__(self, key: str) -> None:
        self._key, self._number = key, 1
        self.token, self.resumed = uuid.uuid4().hex, 0

    @property
    def folder(self) -> Path:
        """Where the state is."""
        name = self._key if self._number == 1 else f"{self._key}-{self._number}"
        return root() / ".dvc" / "tmp" / "dynat" / name

    def __enter__(self) -> Self:
        if distributed.rank() == 0:
            while not self._hold():
                self._number += 1
            self._count_start()
        self._number = distributed.from_first(self._number)
        return self

    def __exit__(self, *error: object) -> None:
        if distributed.rank() == 0:
            self._lock.release()

    def __deepcopy__(self, memo: object) -> Self:
        return self  # of a network whose hooks refer to it

    def _hold(self) -> bool:
        """Lock the folder, which goes with the process, however it ends; False to look for another one."""
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / "lock")
            try:
                self._lock.acquire(LOCK_S)
            except Timeout as error:
                if Path.cwd().resolve() != root():
                    return False
                pid = (self.folder / "token").read_text().rpartition(" ")[2]
                message = f"this stage already runs as process {pid}; wait for it or stop it ({self.folder})"
                raise UserError(message) from error
        return True

    def _count_start(self) -> None:
        path = self.folder / "token"
        if path.exists():
            try:
                self.token, resumed, _ = path.read_text().split()
                self.resumed = int(resumed) + 1
            except ValueError:
                print(f"{path}: damaged; the MLflow run and the count of resumes begin anew", file=sys.stderr)
        write_atomically(path, f"{self.token} {self.resumed} {os.getpid()}".encode())

    @property
    def last_good(self) -> str:
        """Where the work can go on from, for the end of an error message."""
        saved = any(self.folder.glob("*.pt"))
        return f"the last good state is in {self.folder}" if saved else "no earlier state was saved"

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Keep under ``name`` tensors, numbers, strings, None, lists and dicts of them.

        Raises :class:`UserError`, which names the last good state, if it cannot be written.
        """
        content = io.BytesIO()
        torch.save(state, content)
        try:
            with atomic(self._file(name)) as file:
                file.write(hashlib.sha256(content.getbuffer()).digest())
                file.write(content.getbuffer())
        except UserError as error:
            raise UserError(f"{error}; {self.last_good}") from error

    def load(self, name: str) -> dict[str, Any] | None:
        """What is kept under ``name``, tensors on the CPU; None if nothing, or damaged (a line on stderr)."""
        path = self._file(name)
        if not path.exists():
            return None
        with explained(path):
            data = memoryview(path.read_bytes())
        written, content = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        try:
            if hashlib.sha256(content).digest() != written:
                raise ValueError("its SHA-256 does not fit")
            return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        except Exception as error:  # torch raises half a dozen types here
            print(f"{path}: damaged ({str(error).splitlines()[0]}); computed again", file=sys.stderr)
            return None

    def clear(self) -> None:
        """Remove everything, once the stage's outputs are in place."""
        shutil.rmtree(self.folder)

    def _file(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.pt"
