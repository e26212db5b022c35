"""Credentials: the challenge echoed back, and what the payer does about it.

Decoding is split where the order of checks splits it: the envelope first (is this a credential at all?), then the
challenge's MAC and pins, and only then the payload. A payload fault must never hide a forged challenge.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Final, TypeAlias

from channels.descriptor import Descriptor
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, parse_address, parse_channel_id, parse_hex, to_hex
from channels.units import Units, parse_units
from channels.wire import base64url, strict_json
from channels.wire.challenge import ID_TEXT_MAX, REQUEST_TEXT_MAX, Challenge, encode_opaque
from channels.wire.members import (
    SHORT_TEXT_MAX,
    Members,
    descriptor_to_json,
    faults_as,
    members_of,
    optional,
    optional_text,
    parse_descriptor,
    text,
)
from channels.wire.snapshot import SIGNATURE_BYTES_MAX

CREDENTIAL_TEXT_MAX: Final = 16_384
"""Characters of base64 in one credential."""
TRANSACTION_BYTES_MAX: Final = 6_000  # hex doubles it and base64 adds a third: more could not fit a credential anyway
_SOURCE = re.compile(r"did:pkh:eip155:(0|[1-9][0-9]{0,15}):(0x[0-9a-fA-F]{40})", re.ASCII)


@dataclass(frozen=True, slots=True)
class OpenPayload:
    """Open a channel: a signed transaction, and the first voucher over ``cumulative`` base units.

    ``descriptor`` is absent on v1. ``signature`` is raw here and in every payload; ``channels.signature`` judges it.
    """

    channel_id: ChannelId
    transaction: bytes
    descriptor: Descriptor | None
    authorized_signer: Address | None
    cumulative: Units
    signature: bytes


@dataclass(frozen=True, slots=True)
class TopUpPayload:
    """Add ``additional_deposit`` base units to an open channel with a signed transaction."""

    channel_id: ChannelId
    transaction: bytes
    descriptor: Descriptor | None
    additional_deposit: Units


@dataclass(frozen=True, slots=True)
class VoucherPayload:
    """Permit the payee to charge up to ``cumulative`` base units over the channel's life."""

    channel_id: ChannelId
    descriptor: Descriptor | None
    cumulative: Units
    signature: bytes


@dataclass(frozen=True, slots=True)
class ClosePayload:
    """Ask the payee to close, with a last voucher over ``cumulative`` base units."""

    channel_id: ChannelId
    descriptor: Descriptor | None
    cumulative: Units
    signature: bytes


Payload: TypeAlias = OpenPayload | TopUpPayload | VoucherPayload | ClosePayload


@dataclass(frozen=True, slots=True)
class Envelope:
    """A credential whose payload has not been looked at: any JSON value, including null."""

    challenge: Challenge
    payload: object
    source: str | None


@dataclass(frozen=True, slots=True)
class Credential:
    """A fully decoded credential. Nothing in it has been verified yet."""

    challenge: Challenge
    payload: Payload
    source: str | None


