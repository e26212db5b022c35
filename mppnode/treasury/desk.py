"""Brings payers' transactions to the chain: opens and top-ups. Our own are ``settler.py``'s.

A payer's transaction is broadcast once per node: repeats wait for the first, and a channel that already exists on the
chain is taken as the answer of an earlier broadcast whose reply was lost. It counts when its block can no longer be
replaced, never before: a reorganised deposit would have paid for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from channels import escrow as escrow_v2
from channels import escrow_v1
from channels.chain import Chain, Confirmed, Receipt
from channels.descriptor import ChainSnapshot, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.model import Account
from channels.tempo_tx import Form, SignedTx
from channels.verify import (
    Terms,
    VerifiedOpen,
    confirm_open,
    confirm_top_up,
    verify_open,
    verify_top_up,
)
from channels.wire.credential import OpenPayload, TopUpPayload
from mppnode.kernel.clock import Clock
from mppnode.kernel.probe import Probe, unwatched
from mppnode.treasury.sponsor import Sponsor

_OPENED_BLOCKS_BACK = 2_000  # a transaction lives half a minute, so an open that is repeated is no older than a few
_FINAL_POLL_S = 0.25
_FINAL_WAIT_S = 20.0  # a mined block that is not final by then leaves the outcome unknown; a repeat finds it


class ChainDesk:
    """Implements the session rail's ``ChainIntents`` over a chain and the payee's key."""

    def __init__(
        self,
        chain: Chain,
        *,
        terms: Mapping[SessionProtocol, Terms],
        clock: Clock,
        sponsor: Sponsor | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        probe: Probe = unwatched,
    ) -> None:
        self._chain = chain
        self._terms = terms
        self._clock = clock
        self._sponsor = sponsor
        self._sleep = sleep
        self._probe = probe
        self._opening: dict[ChannelId, asyncio.Future[Confirmed]] = {}

    @property
    def sponsoring(self) -> bool:
        """Whether challenges should offer to pay fees just now; what such an offer brought is paid for later too."""
        return self._sponsor is not None and self._sponsor.offering

    def inspect_open(self, escrow: Escrow, payload: OpenPayload) -> VerifiedOpen:
        """See :func:`channels.verify.verify_open`."""
        return verify_open(payload, self._terms[escrow.protocol], now=self._clock.now())

    async def open(
        self, escrow: Escrow, payload: OpenPayload, opened: VerifiedOpen, *, expires: UnixSeconds
    ) -> Confirmed:
        """Broadcast an inspected open; parallel repeats share one broadcast.

        Raises:
            ChannelFault: ``CHAIN_REJECTED``, ``CHAIN_UNAVAILABLE`` or ``CHAIN_OUTCOME_UNKNOWN``; when its fee is left
                to us also ``TRANSACTION_REJECTED`` and ``RATE_LIMITED``.
        """
        return await self._once(payload.channel_id, lambda: self._open(escrow, payload.channel_id, opened, expires))

    async def _open(
        self, escrow: Escrow, channel: ChannelId, opened: VerifiedOpen, expires: UnixSeconds
    ) -> Confirmed:
        # Pinned to a final block, where two nodes must agree: this read alone is taken as proof of a deposit.
        found = await self._chain.channel_state(escrow, channel, at_block=(await self._chain.finalised()).number)
        if found.deposit:  # an earlier broadcast landed and its answer was lost
            return Confirmed(await self._opened_by(escrow, channel, found.block), found)
        signed = await self._paid(
            opened.signed, lambda sponsor: sponsor.pay_for_open(opened, escrow, expires=expires)
        )
        receipt = await self._send(signed.raw)
        confirm_open(opened, channel, escrow, receipt.logs)
        state = await self._chain.channel_state(escrow, channel, at_block=receipt.block)
        if state.deposit != opened.deposit or state.settled or state.close_requested_at is not None:
            raise ChannelFault(Reason.CHAIN_REJECTED, detail="the escrow does not hold the deposit that was sent")
        return Confirmed(receipt.tx_hash, state)

    async def _opened_by(self, escrow: Escrow, channel: ChannelId, block: int) -> Hash32:
        """The transaction that opened a channel: the log's, since a fee payer's signature changes the hash."""
        names = escrow_v2 if escrow.protocol is SessionProtocol.V2 else escrow_v1
        logs = await self._chain.logs(
            escrow.address,
            topics=(names.CHANNEL_OPENED, Hash32(channel)),
            from_block=max(block - _OPENED_BLOCKS_BACK, 0),
            to_block=block,
        )
        if not logs:
            raise ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN, detail="the channel is open and its open was not found")
        return logs[0].tx_hash

    async def _paid(self, signed: SignedTx, pay: Callable[[Sponsor], Awaitable[SignedTx]]) -> SignedTx:
        """The complete transaction: as it is, or with our signature under its fee."""
        if signed.form is Form.COMPLETE:
            return signed
        assert self._sponsor is not None, "verified with sponsored terms"
        try:
            return await pay(self._sponsor)
        except ChannelFault as fault:
            known = await self._sponsor.find(signed) if fault.reason is Reason.CHAIN_REJECTED else None
            if known is None:
                raise
            return known

    async def top_up(self, account: Account, payload: TopUpPayload, *, expires: UnixSeconds) -> Confirmed:
        """Check, broadcast and confirm a top-up; parallel repeats share one broadcast. Raises as :meth:`open`."""
        terms = self._terms[account.escrow.protocol]
        signed = verify_top_up(payload, account.id, account.descriptor, terms, now=self._clock.now())

        async def run() -> Confirmed:
            complete = await self._paid(
                signed,
                lambda sponsor: sponsor.pay_for_top_up(
                    signed, account.descriptor, payload.additional_deposit, account.escrow, expires=expires
                ),
            )
            receipt = await self._send(complete.raw)
            confirm_top_up(payload.additional_deposit, account.id, account.escrow, receipt.logs)
            state = await self._chain.channel_state(account.escrow, account.id, at_block=receipt.block)
            return Confirmed(receipt.tx_hash, state)

        # By what no fee payer can change; the hash of a transaction without one does not exist yet.
        return await self._once(ChannelId(signed.expiring_nonce_hash), run)

    async def observe(self, account: Account) -> ChainSnapshot:
        """The escrow's word on a channel at the newest final block. Raises ``CHAIN_UNAVAILABLE``.

        A withdrawal in a block that is then replaced would end the channel in the books for ever.
        """
        block = (await self._chain.finalised()).number
        return await self._chain.channel_state(account.escrow, account.id, at_block=block)

    async def _send(self, raw: bytes) -> Receipt:
        self._probe("payer_broadcast.before")
        receipt = await self._final(await self._chain.broadcast(raw))
        self._probe("payer_broadcast.after")
        if not receipt.succeeded:
            raise ChannelFault(Reason.CHAIN_REJECTED, detail="the transaction reverted")
        return receipt

    async def _final(self, receipt: Receipt) -> Receipt:
        """Wait until a receipt's block is final and read it again: a reorganisation may have dropped or moved it."""
        deadline = self._clock.monotonic() + _FINAL_WAIT_S
        while (await self._chain.finalised()).number < receipt.block:
            if self._clock.monotonic() >= deadline:
                raise ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN, field="transaction", detail="is not final yet")
            await self._sleep(_FINAL_POLL_S)
        again = await self._chain.receipt(receipt.tx_hash)
        if again is None:
            raise ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN, field="transaction", detail="lost its block")
        return again

    async def _once(self, key: ChannelId, run: Callable[[], Awaitable[Confirmed]]) -> Confirmed:
        """Run ``run`` unless the same work is in flight; then wait for that."""
        running = self._opening.get(key)
        if running is not None:
            return await _join(running)
        future: asyncio.Future[Confirmed] = asyncio.get_running_loop().create_future()
        self._opening[key] = future
        try:
            confirmed = await run()
        except BaseException as error:
            future.set_exception(error if isinstance(error, ChannelFault) else _unknown())
            future.exception()  # mark as seen: there may be nobody else waiting
            raise
        else:
            future.set_result(confirmed)
            return confirmed
        finally:
            del self._opening[key]


async def _join(future: asyncio.Future[Confirmed]) -> Confirmed:
    # Not awaited directly: cancelling one waiter would cancel the future for everybody.
    await asyncio.wait({future})
    return future.result()


def _unknown() -> ChannelFault:
    return ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN, detail="the request that sent this transaction was interrupted")
