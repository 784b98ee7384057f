"""The resume state of one stage, and signals that ask it to leave.

Nothing is unpickled: state is read by ``torch.load(weights_only=True)`` after its SHA-256 has been checked.
"""

import errno
import fcntl
import hashlib
import io
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self
from urllib.parse import quote

from dynat.errors import UserError
from dynat.runtime.files import ADVICE, atomic, digest, explained, write_atomically

DIGEST_BYTES = hashlib.sha256().digest_size
SPACE_FACTOR = 3  # two generations and the one being written


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
    counts the starts after it. Helpers of the process that holds the store keep and read pieces without the
    ``with``.
    """

    def __init__(self, key: str) -> None:
        self._root = Path(os.environ.get("DVC_ROOT", "")).resolve()
        self.folder = self._root / ".dvc" / "tmp" / "dynat" / key
        self.token, self.resumed = "", 0
        self._lock = -1
        self._good: Path | None = None  # the newest generation known to be sound

    def __enter__(self) -> Self:
        self._lock = self._take_lock()
        try:
            self._count_start()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._lock)

    def _take_lock(self) -> int:
        key, number = self.folder.name, 1
        while True:
            try:
                with explained(self.folder):
                    return _lock(self.folder / "lock")
            except AlreadyRunningError:
                if Path.cwd().resolve() == self._root:
                    raise
            number += 1
            self.folder = self.folder.with_name(f"{key}-{number}")

    def _count_start(self) -> None:
        path = self.folder / "token"
        self.token = uuid.uuid4().hex
        if path.exists():
            try:
                name, resumed = path.read_text().split()
                self.token, self.resumed = name, int(resumed) + 1
            except ValueError:
                print(f"{path}: damaged; the MLflow run and the count of resumes begin anew", file=sys.stderr)
        write_atomically(path, f"{self.token} {self.resumed}".encode())

    @property
    def last_good(self) -> str:
        """Where a training can go on from, for the end of an error message."""
        return f"the last good state is {self._good}" if self._good else "no earlier state was saved"

    def save(self, state: dict[str, Any]) -> None:
        """Add a generation: tensors, numbers, strings, None, lists and dicts of them.

        The generation before stays, older ones go once the new one has been read back. Raises
        :class:`UserError`, which names the last good state, when there is no room for three of it.
        """
        numbers = [int(old.stem.removeprefix("state-")) for old in self._generations()]
        path = self.folder / f"state-{max(numbers, default=0) + 1:08d}.pt"
        last = self.last_good
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)  # whatever cleaned up around us
            need, free = SPACE_FACTOR * _size(state), shutil.disk_usage(self.folder).free
        if free < need:
            room = f"{free >> 20} MiB are free, {need >> 20} MiB needed"
            raise UserError(f"{path}: {room}; {ADVICE[errno.ENOSPC]}; {last}")
        try:
            _write_state(path, state)
            _read_state(path)
        except UserError as error:
            raise UserError(f"{error}; {last}") from error
        except DamagedError as error:
            path.unlink()
            raise UserError(f"{path}: cannot be read back ({error}); check that disk; {last}") from error
        if self._good is not None:
            for old in self._generations():
                if old not in (path, self._good):
                    old.unlink()
        self._good = path

    def load(self) -> dict[str, Any] | None:
        """The newest sound generation, tensors on the CPU, or None; each damaged one is a line on stderr."""
        for path in self._generations():
            try:
                state = _read_state(path)
            except DamagedError as error:
                print(f"{path}: damaged ({error}); going back one generation", file=sys.stderr)
            else:
                self._good = path
                return state
        return None

    def save_piece(self, name: str, state: dict[str, Any]) -> None:
        """Keep a finished part of the work, such as one attack on one chunk, under ``name``."""
        try:
            _write_state(self._piece(name), state)
        except UserError as error:
            raise UserError(f"{error}; the parts finished before are kept in {self.folder}") from error

    def load_piece(self, name: str) -> dict[str, Any] | None:
        """The part kept under ``name``, or None if there is none or it is damaged (a line on stderr)."""
        path = self._piece(name)
        try:
            return _read_state(path) if path.exists() else None
        except DamagedError as error:
            print(f"{path}: damaged ({error}); doing this part again", file=sys.stderr)
            return None

    def clear(self) -> None:
        """Remove everything, once the stage's outputs are in place."""
        for path in sorted(self.folder.iterdir()):  # the newest generation after the older ones
            if path.name != "lock":
                path.unlink()
        (self.folder / "lock").unlink()
        with suppress(OSError):  # the next process may have moved in
            self.folder.rmdir()

    def _generations(self) -> list[Path]:
        return sorted(self.folder.glob(f"state-{8 * '[0-9]'}.pt"), reverse=True)

    def _piece(self, name: str) -> Path:
        return self.folder / f"piece-{quote(name, safe='')}.pt"


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


class DamagedError(Exception):
    """A resume file is not what was written."""


def _write_state(path: Path, state: dict[str, Any]) -> None:
    import torch

    with atomic(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a write that failed, when it closes its archive
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.seek(0)
        file.write(hashlib.file_digest(file, "sha256").digest())  # behind the content, which it has just read


def _read_state(path: Path) -> dict[str, Any]:
    import torch

    with explained(path):
        data = memoryview(path.read_bytes())
    content, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise DamagedError("its SHA-256 does not fit")
    try:
        return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises half a dozen types here
        raise DamagedError(str(error).splitlines()[0]) from error


def _lock(path: Path) -> int:
    """Open ``path`` and hold it locked; the lock goes with the process, however it ends."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process cleared the folder just now
            continue
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked workers would hold it too
            if os.path.exists(path) and os.path.samestat(os.fstat(lock), os.stat(path)):
                os.ftruncate(lock, 0)
                os.write(lock, str(os.getpid()).encode())
                return lock
        except BlockingIOError as error:
            pid = os.read(lock, 20).decode() or "unknown"
            os.close(lock)
            message = f"this stage already runs as process {pid}; wait for it or stop it ({path})"
            raise AlreadyRunningError(message) from error
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _size(value: Any) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_size, nested)) + int(getattr(value, "nbytes", 0))
