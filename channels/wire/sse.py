"""Server-sent events: the three frames a paid stream consists of, and an incremental reader for the payer.

Only this module writes ``event:`` lines. A payload with a line break could close its own frame and forge the next one,
so payloads are one line or they are refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final

from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId, parse_channel_id, to_hex
from channels.units import Units, parse_units
from channels.wire import strict_json
from channels.wire.members import members_of
from channels.wire.receipt import SessionReceipt, parse_receipt

NEED_VOUCHER_EVENT: Final = "payment-need-voucher"
RECEIPT_EVENT: Final = "payment-receipt"
MESSAGE_EVENT: Final = "message"
DONE: Final = b"data: [DONE]\n\n"
"""The frame that ends an OpenAI stream."""
EVENT_BYTES_MAX: Final = 256 * 1024  # as large as the largest upstream frame the node forwards

# Not splitlines(): it also breaks at VT, U+0085 and U+2028, which are content.
_LINE_END = re.compile(rb"\r\n|\r|\n")
_NEEDS = re.compile(rb"^event: payment-need-voucher\ndata: [^\n]*\n\n", re.MULTILINE)
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One dispatched event: its name (``message`` when the stream gave none) and its data lines joined by LF."""

    event: str
    data: str


@dataclass(frozen=True, slots=True)
class NeedVoucher:
    """The server's request for a voucher of at least ``required`` cumulative base units."""

    channel_id: ChannelId
    required: Units
    accepted: Units
    deposit: Units


def need_voucher_frame(channel_id: ChannelId, *, required: Units, accepted: Units, deposit: Units) -> bytes:
    """Ask for a voucher that reaches ``required``; all amounts in cumulative base units.

    Source: draft-tempo-session, need-voucher event.
    """
    value: dict[str, object] = {
        "channelId": to_hex(channel_id),
        "requiredCumulative": str(required),
        "acceptedCumulative": str(accepted),
        "deposit": str(deposit),
    }
    return _control_frame(NEED_VOUCHER_EVENT, value, "payment.need_voucher")


def without_needs(frames: bytes) -> bytes:
    """A stream without what was asked of its payer on the way: said again, it would ask for what was paid long ago."""
    return _NEEDS.sub(b"", frames)


def receipt_frame(receipt: SessionReceipt) -> bytes:
    """Tell the payer, at the end of a stream, what was accepted and spent.

    Source: draft-tempo-session, receipt event.
    """
    return _control_frame(RECEIPT_EVENT, receipt.to_json(), "payment.receipt")


def data_frame(payload: bytes) -> bytes:
    """Wrap one line of content.

    Raises:
        ValueError: when ``payload`` holds CR or LF. Splitting it over several ``data:`` lines would be legal, but the
            payload is one JSON text and a raw line break in it means that somebody is forging frames.
    """
    if b"\n" in payload or b"\r" in payload:
        raise ValueError("an event payload is a single line")
    return b"data: " + payload + b"\n\n"


def parse_need_voucher(data: str) -> NeedVoucher:
    """Read the data of a need-voucher event.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming the member.
    """
    value = strict_json.loads(data, field=NEED_VOUCHER_EVENT, reason=Reason.INVALID_PAYLOAD)
    members = members_of(value, field=NEED_VOUCHER_EVENT)
    return NeedVoucher(
        channel_id=parse_channel_id(members.get("channelId")),
        required=parse_units(members.get("requiredCumulative"), field="requiredCumulative"),
        accepted=parse_units(members.get("acceptedCumulative"), field="acceptedCumulative"),
        deposit=parse_units(members.get("deposit"), field="deposit"),
    )


def parse_receipt_event(data: str) -> SessionReceipt:
    """Read the data of a receipt event. Raises as ``parse_receipt`` does."""
    return parse_receipt(strict_json.loads(data, field=RECEIPT_EVENT, reason=Reason.INVALID_PAYLOAD))


class SseParser:
    """Turns reads of any size into events; how the stream was cut into reads makes no difference.

    Line ends are LF, CRLF and CR. An event the stream ends in the middle of is dropped, as the format demands.

    Source: WHATWG HTML, 9.2.6 "Interpreting an event stream".
    """

    def __init__(self, *, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._event_bytes_max = event_bytes_max
        self._line = bytearray()  # the start of a line whose end has not arrived
        self._skip_lf = False  # the last read ended in CR: an LF that follows belongs to it
        self._first_line = True
        self._event = ""
        self._data: list[str] = []
        self._kept = 0  # bytes of data lines of the current event that are kept until it ends

    def feed(self, data: bytes) -> list[SseEvent]:
        """Take one read and return the events it completed.

        Raises:
            ChannelFault: ``INVALID_PAYLOAD`` when an event exceeds the limit or a line is not UTF-8.
        """
        if self._skip_lf and data:
            data = data.removeprefix(b"\n")
            self._skip_lf = False
        lines = _LINE_END.split(data)
        if data.endswith(b"\r"):
            # Dispatching at once, rather than waiting to see whether LF follows, keeps an event from being held up.
            self._skip_lf = True
        events = []
        for index, line in enumerate(lines):
            self._line += line
            if self._kept + len(self._line) > self._event_bytes_max:
                raise ChannelFault(Reason.INVALID_PAYLOAD, field="event", detail="is larger than its limit")
            if index < len(lines) - 1 and (event := self._end_line()) is not None:
                events.append(event)
        return events

    def _end_line(self) -> SseEvent | None:
        raw = bytes(self._line)
        self._line.clear()
        if self._first_line:
            raw = raw.removeprefix(_BOM)
            self._first_line = False
        if not raw:
            return self._dispatch()
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ChannelFault(Reason.INVALID_PAYLOAD, field="event", detail="is not UTF-8") from None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        # A comment has an empty name. `id` and `retry` steer reconnection, which a paid stream never does.
        if name == "event":
            self._event = value
        elif name == "data":
            self._data.append(value)
            self._kept += len(raw)
        return None

    def _dispatch(self) -> SseEvent | None:
        event = SseEvent(self._event or MESSAGE_EVENT, "\n".join(self._data)) if self._data else None
        self._event, self._data, self._kept = "", [], 0
        return event


def _control_frame(event: str, value: dict[str, object], name: str) -> bytes:
    # `object` and an empty `choices` let SDKs that ignore event names take this frame for a chunk with no content.
    # They stand last: the members the payer looks for come first, as in the reference's own frame.
    text = json.dumps(value | {"object": name, "choices": []}, separators=(",", ":"))
    return f"event: {event}\ndata: {text}\n\n".encode("ascii")
