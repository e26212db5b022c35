"""Codecs under arbitrary input: only their own fault, no loss, one meaning per stream."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from channels.descriptor import RESERVE_ADDRESS, Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault
from channels.ids import Address, ChannelId, Hash32, parse_channel_id, to_hex
from channels.instants import UnixMillis, UnixSeconds
from channels.units import MAX_UINT96, Units, parse_units
from channels.wire import (
    accept_payment,
    base64url,
    challenge,
    credential,
    headers,
    jcs,
    receipt,
    request,
    snapshot,
    sse,
    strict_json,
)

MAC = challenge.ChallengeMac((b"s" * 32,))
AMOUNTS = st.integers(0, MAX_UINT96).map(Units)
ADDRESSES = st.binary(min_size=20, max_size=20).map(Address)
HASHES = st.binary(min_size=32, max_size=32).map(Hash32)
CHANNELS = st.binary(min_size=32, max_size=32).map(ChannelId)
DESCRIPTORS = st.builds(Descriptor, ADDRESSES, ADDRESSES, ADDRESSES, ADDRESSES, HASHES, ADDRESSES, HASHES)
ESCROWS = st.builds(Escrow, st.sampled_from(SessionProtocol), st.integers(0, 2**53 - 1), ADDRESSES)
SIGNATURES = st.binary(max_size=80)
MAYBE_DESCRIPTOR = st.none() | DESCRIPTORS
TRANSACTIONS = st.binary(min_size=1, max_size=400)
PAYLOADS = st.one_of(
    st.builds(credential.OpenPayload, CHANNELS, TRANSACTIONS, MAYBE_DESCRIPTOR, st.none() | ADDRESSES, AMOUNTS, SIGNATURES),
    st.builds(credential.TopUpPayload, CHANNELS, TRANSACTIONS, MAYBE_DESCRIPTOR, AMOUNTS.filter(bool)),
    st.builds(credential.VoucherPayload, CHANNELS, MAYBE_DESCRIPTOR, AMOUNTS, SIGNATURES),
    st.builds(credential.ClosePayload, CHANNELS, MAYBE_DESCRIPTOR, AMOUNTS, SIGNATURES),
)
# Everything UTF-8 can carry; half surrogate pairs have tests of their own.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)
SLOTS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="|"), min_size=1, max_size=60)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**53, 2**53 - 1) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
WILD_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | PRINTABLE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
HEADERISH = st.text(st.sampled_from('Payment Bearer,="\\ \t\r\n\x00\x7f;qid=realmu00e9\ud800\u00e9A/*+-_.0123456789'), max_size=120)


@given(st.binary(max_size=200))
def test_base64_round_trip(data: bytes) -> None:
    """Both forms we write are read back as the same bytes."""
    for text in (base64url.encode(data), base64url.encode_padded(data)):
        assert base64url.decode(text, field="f", length_max=200) == data


@given(st.text(st.sampled_from("ABYZabyz0189+/-_= \n\u00e9"), max_size=24))
def test_base64_accepts_only_canonical_text(text: str) -> None:
    """What is accepted is exactly the text we would write, up to alphabet and padding."""
    try:
        data = base64url.decode(text, field="f", length_max=18)
    except ChannelFault:
        return
    padded = base64url.encode_padded(data)
    assert text in {padded, padded.rstrip("="), padded.translate(str.maketrans("+/", "-_")), base64url.encode(data)}


@given(st.text(max_size=40) | st.from_regex(r"[0-9_ +\-.eE\n]{1,32}", fullmatch=True))
@example("1\n")
@example(str(MAX_UINT96))
@example(str(MAX_UINT96 + 1))
def test_p11_accepted_amounts_are_the_canonical_decimals(text: str) -> None:
    """P11: an accepted amount is written back as the very same text, and is within uint96."""
    try:
        value = parse_units(text)
    except ChannelFault:
        canonical = text.isascii() and text.isdigit() and str(int(text)) == text and int(text) <= MAX_UINT96
        assert not canonical
        return
    assert str(value) == text
    assert 0 <= value <= MAX_UINT96


@given(CHANNELS, st.data())
def test_p12_spellings_of_a_channel_id(channel: ChannelId, data: st.DataObject) -> None:
    """P12: random letter case reads as the same channel; one random character more or other reads as none or another."""
    spelled = "".join(data.draw(st.sampled_from([digit.upper(), digit])) for digit in channel.hex())
    assert parse_channel_id("0x" + spelled) == channel
    index = data.draw(st.integers(0, 65))
    other = data.draw(st.characters())
    text = to_hex(channel)
    for changed in (text[:index] + other + text[index:], text[:index] + other + text[index + 1 :]):
        try:
            read = parse_channel_id(changed)
        except ChannelFault:
            continue
        assert to_hex(read) == changed.lower()


@given(JSON)
def test_json_round_trip(value: object) -> None:
    """Canonical JSON reads back as the same value, and writing is a fixed point."""
    text = jcs.canonicalize(value)
    if (text.count("[") + text.count("{")) <= 16:
        read = strict_json.loads(text, field="f")
        assert read == value
        assert jcs.canonicalize(read) == text


@given(st.binary(max_size=60) | HEADERISH | st.text(max_size=60) | WILD_JSON.map(json.dumps))
def test_strict_json_raises_only_its_fault(data: bytes | str) -> None:
    """Whatever is accepted, the standard parser reads alike and our writer can write; the rest is one fault."""
    try:
        value = strict_json.loads(data, field="f")
    except ChannelFault:
        return
    assert value == json.loads(data)
    assert strict_json.loads(jcs.canonicalize(value), field="f") == value


@given(
    realm=SLOTS,
    intent=st.from_regex(r"[a-z][a-z0-9_-]{0,20}", fullmatch=True),
    body=st.dictionaries(TEXTS, JSON, max_size=3),
    at=st.integers(0, 4_000_000_000_000),
    entropy=st.integers(0, 2**64),
    opaque=st.dictionaries(TEXTS, TEXTS, max_size=3),
    description=st.none() | PRINTABLE,
    header=st.none() | st.from_regex(r"X-[A-Za-z0-9-]{1,20}", fullmatch=True),
)
def test_challenge_round_trip(
    *, realm: str, intent: str, body: dict[str, Any], at: int, entropy: int, opaque: dict[str, str], description: str | None, header: str | None
) -> None:
    """An issued challenge survives its header, alone and among others, and is recognised afterwards."""
    issued = MAC.issue(
        realm=realm,
        method="tempo",
        intent=intent,
        request=challenge.encode_object(body),
        expires=challenge.expires_text(UnixMillis(at), entropy),
        opaque=opaque,
        description=description,
        header=header,
    )
    line = headers.serialize_challenge(issued)
    assert line.isprintable()
    assert headers.parse_challenges([f'Bearer realm="Payment id=1", {line}, {line}']) == [issued, issued]
    assert MAC.verify(issued)


@given(st.lists(HEADERISH | st.text(max_size=60), max_size=3))
def test_p18_header_parsers_raise_only_their_fault(values: list[str]) -> None:
    """P18: no header text makes the tokenizer fail in another way, and no token spans a comma outside quotes."""
    for token in headers.payment_credentials(values):
        assert '"' in token or "," not in token
    try:
        parsed = headers.parse_challenges(values)
    except ChannelFault:
        return
    assert all(one.id and one.realm and one.request for one in parsed)


@given(HEADERISH)
def test_p18_quoted_text_never_leaks_a_credential(inside: str) -> None:
    """P18, T-07: nothing inside a quoted value of another scheme becomes a credential."""
    quoted = inside.replace("\\", "\\\\").replace('"', '\\"')
    assert headers.payment_credentials([f'Bearer realm="{quoted}"']) == []
    assert headers.payment_credentials([f'Bearer realm="{quoted}", Payment abc']) == ["abc"]


@given(PAYLOADS, st.none() | st.just("did:pkh:eip155:1:0x" + "11" * 20), st.dictionaries(TEXTS, TEXTS, max_size=2))
def test_credential_round_trip(payload: credential.Payload, source: str | None, opaque: dict[str, str]) -> None:
    """Any credential we can build is read back whole, and its challenge verifies."""
    issued = MAC.issue(realm="r", method="tempo", intent="session", request="e30", expires="2030-01-01T00:00:00Z", opaque=opaque)
    written = credential.Credential(issued, payload, source)
    assert credential.decode(credential.encode(written)) == written
    assert MAC.verify(written.challenge)


@given(PAYLOADS, WILD_JSON, st.data())
def test_credential_parser_raises_only_its_fault(payload: credential.Payload, junk: object, data: st.DataObject) -> None:
    """T-08: replacing, adding or removing any member anywhere gives a credential or a fault, nothing else."""
    issued = MAC.issue(realm="r", method="tempo", intent="session", request="e30", expires="2030-01-01T00:00:00Z")
    value = {"challenge": {"id": issued.id, "realm": "r", "method": "tempo", "intent": "session", "request": "e30"}, "payload": credential.payload_to_json(payload)}
    place: Any = data.draw(st.sampled_from([value, value["challenge"], value["payload"]]))
    name = data.draw(st.sampled_from(sorted(place)) | st.sampled_from(["__proto__", "descriptor", "opaque", "source"]))
    if data.draw(st.booleans()):
        place[name] = junk
    else:
        place.pop(name, None)
    token = base64url.encode(json.dumps(value).encode("utf-8", "replace"))
    try:
        decoded = credential.decode(token)
    except ChannelFault:
        return
    MAC.verify(decoded.challenge)
    assert credential.decode(credential.encode(decoded)) == decoded


@given(st.text(max_size=80) | st.binary(max_size=80).map(base64url.encode) | WILD_JSON.map(lambda value: base64url.encode(json.dumps(value).encode())))
def test_decoders_raise_only_their_fault(text: str) -> None:
    """Arbitrary text, arbitrary bytes and arbitrary JSON are never decoded into a payment object, nor crash a decoder."""
    for decode in (credential.decode, receipt.decode, snapshot.decode, request.decode):
        with pytest.raises(ChannelFault):
            decode(text)
    accept_payment.parse(text)


RECEIPTS = st.builds(
    lambda at, name, channel, low, high, units, tx: receipt.SessionReceipt(at, name, channel, max(low, high), min(low, high), units, tx),
    st.integers(0, 4_000_000_000_000).map(UnixMillis),
    TEXTS,
    CHANNELS,
    AMOUNTS,
    AMOUNTS,
    st.none() | st.integers(0, 2**53 - 1),
    st.none() | HASHES,
)
SNAPSHOTS = st.builds(
    snapshot.SessionSnapshot,
    CHANNELS,
    st.builds(Escrow, st.just(SessionProtocol.V2), st.integers(0, 2**53 - 1), st.just(RESERVE_ADDRESS)),
    DESCRIPTORS,
    AMOUNTS,
    AMOUNTS,
    AMOUNTS,
    AMOUNTS,
    AMOUNTS,
    st.none() | st.integers(0, 2**53 - 1),
    st.none() | st.builds(snapshot.SignedAmount, AMOUNTS, SIGNATURES),
    st.none() | st.integers(0, 2**40).map(UnixSeconds),
)


@given(RECEIPTS)
def test_receipt_round_trip(value: receipt.SessionReceipt) -> None:
    """A receipt survives its header and its event frame."""
    assert receipt.decode(value.encode()) == value
    (event,) = sse.SseParser().feed(sse.receipt_frame(value))
    assert sse.parse_receipt_event(event.data) == value


@given(SNAPSHOTS)
def test_snapshot_round_trip(value: snapshot.SessionSnapshot) -> None:
    """A snapshot survives its header."""
    assert snapshot.decode(value.encode()) == value


@given(
    st.builds(
        request.SessionRequest,
        AMOUNTS.filter(bool),
        ADDRESSES,
        ADDRESSES,
        TEXTS,
        ESCROWS,
        st.none() | AMOUNTS,
        st.none() | TEXTS,
        st.booleans(),
        st.none() | ADDRESSES,
        st.none() | AMOUNTS,
        st.none() | ADDRESSES,
        st.none() | CHANNELS,
        st.none() | SNAPSHOTS,
    )
)
def test_session_request_round_trip(value: request.SessionRequest) -> None:
    """A session request survives its text."""
    assert request.decode(value.encode()) == value


STREAMS = st.lists(
    st.sampled_from([b"data: ", b"data:", b"event: x", b"event", b":c", b"\r", b"\n", b"\r\n", b"\n\n", b"\xef\xbb\xbf", b"a", "\u20ac".encode(), b"\xff", b" "]),
    max_size=30,
).map(b"".join)


def read(stream: bytes, cuts: list[int]) -> tuple[list[sse.SseEvent], bool]:
    parser, events = sse.SseParser(event_bytes_max=40), []
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    try:
        for begin, end in pairwise(places):
            # Events completed before a fault inside the same read are lost with it, so byte-wise reading sees more of them.
            events += parser.feed(stream[begin:end])
    except ChannelFault:
        return events, False
    return events, True


@given(STREAMS, st.lists(st.integers(0, 400), max_size=6))
def test_sse_chunking_changes_nothing(stream: bytes, cuts: list[int]) -> None:
    """Any cutting gives the events that reading byte by byte gives, and faults exactly when that does."""
    bytewise, fine = read(stream, list(range(len(stream))))
    events, also_fine = read(stream, cuts)
    assert also_fine == fine
    assert events == bytewise if fine else events == bytewise[: len(events)]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=20), max_size=5))
def test_sse_data_frames_round_trip(payloads: list[str]) -> None:
    """One-line payloads come back as they were, one event each."""
    stream = b"".join(sse.data_frame(payload.encode()) for payload in payloads)
    assert [event.data for event in sse.SseParser().feed(stream)] == payloads
