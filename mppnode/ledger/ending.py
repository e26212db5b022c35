"""Ends the requests of a channel wherever they run, before a newer stream or a close takes it over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.model import Account, EndStreams, Phase, ReleaseOrphans
from mppnode.kernel.clock import Clock
from mppnode.ledger.books import Books

PATIENCE_S: Final = 3.0
"""How long another process may take to end a stream it was asked to end: a wake-up (1 s at worst), one read of its
client's buffer and one commit. Then it is fenced, which is safe and costs the node up to one window."""
_POLL_S: Final = 0.05


class Ending:
    """Ends requests of other processes; the caller has ended its own."""

    def __init__(self, books: Books, *, clock: Clock, sleep: Callable[[float], Awaitable[None]]) -> None:
        self._books = books
        self._clock = clock
        self._sleep = sleep

    async def streams(self, channel: ChannelId) -> None:
        """Ask the owner of a channel's live stream to bill and end it, and wait for that as long as is reasonable."""
        try:
            account = (await self._books.apply(channel, EndStreams())).account
        except ChannelFault as fault:
            if fault.reason is Reason.CHANNEL_FINALIZED:
                return  # closing ends them too
            raise
        await self._wait(account, lambda now: not now.streams)

    async def everything(self, channel: ChannelId) -> Account:
        """End every request of a channel; what does not end in time is fenced at what it last recorded."""
        account = await self._books.load(channel)
        assert account is not None
        if account.streams and account.phase is Phase.OPEN:
            account = (await self._books.apply(channel, EndStreams())).account
        account = await self._wait(account, lambda now: not now.holds)
        if account.holds:
            account = (await self._books.apply(channel, ReleaseOrphans())).account
        return account

    async def _wait(self, account: Account, done: Callable[[Account], bool]) -> Account:
        deadline = self._clock.monotonic() + PATIENCE_S
        while not done(account) and self._clock.monotonic() < deadline:
            await self._sleep(_POLL_S)
            account = await self._books.load(account.id) or account
        return account
