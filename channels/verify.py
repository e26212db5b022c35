"""What can be decided about an open or a top-up without asking the chain, and what the chain's logs must then say.

A node broadcasts a stranger's transaction only after every check here has passed: the calls are exactly the expected
ones in canonical encoding, they open the channel the credential names, and its first voucher is good money.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from channels import escrow as escrow_v2
from channels import escrow_v1, tip20
from channels.abi import Log
from channels.descriptor import Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, Address, ChannelId
from channels.instants import UnixSeconds
from channels.tempo_tx import EXPIRING_NONCE_KEY, UNPAID, Form, SignedTx, decode
from channels.units import Units
from channels.voucher import derive_channel_id
from channels.wire.credential import OpenPayload, TopUpPayload

_V1_CALLS = 2  # approve, then open or topUp


@dataclass(frozen=True, slots=True)
class Terms:
    """What a node insists on in every channel: who is paid, in which token, in which escrow."""

    escrow: Escrow
    payee: Address
    token: Address
    operator: Address = ZERO_ADDRESS
    sponsored: bool = False
    """Whether a v2 transaction may leave its fee to us; what is paid for is then ``channels.sponsor``'s to decide."""


@dataclass(frozen=True, slots=True)
class VerifiedOpen:
    """A good opening transaction; ``deposit`` in base units. Nothing has been broadcast."""

    signed: SignedTx
    descriptor: Descriptor
    deposit: Units


def verify_open(payload: OpenPayload, terms: Terms, *, now: UnixSeconds) -> VerifiedOpen:
    """Check an open credential's transaction against its descriptor and the node's terms.

    The voucher is the caller's to verify; its signer is ``descriptor.signer``, never a member of the payload.

    Raises:
        ChannelFault: ``TRANSACTION_REJECTED`` or ``DESCRIPTOR_MISMATCH``.

    Source: draft-tempo-session, open verification; TIP-1034 ``open``.
    """
    signed = _signed(payload.transaction, terms, now)
    if terms.escrow.protocol is SessionProtocol.V2:
        descriptor, deposit = _v2_open(payload, signed, terms)
    else:
        descriptor, deposit = _v1_open(signed, terms)
    wanted = (
        ("descriptor.payee", descriptor.payee, terms.payee),
        ("descriptor.token", descriptor.token, terms.token),
        ("descriptor.operator", descriptor.operator, terms.operator),
        ("authorizedSigner", payload.authorized_signer or descriptor.authorized_signer, descriptor.authorized_signer),
        ("channelId", derive_channel_id(terms.escrow, descriptor), payload.channel_id),
    )
    for field, found, expected in wanted:
        if found != expected:
            raise ChannelFault(Reason.DESCRIPTOR_MISMATCH, field=field, detail="is not what this node requires")
    return VerifiedOpen(signed, descriptor, deposit)


def verify_top_up(
    payload: TopUpPayload, channel: ChannelId, descriptor: Descriptor, terms: Terms, *, now: UnixSeconds
) -> SignedTx:
    """Check a top-up credential's transaction against the stored channel.

    Raises:
        ChannelFault: ``TRANSACTION_REJECTED``, ``DESCRIPTOR_MISMATCH``, or ``INVALID_PAYLOAD`` for a zero amount.
    """
    if payload.additional_deposit == 0:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field="additionalDeposit", detail="is zero")
    require_descriptor(payload.descriptor, descriptor)
    signed = _signed(payload.transaction, terms, now)
    if signed.sender != descriptor.payer:
        raise _rejected("is not sent by the channel's payer")
    if terms.escrow.protocol is SessionProtocol.V2:
        call = escrow_v2.decode_top_up(_only_call(signed, terms.escrow))
        same = call.descriptor == descriptor
        additional = call.additional
    else:
        v1_call = escrow_v1.decode_top_up(_approved_call(signed, terms))
        same = v1_call.channel_id == channel
        additional = v1_call.additional
    if not same or additional != payload.additional_deposit:
        raise _rejected("does not add the named deposit to this channel")
    return signed


def require_descriptor(presented: Descriptor | None, stored: Descriptor) -> None:
    """Refuse a descriptor that is not the stored channel's. Raises ``DESCRIPTOR_MISMATCH``."""
    if presented is not None and presented != stored:
        raise ChannelFault(Reason.DESCRIPTOR_MISMATCH, field="descriptor", detail="is not the channel's")


