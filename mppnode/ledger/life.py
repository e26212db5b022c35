"""The life of this process in the ledger, and the sweep that ends what dead processes left behind.

A hold belongs to one life. Everybody may release the holds of a life that has ended; a process that was only asleep
finds its life fenced when it wakes, ends its requests and begins a new one. Leases serve liveness alone: what keeps
money safe is that a released hold can never be renewed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from channels.faults import ChannelFault, Reason
from channels.model import Account, HoldId, NodeId, Phase, ReleaseOrphans
from mppnode.kernel.clock import Clock
from mppnode.ledger.base import LEASE_S, SAFETY_S, Ledger, Which
from mppnode.ledger.books import Books

BEAT_S: Final = 2.5
"""Between two beats: a lease survives two lost ones."""
SWEEP_S: Final = 5.0
"""Between two sweeps for orphaned holds."""
_SETTLED: Final = frozenset({Phase.CAPTURED, Phase.CLOSED})


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a process must end all its requests."""

    fenced: bool
    """The ledger said so; otherwise it could not be reached and the lease has run out on our own clock."""


class Life:
    """One process's membership; its ``id`` changes when the process was given up for dead."""

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        *,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]],
        on_lost: Callable[[Lost], None],
    ) -> None:
        self._ledger = ledger
        self._name = name
        self._clock = clock
        self._sleep = sleep
        self._on_lost = on_lost
        self._until: float = 0
        self._told = False
        self.id = NodeId("")

    @property
    def held(self) -> bool:
        """Whether this life's lease is still running, by our own clock: only then may anything be promised."""
        return self._clock.monotonic() < self._until

    async def begin(self) -> None:
        """Join; an earlier process of the same name is fenced. Raises ``STORE_UNAVAILABLE``."""
        # Measured from before the request: the ledger's clock may start counting as soon as it has left.
        asked = self._clock.monotonic()
        self.id = await self._ledger.join(self._name)
        self._until, self._told = asked + LEASE_S - SAFETY_S, False

    async def keep(self) -> None:
        """Beat until cancelled."""
        while True:
            await self._sleep(BEAT_S)
            await self.beat()

    async def beat(self) -> None:
        """Extend the lease once; begin again when it is gone."""
        asked = self._clock.monotonic()
        try:
            alive = await self._ledger.beat(self.id)
            if not alive:
                self._lost(Lost(fenced=True))
                await self.begin()
        except ChannelFault as fault:
            if fault.reason is not Reason.STORE_UNAVAILABLE:
                raise
            alive = False
        if alive:
            self._until, self._told = asked + LEASE_S - SAFETY_S, False
        elif self._clock.monotonic() >= self._until:
            self._lost(Lost(fenced=False))

    def _lost(self, lost: Lost) -> None:
        if not self._told:
            self._told = True
            self._on_lost(lost)

    async def end(self) -> None:
        """Leave; what is still held is released by the next sweep of anybody."""
        try:
            await self._ledger.leave(self.id)
        except ChannelFault:
            return  # the lease runs out by itself


async def keep_sweeping(
    sweep: Callable[[], Awaitable[object]],
    sleep: Callable[[float], Awaitable[None]],
    on_error: Callable[[ChannelFault], None],
) -> None:
    """Sweep every :data:`SWEEP_S` until cancelled, and go on after the ledger was away."""
    while True:
        await sleep(SWEEP_S)
        try:
            await sweep()
        except ChannelFault as fault:
            on_error(fault)


class Sweeper:
    """Releases holds whose owner has ended, and our own that no request of this process knows."""

    def __init__(self, ledger: Ledger, books: Books, life: Life, *, ours: Callable[[HoldId], bool]) -> None:
        self._ledger = ledger
        self._books = books
        self._life = life
        self._ours = ours
        self._doubtful: set[HoldId] = set()

    async def keep(self, sleep: Callable[[float], Awaitable[None]], on_error: Callable[[ChannelFault], None]) -> None:
        """Sweep until cancelled; a ledger that is away for a moment is tried again."""
        await keep_sweeping(self.sweep, sleep, on_error)

    async def sweep(self) -> int:
        """Release what is orphaned; returns how many holds. Raises ``STORE_UNAVAILABLE``.

        The accounts are read before the list of lives: the owner of any hold that was read had joined before that, so
        a newcomer is never mistaken for a dead one.
        """
        released, doubtful = 0, set[HoldId]()
        after = None
        while page := await self._ledger.page(Which.HELD, after=after):
            after = page[-1].id
            living = await self._ledger.living()
            for account in page:
                released += await self._release(account, living, doubtful)
        # Found twice: the request that owns a hold registers it before it asks for it and forgets it after its bill is
        # settled, but a bill may be settled between our reading and our asking.
        self._doubtful = doubtful
        return released

    async def _release(self, account: Account, living: frozenset[NodeId], doubtful: set[HoldId]) -> int:
        if account.phase in _SETTLED:
            return 0
        released = 0
        for owner in {hold.owner for hold in account.holds.values()}:
            if owner not in living:
                plan = await self._books.apply(account.id, ReleaseOrphans(owner))
                released += len(plan.events)
        for name, hold in account.holds.items():
            if hold.owner == self._life.id and not self._ours(name):
                if name in self._doubtful:
                    await self._books.release(account.id, name)
                    released += 1
                else:
                    doubtful.add(name)
        return released
