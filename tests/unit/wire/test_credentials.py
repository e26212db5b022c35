"""Credentials: what is refused, as what, and naming which member."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from channels.descriptor import Descriptor
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, Hash32, parse_channel_id
from channels.units import MAX_UINT96, Units
from channels.wire import credential
from channels.wire.challenge import ChallengeMac

MAC = ChallengeMac((b"k" * 32,))
CHALLENGE = MAC.issue(
    realm="r",
    method="tempo",
    intent="session",
    request="e30",
    expires="2030-01-01T00:00:00Z",
    opaque={"scope": "x", "a": "1"},
)
DESCRIPTOR = Descriptor(
    payer=Address(b"\x11" * 20),
    payee=Address(b"\x12" * 20),
    operator=Address(bytes(20)),
    token=Address(b"\x20" * 20),
    salt=Hash32(b"\x77" * 32),
    authorized_signer=Address(b"\x11" * 20),
    expiring_nonce_hash=Hash32(b"\x99" * 32),
)
ID = ChannelId(b"\xab" * 32)
SIGNATURE = b"\x01" * 65
OPEN = credential.OpenPayload(ID, b"\x76\xc0", DESCRIPTOR, Address(b"\x11" * 20), Units(25), SIGNATURE)
TOP_UP = credential.TopUpPayload(ID, b"\x78\xc0", DESCRIPTOR, Units(100))
VOUCHER = credential.VoucherPayload(ID, DESCRIPTOR, Units(50), SIGNATURE)
CLOSE = credential.ClosePayload(ID, None, Units(0), SIGNATURE)
SOURCE = "did:pkh:eip155:42431:0x1111111111111111111111111111111111111111"


def wire(payload: credential.Payload = VOUCHER) -> dict[str, Any]:
    token = credential.encode(credential.Credential(CHALLENGE, payload, SOURCE))
    value: dict[str, Any] = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    return value


def token_of(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def fault_of(token: str) -> ChannelFault:
    with pytest.raises(ChannelFault) as caught:
        credential.decode(token)
    return caught.value


@pytest.mark.parametrize("payload", [OPEN, TOP_UP, VOUCHER, CLOSE], ids=["open", "topUp", "voucher", "close"])
@pytest.mark.parametrize("source", [SOURCE, None])
def test_round_trip(payload: credential.Payload, source: str | None) -> None:
    """Each kind of payload survives encoding, and the echoed challenge still verifies."""
    written = credential.Credential(CHALLENGE, payload, source)
    read = credential.decode(credential.encode(written))
    assert read == written
    assert MAC.verify(read.challenge)


def test_t10_standard_base64_with_padding() -> None:
    """T-10: a credential in padded standard base64 is the same credential."""
    text = base64.b64encode(json.dumps(wire()).encode()).decode()
    assert credential.decode(text) == credential.Credential(CHALLENGE, VOUCHER, SOURCE)


def test_t10_opaque_as_an_object() -> None:
    """T-10: the older form of opaque, an object in any order, verifies like the text it stands for."""
    value = wire()
    value["challenge"]["opaque"] = {"scope": "x", "a": "1"}
    assert MAC.verify(credential.decode_envelope(token_of(value)).challenge)
    value["challenge"]["opaque"] = {"scope": "y", "a": "1"}
    assert not MAC.verify(credential.decode_envelope(token_of(value)).challenge)


def test_unknown_members_are_ignored() -> None:
    """T-08: members we do not know, whatever they are called, change nothing."""
    value = wire()
    for place in (value, value["challenge"], value["payload"], value["payload"]["descriptor"]):
        place["__proto__"] = {"action": "close"}
        place["constructor"] = None
        place["futureMember"] = [1, {"x": []}]
    assert credential.decode(token_of(value)) == credential.Credential(CHALLENGE, VOUCHER, SOURCE)


ENVELOPE_CHANGES: list[tuple[str, Any]] = [
    ("challenge", None),
    ("challenge", "e30"),
    ("challenge", []),
    ("challenge.id", None),
    ("challenge.id", 5),
    ("challenge.id", "x" * 257),
    ("challenge.realm", ["r"]),
    ("challenge.method", None),
    ("challenge.intent", {}),
    ("challenge.request", {"amount": "1"}),
    ("challenge.expires", 1_893_456_000),
    ("challenge.expires", None),
    ("challenge.expires", "2" * 1025),
    ("challenge.digest", False),
    ("challenge.opaque", 1),
    ("challenge.opaque", ["a"]),
    ("challenge.opaque", {"a": 1}),
    ("challenge.opaque", {"a": {"b": "c"}}),
    ("challenge.description", 1),
    ("challenge.header", None),
    ("source", None),
    ("source", 5),
    ("source", ["did:pkh"]),
]


@pytest.mark.parametrize(("path", "value"), ENVELOPE_CHANGES, ids=lambda part: ascii(part)[:30])
def test_t08_wrong_types_in_the_envelope(path: str, value: Any) -> None:
    """T-08: a member of the wrong type or size makes the credential malformed and is named, without its content."""
    changed = wire()
    *places, name = path.split(".")
    target = changed[places[0]] if places else changed
    target[name] = value
    fault = fault_of(token_of(changed))
    assert fault.reason is Reason.MALFORMED_CREDENTIAL
    assert fault.field == name


@pytest.mark.parametrize("name", ["challenge", "challenge.id", "challenge.realm", "challenge.method", "challenge.intent", "challenge.request", "payload"])
def test_missing_members_of_the_envelope(name: str) -> None:
    """A credential without a challenge, one of its five members, or a payload is malformed."""
    changed = wire()
    *places, last = name.split(".")
    del (changed[places[0]] if places else changed)[last]
    assert fault_of(token_of(changed)).reason is Reason.MALFORMED_CREDENTIAL


@pytest.mark.parametrize(
    "token",
    [
        "",
        "!!!",
        "dGhpcyBpcyBnYXJiYWdl",
        token_of(None),
        token_of([]),
        token_of("x"),
        token_of(5),
        "e30 ",
        "e30\n",
        base64.urlsafe_b64encode(b'{"challenge":' * 3_000).decode(),
        "A" * 1_000_000,
        "\u00e9\ud800",
        base64.urlsafe_b64encode(b'{"challenge":{},"challenge":{}}').decode(),
        base64.urlsafe_b64encode(b'{"a":"\xff"}').decode(),
        token_of({"pad": "x" * 12_400}),
    ],
    ids=lambda token: ascii(token[:20]),
)
def test_t08_undecodable_credentials(token: str) -> None:
    """T-08: garbage, nesting, size and bad Unicode are all a malformed credential."""
    assert fault_of(token).reason is Reason.MALFORMED_CREDENTIAL


def test_payload_faults_wait_for_the_envelope() -> None:
    """The envelope is readable, and its challenge can be judged, whatever stands in the payload."""
    for payload in (None, 5, [], "x", {}, {"action": "steal"}):
        value = wire() | {"payload": payload}
        envelope = credential.decode_envelope(token_of(value))
        assert MAC.verify(envelope.challenge)
        with pytest.raises(ChannelFault) as caught:
            credential.decode_payload(envelope)
        assert caught.value.reason is Reason.INVALID_PAYLOAD


@pytest.mark.parametrize(
    "text",
    [
        "1e3",
        "-1",
        "0x10",
        "01",
        "",
        "340282366920938463463374607431768211456",
        str(2**96),
        str(2**128),
        str(2**256),
        "9" * 5000,
        "1_000",
        " 12",
        "12 ",
        "12\n",
        "+5",
        "1.0",
        "-0",
        "00",
        "\u0661\u0662",
        "\uff11",
        "NaN",
        "Infinity",
        25,
        0,
        True,
        None,
        ["25"],
        {"value": "25"},
    ],
    ids=lambda text: ascii(text)[:24],
)
@pytest.mark.parametrize("payload", [OPEN, VOUCHER, CLOSE, TOP_UP], ids=["open", "voucher", "close", "topUp"])
def test_t34_p11_amounts_are_canonical_decimal_text(payload: credential.Payload, text: Any) -> None:
    """T-34, P11: an amount that is not a canonical decimal string within uint96 is an invalid payload naming its member."""
    value = wire(payload)
    name = "additionalDeposit" if payload is TOP_UP else "cumulativeAmount"
    value["payload"][name] = text
    fault = fault_of(token_of(value))
    assert (fault.reason, fault.field) == (Reason.INVALID_PAYLOAD, name)


def test_t34_the_largest_amount_is_an_amount() -> None:
    """T-34: 2**96-1 is read exactly."""
    value = wire()
    value["payload"]["cumulativeAmount"] = str(MAX_UINT96)
    payload = credential.decode(token_of(value)).payload
    assert isinstance(payload, credential.VoucherPayload)
    assert payload.cumulative == MAX_UINT96


def test_t25_a_top_up_of_nothing_is_refused() -> None:
    """T-25: additionalDeposit 0 would only cancel a close request at our expense."""
    value = wire(TOP_UP)
    value["payload"]["additionalDeposit"] = "0"
    assert fault_of(token_of(value)).field == "additionalDeposit"


@pytest.mark.parametrize(
    "spelling",
    ["0x" + "AB" * 32, "0x" + "aB" * 32, "0x" + "Ab" * 16 + "ab" * 16],
)
def test_p12_t35_every_spelling_is_one_channel(spelling: str) -> None:
    """P12, T-35: letter case does not make another channel."""
    value = wire()
    value["payload"]["channelId"] = spelling
    assert credential.decode(token_of(value)).payload.channel_id == ID


@pytest.mark.parametrize(
    "spelling",
    [
        "0X" + "ab" * 32,
        "ab" * 32,
        "0x" + "ab" * 31,
        "0x" + "ab" * 33,
        "0x" + "ab" * 31 + "a",
        "0x" + "ab" * 31 + "ag",
        "0x " + "ab" * 32,
        "0x" + "ab " * 32,
        "0x" + "ab" * 32 + "\n",
        "0x" + "\uff41b" * 32,
        "0x" + "\u212a" * 64,
        "0x0x" + "ab" * 31,
        "",
        "0x",
        None,
        171,
        ["0x" + "ab" * 32],
    ],
    ids=lambda text: ascii(text)[:24],
)
def test_p12_other_spellings_are_no_channel(spelling: Any) -> None:
    """P12: spaces, prefixes, look-alikes and wrong lengths are an invalid payload, not a second record."""
    value = wire()
    value["payload"]["channelId"] = spelling
    fault = fault_of(token_of(value))
    assert (fault.reason, fault.field) == (Reason.INVALID_PAYLOAD, "channelId")


@pytest.mark.parametrize("name", ["payer", "payee", "operator", "token", "salt", "authorizedSigner", "expiringNonceHash"])
@pytest.mark.parametrize("bad", [None, "0x", "0x" + "1" * 41, "0x" + "zz" * 20, 5, "0x" + "11" * 65], ids=ascii)
def test_p8_descriptor_members_are_exact(name: str, bad: Any) -> None:
    """P8: each of the seven descriptor members has one length and is named when it is wrong or missing."""
    value = wire()
    value["payload"]["descriptor"][name] = bad
    assert fault_of(token_of(value)).field == f"descriptor.{name}"
    del value["payload"]["descriptor"][name]
    fault = fault_of(token_of(value))
    assert (fault.reason, fault.field) == (Reason.INVALID_PAYLOAD, f"descriptor.{name}")


@pytest.mark.parametrize(
    "bad",
    [None, 5, "", "0x1", "0xzz", "ab" * 65, "0X" + "ab" * 65, "0x" + "ab" * 2_201, "0x" + "ab " * 65, ["0x"]],
    ids=lambda text: ascii(text)[:24],
)
@pytest.mark.parametrize("payload", [OPEN, VOUCHER, CLOSE], ids=["open", "voucher", "close"])
def test_t33_unreadable_signatures_are_invalid_signatures(payload: credential.Payload, bad: Any) -> None:
    """T-33: a signature of odd length, huge size or wrong type is an invalid signature, never another fault."""
    value = wire(payload)
    value["payload"]["signature"] = bad
    fault = fault_of(token_of(value))
    assert (fault.reason, fault.field) == (Reason.INVALID_SIGNATURE, "signature")


@pytest.mark.parametrize("length", [0, 64, 65, 130, 2_200])
def test_signature_lengths_are_left_to_the_signature_module(length: int) -> None:
    """Any readable hex up to 2,200 bytes is handed on raw."""
    value = wire()
    value["payload"]["signature"] = "0x" + "ab" * length
    payload = credential.decode(token_of(value)).payload
    assert isinstance(payload, credential.VoucherPayload)
    assert payload.signature == b"\xab" * length


PAYLOAD_CHANGES: list[tuple[credential.Payload, str, Any, str]] = [
    (VOUCHER, "action", "Voucher", "action"),
    (VOUCHER, "action", None, "action"),
    (VOUCHER, "action", ["voucher"], "action"),
    (VOUCHER, "descriptor", None, "descriptor"),
    (VOUCHER, "descriptor", "0x", "descriptor"),
    (OPEN, "type", "hash", "type"),
    (OPEN, "type", None, "type"),
    (TOP_UP, "type", "Transaction", "type"),
    (OPEN, "transaction", "0x", "transaction"),
    (OPEN, "transaction", None, "transaction"),
    (OPEN, "transaction", "0x7", "transaction"),
    (TOP_UP, "transaction", "0x" + "76" * 6_001, "transaction"),
    (OPEN, "authorizedSigner", "0x11", "authorizedSigner"),
    (OPEN, "authorizedSigner", None, "authorizedSigner"),
]


@pytest.mark.parametrize(("payload", "name", "value", "field"), PAYLOAD_CHANGES, ids=lambda part: ascii(part)[:20])
def test_payload_members_are_typed(payload: credential.Payload, name: str, value: Any, field: str) -> None:
    """A payload member of the wrong type or form is an invalid payload that names it."""
    changed = wire(payload)
    changed["payload"][name] = value
    envelope = credential.Envelope(CHALLENGE, changed["payload"], None)
    with pytest.raises(ChannelFault) as caught:
        credential.decode_payload(envelope)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_PAYLOAD, field)


def test_faults_never_quote_the_peer() -> None:
    """P33: what a peer wrote appears nowhere in the fault, so it can be logged and answered as it is."""
    canary = "canary-7f3a"
    for path in ("action", "channelId", "cumulativeAmount", "signature"):
        value = wire()
        value["payload"][path] = canary
        fault = fault_of(token_of(value))
        assert canary not in str(fault) + fault.message + fault.detail + (fault.field or "")
    assert canary not in str(fault_of(token_of({canary: canary})))
    assert canary not in str(fault_of(base64.urlsafe_b64encode(canary.encode() * 3).decode()))


@pytest.mark.parametrize(
    "source",
    [
        "",
        "0x1111111111111111111111111111111111111111",
        "did:pkh:eip155:042431:0x1111111111111111111111111111111111111111",
        "did:pkh:eip155:-1:0x1111111111111111111111111111111111111111",
        "did:pkh:eip155::0x1111111111111111111111111111111111111111",
        "did:pkh:eip155:1:0X1111111111111111111111111111111111111111",
        "did:pkh:eip155:1:0x111111111111111111111111111111111111111",
        "did:pkh:eip155:1:0x1111111111111111111111111111111111111111\n",
        "did:pkh:eip155:1:0x1111111111111111111111111111111111111111#key",
        "did:pkh:solana:1:0x1111111111111111111111111111111111111111",
        "DID:PKH:EIP155:1:0x1111111111111111111111111111111111111111",
        "did:pkh:eip155:99999999999999999999:0x1111111111111111111111111111111111111111",
        "did:pkh:eip155:\u0661:0x1111111111111111111111111111111111111111",
    ],
    ids=ascii,
)
def test_t42_sources_have_one_form(source: str) -> None:
    """T-42: anything but a did:pkh of one EIP-155 account is a source mismatch."""
    with pytest.raises(ChannelFault) as caught:
        credential.parse_source(source)
    assert caught.value.reason is Reason.SOURCE_MISMATCH


def test_source_round_trip() -> None:
    """A payer identity is read back as the chain and address it was made of, in any letter case."""
    address = Address(bytes.fromhex("19e7e376e7c213b7e7e7e46cc70a5dd086daff2a"))
    assert credential.parse_source(credential.source_of(4217, address)) == (4217, address)
    assert credential.parse_source("did:pkh:eip155:4217:0x19E7E376E7C213B7E7e7e46cc70A5dD086DAff2A") == (4217, address)


def test_a_full_open_fits_the_limit() -> None:
    """The largest honest credential, an open with a WebAuthn-sized signature and transaction, is within 16 KiB."""
    big = credential.OpenPayload(ID, b"\x76" * 2_600, DESCRIPTOR, Address(b"\x11" * 20), Units(MAX_UINT96), b"\x02" * 2_049)
    token = credential.encode(credential.Credential(CHALLENGE, big, SOURCE))
    assert len(token) <= credential.CREDENTIAL_TEXT_MAX
    assert credential.decode(token).payload == big
    assert parse_channel_id("0x" + "ab" * 32) == ID
