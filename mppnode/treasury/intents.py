"""Opens, tops up and closes channels on chain. The only code of the node that signs and broadcasts (design D14).

A payer's transaction is broadcast once per node: repeats wait for the first, and a channel that already exists on the
chain is taken as the answer of an earlier broadcast whose reply was lost. Our own close is signed only from a CAPTURED
account, whose capture can no longer change, so sending it again after a crash cannot take a different amount.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from channels import escrow as escrow_v2
from channels import escrow_v1
from channels.chain import Chain, Confirmed, Receipt
from channels.descriptor import ChainSnapshot, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, Hash32
from channels.model import Account, Voucher
from channels.signature import address_of
from channels.tempo_tx import Call
from channels.units import Units
from channels.verify import (
    Terms,
    VerifiedOpen,
    closed_in,
    confirm_open,
    confirm_top_up,
    verify_open,
    verify_top_up,
)
from channels.wire.credential import OpenPayload, TopUpPayload
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import Clock

_LOG_BLOCKS_BACK = 100_000  # how far a lost close is searched for: more than a day of half-second blocks


class ChainDesk:
    """Implements the session rail's ``ChainIntents`` over a chain and the payee's key."""

    def __init__(
        self,
        chain: Chain,
        *,
        terms: Mapping[SessionProtocol, Terms],
        key: Secret[bytes],
        fee_token: Address,
        clock: Clock,
        entropy: Callable[[int], bytes],
    ) -> None:
        self._chain = chain
        self._terms = terms
        self._key = key
        self._payee = address_of(key.reveal())
        self._fee_token = fee_token
        self._clock = clock
        self._entropy = entropy
        self._opening: dict[ChannelId, asyncio.Future[Confirmed]] = {}

    def inspect_open(self, escrow: Escrow, payload: OpenPayload) -> VerifiedOpen:
        """See :func:`channels.verify.verify_open`."""
        return verify_open(payload, self._terms[escrow.protocol], now=self._clock.now())

    async def open(self, escrow: Escrow, payload: OpenPayload, opened: VerifiedOpen) -> Confirmed:
        """Broadcast an inspected open; parallel repeats share one broadcast.

        Raises:
            ChannelFault: ``CHAIN_REJECTED``, ``CHAIN_UNAVAILABLE`` or ``CHAIN_OUTCOME_UNKNOWN``.
        """
        return await self._once(payload.channel_id, lambda: self._open(escrow, payload.channel_id, opened))

    async def _open(self, escrow: Escrow, channel: ChannelId, opened: VerifiedOpen) -> Confirmed:
        found = await self._chain.channel_state(escrow, channel)
        if found.deposit:  # an earlier broadcast landed and its answer was lost
            return Confirmed(opened.signed.tx_hash, found)
        receipt = await self._send(opened.signed.raw)
        confirm_open(opened, channel, escrow, receipt.logs)
        state = await self._chain.channel_state(escrow, channel, at_block=receipt.block)
        if state.deposit != opened.deposit or state.settled or state.close_requested_at is not None:
            raise ChannelFault(Reason.CHAIN_REJECTED, detail="the escrow does not hold the deposit that was sent")
        return Confirmed(receipt.tx_hash, state)

    async def top_up(self, account: Account, payload: TopUpPayload) -> Confirmed:
        """Check, broadcast and confirm a top-up; parallel repeats share one broadcast. Raises as :meth:`open`."""
        terms = self._terms[account.escrow.protocol]
        signed = verify_top_up(payload, account.id, account.descriptor, terms, now=self._clock.now())

        async def run() -> Confirmed:
            receipt = await self._send(signed.raw)
            confirm_top_up(payload.additional_deposit, account.id, account.escrow, receipt.logs)
            state = await self._chain.channel_state(account.escrow, account.id, at_block=receipt.block)
            return Confirmed(receipt.tx_hash, state)

        return await self._once(ChannelId(signed.tx_hash), run)

    async def observe(self, account: Account) -> ChainSnapshot:
        """The escrow's word on a channel at the newest block. Raises ``CHAIN_UNAVAILABLE``."""
        return await self._chain.channel_state(account.escrow, account.id)

    async def close(self, account: Account) -> Confirmed:
        """Capture a CAPTURED account's fixed amount and refund the rest; safe to repeat after a crash.

        Raises:
            ChannelFault: ``CHAIN_REJECTED`` when it surely did not and will not happen, ``CHAIN_UNAVAILABLE`` when it
                was not sent, ``CHAIN_OUTCOME_UNKNOWN`` when it may yet happen, ``CHANNEL_FINALIZED`` when the payer
                has withdrawn.
        """
        record = account.close
        assert record is not None, "close follows BeginClose"
        assert record.capture is not None, "close follows FixCapture"
        before = await self._chain.channel_state(account.escrow, account.id)
        if before.deposit == 0:
            return await self._found_closed(account, record.capture, before)
        call = Call(account.escrow.address, _close_call(account, record.capture))
        tx = await self._chain.prepare(self._payee, (call,), fee_token=self._fee_token, entropy=self._entropy(8))
        try:
            receipt = await self._send(tx.sign(self._key.reveal()).raw)
        except ChannelFault as fault:
            # It also reverts when an earlier attempt of ours, thought lost, was mined just before it.
            after = await self._chain.channel_state(account.escrow, account.id)
            if fault.reason is Reason.CHAIN_REJECTED and after.deposit == 0:
                return await self._found_closed(account, record.capture, after)
            raise
        closed = closed_in(account.id, account.escrow, receipt.logs)
        if closed is None or closed.settled != record.capture:
            raise ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN, detail="the close paid another amount than was fixed")
        after = await self._chain.channel_state(account.escrow, account.id, at_block=receipt.block)
        return Confirmed(receipt.tx_hash, after)

    async def _found_closed(self, account: Account, capture: Units, state: ChainSnapshot) -> Confirmed:
        """The transaction that closed a channel we find closed, if it was ours and its receipt was lost.

        Raises:
            ChannelFault: ``CHANNEL_FINALIZED`` when the payer withdrew instead: nothing was captured then.
        """
        names = escrow_v2 if account.escrow.protocol is SessionProtocol.V2 else escrow_v1
        logs = await self._chain.logs(
            account.escrow.address,
            topics=(names.CHANNEL_CLOSED, Hash32(account.id)),
            from_block=max(state.block - _LOG_BLOCKS_BACK, 0),
            to_block=state.block,
        )
        closed = closed_in(account.id, account.escrow, logs)
        if closed is None:
            raise ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN, detail="the channel is gone and its close was not found")
        if closed.settled != capture:
            raise ChannelFault(Reason.CHANNEL_FINALIZED, detail="the channel was closed by somebody else")
        return Confirmed(logs[-1].tx_hash, state)

    async def _send(self, raw: bytes) -> Receipt:
        receipt = await self._chain.broadcast(raw)
        if not receipt.succeeded:
            raise ChannelFault(Reason.CHAIN_REJECTED, detail="the transaction reverted")
        return receipt

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


def _close_call(account: Account, capture: Units) -> bytes:
    """Calldata that pays ``capture`` and nothing more."""
    highest = account.ladder[-1]
    if account.escrow.protocol is SessionProtocol.V2:
        return escrow_v2.encode_close(account.descriptor, highest.cumulative, capture, highest.signature)
    rung = next((rung for rung in account.ladder if rung.cumulative == capture), Voucher(capture, b""))
    return escrow_v1.encode_close(account.id, rung.cumulative, rung.signature)
