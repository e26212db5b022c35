"""The embedded store: SQLite in WAL mode, one writer thread, group commit.

One thread owns the one connection. It takes everything that is waiting, runs the steps, commits once with
``synchronous=FULL`` and wakes the event loop once. A commit per step would cost an fsync per voucher; a lock per
channel would cost two threads. Accounts are cached by that thread alone, so a renewal reads nothing from disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

from channels.account import check
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.model import Account, Event, Plan
from channels.store import Step
from mppnode.kernel.clock import Clock
from mppnode.ledger.rows import COLUMNS, account_columns, read_account, read_event, terms_column, write_event

R = TypeVar("R")

_SCHEMA_VERSION: Final = 2
_BATCH_MAX: Final = 512  # rows per commit: 2 ms at the measured 548k updates/s leaves nobody waiting long
_CACHE_MAX: Final = 20_000  # about 2 KiB an account: 40 MiB
_BUSY_S: Final = 2.0  # a backup may hold the file this long; the instance lock keeps other nodes away


class InstanceLocked(Exception):
    """Another node already uses this database file."""


@dataclass(slots=True)
class _Op:
    """One queued step or read, and where its answer goes."""

    channel: ChannelId | None
    step: Callable[..., Any]
    future: asyncio.Future[Any]


@dataclass(slots=True)
class _Answer:
    op: _Op
    value: Any = None
    error: BaseException | None = None


class SqliteStore:
    """A :class:`channels.store.ChannelStore` in one file, for one node."""

    def __init__(self, path: Path, *, clock: Clock, on_fatal: Callable[[BaseException], None]) -> None:
        self._path = path
        self._clock = clock
        self._on_fatal = on_fatal
        self._queue: queue.SimpleQueue[_Op | None] = queue.SimpleQueue()
        self._cache: OrderedDict[ChannelId, Account | None] = OrderedDict()
        self._listeners: list[Callable[[Account], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock_file: int | None = None
        self._broken = False

    # ------------------------------------------------------------------------------------------------ life cycle

    async def start(self) -> None:
        """Take the instance lock, open the file, migrate it.

        Raises:
            InstanceLocked: another node holds the file.
            sqlite3.Error: the file cannot be opened or is not ours.
        """
        self._loop = asyncio.get_running_loop()
        self._lock_file = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_file)
            self._lock_file = None
            raise InstanceLocked(f"{self._path} is in use by another node") from None
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="ledger-writer", daemon=True)
        self._thread.start()
        try:
            await ready
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Commit what is queued, close the file, give the lock back."""
        # Gone at once: what is asked from here on would queue behind the end and wait for ever.
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            await asyncio.get_running_loop().run_in_executor(None, thread.join)
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    # -------------------------------------------------------------------------------------------------- contract

    def subscribe(self, listener: Callable[[Account], None]) -> None:
        """See :meth:`ChannelStore.subscribe`."""
        self._listeners.append(listener)

    async def load(self, channel: ChannelId) -> Account | None:
        """See :meth:`ChannelStore.load`."""
        return await self._ask(_read_only, channel)  # type: ignore[no-any-return]

    async def transact(self, channel: ChannelId, step: Step[R], *, relaxed: bool = False) -> Plan[R]:  # noqa: ARG002
        """See :meth:`ChannelStore.transact`; a relaxed commit is as durable as any other here."""
        return await self._ask(step, channel)  # type: ignore[no-any-return]

    async def accounts(self) -> Sequence[Account]:
        """See :meth:`ChannelStore.accounts`."""
        return await self._ask(_all_accounts)  # type: ignore[no-any-return]

    async def journal(self, channel: ChannelId) -> Sequence[Event]:
        """See :meth:`ChannelStore.journal`."""

        def read(connection: sqlite3.Connection) -> list[Event]:
            rows = connection.execute("SELECT kind, body FROM journal WHERE channel = ? ORDER BY entry", (channel,))
            return [read_event(kind, body) for kind, body in rows]

        return await self._ask(read)  # type: ignore[no-any-return]

    async def _ask(self, step: Callable[..., Any], channel: ChannelId | None = None) -> Any:
        if self._broken or self._thread is None:
            raise ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger is not available")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put(_Op(channel, step, future))
        return await future

    # --------------------------------------------------------------------------------------------- writer thread

    def _run(self, ready: asyncio.Future[None]) -> None:
        assert self._loop is not None
        try:
            connection = self._connect()
        except BaseException as error:  # noqa: BLE001 - handed to start(), which raises it
            self._loop.call_soon_threadsafe(ready.set_exception, error)
            return
        self._loop.call_soon_threadsafe(ready.set_result, None)
        stopping = False
        while not stopping:
            batch, stopping = self._take()
            if batch:
                answers, committed = self._commit(connection, batch)
                self._loop.call_soon_threadsafe(self._deliver, answers, committed)
        connection.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=_BUSY_S)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # Never rely on the build's defaults: FULL is what makes "accepted" survive a power cut.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA fullfsync = ON")
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found > _SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"database schema {found} is newer than this program ({_SCHEMA_VERSION})")
        for version in range(found + 1, _SCHEMA_VERSION + 1):
            script = resources.files("mppnode.ledger").joinpath(f"sql/sqlite_{version:03}.sql").read_text()
            connection.executescript(f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {version};\nCOMMIT;")

    def _take(self) -> tuple[list[_Op], bool]:
        """Wait for work, then take all that is there: the batch is whatever arrived during the last fsync."""
        first = self._queue.get()
        if first is None:
            return [], True
        batch = [first]
        while len(batch) < _BATCH_MAX:
            try:
                op = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
            if op is None:
                return batch, True
            batch.append(op)
        return batch, False

    def _commit(self, connection: sqlite3.Connection, batch: list[_Op]) -> tuple[list[_Answer], list[Account]]:
        staged: dict[ChannelId, Account] = {}
        committed: list[Account] = []
        answers: list[_Answer] = []
        if self._broken:  # what was queued before the failure: a disk may work again, its promises do not
            return self._unavailable(batch), []
        try:
            connection.execute("BEGIN IMMEDIATE")
            answers.extend(self._perform(connection, op, staged, committed) for op in batch)
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - also a row that changed under us: the thread must go on answering
            return self._failed(connection, batch, error), []
        for channel, account in staged.items():
            self._remember(channel, account)
        return answers, committed

    def _perform(
        self, connection: sqlite3.Connection, op: _Op, staged: dict[ChannelId, Account], committed: list[Account]
    ) -> _Answer:
        """Run one step inside the open transaction. A refusal or a broken law concerns this step alone."""
        try:
            if op.channel is None:
                return _Answer(op, value=op.step(connection))
            before = staged.get(op.channel) or self._account(connection, op.channel)
            if op.step is _read_only:
                return _Answer(op, value=before)
            plan: Plan[Any] = op.step(before)
            if plan.events:
                check(plan.account)
        except sqlite3.Error:
            raise
        except Exception as error:  # noqa: BLE001 - a refusal, a broken law or a bug: its asker's, not the thread's
            return _Answer(op, error=error)
        if plan.events:
            self._write(connection, plan, before)
            staged[op.channel] = plan.account
            committed.append(plan.account)
        return _Answer(op, value=plan)

    def _write(self, connection: sqlite3.Connection, plan: Plan[Any], before: Account | None) -> None:
        account = plan.account
        columns = account_columns(account, before)
        if before is None:
            columns["terms"] = terms_column(account)
            marks = ",".join("?" * (len(columns) + 1))
            statement = f"INSERT INTO channel ({','.join(columns)}, id) VALUES ({marks})"  # noqa: S608 - our own names
        else:
            changes = ",".join(f"{name}=?" for name in columns)
            statement = f"UPDATE channel SET {changes} WHERE id = ? AND version = {before.version:d}"  # noqa: S608
        changed = connection.execute(statement, (*columns.values(), account.id)).rowcount
        assert changed == 1, "the row is not the one that was read"
        at = self._clock.now_millis()
        first = account.version - len(plan.events) + 1
        rows = [(account.id, first + i, at, *write_event(event)) for i, event in enumerate(plan.events)]
        connection.executemany("INSERT INTO journal (channel, entry, at_ms, kind, body) VALUES (?,?,?,?,?)", rows)

    def _account(self, connection: sqlite3.Connection, channel: ChannelId) -> Account | None:
        if channel in self._cache:
            self._cache.move_to_end(channel)
            return self._cache[channel]
        row = connection.execute(f"{_SELECT} WHERE id = ?", (channel,)).fetchone()
        account = None if row is None else _account_of(row)
        if account is not None:  # strangers' ids must not push real channels out
            self._remember(channel, account)
        return account

    def _remember(self, channel: ChannelId, account: Account) -> None:
        self._cache[channel] = account
        self._cache.move_to_end(channel)
        while len(self._cache) > _CACHE_MAX:
            self._cache.popitem(last=False)

    def _failed(self, connection: sqlite3.Connection, batch: list[_Op], error: Exception) -> list[_Answer]:
        """Nothing of the batch is certain: refuse all of it, forget the cache, and let the node decide to stop."""
        self._cache.clear()
        with contextlib.suppress(sqlite3.Error):  # the transaction may already be gone; the first error matters
            connection.execute("ROLLBACK")
        # A backup passes; anything else is the disk. Errors of the binding itself (a closed file) carry no code.
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF != sqlite3.SQLITE_BUSY:
            self._broken = True
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._on_fatal, error)
        return self._unavailable(batch)

    def _unavailable(self, batch: list[_Op]) -> list[_Answer]:
        fault = ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger could not be written")
        return [_Answer(op, error=fault) for op in batch]

    # ------------------------------------------------------------------------------------------------ event loop

    def _deliver(self, answers: list[_Answer], committed: list[Account]) -> None:
        for account in committed:
            for listener in self._listeners:
                self._tell(listener, account)
        for answer in answers:
            if answer.op.future.done():  # the asker was cancelled; what was committed stays committed
                continue
            if answer.error is not None:
                answer.op.future.set_exception(answer.error)
            else:
                answer.op.future.set_result(answer.value)


    def _tell(self, listener: Callable[[Account], None], account: Account) -> None:
        try:
            listener(account)
        except Exception as error:  # noqa: BLE001 - one request's bug; the answers of the whole batch come after it
            assert self._loop is not None
            self._loop.call_exception_handler({"message": "a ledger listener failed", "exception": error})


_SELECT: Final = f"SELECT id, terms, {','.join(COLUMNS)} FROM channel"  # noqa: S608 - our own names


def _read_only(account: Account | None) -> Account | None:
    return account


def _account_of(row: Sequence[Any]) -> Account:
    account = read_account(row[0], row[1], dict(zip(COLUMNS, row[2:], strict=True)))
    check(account)
    return account


def _all_accounts(connection: sqlite3.Connection) -> list[Account]:
    return [_account_of(row) for row in connection.execute(f"{_SELECT} ORDER BY id")]
