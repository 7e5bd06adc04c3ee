"""Every measured mask in one SQLite file, so that no measurement is made twice or lost."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from secateur.errors import StoreError, UnusableStoreError

SCHEMA = 1
WAIT_SECONDS = 30.0
REMEDY = "remove it, name another output directory, or add --overwrite to start afresh"
TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE measured (
    part TEXT NOT NULL, mask BLOB NOT NULL, name TEXT NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (part, mask, name)
) WITHOUT ROWID;
"""


@dataclass(eq=False)
class Store:
    """Measured figures by part of the data, mask and name, written at once; processes may share the file.

    Arrays are kept as they were measured, bit for bit, so that a run that carries on ends like one that
    was never interrupted. The file is in write-ahead mode: a kill loses at most what was not yet measured.

    Attributes
    ----------
    path: the SQLite file; made if it is not there.
    model: fingerprint of the model that it belongs to.

    Raises
    ------
    UnusableStoreError: the file belongs to another model or version, is no store or damaged. It is left as it was.
    StoreError: it is locked, or cannot be written.
    """

    path: Path
    model: str
    wait: float = WAIT_SECONDS
    _connection: sqlite3.Connection = field(init=False)

    def __post_init__(self) -> None:
        with self._explaining():
            self._connection = sqlite3.connect(self.path, timeout=self.wait, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def get(self, part: str, mask: bytes) -> dict[str, np.ndarray]:
        """What is known of a mask on a part of the data, by name; empty where nothing is."""
        with self._explaining():
            rows = self._connection.execute(
                "SELECT name, value FROM measured WHERE part = ? AND mask = ?", (part, mask)
            )
            return {name: _array(value) for name, value in rows}

    def put(self, part: str, mask: bytes, figures: dict[str, np.ndarray]) -> None:
        """Add figures of a mask in one step; of figures that are known already, the first stay."""
        rows = [(part, mask, name, _bytes(value)) for name, value in figures.items()]
        with self._explaining(), self._writing():
            self._connection.executemany("INSERT OR IGNORE INTO measured VALUES (?, ?, ?, ?)", rows)

    def __len__(self) -> int:
        """Masks measured, each part of the data counted for itself."""
        with self._explaining():
            count = self._connection.execute("SELECT COUNT(*) FROM (SELECT DISTINCT part, mask FROM measured)")
            return int(count.fetchone()[0])

    def check(self) -> None:
        """Read all that is there.

        Raises
        ------
        UnusableStoreError: some of it cannot be read.
        """
        with self._explaining():
            said = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if said != "ok":
                raise sqlite3.DatabaseError(said)
            for (value,) in self._connection.execute("SELECT value FROM measured"):
                _array(value)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> None:
        """Refuse what is not a store of this model; lay out a new file."""
        tables = {row[0] for row in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._lay_out()
        elif "about" not in tables:
            raise UnusableStoreError(f"'{self.path}' is a database, but not a store of measured masks; {REMEDY}.")
        about = dict(self._connection.execute("SELECT name, value FROM about"))
        if about.get("schema") != str(SCHEMA):
            raise UnusableStoreError(
                f"The store '{self.path}' has the schema version {about.get('schema')}, this version of Secateur "
                f"reads {SCHEMA}; {REMEDY}."
            )
        if about.get("model") != self.model:
            raise UnusableStoreError(f"The store '{self.path}' belongs to another model; {REMEDY}.")
        # A commit survives the process, which is what is asked for; only a crash of the machine may undo the last ones.
        self._connection.execute("PRAGMA synchronous = NORMAL")

    def _lay_out(self) -> None:
        with self._writing():
            # Two processes may find the file empty; the second finds it laid out once it may write.
            if self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                return
            for statement in filter(str.strip, TABLES.split(";")):
                self._connection.execute(statement)
            about = [("schema", str(SCHEMA)), ("model", self.model)]
            self._connection.executemany("INSERT INTO about VALUES (?, ?)", about)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with suppress(sqlite3.Error):  # a full disk has rolled back already
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            reason = str(error)
            if "locked" in reason:
                raise StoreError(
                    f"The store '{self.path}' is locked by another process; try again when it is done."
                ) from error
            if "full" in reason:
                raise StoreError(f"The disk of the store '{self.path}' is full; free some space.") from error
            raise StoreError(f"The store '{self.path}' cannot be used: {reason}.") from error
        except (sqlite3.DatabaseError, ValueError, EOFError) as error:
            raise UnusableStoreError(f"The store '{self.path}' is damaged ({error}); {REMEDY}.") from error


def is_usable(path: Path, model: str) -> bool:
    """Whether a file is a store of a model that can be read as a whole, or not there, which is as good.

    Raises
    ------
    StoreError: it is locked, or cannot be opened.
    """
    if not path.exists():
        return True
    try:
        with Store(path, model) as store:
            store.check()
    except UnusableStoreError:
        return False
    return True


def _array(value: bytes) -> np.ndarray:
    return np.asarray(np.load(BytesIO(value), allow_pickle=False))


def _bytes(value: np.ndarray) -> bytes:
    stream = BytesIO()
    np.save(stream, np.asarray(value), allow_pickle=False)
    return stream.getvalue()
