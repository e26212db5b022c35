"""Brings a ledger from an old backup up to date, from the voucher spool and the chain.

Rolling back is the enemy: an old ``accepted`` forgets signatures, an old ``spent`` forgets deliveries. Signatures prove
themselves, so the spool brings them back. Of what was consumed since the backup the chain knows what was settled, and
nothing else is ever settled; the rest is the node's loss, never the payer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from channels.account import plan
from channels.chain import Chain
from channels.descriptor import ChainSnapshot
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.instants import UnixSeconds
from channels.model import Account, Open, Phase, Restore
from channels.policy import Policy
from channels.signature import parse_signature
from channels.voucher import VoucherDomain, derive_channel_id
from mppnode.ledger.base import Ledger, Which
from mppnode.ledger.books import Books
from mppnode.ledger.spool import Spooled


@dataclass(frozen=True, slots=True)
class Change:
    """What restoring does to one channel; units. ``refused`` says why nothing can be done without people."""

    channel: ChannelId
    accepted: tuple[int, int]
    spent: tuple[int, int]
    phase: tuple[str, str]
    refused: str = ""


class Restorer:
    """Applies spool and chain to every channel; ``dry`` only says what it would do."""

    def __init__(
        self, ledger: Ledger, books: Books, chain: Chain, spooled: Mapping[ChannelId, Spooled], *, dry: bool
    ) -> None:
        self._ledger = ledger
        self._books = books
        self._chain = chain
        self._spooled = spooled
        self._dry = dry

    async def run(self) -> list[Change]:
        """Every change, in the order of the channel ids. Raises ``CHAIN_UNAVAILABLE`` or ``STORE_UNAVAILABLE``."""
        known: dict[ChannelId, Account] = {}
        after = None
        while page := await self._ledger.page(Which.ALL, after=after):
            after = page[-1].id
            known |= {account.id: account for account in page if account.phase is not Phase.CLOSED}
        closed = [channel for channel in self._spooled if channel not in known and await self._ledger.load(channel)]
        wanted = sorted({*known, *self._spooled} - set(closed))
        changes = [await self._one(channel, known.get(channel)) for channel in wanted]
        return [change for change in changes if change is not None]

    async def _one(self, channel: ChannelId, account: Account | None) -> Change | None:
        spooled = self._spooled.get(channel)
        source = account or spooled
        assert source is not None, "a channel is listed because the books or the spool have it"
        block = (await self._chain.finalised()).number
        state = await self._chain.channel_state(source.escrow, channel, at_block=block)
        try:
            command = self._command(channel, account, spooled, state)
            if command is None:
                return None
            if self._dry:
                # The policy's limits are for payers; what is in the books already stays there.
                after = plan(account, command, now=UnixSeconds(0), policy=Policy()).account
            else:
                after = (await self._books.apply(channel, command)).account
        except ChannelFault as fault:
            return _change(channel, account, account, fault.message)
        change = _change(channel, account, after, "")
        return change if account is None or _differs(change) else None

    def _command(
        self, channel: ChannelId, account: Account | None, spooled: Spooled | None, state: ChainSnapshot
    ) -> Open | Restore | None:
        vouchers = () if spooled is None else tuple(v for v in spooled.vouchers if v.cumulative <= state.deposit)
        if spooled is not None:
            # A spool is a file, and files are edited: only what the payer really signed counts.
            domain = VoucherDomain(spooled.escrow)
            if derive_channel_id(spooled.escrow, spooled.descriptor) != channel:
                raise ChannelFault(Reason.DESCRIPTOR_MISMATCH, field="spool", detail="has other terms for this channel")
            signer = spooled.descriptor.signer
            for voucher in vouchers:
                domain.verify(channel, voucher.cumulative, parse_signature(voucher.signature), signer)
        if account is not None:
            return Restore(state, vouchers)
        if state.deposit == 0 or not vouchers:
            return None  # opened and closed since the backup: nothing is left to do for it
        assert spooled is not None
        return Open(channel, spooled.escrow, spooled.descriptor, state, vouchers[-1])


def _change(channel: ChannelId, before: Account | None, after: Account | None, refused: str) -> Change:
    def figures(account: Account | None) -> tuple[int, int, str]:
        return (0, 0, "unknown") if account is None else (account.accepted, account.spent, account.phase.value)

    (a, s, p), (a2, s2, p2) = figures(before), figures(after)
    return Change(channel, (a, a2), (s, s2), (p, p2), refused)


def _differs(change: Change) -> bool:
    return any(pair[0] != pair[1] for pair in (change.accepted, change.spent, change.phase))
