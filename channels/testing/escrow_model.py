"""Both escrows in memory, judging: what the contracts would revert raises :class:`EscrowRevert`.

Rules are TIP-1034's for v2 and the published contract's for v1. Where a signature is checked only the canonical form
counts: the v2 precompile takes a few more, and a test double that is stricter than the world cannot hide a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from channels import escrow as v2
from channels import escrow_v1 as v1
from channels.abi import WORD, Log, Words, arguments, encode
from channels.descriptor import CLOSE_GRACE_S, RESERVE_ADDRESS, Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.signature import parse_signature
from channels.tempo_tx import Call
from channels.testing.token_model import Cells, EscrowRevert, Journal, TokenModel
from channels.units import MAX_UINT96, Units
from channels.voucher import VoucherDomain, derive_channel_id

_UINT128_MAX: Final = 2**128 - 1
_NEVER: Final = UnixSeconds(0)


@dataclass(frozen=True, slots=True)
class Context:
    """Who calls, when, and in which transaction (zero for a read)."""

    sender: Address
    now: UnixSeconds
    nonce_hash: Hash32
    at_block: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A v2 channel's only stored word. All zeros means never opened, or closed: the chain cannot tell either."""

    settled: Units = Units(0)
    deposit: Units = Units(0)
    requested_at: UnixSeconds = _NEVER


_EMPTY: Final = Slot()
_NO_STREAM: Final = v1.ChannelState(
    finalized=False,
    close_requested_at=None,
    payer=ZERO_ADDRESS,
    payee=ZERO_ADDRESS,
    token=ZERO_ADDRESS,
    authorized_signer=ZERO_ADDRESS,
    deposit=Units(0),
    settled=Units(0),
)


def _check_signature(
    domain: VoucherDomain, channel_id: ChannelId, cumulative: int, signature: bytes, signer: Address
) -> None:
    try:
        domain.verify(channel_id, cumulative, parse_signature(signature), signer)
    except ChannelFault:
        raise EscrowRevert("InvalidSignature") from None


