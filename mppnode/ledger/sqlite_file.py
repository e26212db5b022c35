"""The database file of the embedded store: who may open it, how it is opened, and how it got its tables."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mppnode.ledger.base import LedgerError

_SCRIPTS: Final = ("sqlite_001", "sqlite_002", "accounts")
"""What brings a file to schema 1, 2, ..."""
SCHEMA: Final = len(_SCRIPTS)
_LOOK_S: Final = 0.0005
BUSY_S: Final = 2  # a backup may hold the file this long; the instance lock keeps other nodes away


class InstanceLocked(LedgerError):
    """Another node already uses this database file."""


class InstanceLock:
    """The right to use a database file: of one node, or of one supervisor for all its workers.

    The kernel gives it back however the process ends; a heartbeat row would first have to be believed dead.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def acquire(self) -> None:
        """Take it. Raises ``InstanceLocked``, or ``OSError`` when the lock file cannot be made."""
        file = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise InstanceLocked(f"{self._path} is in use by another node") from None
        self._file = file

    def release(self) -> None:
        """Give it back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def open_writer(path: Path, *, shared: bool) -> sqlite3.Connection:
    """Open the file to write, migrated to this program's schema; beside other processes if it is ``shared``.

    Raises:
        LedgerError: the schema is newer than this program.
        sqlite3.Error: the file cannot be opened or is not ours.
    """
    connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_S)
    try:
        # Never rely on the build's defaults: FULL is what makes "accepted" survive a power cut.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA fullfsync = ON")
        _migrate(connection)
        if shared:
            connection.execute("PRAGMA busy_timeout = 0")  # begin() waits instead
    except BaseException:
        connection.close()
        raise
    return connection


def begin(connection: sqlite3.Connection, *, shared: bool) -> None:
    """Begin to write; beside other processes this waits its turn, for :data:`BUSY_S` at most.

    SQLite's own wait grows to 100 ms between two looks, and the process that has just written is back before that: the
    others starve. Half a millisecond is about what it needs to come back.
    """
    if not shared:
        connection.execute("BEGIN IMMEDIATE")
        return
    for left in range(int(BUSY_S // _LOOK_S), -1, -1):
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if not is_busy(error) or left == 0:
                raise
            time.sleep(_LOOK_S)
        else:
            return


def is_busy(error: BaseException) -> bool:
    """Whether somebody else holds the file; errors of the binding itself (a closed file) carry no code."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF == sqlite3.SQLITE_BUSY


def open_reader(path: Path) -> sqlite3.Connection:
    """Open the file to read; writers and readers do not wait for each other."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_S)
    connection.execute("PRAGMA query_only = ON")
    return connection


def _migrate(connection: sqlite3.Connection) -> None:
    if _version(connection) == SCHEMA:
        return
    connection.execute("BEGIN IMMEDIATE")  # and look again: another worker may be migrating at this moment
    try:
        found = _version(connection)
        if found > SCHEMA:
            raise LedgerError(f"the database's schema {found} is newer than this program's ({SCHEMA})")
        for version in range(found + 1, SCHEMA + 1):
            script = resources.files("mppnode.ledger").joinpath(f"sql/{_SCRIPTS[version - 1]}.sql").read_text()
            for statement in _statements(script):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version:d}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def _statements(script: str) -> Iterator[str]:
    # Not executescript: it commits the transaction it is called in.
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
