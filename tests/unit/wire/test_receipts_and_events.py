"""Receipts, snapshots, server-sent events, problem types and Accept-Payment."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from channels.descriptor import RESERVE_ADDRESS, Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixMillis, UnixSeconds
from channels.units import Units
from channels.wire import accept_payment, base64url, problems, receipt, snapshot, sse

ID = ChannelId(b"\x5b" * 32)
RECEIPT = receipt.SessionReceipt(UnixMillis(1_893_456_001_000), "challenge-1", ID, Units(250), Units(225))
SNAPSHOT = snapshot.SessionSnapshot(
    channel_id=ID,
    escrow=Escrow(SessionProtocol.V2, 42_431, RESERVE_ADDRESS),
    descriptor=Descriptor(
        Address(b"\x11" * 20),
        Address(b"\x12" * 20),
        Address(bytes(20)),
        Address(b"\x20" * 20),
        Hash32(b"\x77" * 32),
        Address(b"\x11" * 20),
        Hash32(b"\x99" * 32),
    ),
    deposit=Units(10_000),
    settled=Units(0),
    spent=Units(25),
    accepted=Units(50),
    required=Units(75),
    units=2,
    highest_voucher=snapshot.SignedAmount(Units(50), b"\x01" * 65),
    close_requested_at=UnixSeconds(1_893_456_000),
)


def refused(call: Any, *args: Any) -> ChannelFault:
    with pytest.raises(ChannelFault) as caught:
        call(*args)
    return caught.value


@pytest.mark.parametrize("value", [RECEIPT, replace(RECEIPT, units=0), replace(RECEIPT, tx_hash=Hash32(b"\xcd" * 32))])
def test_receipt_round_trip(value: receipt.SessionReceipt) -> None:
    """A receipt survives its header and its event."""
    assert receipt.decode(value.encode()) == value
    (event,) = sse.SseParser().feed(sse.receipt_frame(value))
    assert event.event == sse.RECEIPT_EVENT
    assert sse.parse_receipt_event(event.data) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "stripe"),
        ("method", None),
        ("intent", "charge"),
        ("status", "failed"),
        ("timestamp", 5),
        ("timestamp", "yesterday"),
        ("challengeId", None),
        ("challengeId", "x" * 257),
        ("channelId", "0x5b"),
        ("acceptedCumulative", 250),
        ("acceptedCumulative", "224"),
        ("spent", "251"),
        ("spent", "-1"),
        ("units", -1),
        ("units", "9"),
        ("units", True),
        ("units", 2**53),
        ("txHash", "0x"),
        ("txHash", None),
    ],
)
def test_bad_receipts_are_refused(name: str, value: Any) -> None:
    """A receipt with a member of the wrong form, or more spent than accepted, is not one."""
    fault = refused(receipt.parse_receipt, RECEIPT.to_json() | {name: value})
    assert fault.reason is Reason.INVALID_PAYLOAD


@pytest.mark.parametrize("value", [SNAPSHOT, replace(SNAPSHOT, units=None, highest_voucher=None, close_requested_at=None)])
def test_snapshot_round_trip(value: snapshot.SessionSnapshot) -> None:
    """A snapshot survives its header, with and without its optional members."""
    assert snapshot.decode(value.encode()) == value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("channelId", "0x"),
        ("chainId", "42431"),
        ("chainId", 1.5),
        ("escrow", None),
        ("descriptor", []),
        ("descriptor", None),
        ("deposit", 1),
        ("settled", ""),
        ("spent", "01"),
        ("acceptedCumulative", None),
        ("requiredCumulative", "1e2"),
        ("units", "2"),
        ("closeRequestedAt", 5),
        ("highestVoucher", None),
        ("highestVoucher", {}),
        ("highestVoucher.channelId", "0x" + "5c" * 32),
        ("highestVoucher.cumulativeAmount", 50),
        ("highestVoucher.signature", "0x" + "01" * 2_201),
        ("highestVoucher.signature", None),
    ],
)
def test_bad_snapshots_are_refused(path: str, value: Any) -> None:
    """A snapshot with a wrong member, or a voucher of another channel, is refused as a whole."""
    changed: Any = SNAPSHOT.to_json()
    target, _, name = path.rpartition(".")
    (changed[target] if target else changed)[name] = value
    assert refused(snapshot.decode, base64url.encode(json.dumps(changed).encode())).reason is Reason.INVALID_PAYLOAD


def test_t52_need_voucher_frame() -> None:
    """T-52: the four members come first, all text, with the channel id in lower case; the frame is one event on LF lines."""
    frame = sse.need_voucher_frame(ChannelId(b"\xab" * 32), required=Units(50), accepted=Units(25), deposit=Units(100))
    name, data, *rest = frame.decode().split("\n")
    assert (name, rest) == ("event: payment-need-voucher", ["", ""])
    value = json.loads(data.removeprefix("data: "))
    assert list(value) == ["channelId", "requiredCumulative", "acceptedCumulative", "deposit", "object", "choices"]
    assert value["channelId"] == "0x" + "ab" * 32
    assert (value["requiredCumulative"], value["acceptedCumulative"], value["deposit"]) == ("50", "25", "100")
    assert (value["object"], value["choices"]) == ("payment.need_voucher", [])
    need = sse.parse_need_voucher(data.removeprefix("data: "))
    assert need == sse.NeedVoucher(ChannelId(b"\xab" * 32), Units(50), Units(25), Units(100))


@pytest.mark.parametrize("name", ["channelId", "requiredCumulative", "acceptedCumulative", "deposit"])
@pytest.mark.parametrize("value", [None, 2, "x", ""])
def test_bad_need_vouchers_are_refused(name: str, value: Any) -> None:
    """A number where text is due, or a missing member, is a fault and not a silent hang."""
    members = {"channelId": "0x" + "ab" * 32, "requiredCumulative": "2", "acceptedCumulative": "1", "deposit": "3"}
    assert refused(sse.parse_need_voucher, json.dumps(members | {name: value})).reason is Reason.INVALID_PAYLOAD


@pytest.mark.parametrize("payload", [b"a\nb", b"a\r", b"\r\nevent: payment-receipt", b"x\n\nevent: payment-receipt\ndata: {}"])
def test_t51_a_payload_cannot_forge_a_frame(payload: bytes) -> None:
    """T-51: content with CR or LF is never put into a frame."""
    with pytest.raises(ValueError):
        sse.data_frame(payload)


def test_t51_other_line_separators_are_content() -> None:
    """T-51: VT, NEL and U+2028 end a line for Python but not for an event stream."""
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029"
    assert sse.SseParser().feed(sse.data_frame(text.encode())) == [sse.SseEvent("message", text)]


STREAM = (
    b"\xef\xbb\xbf: hello\r\n"
    b"data: a\r"
    b"data:b\n"
    b"data\r\n"
    b"\r\n"
    b"event: custom\nid: 7\nretry: 5\ndata:  two spaces\n\n"
    b"event: lost\n\n"
    b": ping\n\n"
    b"data: \xf0\x9f\x98\x80\r\r"
    b"data:\n\n"
    b"nonsense: x\ndata: last\n\n"
    b"data: unfinished\n"
)
EVENTS = [
    sse.SseEvent("message", "a\nb\n"),
    sse.SseEvent("custom", " two spaces"),
    sse.SseEvent("message", "\U0001f600"),
    sse.SseEvent("message", ""),
    sse.SseEvent("message", "last"),
]


def test_event_stream_format() -> None:
    """BOM, comments, all line ends, unknown fields, missing space and an unfinished event are read as the format says."""
    assert sse.SseParser().feed(STREAM) == EVENTS


def test_every_split_of_a_stream_reads_alike() -> None:
    """Cutting the stream at any one or two places, or into single bytes, changes no event."""
    for first in range(len(STREAM)):
        for second in range(first, len(STREAM), 7):
            parser = sse.SseParser()
            parts = (STREAM[:first], b"", STREAM[first:second], STREAM[second:])
            assert [event for part in parts for event in parser.feed(part)] == EVENTS
    parser = sse.SseParser()
    assert [event for byte in STREAM for event in parser.feed(bytes([byte]))] == EVENTS


def test_an_event_is_dispatched_at_a_bare_cr() -> None:
    """An event that ends in CR is not held back until the next read, and an LF that follows starts nothing."""
    parser = sse.SseParser()
    assert parser.feed(b"data: x\r\r") == [sse.SseEvent("message", "x")]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"data: y\n\n") == [sse.SseEvent("message", "y")]


@pytest.mark.parametrize("size", [64, 65, 66, 640])
def test_events_have_a_size_limit(size: int) -> None:
    """At the limit an event passes; beyond it the stream is refused, in one line or many, in one read or many."""
    one_line = b"data: " + b"x" * (size - 6) + b"\n\n"
    short_lines = b"data: x\n" * (size // 8) + b"data: "[: size % 8] + b"\n\n"
    for stream in (one_line, short_lines):
        for chunk in (1, 7, len(stream)):
            parser = sse.SseParser(event_bytes_max=65)
            reads = [stream[at : at + chunk] for at in range(0, len(stream), chunk)]
            kept = len(stream) - 2 - (stream.count(b"\n") - 2)
            if kept <= 65:
                assert sum(len(parser.feed(read)) for read in reads) == 1
            else:
                assert refused(lambda parser=parser, reads=reads: [parser.feed(read) for read in reads]).reason is Reason.INVALID_PAYLOAD


def test_keep_alive_comments_do_not_fill_the_limit() -> None:
    """T-62: comments without a blank line may come forever."""
    parser = sse.SseParser(event_bytes_max=64)
    for _ in range(1000):
        assert parser.feed(b": ping\n") == []


def test_events_that_are_not_utf8_are_refused() -> None:
    """Bytes that are no text are a fault, not replacement characters in somebody's answer."""
    assert refused(sse.SseParser().feed, b"data: \xff\n").reason is Reason.INVALID_PAYLOAD