def confirm_open(opened: VerifiedOpen, channel: ChannelId, escrow: Escrow, logs: Iterable[Log]) -> None:
    """Require exactly one matching ``ChannelOpened`` from the escrow in a receipt. Raises ``CHAIN_REJECTED``."""
    events = [event for event in _events(escrow, logs) if isinstance(event, escrow_v2.ChannelOpened)]
    if [(event.channel_id, event.deposit) for event in events] != [(channel, opened.deposit)]:
        raise ChannelFault(Reason.CHAIN_REJECTED, detail="the transaction did not open this channel")


def confirm_top_up(additional: Units, channel: ChannelId, escrow: Escrow, logs: Iterable[Log]) -> None:
    """Require exactly one matching ``TopUp`` from the escrow in a receipt. Raises ``CHAIN_REJECTED``."""
    events = [event for event in _events(escrow, logs) if isinstance(event, escrow_v2.ToppedUp)]
    if [(event.channel_id, event.additional) for event in events] != [(channel, additional)]:
        raise ChannelFault(Reason.CHAIN_REJECTED, detail="the transaction did not top up this channel")


def closed_in(channel: ChannelId, escrow: Escrow, logs: Iterable[Log]) -> escrow_v2.ChannelClosed | None:
    """The ``ChannelClosed`` of a channel among a receipt's logs."""
    for event in _events(escrow, logs):
        if isinstance(event, escrow_v2.ChannelClosed) and event.channel_id == channel:
            return event
    return None


def settled_in(channel: ChannelId, escrow: Escrow, logs: Iterable[Log]) -> escrow_v2.Settled | None:
    """The ``Settled`` of a channel among a receipt's logs."""
    for event in _events(escrow, logs):
        if isinstance(event, escrow_v2.Settled) and event.channel_id == channel:
            return event
    return None


def _events(escrow: Escrow, logs: Iterable[Log]) -> list[escrow_v2.Event]:
    decode_events = escrow_v2.decode_events if escrow.protocol is SessionProtocol.V2 else escrow_v1.decode_events
    return decode_events(escrow, logs)


def _signed(raw: bytes, terms: Terms, now: UnixSeconds) -> SignedTx:
    signed = decode(raw)
    tx = signed.tx
    if tx.chain_id != terms.escrow.chain_id:
        raise _rejected("is for another chain")
    open_to_us = terms.sponsored and terms.escrow.protocol is SessionProtocol.V2 and signed.form in UNPAID
    if signed.form is not Form.COMPLETE and not open_to_us:
        raise _rejected("waits for a fee payer, and this node sponsors no fees")
    if tx.nonce_key != EXPIRING_NONCE_KEY or tx.nonce != 0 or tx.valid_before is None:
        raise _rejected("does not use an expiring nonce")
    if tx.valid_before <= now:
        raise _rejected("is no longer valid")
    if any(call.value for call in tx.calls):
        raise _rejected("moves native value")
    return signed


def _v2_open(payload: OpenPayload, signed: SignedTx, terms: Terms) -> tuple[Descriptor, Units]:
    descriptor = payload.descriptor
    if descriptor is None:
        raise ChannelFault(Reason.DESCRIPTOR_MISMATCH, field="descriptor", detail="is missing")
    call = escrow_v2.decode_open(_only_call(signed, terms.escrow))
    rebuilt = Descriptor(
        payer=signed.sender,
        payee=call.payee,
        operator=call.operator,
        token=call.token,
        salt=call.salt,
        authorized_signer=call.authorized_signer,
        expiring_nonce_hash=signed.expiring_nonce_hash,
    )
    require_descriptor(descriptor, rebuilt)
    return rebuilt, call.deposit


def _v1_open(signed: SignedTx, terms: Terms) -> tuple[Descriptor, Units]:
    call = escrow_v1.decode_open(_approved_call(signed, terms))
    return call.descriptor(signed.sender), call.deposit


def _only_call(signed: SignedTx, escrow: Escrow) -> bytes:
    if len(signed.tx.calls) != 1 or signed.tx.calls[0].to != escrow.address:
        raise _rejected("is not one call to the escrow")
    return signed.tx.calls[0].data


def _approved_call(signed: SignedTx, terms: Terms) -> bytes:
    """The escrow call of a v1 transaction, alone or after an approval for the same escrow."""
    calls = signed.tx.calls
    if calls[-1].to != terms.escrow.address or len(calls) > _V1_CALLS:
        raise _rejected("is not a call to the escrow")
    if len(calls) == _V1_CALLS:
        approval = tip20.decode_approve(calls[0].data)
        if calls[0].to != terms.token or approval.spender != terms.escrow.address:
            raise _rejected("approves something else first")
    return calls[-1].data


def _rejected(detail: str) -> ChannelFault:
    return ChannelFault(Reason.TRANSACTION_REJECTED, field="transaction", detail=detail)
