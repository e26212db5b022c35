"""From a credential's text to a payload the rail may act on: challenge binding first, anything costly later.

The order is the reference server's: decode, MAC, pinned fields, expiry, payload. The MAC comes before everything that
touches a disk, a chain or a curve, so strangers cost one hash.
"""

from __future__ import annotations

from dataclasses import dataclass

from channels.descriptor import Escrow
from channels.faults import ChannelFault, Reason
from channels.ids import Address
from channels.instants import UnixMillis, UnixSeconds, parse_rfc3339
from channels.wire import request as session_request
from channels.wire.challenge import Challenge, ChallengeMac, decode_opaque, require_fresh
from channels.wire.credential import (
    ClosePayload,
    Envelope,
    Payload,
    VoucherPayload,
    decode_payload,
    parse_source,
)
from channels.wire.request import SessionRequest
from mppnode.kernel.rates import Rates
from mppnode.pricing.book import usual_unit
from mppnode.rails.base import WHOLE_REQUEST, Offer, quoted_rates


@dataclass(frozen=True, slots=True)
class Presented:
    """A credential that answers one of our challenges. Its signatures are not verified yet."""

    challenge: Challenge
    expires: UnixSeconds
    escrow: Escrow
    payload: Payload
    source: tuple[int, Address] | None
    peer: str
    """Network address it came from; only ever a key of a rate limit."""
    quoted: Rates | None = None
    """What the challenge promised at most, when the credential is to buy content."""


@dataclass(frozen=True, slots=True)
class Seller:
    """Who is paid and where: the pinned half of every challenge."""

    realm: str
    payee: Address
    token: Address
    escrows: tuple[Escrow, ...]


def read_presented(
    envelope: Envelope, *, mac: ChallengeMac, seller: Seller, offer: Offer | None, now: UnixMillis, peer: str
) -> Presented:
    """Decide whether a credential answers a challenge of this node, and for ``offer`` when it is to buy content.

    Prices are not compared with today's: the MAC proves that they were ours a few minutes ago, and the request is
    served within them or not at all. Management requests (``offer`` is None) carry no body, so not even the scope is
    compared. Vouchers and closes may come with an expired challenge, because a stream can outlive its challenge and a
    v1 payer cannot get another.

    Raises:
        ChannelFault: ``INVALID_CHALLENGE``, ``PAYMENT_EXPIRED``, ``INVALID_PAYLOAD``, ``INVALID_SIGNATURE`` or
            ``SOURCE_MISMATCH``, naming the field.
    """
    challenge = envelope.challenge
    if not mac.verify(challenge):
        raise ChannelFault(Reason.INVALID_CHALLENGE, field="id", detail="does not belong to this challenge")
    asked = _pinned(challenge, seller)
    quoted = None if offer is None else _quoted(challenge, asked, offer)
    expires = parse_rfc3339(challenge.expires)
    payload = None
    if offer is None:
        # Which rule of expiry applies depends on the action, so the payload is read first here, and only here.
        payload = decode_payload(envelope)
    if not isinstance(payload, VoucherPayload | ClosePayload):
        require_fresh(challenge, now=now)
    payload = payload if payload is not None else decode_payload(envelope)
    source = None if envelope.source is None else parse_source(envelope.source)
    if source is not None and source[0] != asked.escrow.chain_id:
        raise ChannelFault(Reason.SOURCE_MISMATCH, field="source", detail="names another chain")
    return Presented(challenge, UnixSeconds(-(-expires // 1000)), asked.escrow, payload, source, peer, quoted)


def _pinned(challenge: Challenge, seller: Seller) -> SessionRequest:
    for field, found, expected in (
        ("method", challenge.method, "tempo"),
        ("intent", challenge.intent, "session"),
        ("realm", challenge.realm, seller.realm),
    ):
        if found != expected:
            raise ChannelFault(Reason.INVALID_CHALLENGE, field=field, detail="is not this route's")
    asked = session_request.decode(challenge.request)
    if asked.escrow not in seller.escrows:
        raise ChannelFault(Reason.INVALID_CHALLENGE, field="escrowContract", detail="is not this route's")
    if asked.currency != seller.token or asked.recipient != seller.payee:
        raise ChannelFault(Reason.INVALID_CHALLENGE, field="recipient", detail="is not this route's")
    return asked


def _quoted(challenge: Challenge, asked: SessionRequest, offer: Offer) -> Rates:
    """The rates this challenge promised for what is asked now."""
    scope = decode_opaque(challenge.opaque)
    try:
        rates = quoted_rates(scope)
    except (ValueError, TypeError):
        rates = None  # issued before an update of the node
    if rates is None or (scope.get("route"), scope.get("model")) != (offer.route, offer.asked):
        raise ChannelFault(Reason.INVALID_CHALLENGE, field="opaque", detail="is for another route or model")
    unit = usual_unit(rates)
    the_rest = asked.unit_type == WHOLE_REQUEST and asked.amount > unit.amount
    if not the_rest and (asked.amount != unit.amount or asked.unit_type != unit.unit_type):
        raise ChannelFault(Reason.INVALID_CHALLENGE, field="amount", detail="is not what its rates come to")
    return rates
