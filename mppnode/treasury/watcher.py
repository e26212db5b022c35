"""Looks at the chain for what payers do behind our back, and tells the books.

Two ways at once: the escrow's events since the last look name the channels that changed within seconds, and a sweep of
every channel that holds money of ours proves every few seconds that no event was missed. Both read a final block, so a
reorganisation cannot show us something that never happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from channels import escrow as escrow_v2
from channels import escrow_v1
from channels.chain import Chain, Head
from channels.descriptor import ChainSnapshot, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.model import Account, ObserveChain, Phase
from mppnode.kernel.clock import Clock
from mppnode.ledger.base import Ledger, Which
from mppnode.ledger.books import Books
from mppnode.observe.logs import Level, Log

_LOG_BLOCKS_MAX: Final = 2_000  # per query; RPC providers refuse much wider ones; 1,000 s of half-second blocks
_ASLEEP_EVERY: Final = 60  # sweeps between two looks at channels with nothing to lose: ten minutes
_OVER: Final = frozenset({Phase.CLOSED, Phase.CAPTURED})  # a capture in flight is the settler's to watch


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look brought."""

    head: Head
    changed: tuple[Account, ...]
    """Accounts whose chain facts are new, after the books have heard of it."""


class Watcher:
    """Compares the chain with the books; decides nothing."""

    def __init__(
        self, chain: Chain, ledger: Ledger, books: Books, *, escrows: Sequence[Escrow], clock: Clock, log: Log
    ) -> None:
        self._chain = chain
        self._ledger = ledger
        self._books = books
        self._escrows = escrows
        self._clock = clock
        self._log = log
        self._next_block: int | None = None
        self._sweeps = 0
        self.checked_at = clock.monotonic()
        """When a sweep last succeeded, on the monotonic clock."""

    async def glance(self) -> Seen:
        """Read the escrows' events since the last look. Raises ``CHAIN_UNAVAILABLE`` or ``STORE_UNAVAILABLE``."""
        head = await self._chain.finalised()
        first = head.number if self._next_block is None else self._next_block
        named: list[ChannelId] = []
        while first <= head.number:
            last = min(first + _LOG_BLOCKS_MAX - 1, head.number)
            for escrow in self._escrows:
                named += await self._named(escrow, first, last)
            first = last + 1
        known = [await self._books.load(channel) for channel in dict.fromkeys(named)]
        changed = await self._compare((account for account in known if account is not None), head)
        self._next_block = head.number + 1
        return Seen(head, changed)

    async def sweep(self) -> Seen:
        """Read the state of every channel with something to lose, and now and then of the others. Raises as above."""
        head = await self._chain.finalised()
        everyone = self._sweeps % _ASLEEP_EVERY == 0
        changed: list[Account] = []
        after = None
        while page := await self._ledger.page(Which.NOT_CLOSED, after=after):
            after = page[-1].id
            watched = [account for account in page if everyone or account.unsettled or account.holds]
            changed += await self._compare(watched, head)
        self._sweeps += 1
        self.checked_at = self._clock.monotonic()
        return Seen(head, tuple(changed))

    async def _named(self, escrow: Escrow, first: int, last: int) -> list[ChannelId]:
        names = escrow_v2 if escrow.protocol is SessionProtocol.V2 else escrow_v1
        kinds = (names.CLOSE_REQUESTED, names.CHANNEL_CLOSED, names.TOPPED_UP, names.SETTLED)
        logs = await self._chain.logs(escrow.address, topics=(kinds,), from_block=first, to_block=last)
        return [ChannelId(log.topics[1]) for log in logs if len(log.topics) > 1]

    async def _compare(self, accounts: Iterable[Account], head: Head) -> tuple[Account, ...]:
        changed: list[Account] = []
        watched = sorted((a for a in accounts if a.phase not in _OVER), key=lambda a: (a.escrow.protocol, a.id))
        for escrow, group in groupby(watched, key=lambda account: account.escrow):
            members = list(group)
            ids = [account.id for account in members]
            states = await self._chain.channel_states(escrow, ids, at_block=head.number)
            for account, state in zip(members, states, strict=True):
                if _facts(state) != _facts(account.chain) and (heard := await self._hear(account, state)) is not None:
                    changed.append(heard)
        return tuple(changed)

    async def _hear(self, account: Account, state: ChainSnapshot) -> Account | None:
        try:
            plan = await self._books.apply(account.id, ObserveChain(state))
        except ChannelFault as fault:
            if fault.reason is not Reason.CHANNEL_FINALIZED:
                raise
            return None
        if not plan.events:
            return None
        after = plan.account
        if after.phase is Phase.CLOSED and account.unsettled:
            self._log("channel.lost", level=Level.ERROR, channel="0x" + account.id.hex(), units=account.unsettled)
        if after.phase is Phase.SUSPECT and account.phase is not Phase.SUSPECT:
            self._log("channel.suspect", level=Level.ERROR, channel="0x" + account.id.hex(), settled=state.settled)
        return after


def _facts(state: ChainSnapshot) -> tuple[int, int, int | None]:
    """A snapshot without its block: a newer block that says the same is no news worth a write."""
    return state.deposit, state.settled, state.close_requested_at