def test_every_reason_has_a_problem_type() -> None:
    """A reason without a problem type cannot be added unnoticed, and slugs are those of the registry."""
    assert set(problems.PROBLEMS) == set(Reason)
    assert {problem.slug for problem in problems.PROBLEMS.values()} == {
        "payment-required",
        "malformed-credential",
        "invalid-challenge",
        "payment-expired",
        "invalid-payload",
        "verification-failed",
        "bad-request",
        "internal-payment-error",
        "session/insufficient-balance",
        "session/invalid-signature",
        "session/amount-exceeds-deposit",
        "session/delta-too-small",
        "session/channel-not-found",
        "session/channel-finalized",
    }
    assert problems.PROBLEMS[Reason.CHANNEL_FINALIZED].type_uri == "https://paymentauth.org/problems/session/channel-finalized"
    titles = {problem.slug: problem.title for problem in problems.PROBLEMS.values()}
    assert len(set(titles.values())) == len(titles)


OFFERS = [("tempo", "charge"), ("tempo", "session"), ("evm", "charge")]


@pytest.mark.parametrize(
    ("header", "chosen"),
    [
        (None, OFFERS),
        ("", OFFERS),
        (",", OFFERS),
        ("tempo", OFFERS),
        ("tempo/session;q=2", OFFERS),
        ("tempo/session;q=-1", OFFERS),
        ("tempo/session;q=.5", OFFERS),
        ("tempo/session;q=0.0001", OFFERS),
        ("tempo/session;q=\u0661", OFFERS),
        ("tempo/session, Evm/charge", OFFERS),
        ("tempo/session " * 1000, OFFERS),
        ("solana/charge", OFFERS),
        ("*/*;q=0", OFFERS),
        ("tempo/session", [OFFERS[1]]),
        (" tempo / session ; q=0.5 ; x=y , ", [OFFERS[1]]),
        ("tempo/session;q=0.", OFFERS),
        ("*/charge;q=0.5, tempo/*;q=0.501", [OFFERS[0], OFFERS[1], OFFERS[2]]),
        ("*/*;q=0.1, evm/charge", [OFFERS[2], OFFERS[0], OFFERS[1]]),
        ("tempo/*, tempo/charge;q=0", [OFFERS[1]]),
    ],
)
def test_t84_accept_payment(header: str | None, chosen: list[tuple[str, str]]) -> None:
    """T-84: order and q are honoured, the most specific pattern decides, and a malformed header is as good as none."""
    assert accept_payment.choose(OFFERS, header, key=lambda offer: offer) == chosen
