"""What a session challenge asks for: the price, the payee, the escrow and how much to deposit."""

from __future__ import annotations

from dataclasses import dataclass

from channels.descriptor import Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, parse_address, parse_channel_id, to_hex
from channels.units import Units, parse_units
from channels.wire import base64url, strict_json
from channels.wire.challenge import REQUEST_TEXT_MAX, encode_object
from channels.wire.members import (
    SHORT_TEXT_MAX,
    Members,
    faults_as,
    flag,
    integer,
    members_of,
    optional,
    optional_text,
    text,
)
from channels.wire.snapshot import SessionSnapshot, parse_snapshot


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """The ``request`` of a ``tempo``/``session`` challenge; all amounts in base units.

    ``amount`` is the price of one ``unit_type``. No ``operator`` means the zero address in the channel's descriptor.
    """

    amount: Units
    currency: Address
    recipient: Address
    unit_type: str
    escrow: Escrow
    suggested_deposit: Units | None = None
    description: str | None = None
    fee_payer: bool = False
    fee_token: Address | None = None
    min_voucher_delta: Units | None = None
    operator: Address | None = None
    channel_id: ChannelId | None = None
    snapshot: SessionSnapshot | None = None

    def to_json(self) -> dict[str, object]:
        """The request object, hex in lower case, absent members left out."""
        details: dict[str, object] = {
            "chainId": self.escrow.chain_id,
            "escrowContract": to_hex(self.escrow.address),
            "sessionProtocol": self.escrow.protocol.value,
        }
        if self.fee_payer:
            details["feePayer"] = True
        if self.fee_token is not None:
            details["feeToken"] = to_hex(self.fee_token)
        if self.min_voucher_delta is not None:
            details["minVoucherDelta"] = str(self.min_voucher_delta)
        if self.operator is not None:
            details["operator"] = to_hex(self.operator)
        if self.channel_id is not None:
            details["channelId"] = to_hex(self.channel_id)
        if self.snapshot is not None:
            details["sessionSnapshot"] = self.snapshot.to_json()
        value: dict[str, object] = {
            "amount": str(self.amount),
            "currency": to_hex(self.currency),
            "recipient": to_hex(self.recipient),
            "unitType": self.unit_type,
            "methodDetails": details,
        }
        if self.suggested_deposit is not None:
            value["suggestedDeposit"] = str(self.suggested_deposit)
        if self.description is not None:
            value["description"] = self.description
        return value

    def encode(self) -> str:
        """The ``request`` text: base64url of canonical JSON, so that a payer who re-encodes it changes nothing."""
        return encode_object(self.to_json())


def decode(request: str) -> SessionRequest:
    """Read a session challenge's ``request`` text; unknown members are ignored, known ones are checked.

    Raises:
        ChannelFault: ``INVALID_CHALLENGE`` naming the member.

    Source: draft-tempo-session, request object.
    """
    with faults_as(Reason.INVALID_CHALLENGE):
        data = base64url.decode(request, field="request", length_max=REQUEST_TEXT_MAX)
        members = members_of(strict_json.loads(data, field="request"), field="request")
        details = members_of(members.get("methodDetails"), field="methodDetails")
        amount = parse_units(members.get("amount"), field="amount")
        if amount == 0:
            raise ChannelFault(Reason.INVALID_CHALLENGE, field="amount", detail="is zero")
        return SessionRequest(
            amount=amount,
            currency=parse_address(members.get("currency"), field="currency"),
            recipient=parse_address(members.get("recipient"), field="recipient"),
            unit_type=text(members, "unitType"),
            escrow=_escrow(details),
            suggested_deposit=_amount(members, "suggestedDeposit"),
            description=optional_text(members, "description", length_max=4 * SHORT_TEXT_MAX),
            fee_payer=flag(details, "feePayer"),
            fee_token=optional(details, "feeToken", lambda value: parse_address(value, field="feeToken")),
            min_voucher_delta=_amount(details, "minVoucherDelta"),
            operator=optional(details, "operator", lambda value: parse_address(value, field="operator")),
            channel_id=optional(details, "channelId", parse_channel_id),
            snapshot=optional(details, "sessionSnapshot", parse_snapshot),
        )


def _amount(members: Members, name: str) -> Units | None:
    return optional(members, name, lambda value: parse_units(value, field=name))


def _escrow(details: Members) -> Escrow:
    # Challenges older than the second protocol do not name one, so absence means the first.
    name = text(details, "sessionProtocol") if "sessionProtocol" in details else SessionProtocol.V1.value
    if name not in {protocol.value for protocol in SessionProtocol}:
        raise ChannelFault(Reason.INVALID_CHALLENGE, field="sessionProtocol", detail="is not a protocol we know")
    return Escrow(
        protocol=SessionProtocol(name),
        chain_id=integer(details, "chainId"),
        address=parse_address(details.get("escrowContract"), field="escrowContract"),
    )
