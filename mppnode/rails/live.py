"""What this process is doing with each channel right now. Never the truth about money: that is in the books."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any, Final
from weakref import WeakValueDictionary

from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.model import Account, HoldId, Voucher
from mppnode.kernel.clock import Clock
from mppnode.kernel.tasks import TaskOwner
from mppnode.rails.tab import SessionTab

_CHECKED_MAX: Final = 50_000  # channels whose last chain read is remembered; forgetting one costs one read
_BURST: Final = 20  # vouchers a channel may send at once
_PER_SECOND: Final = 10  # and sustain: the session draft's rate
_BUCKETS_MAX: Final = 50_000


class LiveChannels:
    """The tabs of running requests by channel, told of every committed change."""

    def __init__(self, clock: Clock, owner: TaskOwner) -> None:
        self._clock = clock
        self._owner = owner
        self._tabs: dict[ChannelId, list[SessionTab]] = {}
        self._streams: set[SessionTab] = set()
        self._holds: set[HoldId] = set()
        self._asked: set[SessionTab] = set()
        self._enders: dict[SessionTab, Callable[[], Coroutine[Any, Any, None]]] = {}
        self._checked: OrderedDict[ChannelId, float] = OrderedDict()
        self.resubmit: Callable[[ChannelId, Voucher], Coroutine[Any, Any, None]] = _not_kept
        # A lock lives as long as somebody holds or awaits it.
        self._admissions: WeakValueDictionary[ChannelId, asyncio.Lock] = WeakValueDictionary()

    def admitting(self, channel: ChannelId) -> asyncio.Lock:
        """One admission of a channel at a time.

        Between a committed hold and its entry among the live tabs nobody could tell its request that a newer one has
        fenced it: it would be served to the end, and its bill would be nothing.
        """
        return self._admissions.get(channel) or self._admissions.setdefault(channel, asyncio.Lock())

    def channels(self) -> Collection[ChannelId]:
        """Channels with running requests: the ones whose changes elsewhere matter here."""
        return self._tabs.keys()

    def unrecorded(self) -> int:
        """Pico of all live requests that have left this process and are not in the ledger yet."""
        return sum(tab.unrecorded for tabs in self._tabs.values() for tab in tabs)

    def expect(self, hold: HoldId) -> None:
        """Say that a hold is about to be reserved; from now on it is ours until :meth:`forget`."""
        self._holds.add(hold)

    def forget(self, hold: HoldId) -> None:
        """Say that a hold was refused or its bill is settled."""
        self._holds.discard(hold)

    def owns(self, hold: HoldId) -> bool:
        """Whether a request of this process stands behind a hold."""
        return hold in self._holds

    def on_commit(self, account: Account) -> None:
        """Tell the running requests of a channel about its new state, and end those that were asked to end."""
        tabs = tuple(self._tabs.get(account.id, ()))
        known = max((tab.account.ladder[-1] for tab in tabs), key=lambda rung: rung.cumulative, default=None)
        if known is not None and known.cumulative > account.accepted:
            # The database has lost commits it had confirmed. A signature proves itself, so what was answered holds.
            self._owner.spawn(self.resubmit(account.id, known), name="resubmit voucher")
        for tab in tabs:
            tab.observe(account)
            if tab.must_end(account):
                self._start_ending(tab)

    def end_everything(self) -> None:
        """End every request of this process: its life in the ledger is over, its holds may be gone."""
        for tab in tuple(self._enders):
            self._start_ending(tab)

    def _start_ending(self, tab: SessionTab) -> None:
        if tab in self._enders and tab not in self._asked:
            self._asked.add(tab)
            self._owner.spawn(self._enders[tab](), name="end request")

    def add(self, tab: SessionTab, *, stream: bool) -> None:
        """Register a running request, and whether it is a stream."""
        self._tabs.setdefault(tab.account.id, []).append(tab)
        if stream:
            self._streams.add(tab)

    def remove(self, tab: SessionTab) -> None:
        """Forget a finished request."""
        tabs = self._tabs.get(tab.account.id, [])
        if tab in tabs:
            tabs.remove(tab)
        if not tabs:
            self._tabs.pop(tab.account.id, None)
        self._enders.pop(tab, None)
        self._streams.discard(tab)
        self._asked.discard(tab)
        self._holds.discard(tab.hold)

    def on_supersede(self, tab: SessionTab, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Say how a request is ended from outside: ``end`` returns when its bill is settled."""
        self._enders[tab] = end
        if tab.must_end(tab.account):  # asked while it was being admitted
            self._start_ending(tab)

    def streaming(self, channel: ChannelId) -> bool:
        """Whether a stream of a channel is running."""
        return not self._streams.isdisjoint(self._tabs.get(channel, ()))

    async def end_streams(self, channel: ChannelId) -> None:
        """End the streams of a channel and wait until their bills are settled; buffered requests go on."""
        await self._end(tab for tab in self._tabs.get(channel, ()) if tab in self._streams)

    async def quiesce(self, channel: ChannelId) -> None:
        """End every request of a channel, one just being admitted too, and wait until their bills are settled."""
        async with self.admitting(channel):
            await self.end_all(channel)

    async def end_all(self, channel: ChannelId) -> None:
        """End every request of a channel and wait until their bills are settled."""
        await self._end(self._tabs.get(channel, ()))

    async def _end(self, tabs: Iterable[SessionTab]) -> None:
        enders = [self._enders[tab] for tab in tabs if tab in self._enders]
        if enders:
            await asyncio.gather(*(end() for end in enders))

    def checked(self, channel: ChannelId) -> None:
        """Remember that the chain was just asked about a channel."""
        self._checked[channel] = self._clock.monotonic()
        self._checked.move_to_end(channel)
        while len(self._checked) > _CHECKED_MAX:
            self._checked.popitem(last=False)

    def checked_within(self, channel: ChannelId, seconds: float) -> bool:
        """Whether the chain was asked about a channel in the last ``seconds``."""
        at = self._checked.get(channel)
        return at is not None and self._clock.monotonic() - at < seconds


async def _not_kept(_channel: ChannelId, _voucher: Voucher) -> None:
    """Stand in for the books until they are there."""


class VoucherRate:
    """A token bucket in front of signature recovery, the one costly step a stranger can ask for.

    Kept per channel and peer address: a channel id is public on chain, so with one bucket per channel anybody could
    send garbage under a payer's id until the payer's own vouchers are refused.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: OrderedDict[tuple[ChannelId, str], tuple[float, float]] = OrderedDict()

    def take(self, channel: ChannelId, peer: str) -> None:
        """Allow one more voucher check. Raises ``RATE_LIMITED``."""
        now, key = self._clock.monotonic(), (channel, peer)
        level, at = self._buckets.pop(key, (float(_BURST), now))
        level = min(level + (now - at) * _PER_SECOND, _BURST)
        allowed = level >= 1
        self._buckets[key] = (level - 1 if allowed else level, now)
        while len(self._buckets) > _BUCKETS_MAX:
            self._buckets.popitem(last=False)
        if not allowed:
            raise ChannelFault(Reason.RATE_LIMITED, detail="too many vouchers on this channel")
