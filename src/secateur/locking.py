"""A lock on a directory that is being written, which its holder loses by ending, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # systems without it go without locks
    fcntl = None  # type: ignore[assignment]

TRIES = 20
PAUSE = 0.01  # seconds; whoever asks who holds a lock takes it for a moment
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems that have none answer


class LockedError(Exception):
    """Another process holds the lock; says which."""


@dataclass(eq=False)
class Lock:
    """A held lock: an open file in the directory that names its holder; no handle where there are no locks."""

    path: Path
    handle: int | None

    @classmethod
    def take(cls, directory: Path, name: str) -> Lock:
        """Lock a directory, which is made if it is not there, by a file in it.

        Raises
        ------
        LockedError: another process holds the lock.
        OSError: the directory cannot be written.
        """
        while True:
            directory.mkdir(exist_ok=True)
            try:
                lock = cls(directory / name, _take(directory / name))
            except FileNotFoundError:  # the directory has been published or removed since
                continue
            if lock.handle is None or lock._is_in_place():
                return lock
            lock.release()

    def release(self) -> None:
        """Give the lock back, and remove its file unless the directory has another name by now."""
        if self.handle is None:
            return
        if self._is_in_place():
            self.path.unlink(missing_ok=True)
        os.close(self.handle)
        self.handle = None

    def _is_in_place(self) -> bool:
        """Whether the file that is locked still has its name."""
        assert self.handle is not None
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self.handle), self.path.stat())
        return False


def holder_of(path: Path) -> str | None:
    """Who holds the lock of a file, in words; None where nobody does, or nobody can tell."""
    if fcntl is None:
        return None
    with contextlib.suppress(OSError), path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read() or "PID not known"
    return None


def _take(path: Path) -> int | None:
    """Lock a file and write into it who holds it; None where there are no locks."""
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _wait(handle)
        os.ftruncate(handle, 0)
        os.write(handle, f"PID {os.getpid()} on {platform.node()}".encode())
    except BlockingIOError:
        os.close(handle)
        raise LockedError(holder_of(path) or "PID not known") from None
    except OSError as error:
        os.close(handle)
        if error.errno not in WITHOUT_LOCKS:
            raise
        path.unlink(missing_ok=True)
        return None
    return handle


def _wait(handle: int) -> None:
    for _ in range(TRIES - 1):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(PAUSE)
    return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
