"""The shared ledger of a simulation, and one process's link to it, which can be cut."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any

from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.intent import Intent
from channels.model import Account, NodeId, Phase
from channels.testing.memory_store import MemoryStore
from mppnode.kernel.clock import Clock
from mppnode.ledger.base import GRACE_S, LEASE_S, PAGE, IntentExists, Which


class MemoryLedger(MemoryStore):
    """The part of :class:`mppnode.ledger.base.Ledger` a simulation needs; every call is one transaction."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._lives: dict[str, tuple[NodeId, float]] = {}
        self._leads: dict[str, tuple[NodeId, float]] = {}
        self._born = 0
        self.desk: dict[str, Intent] = {}
        self.lived: dict[str, tuple[float, float]] = {}
        """When each intent began and ended."""
        self.signed_at: dict[str, float] = {}

    async def page(self, which: Which, *, after: ChannelId | None = None, limit: int = PAGE) -> list[Account]:
        wanted: Callable[[Account], bool] = {
            Which.ALL: lambda _: True,
            Which.NOT_CLOSED: lambda account: account.phase is not Phase.CLOSED,
            Which.HELD: lambda account: bool(account.holds),
        }[which]
        return [a for a in await self.accounts() if (after is None or a.id > after) and wanted(a)][:limit]

    async def join(self, name: str) -> NodeId:
        self._born += 1
        node = NodeId(f"{name}.{self._born}")
        self._lives[name] = (node, self._clock.monotonic() + LEASE_S)
        return node

    async def beat(self, node: NodeId) -> bool:
        name = node.rpartition(".")[0]
        if self._lives.get(name, (None, 0))[0] != node:
            return False
        self._lives[name] = (node, self._clock.monotonic() + LEASE_S)
        return True

    async def living(self) -> frozenset[NodeId]:
        fenced = self._clock.monotonic() - GRACE_S
        self._lives = {name: life for name, life in self._lives.items() if life[1] > fenced}
        return frozenset(node for node, _ in self._lives.values())

    async def lead(self, job: str, node: NodeId) -> bool:
        leader, until = self._leads.get(job, (node, 0.0))
        now, alive = self._clock.monotonic(), {life for life, _ in self._lives.values()}
        if leader != node and until > now and leader in alive:
            return False
        self._leads[job] = (node, now + LEASE_S)
        return True

    async def add_intent(self, intent: Intent) -> None:
        if any(other.channel == intent.channel and other.active for other in self.desk.values()):
            raise IntentExists(intent.id)
        self.desk[intent.id] = intent
        self.lived[intent.id] = (self._clock.monotonic(), math.inf)

    async def move_intent(self, before: Intent, after: Intent) -> bool:
        if self.desk[before.id].version != before.version:
            return False
        self.desk[before.id] = after
        if after.raw and not before.raw:
            self.signed_at[before.id] = self._clock.monotonic()
        if not after.active:
            self.lived[before.id] = (self.lived[before.id][0], self._clock.monotonic())
        return True

    async def intents(self, *, active: bool, channel: ChannelId | None = None, limit: int = PAGE) -> list[Intent]:
        wanted = [i for i in self.desk.values() if (channel in (None, i.channel)) and (i.active or not active)]
        return wanted[-limit:]


class Killed(BaseException):
    """The process does not exist any more. Not an ``Exception``, so that nothing in it can handle its own death."""


class Link:
    """The ledger as one process sees it: it may be slow or away, and it is gone when the process is."""

    def __init__(self, ledger: MemoryLedger, dice: random.Random, *, must_live: Callable[[], None]) -> None:
        self._ledger = ledger
        self._dice = dice
        self._must_live = must_live
        self.away = False
        self.everybody_leads = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)

        async def call(*args: Any, **options: Any) -> Any:
            self._must_live()
            if self._dice.random() < 0.03:  # now and then another process gets between two calls
                await asyncio.sleep(self._dice.random() * 0.2)
                self._must_live()
            if self.away:
                raise ChannelFault(Reason.STORE_UNAVAILABLE, detail="away")
            answer = await method(*args, **options)
            return True if name == "lead" and self.everybody_leads else answer

        self.__dict__[name] = call
        return call
