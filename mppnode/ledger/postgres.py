"""The store of several nodes: PostgreSQL. Nobody owns a channel; its row is where nodes take turns.

A node has a few *lanes* (:mod:`mppnode.ledger.postgres_lane`), each one connection with one task, and a channel always
goes by the same one. A lane commits what arrived during its last commit in one transaction that locks its rows in the
order of their ids. Firm steps are committed with ``synchronous_commit`` on, relaxed ones with it off.

One more connection does what is not accounts, one reads lists, one carries hints to other nodes. Connect directly:
behind a pooler that hands connections round, hints are lost and a failover may go unnoticed.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Any, Final, TypeVar
from zlib import crc32

from channels.ids import ChannelId, Hash32
from channels.intent import Intent
from channels.model import Account, Event, NodeId, Plan
from channels.store import Step
from channels.units import Units
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import Clock
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger import postgres_desk as desk
from mppnode.ledger.base import PAGE, Budget, Grant, Which
from mppnode.ledger.batch import Batch, Found, Op, Rows, all_firm, lawful, unavailable
from mppnode.ledger.postgres_lane import Lane
from mppnode.ledger.postgres_link import MARK, Connection, Generation, Link, Mark
from mppnode.ledger.postgres_rows import SELECT, found_in, read_newer
from mppnode.ledger.postgres_schema import prepare
from mppnode.ledger.postgres_talk import on_postgres, read_postgres
from mppnode.ledger.postgres_wakeup import Wakeup
from mppnode.ledger.rows import read_journal
from mppnode.ledger.subscribers import Subscribers
from mppnode.ledger.talk import Talk

R = TypeVar("R")

LANES: Final = 4  # one fsync each at a time; PostgreSQL joins those of a moment
_STOP_S: Final = 6.0  # the lanes' last batches, each within its own deadline
_TOGETHER: Final = 16  # accounts decoded between two looks at the event loop: about 2 ms with full ladders
_WANTED: Final = {
    Which.ALL: "true",
    Which.NOT_CLOSED: "c.phase <> 'closed'",  # spelled as in the partial indexes, or they are not used
    Which.HELD: "c.live = 1",
}


class PostgresStore:
    """A :class:`mppnode.ledger.base.Ledger` that nodes share."""

    def __init__(
        self, dsn: Secret[str], *, clock: Clock, on_fatal: Callable[[BaseException], None], lanes: int = LANES
    ) -> None:
        self._dsn = dsn
        self._node_on_fatal = on_fatal
        self._open = False
        self.on_commit: Callable[[float | None], None] = lambda _: None
        self._subscribers = Subscribers()
        self._owner = TaskOwner(lambda _, error: self._failed(error))
        self._watchers: list[asyncio.Task[None]] = []
        generation = Generation(on_new=self._subscribers.forget)
        link = partial(
            Link, dsn, generation=generation, on_fatal=self._failed, on_commit=self._on_commit
        )
        self._desk, self._reader = link(), link()
        self._wakeup = Wakeup(dsn, self._subscribers, self._look)
        self._tills = [link() for _ in range(lanes)]
        self._links = [self._desk, self._reader, *self._tills]
        self._lanes: list[Lane] = []
        for _ in range(lanes):
            rows = Rows()
            self._links.append(link(on_connect=rows.forget))
            lane = Lane(self._links[-1], rows, clock=clock, on_committed=self._committed, on_fatal=self._failed)
            self._lanes.append(lane)

    # ------------------------------------------------------------------------------------------------ life cycle

    async def start(self) -> None:
        """Connect and migrate.

        Raises:
            LedgerError: the database cannot be reached, may not be used, or has a newer schema.
        """
        await prepare(self._dsn)
        try:
            for link in self._links:
                await link.open()
        except BaseException:
            await self._close()
            raise
        self._open = True
        for lane in self._lanes:
            _ = self._owner.start(lane.keep(), name="ledger-lane")
        endless = (self._wakeup.listen(), self._wakeup.send(), self._wakeup.watch())
        self._watchers = [self._owner.start(task, name="ledger-wakeup") for task in endless]

    async def stop(self) -> None:
        """Commit what is queued and close."""
        self._open = False
        for task in self._watchers:
            task.cancel()
        for lane in self._lanes:
            lane.stop()
        await self._owner.drain(deadline_s=_STOP_S)
        await self._close()

    async def _close(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links))

    def _failed(self, error: BaseException) -> None:
        """The ledger cannot be trusted with the next commit: answer nothing more, and let the node decide to stop."""
        if self._open:
            self._open = False
            for lane in self._lanes:
                lane.refuse()
            self._node_on_fatal(error)

    # -------------------------------------------------------------------------------------------------- accounts

    def subscribe(self, listener: Callable[[Account], None]) -> None:
        """See :meth:`ChannelStore.subscribe`. A relaxed commit is told once it is firm."""
        self._subscribers.subscribe(listener)

    def follow(self, interest: Callable[[], Collection[ChannelId]]) -> None:
        """See :meth:`Ledger.follow`."""
        self._subscribers.follow(interest)

    async def load(self, channel: ChannelId) -> Account | None:
        """See :meth:`ChannelStore.load`."""
        return await self._ask(channel, None, relaxed=False)  # type: ignore[no-any-return]

    async def transact(self, channel: ChannelId, step: Step[R], *, relaxed: bool = False) -> Plan[R]:
        """See :meth:`ChannelStore.transact`."""
        return await self._ask(channel, step, relaxed=relaxed)  # type: ignore[no-any-return]

    async def page(self, which: Which, *, after: ChannelId | None = None, limit: int = PAGE) -> Sequence[Account]:
        """See :meth:`Ledger.page`."""
        statement = f"{SELECT} WHERE {_WANTED[which]} AND c.id > $1 ORDER BY c.id LIMIT $2"
        rows = await self._read(lambda db: db.fetch(statement, after or b"", limit))
        found: list[Found] = []
        for row in rows:
            found.append(found_in(row))
            if len(found) % _TOGETHER == 0:
                await asyncio.sleep(0)  # streams go on while a page is decoded
        return await all_firm(lawful(found, report=True), self.load)

    async def accounts(self) -> Sequence[Account]:
        """See :meth:`ChannelStore.accounts`."""
        found: list[Account] = []
        while page := await self.page(Which.ALL, after=found[-1].id if found else None):
            found.extend(page)
        return found

    async def journal(self, channel: ChannelId) -> Sequence[Event]:
        """See :meth:`ChannelStore.journal`."""
        statement = "SELECT kind, body FROM journal WHERE channel = $1 ORDER BY entry"
        return read_journal(await self._read(lambda db: db.fetch(statement, channel)))

    # -------------------------------------------------------------------------------------------- lives and leads

    async def join(self, name: str) -> NodeId:
        """See :meth:`Ledger.join`."""
        node = NodeId(f"{name}-{secrets.token_hex(6)}")
        return await self._do(lambda db: desk.join(db, name, node))

    async def beat(self, node: NodeId) -> bool:
        """See :meth:`Ledger.beat`."""
        return await self._do(lambda db: desk.beat(db, node))

    async def leave(self, node: NodeId) -> None:
        """See :meth:`Ledger.leave`."""
        await self._do(lambda db: desk.leave(db, node))

    async def living(self) -> frozenset[NodeId]:
        """See :meth:`Ledger.living`."""
        return await self._do(desk.living)

    async def lead(self, job: str, node: NodeId) -> bool:
        """See :meth:`Ledger.lead`."""
        return await self._do(lambda db: desk.lead(db, job, node))

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
        return await self._do(lambda db: desk.grant(db, grant, budget))

    async def promised(self) -> Units:
        """See :meth:`Ledger.promised`."""
        return await self._read(desk.promised)

    async def settle_grant(self, tx_hash: Hash32, fee: Units) -> None:
        """See :meth:`Ledger.settle_grant`."""
        await self._do(lambda db: desk.settle_grant(db, tx_hash, fee))

    async def open_grants(self, *, limit: int = PAGE) -> Sequence[Grant]:
        """See :meth:`Ledger.open_grants`."""
        return await self._read(lambda db: desk.open_grants(db, limit))

    # ------------------------------------------------------------------------------------------------------ talks

    async def write(self, talk: Callable[[], Talk[R]], *, of: str) -> R:
        """See :meth:`Till.write`: an account always goes by the same connection, so it never waits for our own lock."""
        if not self._open:
            raise unavailable()
        link = self._tills[crc32(of.encode()) % len(self._tills)]
        return await link.write(lambda db, mark: on_postgres(db, mark, talk))

    async def read(self, talk: Callable[[], Talk[R]]) -> R:
        """See :meth:`Till.read`."""
        return await self._read(lambda db: read_postgres(db, talk))

    # ---------------------------------------------------------------------------------------------- the three ways

    async def _ask(self, channel: ChannelId, step: Callable[..., Any] | None, *, relaxed: bool) -> Any:
        if not self._open:
            raise unavailable()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        lane = self._lanes[int.from_bytes(channel[-4:]) % len(self._lanes)]
        lane.put(Op(channel, step, future, relaxed))
        return await future

    async def _do(self, work: Callable[[Connection], Awaitable[R]]) -> R:
        if not self._open:
            raise unavailable()

        async def transaction(db: Connection, mark: Mark) -> tuple[R, bool]:
            result = await work(db)
            await db.execute(MARK, mark.lane, mark.number)
            return result, True

        return await self._desk.write(transaction)

    async def _read(self, work: Callable[[Connection], Awaitable[R]]) -> R:
        if not self._open:
            raise unavailable()
        return await self._reader.read(work)

    # ------------------------------------------------------------------------------------------------------ news

    def _on_commit(self, seconds: float | None) -> None:
        self.on_commit(seconds)  # whatever it is by now

    def _committed(self, batch: Batch, told: list[Account]) -> None:
        if not batch.firm:
            for change in batch.changes.values():
                self._subscribers.passed(change.before, change.account)
        self._subscribers.tell(told)
        self._wakeup.changed(told)

    async def _look(self, known: dict[ChannelId, int]) -> list[Account]:
        found = await self._read(lambda db: read_newer(db, known))
        return await all_firm(lawful(found, report=False), self.load)
