"""What the payer believes. Every claim of a server passes through here before it may change what gets signed."""

from __future__ import annotations

from channels.descriptor import ChainSnapshot, Descriptor, SessionProtocol
from channels.faults import ChannelFault
from channels.ids import ZERO_ADDRESS, Address
from channels.instants import UnixMillis
from channels.payer.model import Channel, Counterparty, GiveUpReason, PayerPolicy, PayerState, counterparty_of
from channels.signature import parse_signature
from channels.units import Units
from channels.voucher import VoucherDomain, derive_channel_id
from channels.wire import request
from channels.wire.challenge import Challenge, require_fresh
from channels.wire.receipt import SessionReceipt
from channels.wire.request import SessionRequest
from channels.wire.snapshot import SessionSnapshot

_METHOD, _INTENT = "tempo", "session"


def read_terms(
    policy: PayerPolicy, counterparty: Counterparty, challenge: Challenge, now: UnixMillis
) -> SessionRequest | GiveUpReason:
    """The terms of a challenge we are willing to pay at all, else why not.

    They are decoded from the challenge here, not passed in: what is checked must be what the credential echoes.
    """
    if (challenge.method, challenge.intent) != (_METHOD, _INTENT):
        return GiveUpReason.BAD_CHALLENGE
    try:
        terms = request.decode(challenge.request)
    except ChannelFault:
        return GiveUpReason.BAD_CHALLENGE
    if challenge.expires is not None:
        try:
            require_fresh(challenge, now=now)
        except ChannelFault:
            return GiveUpReason.EXPIRED_CHALLENGE
    if terms.escrow not in policy.escrows or terms.currency not in policy.tokens:
        return GiveUpReason.FOREIGN_TERMS
    if counterparty_of(terms) != counterparty:
        return GiveUpReason.FOREIGN_TERMS
    return terms


def own_channel(
    policy: PayerPolicy, counterparty: Counterparty, operator: Address | None, descriptor: Descriptor
) -> Channel | None:
    """The channel a descriptor describes, if it is one between us and this counterparty; its id is derived here."""
    expected_operator = operator or ZERO_ADDRESS
    if counterparty.escrow.protocol is SessionProtocol.V1:
        expected_operator = ZERO_ADDRESS  # v1 channels have none
    facts = (descriptor.payer, descriptor.payee, descriptor.token, descriptor.operator, descriptor.signer)
    if facts != (policy.payer, counterparty.payee, counterparty.token, expected_operator, policy.signer):
        return None
    return Channel(derive_channel_id(counterparty.escrow, descriptor), descriptor, counterparty.escrow)


def trusted_snapshot(
    policy: PayerPolicy, counterparty: Counterparty, terms: SessionRequest
) -> tuple[SessionSnapshot, Channel] | None:
    """The snapshot in a challenge with the channel it is about, if it proves itself by a voucher of ours.

    Its deposit is not believed: that is for the chain to say.
    """
    snapshot = terms.snapshot
    if snapshot is None or snapshot.escrow != counterparty.escrow or snapshot.close_requested_at is not None:
        return None
    channel = own_channel(policy, counterparty, terms.operator, snapshot.descriptor)
    voucher = snapshot.highest_voucher
    if channel is None or channel.id != snapshot.channel_id or voucher is None:
        return None
    if voucher.cumulative != snapshot.accepted or snapshot.spent > snapshot.accepted:
        return None
    if snapshot.settled > snapshot.deposit or snapshot.accepted > policy.channel_cap:
        return None
    try:
        VoucherDomain(channel.escrow).verify(
            channel.id, voucher.cumulative, parse_signature(voucher.signature), policy.signer
        )
    except ChannelFault:
        return None
    return snapshot, channel


def usable_on_chain(chain: ChainSnapshot | None, *, accepted: Units) -> bool:
    """Tell whether the escrow holds the channel open with nothing taken from it beyond what we know to have signed."""
    return (
        chain is not None
        and chain.deposit > 0
        and chain.close_requested_at is None
        and chain.settled <= accepted <= chain.deposit
    )


def receipt_problem(state: PayerState, receipt: SessionReceipt) -> GiveUpReason | None:
    """Why a receipt cannot be true, if it cannot: another channel, or more claimed than was ever signed."""
    if state.channel is None or receipt.channel_id != state.channel.id:
        return GiveUpReason.FOREIGN_CHANNEL
    if not receipt.spent <= receipt.accepted <= state.signed_max:
        return GiveUpReason.INFLATED_CLAIM
    return None