class ReserveModel:
    """The v2 channel reserve. Amounts are base units; every method is one contract call of one sender."""

    def __init__(self, escrow: Escrow, journal: Journal, tokens: TokenModel) -> None:
        self.escrow = escrow
        self._domain = VoucherDomain(escrow)
        self._journal = journal
        self._tokens = tokens
        self.slots: Cells[ChannelId, Slot] = Cells(journal, _EMPTY)

    def open(self, context: Context, call: v2.OpenCall) -> ChannelId:
        """Take the deposit from the sender, without approval, and create the channel."""
        if call.payee == ZERO_ADDRESS:
            raise EscrowRevert("InvalidPayee")
        if call.deposit == 0:
            raise EscrowRevert("ZeroDeposit")
        descriptor = Descriptor(
            payer=context.sender,
            payee=call.payee,
            operator=call.operator,
            token=call.token,
            salt=call.salt,
            authorized_signer=call.authorized_signer,
            expiring_nonce_hash=context.nonce_hash,
        )
        channel_id = derive_channel_id(self.escrow, descriptor)
        if self.slots[channel_id] != _EMPTY:
            raise EscrowRevert("ChannelAlreadyExists")
        self._tokens.transfer(call.token, context.sender, self.escrow.address, call.deposit)
        self.slots[channel_id] = Slot(deposit=call.deposit)
        self._emit(v2.ChannelOpened(channel_id, descriptor, call.deposit))
        return channel_id

    def top_up(self, context: Context, call: v2.TopUpCall) -> None:
        """Add to the deposit; also takes a close request back."""
        channel_id, slot, parties = self._find(call.descriptor)
        self._only(context.sender == call.descriptor.payer, "NotPayer")
        if call.additional == 0:
            raise EscrowRevert("ZeroDeposit")
        if slot.deposit + call.additional > MAX_UINT96:
            raise EscrowRevert("DepositOverflow")
        self._tokens.transfer(call.descriptor.token, context.sender, self.escrow.address, call.additional)
        deposit = Units(slot.deposit + call.additional)
        self.slots[channel_id] = Slot(slot.settled, deposit)
        if slot.requested_at:
            self._emit(v2.CloseRequestCancelled(channel_id, *parties))
        self._emit(v2.ToppedUp(channel_id, *parties, call.additional, deposit))

    def settle(self, context: Context, descriptor: Descriptor, cumulative: Units, signature: bytes) -> None:
        """Pay the voucher's whole amount to the payee."""
        channel_id, slot, parties = self._find(descriptor)
        self._only(self._may_settle(context.sender, descriptor), "NotPayeeOrOperator")
        if cumulative <= slot.settled:
            raise EscrowRevert("AmountNotIncreasing")
        if cumulative > slot.deposit:
            raise EscrowRevert("AmountExceedsDeposit")
        _check_signature(self._domain, channel_id, cumulative, signature, descriptor.signer)
        paid = Units(cumulative - slot.settled)
        self.slots[channel_id] = replace(slot, settled=cumulative)
        self._pay(descriptor, paid)
        self._emit(v2.Settled(channel_id, *parties, cumulative, paid, cumulative))

    def close(
        self, context: Context, descriptor: Descriptor, cumulative: Units, capture: Units, signature: bytes
    ) -> None:
        """Pay the payee up to ``capture`` in total, the payer the rest, and forget the channel."""
        channel_id, slot, _ = self._find(descriptor)
        self._only(self._may_settle(context.sender, descriptor), "NotPayeeOrOperator")
        if not slot.settled <= capture <= cumulative:
            raise EscrowRevert("CaptureAmountInvalid")
        if capture > slot.deposit:
            raise EscrowRevert("AmountExceedsDeposit")
        if capture > slot.settled:
            _check_signature(self._domain, channel_id, cumulative, signature, descriptor.signer)
        self._finish(channel_id, slot, descriptor, capture)

    def request_close(self, context: Context, descriptor: Descriptor) -> None:
        """Start the grace period; asking again does not restart it."""
        channel_id, slot, parties = self._find(descriptor)
        self._only(context.sender == descriptor.payer, "NotPayer")
        if not slot.requested_at:
            self.slots[channel_id] = replace(slot, requested_at=context.now)
            self._emit(v2.CloseRequested(channel_id, *parties, UnixSeconds(context.now + CLOSE_GRACE_S)))

    def withdraw(self, context: Context, descriptor: Descriptor) -> None:
        """Give the payer what was not settled, from the end of the grace period on."""
        channel_id, slot, _ = self._find(descriptor)
        self._only(context.sender == descriptor.payer, "NotPayer")
        if not slot.requested_at or context.now < slot.requested_at + CLOSE_GRACE_S:
            raise EscrowRevert("CloseNotReady")
        self._finish(channel_id, slot, descriptor, slot.settled)

    def call(self, context: Context, data: bytes) -> bytes:
        """One contract call by its calldata."""
        name, read = data[:4], Words(data[4:], heads=0, field="data")
        match name:
            case v2.OPEN:
                return encode(self.open(context, v2.decode_open(data)))
            case v2.TOP_UP:
                self.top_up(context, v2.decode_top_up(data))
            case v2.SETTLE:
                read = arguments(data, name, heads=9, field="data")
                descriptor, cumulative = v2.read_descriptor(read), Units(read.uint(96))
                self.settle(context, descriptor, cumulative, read.dynamic(length_max=v2.SIGNATURE_MAX))
                read.end()
            case v2.CLOSE:
                read = arguments(data, name, heads=10, field="data")
                descriptor, cumulative, capture = v2.read_descriptor(read), Units(read.uint(96)), Units(read.uint(96))
                self.close(context, descriptor, cumulative, capture, read.dynamic(length_max=v2.SIGNATURE_MAX))
                read.end()
            case v2.REQUEST_CLOSE:
                self.request_close(context, v2.read_descriptor(arguments(data, name, heads=7, field="data")))
            case v2.WITHDRAW:
                self.withdraw(context, v2.read_descriptor(arguments(data, name, heads=7, field="data")))
            case _:
                return self._view(context, data)
        return b""

    def _view(self, context: Context, data: bytes) -> bytes:
        match data[:4]:
            case v2.GET_CHANNEL:
                descriptor = v2.read_descriptor(Words(data[4:], heads=7, field="data"))
                slot = self.slots.at(derive_channel_id(self.escrow, descriptor), context.at_block)
                return data[4:] + encode(slot.settled, slot.deposit, slot.requested_at)
            case v2.GET_CHANNEL_STATE:
                channel_id = ChannelId(Words(data[4:], heads=1, field="data").hash32())
                slot = self.slots.at(channel_id, context.at_block)
                return encode(slot.settled, slot.deposit, slot.requested_at)
            case v2.GET_CHANNEL_STATES:
                count = len(data[4:]) // WORD - 2
                words = Words(data[4:], heads=2 + count, field="data")
                if (words.uint(256), words.uint(256)) != (WORD, count):
                    raise EscrowRevert("InvalidCalldata")
                ids = [ChannelId(words.hash32()) for _ in range(count)]
                words.end()
                slots = [self.slots.at(channel_id, context.at_block) for channel_id in ids]
                values = [value for slot in slots for value in (slot.settled, slot.deposit, slot.requested_at)]
                return encode(WORD, count, *values)
            case v2.COMPUTE_CHANNEL_ID:
                return derive_channel_id(self.escrow, v2.read_descriptor(Words(data[4:], heads=7, field="data")))
            case v2.GET_VOUCHER_DIGEST:
                words = Words(data[4:], heads=2, field="data")
                return self._domain.digest(ChannelId(words.hash32()), words.uint(96))
            case v2.DOMAIN_SEPARATOR:
                return self._domain.separator
            case _:
                raise EscrowRevert("UnknownFunction")

    def _find(self, descriptor: Descriptor) -> tuple[ChannelId, Slot, tuple[Address, Address]]:
        channel_id = derive_channel_id(self.escrow, descriptor)
        slot = self.slots[channel_id]
        if slot == _EMPTY:
            raise EscrowRevert("ChannelNotFound")
        return channel_id, slot, (descriptor.payer, descriptor.payee)

    def _finish(self, channel_id: ChannelId, slot: Slot, descriptor: Descriptor, capture: Units) -> None:
        self.slots[channel_id] = _EMPTY
        refund = Units(slot.deposit - capture)
        if capture > slot.settled:
            self._pay(descriptor, capture - slot.settled)
        if refund:
            self._tokens.transfer(descriptor.token, self.escrow.address, descriptor.payer, refund)
        self._emit(v2.ChannelClosed(channel_id, descriptor.payer, descriptor.payee, capture, refund))

    def _pay(self, descriptor: Descriptor, amount: int) -> None:
        # The money is the payer's until it is paid out: a payer the token's policy has blocked since then cannot pay.
        self._tokens.require_allowed(descriptor.payer)
        self._tokens.transfer(descriptor.token, self.escrow.address, descriptor.payee, amount)

    @staticmethod
    def _may_settle(sender: Address, descriptor: Descriptor) -> bool:
        return sender == descriptor.payee or (sender == descriptor.operator and sender != ZERO_ADDRESS)

    @staticmethod
    def _only(allowed: bool, name: str) -> None:  # noqa: FBT001 - reads as the contract's modifier
        if not allowed:
            raise EscrowRevert(name)

    def _emit(self, event: v2.Event) -> None:
        self._journal.logs.append(v2.encode_event(self.escrow, event))


