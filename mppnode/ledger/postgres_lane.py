"""One of a node's lanes to PostgreSQL: a queue, a connection, and the one task that takes from the first to the second.

Steps that arrive during a commit are the next batch. A channel always goes by the same lane, so a node never waits for
its own locks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from channels.faults import ChannelFault
from channels.ids import ChannelId
from channels.model import Account
from mppnode.kernel.clock import Clock
from mppnode.ledger.batch import BATCH_MAX, Batch, Op, Rows, refuse
from mppnode.ledger.postgres_link import Connection, Link, Mark
from mppnode.ledger.postgres_rows import read_rows, write_batch
from mppnode.ledger.rows import BrokenRow


class Lane:
    """Reads and writes accounts on one link."""

    def __init__(
        self,
        link: Link,
        rows: Rows,
        *,
        clock: Clock,
        on_committed: Callable[[Batch, list[Account]], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._link = link
        self._rows = rows
        self._clock = clock
        self._on_committed = on_committed
        self._on_fatal = on_fatal
        self._queue: deque[Op] = deque()
        self._work = asyncio.Event()
        self._stopping = False

    def put(self, op: Op) -> None:
        """Queue a step or a load."""
        self._queue.append(op)
        self._work.set()

    def stop(self) -> None:
        """Let :meth:`keep` end when the queue is empty."""
        self._stopping = True
        self._work.set()

    def refuse(self) -> None:
        """Answer everything that is queued: the ledger is not available."""
        refuse(op.future for op in self._queue)
        self._queue.clear()

    async def keep(self) -> None:
        """Serve the queue until told to stop."""
        while True:
            await self._work.wait()
            ops = [self._queue.popleft() for _ in range(min(len(self._queue), BATCH_MAX))]
            if not ops:
                if self._stopping:
                    return
                self._work.clear()
                continue
            try:
                await self._serve(ops)
            except ChannelFault:
                refuse(op.future for op in ops)
            except Exception as error:  # noqa: BLE001 - a row that changed under its lock, or a bug
                self._on_fatal(error)
                refuse(op.future for op in ops)
            except BaseException:
                refuse(op.future for op in ops)
                raise

    async def _serve(self, ops: list[Op]) -> None:
        if all(op.step is None for op in ops):
            ops = await self._load(ops)
        if not ops:
            return
        firm = any(not op.relaxed for op in ops)
        batch, wrote = await self._link.write(lambda db, mark: self._transact(db, mark, ops, firm=firm), firm=firm)
        self._on_committed(batch, self._rows.committed(batch, wrote=wrote))
        batch.deliver()

    async def _load(self, ops: list[Op]) -> list[Op]:
        """Answer loads without locking anything; those of soft rows are left, to be made firm."""
        channels = _channels(ops)
        found = await self._link.read(lambda db: read_rows(db, channels, self._rows, lock=False))
        batch = Batch(firm=False, soft=())
        for op in ops:
            if op.channel not in self._rows.soft:
                _decide(batch, op, found.get(op.channel))
        batch.deliver()
        return [op for op in ops if op.channel in self._rows.soft]

    async def _transact(
        self, connection: Connection, mark: Mark, ops: list[Op], *, firm: bool
    ) -> tuple[tuple[Batch, bool], bool]:
        found = await read_rows(connection, _channels(ops), self._rows, lock=True)
        batch = Batch(firm=firm, soft=self._rows.soft)
        for op in ops:
            _decide(batch, op, found.get(op.channel))
        wrote = await write_batch(connection, batch, mark, self._clock.now_millis())
        return (batch, wrote), wrote


def _channels(ops: list[Op]) -> list[ChannelId]:
    return sorted({op.channel for op in ops})


def _decide(batch: Batch, op: Op, found: Account | BrokenRow | None) -> None:
    if isinstance(found, BrokenRow):
        batch.fail(op.future, found)
    else:
        batch.decide(op, found)
