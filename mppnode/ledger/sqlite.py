"""The embedded store: SQLite in WAL mode, one writer thread, group commit.

One thread owns the connection that writes. It takes everything that is waiting, decides the steps, commits once and
wakes the event loop once. A commit per step would cost an fsync per voucher; a lock per channel would cost two threads.
Accounts are cached by that thread alone, so a renewal reads nothing from disk. A batch with a firm step in it is
committed with ``synchronous=FULL``, one of relaxed steps alone with ``NORMAL``; both go into the same log, so the next
FULL commit makes the earlier NORMAL ones last too.

Lists are read on a second connection and thread: decoding a page must not keep commits waiting.

``shared`` opens the file beside other processes of this machine. Then a cached account counts only if the row still has
its version, which is looked up inside the transaction. A single node has the file to itself but for the operator's
visits; it asks SQLite once per batch whether there was one. A watch tells subscribers what the others committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
import sqlite3
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from channels.faults import ChannelFault
from channels.ids import ChannelId, Hash32
from channels.intent import Intent
from channels.model import Account, Event, NodeId, Plan
from channels.store import Step
from channels.units import Units
from mppnode.kernel.clock import Clock
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger import sqlite_desk as desk
from mppnode.ledger.base import PAGE, Budget, Grant, Which
from mppnode.ledger.batch import BATCH_MAX, Batch, Change, Found, Op, Rows, all_firm, lawful, refuse, unavailable
from mppnode.ledger.rows import (
    COLUMNS,
    BrokenRow,
    account_columns,
    checked_account,
    read_journal,
    terms_column,
    write_journal,
)
from mppnode.ledger.sqlite_file import InstanceLock, InstanceLocked, begin, is_busy, open_reader, open_writer
from mppnode.ledger.subscribers import Subscribers
from mppnode.ledger.talk import Talk, on_sqlite, read_sqlite

__all__ = ["InstanceLock", "InstanceLocked", "SqliteStore"]

R = TypeVar("R")
Job = Callable[[sqlite3.Connection], R]

_WATCH_S: Final = 0.05  # between two looks for other workers' commits
_VISITS_S: Final = 0.25  # and for an operator's, which are rare
_ASKED_MAX: Final = 500  # parameters of one statement
_WANTED: Final = {
    Which.ALL: "1",
    Which.NOT_CLOSED: "phase <> 'closed'",  # spelled as in the partial indexes, or they are not used
    Which.HELD: "live = 1",
}


@dataclass(slots=True)
class _JobOp:
    """Statements of their own in the writer's transaction."""

    job: Job[Any]
    future: asyncio.Future[Any]
    relaxed: bool


