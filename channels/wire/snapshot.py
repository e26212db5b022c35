"""A server's account of a channel, handed to a payer who has lost or never had one (session draft, resumption).

Every number in it is a claim. The payer believes it only after checking the voucher, the id and the chain.
"""

from __future__ import annotations

from dataclasses import dataclass

from channels.descriptor import Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId, parse_address, parse_channel_id, parse_hex, to_hex
from channels.instants import UnixSeconds
from channels.units import Units, parse_units
from channels.wire import base64url, jcs, strict_json
from channels.wire.members import descriptor_to_json, integer, members_of, optional, parse_descriptor

SIGNATURE_BYTES_MAX = 2_200  # the longest form a Tempo account can produce is a WebAuthn one of 2,049 bytes
_HEADER_BYTES_MAX = 8_192


@dataclass(frozen=True, slots=True)
class SignedAmount:
    """A voucher without its channel: the cumulative base units and the raw signature over them."""

    cumulative: Units
    signature: bytes


@dataclass(frozen=True, slots=True)
class SessionSnapshot:
    """State of one v2 channel as its server sees it; all amounts in base units.

    ``required`` is what the next voucher must reach for the challenged request.
    """

    channel_id: ChannelId
    escrow: Escrow
    descriptor: Descriptor
    deposit: Units
    settled: Units
    spent: Units
    accepted: Units
    required: Units
    units: int | None = None
    highest_voucher: SignedAmount | None = None
    close_requested_at: UnixSeconds | None = None

    def to_json(self) -> dict[str, object]:
        """The object that stands in ``methodDetails.sessionSnapshot``."""
        channel_id = to_hex(self.channel_id)
        value: dict[str, object] = {
            "acceptedCumulative": str(self.accepted),
            "chainId": self.escrow.chain_id,
            "channelId": channel_id,
            "deposit": str(self.deposit),
            "descriptor": descriptor_to_json(self.descriptor),
            "escrow": to_hex(self.escrow.address),
            "requiredCumulative": str(self.required),
            "settled": str(self.settled),
            "spent": str(self.spent),
        }
        if self.units is not None:
            value["units"] = self.units
        if self.close_requested_at is not None:
            value["closeRequestedAt"] = str(self.close_requested_at)
        if self.highest_voucher is not None:
            value["highestVoucher"] = {
                "channelId": channel_id,
                "cumulativeAmount": str(self.highest_voucher.cumulative),
                "signature": to_hex(self.highest_voucher.signature),
            }
        return value

    def encode(self) -> str:
        """The ``Payment-Session-Snapshot`` header: padded standard base64, which the reference client writes too."""
        return base64url.encode_padded(jcs.canonicalize(self.to_json()).encode())


def parse_snapshot(value: object) -> SessionSnapshot:
    """Read a snapshot object; unknown members are ignored.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming the member.
    """
    members = members_of(value, field="sessionSnapshot")
    channel_id = parse_channel_id(members.get("channelId"))
    closing = optional(members, "closeRequestedAt", lambda text: parse_units(text, field="closeRequestedAt"))
    return SessionSnapshot(
        channel_id=channel_id,
        # Snapshots exist for the v2 reserve only; the v1 escrow has neither descriptor nor resumption.
        escrow=Escrow(
            SessionProtocol.V2,
            integer(members, "chainId"),
            parse_address(members.get("escrow"), field="escrow"),
        ),
        descriptor=parse_descriptor(members.get("descriptor")),
        deposit=parse_units(members.get("deposit"), field="deposit"),
        settled=parse_units(members.get("settled"), field="settled"),
        spent=parse_units(members.get("spent"), field="spent"),
        accepted=parse_units(members.get("acceptedCumulative"), field="acceptedCumulative"),
        required=parse_units(members.get("requiredCumulative"), field="requiredCumulative"),
        units=integer(members, "units") if "units" in members else None,
        highest_voucher=optional(members, "highestVoucher", lambda voucher: _voucher(voucher, channel_id)),
        close_requested_at=None if closing is None else UnixSeconds(closing),
    )


def decode(header: str) -> SessionSnapshot:
    """Read a ``Payment-Session-Snapshot`` header in either base64 alphabet.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming the member, or the header itself.
    """
    field = "Payment-Session-Snapshot"
    data = base64url.decode(header, field=field, length_max=_HEADER_BYTES_MAX)
    return parse_snapshot(strict_json.loads(data, field=field, reason=Reason.INVALID_PAYLOAD))


def _voucher(value: object, channel_id: ChannelId) -> SignedAmount:
    members = members_of(value, field="highestVoucher")
    if parse_channel_id(members.get("channelId"), field="highestVoucher.channelId") != channel_id:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field="highestVoucher.channelId", detail="names another channel")
    return SignedAmount(
        cumulative=parse_units(members.get("cumulativeAmount"), field="highestVoucher.cumulativeAmount"),
        signature=parse_hex(
            members.get("signature"), field="highestVoucher.signature", length_max=SIGNATURE_BYTES_MAX
        ),
    )
