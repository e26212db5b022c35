"""Brings a channel to its end: end its requests everywhere, fix the capture, tell the chain, write it down.

The order is the law: the capture is durable before anything is signed, and it can no longer change then, so sending the
close again after a crash cannot take a different amount. A channel is opened again only when the chain surely will not
include any close of ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import chain as chained
from itertools import repeat
from typing import Final
from weakref import WeakValueDictionary

from channels.chain import Chain
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.intent import IntentKind
from channels.model import AbortClose, Account, BeginClose, ConfirmClosed, FixCapture, ObserveChain, Phase
from mppnode.kernel.clock import Clock
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger.base import Ledger, Which
from mppnode.ledger.books import Books
from mppnode.ledger.ending import Ending
from mppnode.treasury.settler import Settler

_MAY_YET_HAPPEN: Final = frozenset(
    {Reason.CHAIN_UNAVAILABLE, Reason.CHAIN_OUTCOME_UNKNOWN, Reason.CHAIN_REJECTED, Reason.CHANNEL_BUSY}
)
_RETRY_S: Final = (2, 5, 10)
"""Never rarer: an RPC that comes back for half a minute before the payer may withdraw must be found in time."""
OURS: Final = "node:"
"""Prefix of the challenge id in the close record of a channel the node closes by its own wish."""


class Closer:
    """Closes channels for payers and for the treasury."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        books: Books,
        settler: Settler,
        chain: Chain,
        ending: Ending,
        quiesce: Callable[[ChannelId], Awaitable[None]],
        owner: TaskOwner,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._ledger = ledger
        self._books = books
        self._settler = settler
        self._chain = chain
        self._ending = ending
        self._quiesce = quiesce
        self._owner = owner
        self._clock = clock
        self._sleep = sleep
        # A lock lives as long as somebody holds or awaits it.
        self._locks: WeakValueDictionary[ChannelId, asyncio.Lock] = WeakValueDictionary()
        self._later: dict[ChannelId, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def closing(self, channel: ChannelId) -> AsyncIterator[None]:
        """One close of a channel at a time in this process: a second transaction could only revert, at our cost."""
        lock = self._locks.get(channel) or self._locks.setdefault(channel, asyncio.Lock())
        async with lock:
            yield

    def busy(self, channel: ChannelId) -> bool:
        """Whether this process is closing a channel now or has planned to go on with it."""
        lock = self._locks.get(channel)
        return channel in self._later or (lock is not None and lock.locked())

    async def end_requests(self, channel: ChannelId) -> None:
        """End what runs on a channel, here and elsewhere, each billed as exactly as can be."""
        await self._quiesce(channel)
        await self._ending.everything(channel)

    async def close(self, account: Account, why: str, *, deadline: UnixSeconds | None = None) -> tuple[Account, Hash32]:
        """Close a channel by the node's own wish, from any phase that can still lead there.

        Raises:
            ChannelFault: as :meth:`finish`.
        """
        async with self.closing(account.id):
            if account.phase in (Phase.OPEN, Phase.CONTESTED):
                await self._books.apply(account.id, BeginClose(f"{OURS}{why}", None))
            return await self.finish(account.id, first=False, deadline=deadline)

    async def finish(
        self, channel: ChannelId, *, first: bool, deadline: UnixSeconds | None = None
    ) -> tuple[Account, Hash32]:
        """Bring a CLOSING or CAPTURED channel to its end; call it inside :meth:`closing`.

        ``first`` says that no transaction of this close can exist yet: only then may a refusal open the channel again.

        Raises:
            ChannelFault: ``CHAIN_UNAVAILABLE`` or ``CHAIN_OUTCOME_UNKNOWN``: go on :meth:`later`. ``CHAIN_REJECTED``:
                not this time. ``CHANNEL_FINALIZED``: the payer has withdrawn or somebody else has closed it.
        """
        await self.end_requests(channel)
        plan = await self._books.apply(channel, FixCapture())
        account = plan.account
        assert account.close is not None
        assert account.close.capture is not None
        try:
            landed = await self._settler.bring(account, IntentKind.CLOSE, account.close.capture, deadline=deadline)
        except ChannelFault as fault:
            if fault.reason is Reason.CHAIN_REJECTED and first:
                # Unless another process has taken the close over meanwhile: its transaction may yet land.
                if not await self._ledger.intents(active=True, channel=channel):
                    await self._books.apply(channel, AbortClose())
            elif fault.reason is Reason.CHANNEL_FINALIZED:
                block = (await self._chain.finalised()).number
                seen = await self._chain.channel_state(account.escrow, account.id, at_block=block)
                await self._books.apply(channel, ObserveChain(seen))
            raise
        closed = await self._books.apply(channel, ConfirmClosed(landed.tx_hash, landed.chain))
        return closed.account, landed.tx_hash

    async def resume(self) -> None:
        """Take up the closes a crash interrupted; each goes on in the background until the chain has answered."""
        after = None
        while page := await self._ledger.page(Which.NOT_CLOSED, after=after):
            after = page[-1].id
            for account in page:
                if account.phase in (Phase.CLOSING, Phase.CAPTURED):
                    self.later(account.id, at_once=True)

    def later(self, channel: ChannelId, *, at_once: bool = False) -> None:
        """Go on with a close in the background, ever less often, until the chain has answered."""
        if channel not in self._later:
            task = self._owner.start(self._keep_closing(channel, at_once=at_once), name="close channel")
            self._later[channel] = task
            task.add_done_callback(lambda _: self._later.pop(channel, None))

    async def _keep_closing(self, channel: ChannelId, *, at_once: bool) -> None:
        for delay_s in chained((0,) if at_once else (), _RETRY_S, repeat(_RETRY_S[-1])):
            await self._sleep(delay_s)
            try:
                async with self.closing(channel):
                    await self.finish(channel, first=False)
            except ChannelFault as fault:
                if fault.reason not in _MAY_YET_HAPPEN:
                    return  # already closed by another attempt or by the payer, or stopped with the ledger
            else:
                return
