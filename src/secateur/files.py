"""Output directories that are either whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from secateur.errors import ClusterError, OutputError, SecateurError, StoreError
from secateur.locking import Lock, LockedError, holder_of

PARTIAL_SUFFIX = ".partial"
# In the directory of a run that is under way: what it is and how far, and every mask that it has measured.
STATE = "partial.json"
MEASURED = "measured.sqlite"
LEFT_BEHIND = (
    "files, and no run that can be carried on from them: move it away, name another directory, or add --overwrite to "
    "remove them."
)
TEMPORARY = ".secateur-"  # how the name begins of what is not whole yet or on its way out; a kill may leave some
LOCK = f"{TEMPORARY}lock"


@dataclass(frozen=True)
class OutputDirectory:
    """A directory that appears under its name only when everything is in it.

    Until then the files lie in ``NAME.partial`` beside it. After Ctrl-C or a kill that directory
    stays, readable; after an error it is removed, unless it holds what a run has measured, or all that failed was
    giving it its name. What lies there from before is removed only where ``overwrite`` says so. From :meth:`open` to
    :meth:`close` no other process may write it.
    """

    target: Path
    staging: Path
    overwrite: bool
    lock: Lock

    @classmethod
    def open(
        cls, target: str | Path, overwrite: bool = False, needed_bytes: int = 0, *, carry_on: bool = False
    ) -> OutputDirectory:
        """Check at the door that the directory may and can be written.

        Parameters
        ----------
        carry_on: keep what an interrupted run left in ``NAME.partial``.

        Raises
        ------
        OutputError: it exists, or files lie in ``NAME.partial`` that are not carried on, and ``overwrite`` is off;
            another process is writing it; it cannot be written, or the disk is too full.
        """
        target = check_target(target, overwrite)
        staging = _beside(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            opened = cls(target, staging, overwrite, Lock.take(staging, LOCK))
        except LockedError as error:
            raise OutputError(_written_by(target, error)) from None
        except OSError as error:
            raise OutputError(f"'{target}' cannot be written: {error.strerror or error}.") from error
        try:
            opened._settle_kills()
            _check_place(target, overwrite)  # another process may have published it until the lock was taken
            if not carry_on:
                opened.start_afresh(LEFT_BEHIND)
            free = shutil.disk_usage(staging).free
            if free < needed_bytes:
                raise OutputError(
                    f"The disk of '{target}' has {free / 1e9:.1f} GB free, but about "
                    f"{needed_bytes / 1e9:.1f} GB are needed."
                )
        except BaseException:
            opened.close()
            raise
        return opened

    def close(self) -> None:
        """Let other processes write the directory; what is in ``NAME.partial`` stays, if anything is."""
        self.lock.release()
        with contextlib.suppress(OSError):
            self.staging.rmdir()

    def write_json(self, name: str, content: Any) -> None:
        """Write one JSON file, atomically."""
        write_text(self.staging / name, to_json(content))

    def read_json(self, name: str) -> Any:
        """What an interrupted run left under this name; None where there is nothing that can be read."""
        try:
            return json.loads((self.staging / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def publish(self) -> None:
        """Give the directory its name, in place of an older one where that is allowed.

        Raises
        ------
        OutputError: the name cannot be given; the files stay in ``NAME.partial``.
        """
        where = f"the results are in '{self.staging}'"
        try:
            if not self.target.exists():
                self.staging.rename(self.target)
            elif self.overwrite:
                self._replace()
            else:
                raise OutputError(f"'{self.target}' has appeared meanwhile and is not replaced; {where}.")
        except OSError as error:
            raise OutputError(f"'{self.target}' cannot be written: {error.strerror or error}; {where}.") from error
        with contextlib.suppress(OSError):  # what stays is the next run's to remove
            (self.target / LOCK).unlink(missing_ok=True)
            self._remove_older()

    def _replace(self) -> None:
        """Put the new directory in the place of the older one, which comes back if that fails.

        A kill leaves the older one whole under one of two names; :meth:`_settle_kills` puts that right.
        """
        self.target.rename(self._older)
        try:
            self.staging.rename(self.target)
        except OSError:
            self._older.rename(self.target)
            raise

    @property
    def _older(self) -> Path:
        """Where the older directory is until the new one is in its place."""
        return self.target.with_name(f"{TEMPORARY}old-{self.target.name}")

    def _remove_older(self) -> None:
        """Remove the older directory, under a name by which half of it is not taken for the whole."""
        going = self.target.with_name(f"{TEMPORARY}going-{self.target.name}")
        shutil.rmtree(going, ignore_errors=True)
        if self._older.exists():
            self._older.rename(going)
            shutil.rmtree(going, ignore_errors=True)

    def _settle_kills(self) -> None:
        """Put right what kills left: files that are not whole, and an older directory on its way out.

        Raises
        ------
        OutputError: that cannot be done.
        """
        try:
            for left in self.staging.rglob(f"{TEMPORARY}*"):
                if left.name != LOCK:
                    left.unlink()
            if self._older.exists() and not self.target.exists():
                self._older.rename(self.target)
            self._remove_older()
        except OSError as error:
            raise OutputError(f"'{self.target}' cannot be written: {error.strerror or error}.") from error

    def start_afresh(self, refusal: str) -> None:
        """Remove what lies in the staging directory from before, where that is allowed or nobody can miss it.

        Raises
        ------
        OutputError: there are files, and ``overwrite`` is off; says that the directory holds what ``refusal`` says.
            Or they cannot be removed.
        """
        try:
            left = [entry for entry in self.staging.iterdir() if entry.name != LOCK]
            if left and not self.overwrite:
                raise OutputError(f"'{self.staging}' holds {refusal}")
            for entry in left:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        except OSError as error:
            raise OutputError(f"'{self.staging}' cannot be emptied: {error.strerror or error}.") from error

    def discard(self) -> None:
        """Remove what was written, and close."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.close()