class StreamModel:
    """The v1 stream channel contract. Amounts are base units; every method is one contract call of one sender."""

    def __init__(self, escrow: Escrow, journal: Journal, tokens: TokenModel) -> None:
        self.escrow = escrow
        self._domain = VoucherDomain(escrow)
        self._journal = journal
        self._tokens = tokens
        self.channels: Cells[ChannelId, v1.ChannelState] = Cells(journal, _NO_STREAM)

    def open(self, context: Context, call: v1.OpenCall) -> ChannelId:
        """Take the approved deposit from the sender and create the channel."""
        if call.payee == ZERO_ADDRESS:
            raise EscrowRevert("InvalidPayee")
        descriptor = call.descriptor(context.sender)
        channel_id = derive_channel_id(self.escrow, descriptor)
        if self.channels[channel_id] != _NO_STREAM:
            raise EscrowRevert("ChannelAlreadyExists")
        self._pull(call.token, context.sender, call.deposit)
        self.channels[channel_id] = v1.ChannelState(
            finalized=False,
            close_requested_at=None,
            payer=context.sender,
            payee=call.payee,
            token=call.token,
            authorized_signer=call.authorized_signer,
            deposit=call.deposit,
            settled=Units(0),
        )
        self._emit(v2.ChannelOpened(channel_id, descriptor, call.deposit))
        return channel_id

    def top_up(self, context: Context, call: v1.TopUpCall) -> None:
        """Add to the deposit; also takes a close request back."""
        state = self._find(call.channel_id)
        if context.sender != state.payer:
            raise EscrowRevert("NotPayer")
        if state.deposit + call.additional > _UINT128_MAX:
            raise EscrowRevert("DepositOverflow")
        self._pull(state.token, context.sender, call.additional)
        deposit = Units(state.deposit + call.additional)
        self.channels[call.channel_id] = replace(state, deposit=deposit, close_requested_at=None)
        if state.close_requested_at is not None:
            self._emit(v2.CloseRequestCancelled(call.channel_id, state.payer, state.payee))
        self._emit(v2.ToppedUp(call.channel_id, state.payer, state.payee, call.additional, deposit))

    def settle(self, context: Context, channel_id: ChannelId, cumulative: Units, signature: bytes) -> None:
        """Pay the voucher's whole amount to the payee."""
        state = self._find(channel_id)
        if context.sender != state.payee:
            raise EscrowRevert("NotPayee")
        if cumulative <= state.settled:
            raise EscrowRevert("AmountNotIncreasing")
        self._check(channel_id, state, cumulative, signature)
        paid = Units(cumulative - state.settled)
        self.channels[channel_id] = replace(state, settled=cumulative)
        self._tokens.transfer(state.token, self.escrow.address, state.payee, paid)
        self._emit(v2.Settled(channel_id, state.payer, state.payee, cumulative, paid, cumulative))

    def close(self, context: Context, channel_id: ChannelId, cumulative: Units, signature: bytes) -> None:
        """Pay the voucher's whole amount, return the rest; a voucher that raises nothing is not even checked."""
        state = self._find(channel_id)
        if context.sender != state.payee:
            raise EscrowRevert("NotPayee")
        final = state.settled
        if cumulative > state.settled:
            self._check(channel_id, state, cumulative, signature)
            final = cumulative
            self._tokens.transfer(state.token, self.escrow.address, state.payee, cumulative - state.settled)
        self._finish(channel_id, state, final)

    def request_close(self, context: Context, channel_id: ChannelId) -> None:
        """Start the grace period; asking again does not restart it."""
        state = self._find(channel_id)
        if context.sender != state.payer:
            raise EscrowRevert("NotPayer")
        if state.close_requested_at is None:
            self.channels[channel_id] = replace(state, close_requested_at=context.now)
            end = UnixSeconds(context.now + CLOSE_GRACE_S)
            self._emit(v2.CloseRequested(channel_id, state.payer, state.payee, end))

    def withdraw(self, context: Context, channel_id: ChannelId) -> None:
        """Give the payer what was not settled, from the end of the grace period on."""
        state = self._find(channel_id)
        if context.sender != state.payer:
            raise EscrowRevert("NotPayer")
        if state.close_requested_at is None or context.now < state.close_requested_at + CLOSE_GRACE_S:
            raise EscrowRevert("CloseNotReady")
        self._finish(channel_id, state, state.settled)

    def call(self, context: Context, data: bytes) -> bytes:
        """One contract call by its calldata."""
        name, body = data[:4], data[4:]
        match name:
            case v1.OPEN:
                return encode(self.open(context, v1.decode_open(data)))
            case v1.TOP_UP:
                self.top_up(context, v1.decode_top_up(data))
            case v1.SETTLE | v1.CLOSE:
                words = Words(body, heads=3, field="data")
                channel_id, cumulative = ChannelId(words.hash32()), Units(words.uint(96))
                signature = words.dynamic(length_max=v2.SIGNATURE_MAX)
                words.end()
                act = self.settle if name == v1.SETTLE else self.close
                act(context, channel_id, cumulative, signature)
            case v1.REQUEST_CLOSE:
                self.request_close(context, ChannelId(Words(body, heads=1, field="data").hash32()))
            case v1.WITHDRAW:
                self.withdraw(context, ChannelId(Words(body, heads=1, field="data").hash32()))
            case v1.GET_CHANNEL:
                channel_id = ChannelId(Words(body, heads=1, field="data").hash32())
                return _encode_state(self.channels.at(channel_id, context.at_block))
            case v1.GET_VOUCHER_DIGEST:
                words = Words(body, heads=2, field="data")
                return self._domain.digest(ChannelId(words.hash32()), words.uint(128))
            case v1.DOMAIN_SEPARATOR:
                return self._domain.separator
            case _:
                raise EscrowRevert("UnknownFunction")
        return b""

    def _find(self, channel_id: ChannelId) -> v1.ChannelState:
        state = self.channels[channel_id]
        if state.finalized:
            raise EscrowRevert("ChannelFinalized")
        if state == _NO_STREAM:
            raise EscrowRevert("ChannelNotFound")
        return state

    def _check(self, channel_id: ChannelId, state: v1.ChannelState, cumulative: Units, signature: bytes) -> None:
        if cumulative > state.deposit:
            raise EscrowRevert("AmountExceedsDeposit")
        signer = state.payer if state.authorized_signer == ZERO_ADDRESS else state.authorized_signer
        _check_signature(self._domain, channel_id, cumulative, signature, signer)

    def _pull(self, token: Address, payer: Address, amount: Units) -> None:
        self._tokens.transfer_from(token, self.escrow.address, payer, self.escrow.address, amount)

    def _finish(self, channel_id: ChannelId, state: v1.ChannelState, settled: Units) -> None:
        self.channels[channel_id] = replace(_NO_STREAM, finalized=True)
        refund = Units(state.deposit - settled)
        if refund:
            self._tokens.transfer(state.token, self.escrow.address, state.payer, refund)
        self._emit(v2.ChannelClosed(channel_id, state.payer, state.payee, settled, refund))

    def _emit(self, event: v2.Event) -> None:
        self._journal.logs.append(v1.encode_event(self.escrow, event))


