"""The resume state of one stage, and signals that ask it to leave.

Nothing is unpickled: state is read by ``torch.load(weights_only=True)`` after its SHA-256 has been checked.
"""

import hashlib
import io
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self
from urllib.parse import quote

from filelock import FileLock, Timeout

from dynat.errors import UserError
from dynat.runtime.files import atomic, digest, explained, write_atomically

DIGEST_BYTES = hashlib.sha256().digest_size
LOCK_S = 1.0  # how long a lock is waited for: the workers of a process that was killed end a moment later


def resume_key(parts: Mapping[str, str]) -> str:
    """The name of a stage's resume state: SHA-256 of all that its bits depend on."""
    return digest(dict(parts))


class AlreadyRunningError(UserError):
    """Another process holds the resume state."""


class ResumeStore:
    """Resume state of one stage in ``$DVC_ROOT/.dvc/tmp/dynat/<key>/``, for one process at a time.

    Use it in a ``with``; a second process is refused with the first one's pid. In a temporary workspace of
    DVC it gets a folder of its own, ``<key>-2``: two experiments of a queue may need the same stage.
    ``token`` is a random name that the folder keeps from the first start until :meth:`clear`, ``resumed``
    counts the starts after it. Helpers of the process that holds the store keep and read chunks without the
    ``with``.
    """

    def __init__(self, key: str) -> None:
        self._root = Path(os.environ.get("DVC_ROOT", "")).resolve()
        self.folder = self._root / ".dvc" / "tmp" / "dynat" / key
        self.token, self.resumed = "", 0

    def __enter__(self) -> Self:
        key, number = self.folder.name, 1
        while True:
            try:
                self._lock = _locked(self.folder)
                break
            except AlreadyRunningError:
                if Path.cwd().resolve() == self._root:
                    raise
            number += 1
            self.folder = self.folder.with_name(f"{key}-{number}")
        try:
            self._count_start()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: object) -> Self:
        return self  # of a network whose hooks refer to it

    def _count_start(self) -> None:
        path = self.folder / "token"
        self.token = uuid.uuid4().hex
        if path.exists():
            try:
                self.token, resumed, _ = path.read_text().split()
                self.resumed = int(resumed) + 1
            except ValueError:
                print(f"{path}: damaged; the MLflow run and the count of resumes begin anew", file=sys.stderr)
        write_atomically(path, f"{self.token} {self.resumed} {os.getpid()}".encode())

    @property
    def last_good(self) -> str:
        """Where a training can go on from, for the end of an error message."""
        path = self.folder / "state.pt"
        return f"the last good state is {path}" if path.exists() else "no earlier state was saved"

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state: tensors, numbers, strings, None, lists and dicts of them.

        Raises :class:`UserError`, which names the last good state, if it cannot be written.
        """
        try:
            _write(self.folder / "state.pt", state)
        except UserError as error:
            raise UserError(f"{error}; {self.last_good}") from error

    def load(self) -> dict[str, Any] | None:
        """The state, tensors on the CPU; None if there is none or it is damaged (a line on stderr)."""
        return _read(self.folder / "state.pt", "starting anew")

    def save_chunk(self, name: str, state: dict[str, Any]) -> None:
        """Keep a finished part of the work, such as one attack on some images, under ``name``."""
        try:
            _write(self._chunk(name), state)
        except UserError as error:
            raise UserError(f"{error}; the parts finished before are kept in {self.folder}") from error

    def load_chunk(self, name: str) -> dict[str, Any] | None:
        """The part kept under ``name``, or None if there is none or it is damaged (a line on stderr)."""
        return _read(self._chunk(name), "doing this part again")

    def clear(self) -> None:
        """Remove everything, once the stage's outputs are in place."""
        (self.folder / "state.pt").unlink(missing_ok=True)  # first: it goes at once, a folder in steps
        shutil.rmtree(self.folder)

    def _chunk(self, name: str) -> Path:
        return self.folder / f"chunk-{quote(name, safe='')}.pt"


class StopRequested:
    """Whether, and by which signal, the process has been asked to stop."""

    signal: int | None = None

    @property
    def requested(self) -> bool:
        """True from the first SIGTERM or SIGINT on."""
        return self.signal is not None


@contextmanager
def graceful_stop() -> Iterator[StopRequested]:
    """Let SIGTERM and SIGINT only set ``requested``; a SIGINT after that raises ``KeyboardInterrupt``."""
    stop = StopRequested()

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = signum

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _write(path: Path, state: dict[str, Any]) -> None:
    import torch

    content = io.BytesIO()
    torch.save(state, content)
    with atomic(path) as file:
        file.write(hashlib.sha256(content.getbuffer()).digest())
        file.write(content.getbuffer())


def _read(path: Path, remedy: str) -> dict[str, Any] | None:
    import torch

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
        print(f"{path}: damaged ({str(error).splitlines()[0]}); {remedy}", file=sys.stderr)
        return None


def _locked(folder: Path) -> FileLock:
    """Make ``folder`` and hold it locked; the lock goes with the process, however it ends."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        try:
            lock.acquire(LOCK_S)
        except Timeout as error:
            token = folder / "token"
            pid = token.read_text().split()[-1] if token.exists() else "unknown"
            message = f"this stage already runs as process {pid}; wait for it or stop it ({folder})"
            raise AlreadyRunningError(message) from error
    return lock