class SqliteStore:
    """A :class:`mppnode.ledger.base.Ledger` in one file: of one node, or of the workers of one machine."""

    def __init__(
        self, path: Path, *, clock: Clock, on_fatal: Callable[[BaseException], None], shared: bool = False
    ) -> None:
        self._path = path
        self._clock = clock
        self._on_fatal = on_fatal
        self._shared = shared
        self.on_commit: Callable[[float | None], None] = lambda _: None
        self._lock = InstanceLock(path)
        self._subscribers = Subscribers()
        self._owner = TaskOwner(self._watch_failed)
        self._watching: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._queue: queue.SimpleQueue[Op | _JobOp | None] = queue.SimpleQueue()
        self._broken = False
        self._data_version = -1
        self._visited = False
        self._commits = 0
        # The writer thread's own:
        self._rows = Rows()
        self._firm = True
        # The reader thread's own:
        self._reader = ThreadPoolExecutor(1, "ledger-reader")
        self._reading: sqlite3.Connection | None = None

    # ------------------------------------------------------------------------------------------------ life cycle

    async def start(self) -> None:
        """Take the instance lock unless the file is shared, open the file, migrate it.

        Raises:
            InstanceLocked: another node holds the file.
            LedgerError: the schema is newer than this program.
            sqlite3.Error: the file cannot be opened or is not ours.
        """
        self._loop = asyncio.get_running_loop()
        if not self._shared:
            self._lock.acquire()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="ledger-writer", daemon=True)
        self._thread.start()
        try:
            await asyncio.wait({ready})  # a start that is cancelled leaves it to the thread, which sets it all the same
            ready.result()
        except BaseException:
            await self.stop()
            raise
        self._watching = self._owner.start(self._watch(), name="ledger-watch")

    async def stop(self) -> None:
        """Commit what is queued, close the file, give the lock back."""
        # Gone at once: what is asked from here on would queue behind the end and wait for ever.
        thread, self._thread = self._thread, None
        if self._watching is not None:
            self._watching.cancel()
            await self._owner.drain(deadline_s=0)
        if thread is not None:
            self._queue.put(None)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, thread.join)
            await loop.run_in_executor(self._reader, self._close_reader)
            self._reader.shutdown()
        self._lock.release()

    # -------------------------------------------------------------------------------------------------- accounts

    def subscribe(self, listener: Callable[[Account], None]) -> None:
        """See :meth:`ChannelStore.subscribe`. A relaxed commit is told once it is firm."""
        self._subscribers.subscribe(listener)

    def follow(self, interest: Callable[[], Collection[ChannelId]]) -> None:
        """See :meth:`Ledger.follow`; beside a single node it is the operator who commits."""
        self._subscribers.follow(interest)

    async def load(self, channel: ChannelId) -> Account | None:
        """See :meth:`ChannelStore.load`."""
        return await self._ask(lambda future: Op(channel, None, future))  # type: ignore[no-any-return]

    async def transact(self, channel: ChannelId, step: Step[R], *, relaxed: bool = False) -> Plan[R]:
        """See :meth:`ChannelStore.transact`."""
        return await self._ask(lambda future: Op(channel, step, future, relaxed))  # type: ignore[no-any-return]

    async def page(self, which: Which, *, after: ChannelId | None = None, limit: int = PAGE) -> Sequence[Account]:
        """See :meth:`Ledger.page`."""
        condition = f"{_WANTED[which]} AND id > ? ORDER BY id LIMIT ?"
        rows = await self._read(lambda db: _rows(db, condition, (after or b"", limit)))
        return await all_firm(lawful(rows, report=True), self.load)

    async def accounts(self) -> Sequence[Account]:
        """See :meth:`ChannelStore.accounts`."""
        found: list[Account] = []
        while page := await self.page(Which.ALL, after=found[-1].id if found else None):
            found.extend(page)
        return found

    async def journal(self, channel: ChannelId) -> Sequence[Event]:
        """See :meth:`ChannelStore.journal`."""
        select = "SELECT kind, body FROM journal WHERE channel = ? ORDER BY entry"
        return await self._read(lambda db: read_journal(db.execute(select, (channel,))))

    # -------------------------------------------------------------------------------------------- lives and leads

    async def join(self, name: str) -> NodeId:
        """See :meth:`Ledger.join`."""
        node = NodeId(f"{name}-{secrets.token_hex(6)}")
        return await self._do(lambda db: desk.join(db, name, node, self._clock.now_millis()))

    async def beat(self, node: NodeId) -> bool:
        """See :meth:`Ledger.beat`. Relaxed, as after a power cut every life is over."""
        return await self._do(lambda db: desk.beat(db, node, self._clock.now_millis()), relaxed=True)

    async def leave(self, node: NodeId) -> None:
        """See :meth:`Ledger.leave`."""
        await self._do(lambda db: desk.leave(db, node))

    async def living(self) -> frozenset[NodeId]:
        """See :meth:`Ledger.living`."""
        return await self._do(lambda db: desk.living(db, self._clock.now_millis()))

    async def lead(self, job: str, node: NodeId) -> bool:
        """See :meth:`Ledger.lead`."""
        return await self._do(lambda db: desk.lead(db, job, node, self._clock.now_millis()), relaxed=True)

    # ------------------------------------------------------------------------------------ intents and sponsoring

    async def add_intent(self, intent: Intent) -> None:
        """See :meth:`Ledger.add_intent`."""
        await self._do(lambda db: desk.add_intent(db, intent))

    async def move_intent(self, before: Intent, after: Intent) -> bool:
        """See :meth:`Ledger.move_intent`."""
        return await self._do(lambda db: desk.move_intent(db, before, after))

    async def intents(
        self, *, active: bool, channel: ChannelId | None = None, limit: int = PAGE
    ) -> Sequence[Intent]:
        """See :meth:`Ledger.intents`."""
        return await self._read(lambda db: desk.intents(db, active=active, channel=channel, limit=limit))

    async def grant(self, grant: Grant, budget: Budget) -> bool:
        """See :meth:`Ledger.grant`."""
        return await self._do(lambda db: desk.grant(db, grant, budget, self._clock.now_millis()))

    async def promised(self) -> Units:
        """See :meth:`Ledger.promised`."""
        return await self._read(lambda db: desk.promised(db, self._clock.now_millis()))

    async def settle_grant(self, tx_hash: Hash32, fee: Units) -> None:
        """See :meth:`Ledger.settle_grant`."""
        await self._do(lambda db: desk.settle_grant(db, tx_hash, fee))

    async def open_grants(self, *, limit: int = PAGE) -> Sequence[Grant]:
        """See :meth:`Ledger.open_grants`."""
        return await self._read(lambda db: desk.open_grants(db, limit))

    # ------------------------------------------------------------------------------------------------------ talks

    async def write(self, talk: Callable[[], Talk[R]], *, of: str) -> R:  # noqa: ARG002 - one writer serves everybody
        """See :meth:`Till.write`: part of the writer's next batch."""
        return await self._do(lambda db: on_sqlite(db, talk))

    async def read(self, talk: Callable[[], Talk[R]]) -> R:
        """See :meth:`Till.read`."""
        return await self._read(lambda db: read_sqlite(db, talk))

    # ---------------------------------------------------------------------------------------------- the two ways

    async def _do(self, job: Job[R], *, relaxed: bool = False) -> R:
        return await self._ask(lambda future: _JobOp(job, future, relaxed))  # type: ignore[no-any-return]

    async def _ask(self, op: Callable[[asyncio.Future[Any]], Op | _JobOp]) -> Any:
        if self._broken or self._thread is None:
            raise unavailable()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put(op(future))
        return await future

    async def _read(self, job: Job[R]) -> R:
        if self._broken or self._thread is None:
            raise unavailable()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, self._on_reader, job)
        except sqlite3.Error as error:
            self._failed(error)
            raise unavailable() from error

    # --------------------------------------------------------------------------------------------- writer thread

    def _connect(self) -> sqlite3.Connection:
        return open_writer(self._path, shared=self._shared)

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
            ops, stopping = self._take()
            if ops:
                self._commit(connection, ops)
        connection.close()

    def _take(self) -> tuple[list[Op | _JobOp], bool]:
        """Wait for work, then take all that is there: the batch is whatever arrived during the last fsync."""
        first = self._queue.get()
        if first is None:
            return [], True
        ops = [first]
        while len(ops) < BATCH_MAX:
            try:
                op = self._queue.get_nowait()
            except queue.Empty:
                return ops, False
            if op is None:
                return ops, True
            ops.append(op)
        return ops, False

    def _commit(self, connection: sqlite3.Connection, ops: list[Op | _JobOp]) -> None:
        assert self._loop is not None
        begun = self._clock.monotonic()
        batch = Batch(firm=any(not op.relaxed for op in ops), soft=self._rows.soft)
        try:
            if self._broken:  # what was queued before the failure: a disk may work again, its promises do not
                raise unavailable()
            self._set_durability(connection, firm=batch.firm)
            begin(connection, shared=self._shared)
            self._commits += 1
            self._look_for_visitors(connection)
            before = connection.total_changes
            for op in ops:
                self._decide(connection, batch, op)
            self._write(connection, batch)
            wrote = connection.total_changes != before
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - also a row that changed under us: the thread must go on answering
            self._rows.forget()  # nothing of the batch is certain
            with contextlib.suppress(sqlite3.Error):  # the transaction may already be gone; the first error matters
                connection.execute("ROLLBACK")
            self._failed(error)
            self._loop.call_soon_threadsafe(refuse, [op.future for op in ops])
            self._loop.call_soon_threadsafe(self.on_commit, None)
            return
        told = self._rows.committed(batch, wrote=wrote)
        self._loop.call_soon_threadsafe(self._deliver, batch, told, self._clock.monotonic() - begun)

    def _look_for_visitors(self, connection: sqlite3.Connection) -> None:
        """Forget what is cached when somebody else wrote: an operator's command beside a running node, which is rare.

        Beside other workers it would be all the time; there each row's version is asked instead.
        """
        if self._shared:
            return
        (seen,) = connection.execute("PRAGMA data_version").fetchone()
        if seen != self._data_version:
            self._visited = self._data_version != -1
            self._data_version = seen
            self._rows.forget()

    def _set_durability(self, connection: sqlite3.Connection, *, firm: bool) -> None:
        if firm != self._firm:  # it cannot be changed inside a transaction
            connection.execute(f"PRAGMA synchronous = {'FULL' if firm else 'NORMAL'}")
            self._firm = firm

    def _decide(self, connection: sqlite3.Connection, batch: Batch, op: Op | _JobOp) -> None:
        """Run one step or job inside the open transaction. A refusal or a broken law concerns its asker alone."""
        try:
            if isinstance(op, _JobOp):
                batch.answer(op.future, op.job(connection))
            else:
                staged = op.channel in batch.changes
                batch.decide(op, None if staged else self._account(connection, op.channel))
        except sqlite3.Error:
            raise
        except Exception as error:  # noqa: BLE001 - also a row that breaks the law: its asker's, not the thread's
            batch.fail(op.future, error)

    def _write(self, connection: sqlite3.Connection, batch: Batch) -> None:
        for channel, change in batch.changes.items():
            self._write_row(connection, change, soft=not batch.firm)
            first = change.account.version - len(change.events) + 1
            at, entries = self._clock.now_millis(), write_journal(change.events, change.before)
            rows = [(channel, first + i, at, kind, body) for i, (kind, body) in enumerate(entries)]
            connection.executemany("INSERT INTO journal (channel, entry, at_ms, kind, body) VALUES (?,?,?,?,?)", rows)
        for channel in batch.harden:
            connection.execute("UPDATE channel SET soft = 0 WHERE id = ?", (channel,))

    def _write_row(self, connection: sqlite3.Connection, change: Change, *, soft: bool) -> None:
        account, before = change.account, change.before
        columns = account_columns(account, before)
        columns["soft"] = int(soft)
        if before is None:
            columns["terms"] = terms_column(account)
            marks = ",".join("?" * (len(columns) + 1))
            statement = f"INSERT INTO channel ({','.join(columns)}, id) VALUES ({marks})"  # noqa: S608 - our own names
        else:
            changes = ",".join(f"{name}=?" for name in columns)
            statement = f"UPDATE channel SET {changes} WHERE id = ? AND version = {before.version:d}"  # noqa: S608
        changed = connection.execute(statement, (*columns.values(), account.id)).rowcount
        assert changed == 1, "the row is not the one that was read"

    def _account(self, connection: sqlite3.Connection, channel: ChannelId) -> Account | None:
        known = self._rows.get(channel)
        if known is not None and self._shared:
            # Versions are linear: a row with the version we know is the account we know.
            row = connection.execute("SELECT version FROM channel WHERE id = ?", (channel,)).fetchone()
            known = known if row == (known.version,) else None
        if known is not None:
            return known
        for account, soft in _rows(connection, "id = ?", (channel,)):
            if isinstance(account, BrokenRow):
                raise account
            return self._rows.read(account, soft=soft)
        return None

    def _failed(self, error: Exception) -> None:
        """Let the node decide to stop. On whichever thread met the error, so that nothing is promised after it."""
        # A backup passes; anything else is the disk.
        if not is_busy(error) and not self._broken:
            self._broken = True
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._on_fatal, error)

    # ------------------------------------------------------------------------------------------------ event loop

    def _deliver(self, batch: Batch, told: list[Account], seconds: float) -> None:
        self.on_commit(seconds)
        if not batch.firm:
            for change in batch.changes.values():
                self._subscribers.passed(change.before, change.account)
        self._subscribers.tell(told)
        batch.deliver()

    def _watch_failed(self, _name: str, error: BaseException) -> None:
        self._on_fatal(error)

    # -------------------------------------------------------------------------------------------------- reading

    def _on_reader(self, job: Job[R]) -> R:
        if self._reading is None:
            self._reading = open_reader(self._path)
        return job(self._reading)

    def _close_reader(self) -> None:
        if self._reading is not None:
            self._reading.close()

    async def _watch(self) -> None:
        """Tell subscribers what other processes committed."""
        await (self._watch_others() if self._shared else self._watch_visitors())

    async def _watch_visitors(self) -> None:
        """The writer notices a visitor at its next batch; only when it has none it is asked to look.

        Looking from the reader's connection would take every commit of our own for somebody's.
        """
        commits = 0
        while True:
            await asyncio.sleep(_VISITS_S)
            known = self._subscribers.followed()
            if not known or self._broken:
                continue
            with contextlib.suppress(ChannelFault):  # busy: looked at again in a moment
                if self._commits == commits:
                    await self._do(lambda _: None, relaxed=True)
                commits = self._commits
                if self._visited:
                    self._visited = False
                    rows = await self._read(partial(_newer, known))
                    self._subscribers.tell(await all_firm(lawful(rows, report=False), self.load))

    async def _watch_others(self) -> None:
        seen, watched = -1, frozenset[ChannelId]()
        while True:
            await asyncio.sleep(_WATCH_S)
            known = self._subscribers.followed()
            if not known or self._broken:
                continue
            with contextlib.suppress(ChannelFault):  # busy: looked at again in a moment
                version = await self._read(lambda db: int(db.execute("PRAGMA data_version").fetchone()[0]))
                if version != seen or not known.keys() <= watched:
                    rows = await self._read(partial(_newer, known))
                    self._subscribers.tell(await all_firm(lawful(rows, report=False), self.load))
                    seen, watched = version, frozenset(known)


_SELECT: Final = f"SELECT soft, id, terms, {','.join(COLUMNS)} FROM channel WHERE"  # noqa: S608 - our own names


def _rows(db: sqlite3.Connection, condition: str, values: Sequence[Any]) -> list[Found]:
    return [(_account_of(row), bool(row[0])) for row in db.execute(f"{_SELECT} {condition}", values)]


def _account_of(row: Sequence[Any]) -> Account | BrokenRow:
    try:
        return checked_account(row[1], row[2], dict(zip(COLUMNS, row[3:], strict=True)))
    except BrokenRow as error:
        return error


def _newer(known: dict[ChannelId, int], db: sqlite3.Connection) -> list[Found]:
    """The accounts of these channels that are newer than the known version."""
    channels, found = list(known), list[ChannelId]()
    for start in range(0, len(channels), _ASKED_MAX):
        asked = channels[start : start + _ASKED_MAX]
        marks = ",".join("?" * len(asked))
        rows = db.execute(f"SELECT id, version FROM channel WHERE id IN ({marks})", asked)  # noqa: S608 - only marks
        found += [channel for channel, version in rows if version > known[channel]]
    return [row for channel in found for row in _rows(db, "id = ?", (channel,))]
