"""Session receipts: what the server says has been accepted and spent, in a header and in the last event of a stream."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId, Hash32, parse_channel_id, parse_hash32, to_hex
from channels.instants import UnixMillis, parse_rfc3339, to_rfc3339
from channels.units import Units, parse_units
from channels.wire import base64url, strict_json
from channels.wire.challenge import ID_TEXT_MAX
from channels.wire.members import faults_as, integer, members_of, optional, text

_RECEIPT_BYTES_MAX: Final = 8_192


@dataclass(frozen=True, slots=True)
class SessionReceipt:
    """Answer to one credential of a channel: ``accepted`` and ``spent`` are cumulative base units.

    ``challenge_id`` names the credential answered. ``tx_hash`` is set when the answer followed a transaction.
    """

    timestamp_ms: UnixMillis
    challenge_id: str
    channel_id: ChannelId
    accepted: Units
    spent: Units
    units: int | None = None
    tx_hash: Hash32 | None = None

    def to_json(self) -> dict[str, object]:
        """The receipt object, members in the order the reference client writes them."""
        channel_id = to_hex(self.channel_id)
        value: dict[str, object] = {
            "method": "tempo",
            "intent": "session",
            "status": "success",
            "timestamp": to_rfc3339(self.timestamp_ms),
            "reference": channel_id,
            "challengeId": self.challenge_id,
            "channelId": channel_id,
            "acceptedCumulative": str(self.accepted),
            "spent": str(self.spent),
        }
        if self.units is not None:
            value["units"] = self.units
        if self.tx_hash is not None:
            value["txHash"] = to_hex(self.tx_hash)
        return value

    def encode(self) -> str:
        """The ``Payment-Receipt`` header: base64url of the object's JSON."""
        return base64url.encode(json.dumps(self.to_json(), separators=(",", ":")).encode())


def parse_receipt(value: object) -> SessionReceipt:
    """Read a receipt object; unknown members are ignored.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming the member; also when it is not a successful Tempo session receipt, or
            claims more spent than accepted.
    """
    members = members_of(value, field="receipt")
    for name, expected in (("method", "tempo"), ("intent", "session"), ("status", "success")):
        if members.get(name) != expected:
            raise ChannelFault(Reason.INVALID_PAYLOAD, field=name, detail="is not that of a paid session")
    with faults_as(Reason.INVALID_PAYLOAD):
        timestamp = parse_rfc3339(members.get("timestamp"), field="timestamp")
    receipt = SessionReceipt(
        timestamp_ms=timestamp,
        challenge_id=text(members, "challengeId", length_max=ID_TEXT_MAX),
        channel_id=parse_channel_id(members.get("channelId")),
        accepted=parse_units(members.get("acceptedCumulative"), field="acceptedCumulative"),
        spent=parse_units(members.get("spent"), field="spent"),
        units=integer(members, "units") if "units" in members else None,
        tx_hash=optional(members, "txHash", lambda value: parse_hash32(value, field="txHash")),
    )
    if receipt.spent > receipt.accepted:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field="spent", detail="is more than was accepted")
    return receipt


def decode(header: str) -> SessionReceipt:
    """Read a ``Payment-Receipt`` header. Raises as :func:`parse_receipt` does."""
    field = "Payment-Receipt"
    data = base64url.decode(header, field=field, length_max=_RECEIPT_BYTES_MAX)
    return parse_receipt(strict_json.loads(data, field=field, reason=Reason.INVALID_PAYLOAD))