def _encode_state(state: v1.ChannelState) -> bytes:
    return encode(
        state.finalized,
        state.close_requested_at or 0,
        state.payer,
        state.payee,
        state.token,
        state.authorized_signer,
        state.deposit,
        state.settled,
    )


class EscrowModel:
    """One chain's contracts: every token, the v2 reserve and, if an address is given, one v1 escrow.

    ``run`` is a transaction: all calls or none. It is what a chain simulator drives with decoded transactions, and
    what unit tests drive directly.
    """

    def __init__(self, *, chain_id: int, v1_address: Address | None = None) -> None:
        self.journal = Journal()
        self.tokens = TokenModel(self.journal)
        self.reserve = ReserveModel(
            Escrow(SessionProtocol.V2, chain_id, RESERVE_ADDRESS), self.journal, self.tokens
        )
        self.streams = (
            None
            if v1_address is None
            else StreamModel(Escrow(SessionProtocol.V1, chain_id, v1_address), self.journal, self.tokens)
        )

    def mint(self, token: Address, owner: Address, amount: int) -> None:
        """Give ``owner`` base units of ``token``, outside any transaction."""
        with self.journal.attempt(commit=True):
            self.tokens.mint(token, owner, amount)

    def run(self, context: Context, calls: Sequence[Call], *, commit: bool) -> tuple[list[bytes], list[Log]]:
        """Run a batch atomically; results and logs in order. Without ``commit`` nothing remains of it.

        Raises:
            EscrowRevert: when any call reverts; nothing remains then either.
        """
        with self.journal.attempt(commit=commit) as logs:
            results = [self._call(context, call) for call in calls]
        return results, logs

    def _call(self, context: Context, call: Call) -> bytes:
        if call.value:
            raise EscrowRevert("ValueTransferNotAllowed")  # Tempo has no native token
        try:
            if call.to == self.reserve.escrow.address:
                return self.reserve.call(context, call.data)
            if self.streams is not None and call.to == self.streams.escrow.address:
                return self.streams.call(context, call.data)
            if call.to in self.tokens.known:
                return self.tokens.call(call.to, context.sender, call.data, at_block=context.at_block)
        except ChannelFault:
            raise EscrowRevert("InvalidCalldata") from None
        return b""  # an address without code: the EVM calls nothing, successfully


__all__ = ["Context", "EscrowModel", "EscrowRevert", "ReserveModel", "Slot", "StreamModel"]