def decode_envelope(token: str) -> Envelope:
    """Read a credential token as far as its challenge; neither the MAC nor the payload is judged.

    Raises:
        ChannelFault: ``MALFORMED_CREDENTIAL`` naming what is wrong.

    Source: draft-httpauth-payment, credential.
    """
    malformed = Reason.MALFORMED_CREDENTIAL
    data = base64url.decode(token, field="credential", length_max=CREDENTIAL_TEXT_MAX * 3 // 4, reason=malformed)
    with faults_as(malformed):
        members = members_of(strict_json.loads(data, field="credential"), field="credential")
        challenge = members_of(members.get("challenge"), field="challenge")
        if "payload" not in members:
            raise ChannelFault(malformed, field="payload", detail="is missing")
        return Envelope(
            # Only types and sizes are checked: every altered character is the MAC's to find.
            challenge=Challenge(
                id=text(challenge, "id", length_max=ID_TEXT_MAX),
                realm=text(challenge, "realm"),
                method=text(challenge, "method"),
                intent=text(challenge, "intent"),
                request=text(challenge, "request", length_max=REQUEST_TEXT_MAX),
                expires=optional_text(challenge, "expires"),
                digest=optional_text(challenge, "digest"),
                opaque=_opaque(challenge),
                description=optional_text(challenge, "description", length_max=4 * SHORT_TEXT_MAX),
                header=optional_text(challenge, "header"),
            ),
            payload=members["payload"],
            source=optional_text(members, "source"),
        )


def decode_payload(envelope: Envelope) -> Payload:
    """Read the payload of a session credential; unknown members are ignored.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming the member, or ``INVALID_SIGNATURE`` for a signature that is not hex.

    Source: draft-tempo-session, credential payload.
    """
    members = members_of(envelope.payload, field="payload")
    action = text(members, "action")
    channel_id = parse_channel_id(members.get("channelId"))
    descriptor = optional(members, "descriptor", parse_descriptor)
    match action:
        case "open":
            return OpenPayload(
                channel_id=channel_id,
                transaction=_transaction(members),
                descriptor=descriptor,
                authorized_signer=optional(
                    members, "authorizedSigner", lambda value: parse_address(value, field="authorizedSigner")
                ),
                cumulative=_cumulative(members),
                signature=_signature(members),
            )
        case "topUp":
            additional = parse_units(members.get("additionalDeposit"), field="additionalDeposit")
            if additional == 0:
                # On chain it would only cancel a close request, and we would pay for the transaction.
                raise ChannelFault(Reason.INVALID_PAYLOAD, field="additionalDeposit", detail="is zero")
            return TopUpPayload(channel_id, _transaction(members), descriptor, additional)
        case "voucher":
            return VoucherPayload(channel_id, descriptor, _cumulative(members), _signature(members))
        case "close":
            return ClosePayload(channel_id, descriptor, _cumulative(members), _signature(members))
        case _:
            raise ChannelFault(Reason.INVALID_PAYLOAD, field="action", detail="is not one of the four we know")


def decode(token: str) -> Credential:
    """Read a whole credential token. Raises as :func:`decode_envelope` and :func:`decode_payload` do."""
    envelope = decode_envelope(token)
    return Credential(envelope.challenge, decode_payload(envelope), envelope.source)


def encode(credential: Credential) -> str:
    """Write a credential as the token that follows ``Payment`` in the header."""
    challenge = {name: part for name, part in asdict(credential.challenge).items() if part is not None}
    value: dict[str, object] = {"challenge": challenge, "payload": payload_to_json(credential.payload)}
    if credential.source is not None:
        value["source"] = credential.source
    return base64url.encode(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def payload_to_json(payload: Payload) -> dict[str, object]:
    """The wire form of a payload: amounts as text, hex in lower case, absent members left out."""
    value: dict[str, object] = {"channelId": to_hex(payload.channel_id)}
    if payload.descriptor is not None:
        value["descriptor"] = descriptor_to_json(payload.descriptor)
    match payload:
        case OpenPayload():
            if payload.authorized_signer is not None:
                value["authorizedSigner"] = to_hex(payload.authorized_signer)
            transaction = {"action": "open", "type": "transaction", "transaction": to_hex(payload.transaction)}
            return transaction | value | _voucher_members(payload)
        case TopUpPayload():
            transaction = {"action": "topUp", "type": "transaction", "transaction": to_hex(payload.transaction)}
            return transaction | value | {"additionalDeposit": str(payload.additional_deposit)}
        case VoucherPayload():
            return {"action": "voucher"} | value | _voucher_members(payload)
        case ClosePayload():
            return {"action": "close"} | value | _voucher_members(payload)


def parse_source(source: str) -> tuple[int, Address]:
    """Read a payer identity as chain id and address.

    Raises:
        ChannelFault: ``SOURCE_MISMATCH`` for anything but a ``did:pkh`` on an EIP-155 chain.

    Source: CAIP-10, did:pkh.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ChannelFault(Reason.SOURCE_MISMATCH, field="source", detail="is not a did:pkh of an EIP-155 account")
    return int(match.group(1)), parse_address(match.group(2), field="source")


def source_of(chain_id: int, address: Address) -> str:
    """The payer identity of ``address`` on a chain."""
    return f"did:pkh:eip155:{chain_id}:{to_hex(address)}"


def _opaque(challenge: Members) -> str | None:
    value = challenge.get("opaque")
    if isinstance(value, dict):  # older payers send the decoded map; the MAC covers its canonical text
        return encode_opaque(value)
    return optional_text(challenge, "opaque", length_max=REQUEST_TEXT_MAX)


def _transaction(members: Members) -> bytes:
    if members.get("type") != "transaction":
        raise ChannelFault(Reason.INVALID_PAYLOAD, field="type", detail="is not transaction")
    raw = parse_hex(members.get("transaction"), field="transaction", length_max=TRANSACTION_BYTES_MAX)
    if not raw:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field="transaction", detail="is empty")
    return raw


def _cumulative(members: Members) -> Units:
    return parse_units(members.get("cumulativeAmount"), field="cumulativeAmount")


def _signature(members: Members) -> bytes:
    # A signature of any unusable shape is one problem to the payer: it does not prove anything.
    with faults_as(Reason.INVALID_SIGNATURE):
        return parse_hex(members.get("signature"), field="signature", length_max=SIGNATURE_BYTES_MAX)


def _voucher_members(payload: OpenPayload | VoucherPayload | ClosePayload) -> dict[str, object]:
    return {"cumulativeAmount": str(payload.cumulative), "signature": to_hex(payload.signature)}