def check_target(target: str | Path, overwrite: bool) -> Path:
    """The absolute path of an output directory that may be written.

    Raises
    ------
    OutputError: it exists and ``overwrite`` is off, is a file, holds the current directory, or another process is
        writing it.
    """
    target = Path(target).expanduser().resolve()
    _check_place(target, overwrite)
    holder = holder_of(_beside(target) / LOCK)
    if holder is not None:
        raise OutputError(_written_by(target, holder))
    return target


def staging_of(directory: Path) -> Path:
    """``NAME.partial`` of a run's directory, or of this itself; of a place without a name, such as the root, this."""
    directory = directory.expanduser().resolve()
    name = directory.name.removesuffix(PARTIAL_SUFFIX)
    return _beside(directory.with_name(name)) if name else directory


def _beside(target: Path) -> Path:
    return target.with_name(target.name + PARTIAL_SUFFIX)


def _written_by(target: Path, holder: object) -> str:
    return (
        f"'{target}' is being written by another process ({holder}); wait until it is done, or name another directory."
    )


def _check_place(target: Path, overwrite: bool) -> None:
    """Refuse a place that may not be written, whoever does.

    Raises
    ------
    OutputError: as of :func:`check_target`.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"'{target}' is a file, not a directory; name another one.")
    if target == Path.cwd() or target in Path.cwd().parents:
        raise OutputError(f"'{target}' holds the current directory and will not be replaced; name another one.")
    if target.exists() and not overwrite:
        raise OutputError(f"'{target}' exists; name another directory or add --overwrite.")


@contextlib.contextmanager
def writing(
    output: OutputDirectory | None, *, keep: bool = False, carry_on: bool = False
) -> Iterator[OutputDirectory | None]:
    """Publish on success, keep the partial state on Ctrl-C, remove it on any error unless ``keep`` is set; then close.

    Parameters
    ----------
    carry_on: also keep it where the run has measured masks, or on errors that are not the user's, such as too little
        memory: a run can be carried on.
    """
    with contextlib.nullcontext() if output is None else contextlib.closing(output):
        try:
            yield output
        except KeyboardInterrupt:
            raise
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk with its own error
            if output is None:
                raise
            if not keep and not carry_on:
                output.discard()
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"'{output.target}' cannot be written: {reason}.") from error
        except BaseException as error:
            users = isinstance(error, SecateurError) and not isinstance(error, ClusterError | StoreError)
            worth = carry_on and output is not None and (not users or has_measured(output.staging))
            if output is not None and not keep and not worth:
                output.discard()
            raise
        if output is not None:
            output.publish()


def has_measured(directory: Path) -> bool:
    """Whether the run in a directory has measured masks; yes, too, where nobody can tell, as of a locked store."""
    if not (directory / MEASURED).is_file():
        return False
    try:
        with contextlib.closing(sqlite3.connect(directory / MEASURED, timeout=1.0)) as connection:
            return connection.execute("SELECT 1 FROM measured LIMIT 1").fetchone() is not None
    except sqlite3.Error:
        return True


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: a reader sees the old content or the new, never a part, also after a power cut."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _settle(path.parent)


def _settle(directory: Path) -> None:
    """Have the names in a directory reach the disk, where the system allows that."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def to_json(content: Any) -> str:
    """JSON without NaN or infinity, which other readers refuse; numpy numbers become plain ones."""
    return json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
