"""Calldata, selectors, topics and transactions agree byte for byte with the reference client."""

import json
from pathlib import Path

import pytest

from channels import escrow, escrow_v1, tip20
from channels.abi import selector, topic
from channels.descriptor import Descriptor, Escrow, SessionProtocol
from channels.ids import ZERO_ADDRESS, ChannelId, parse_address, parse_hash32, to_hex
from channels.tempo_tx import EXPIRING_NONCE_KEY, Form, decode
from channels.units import Units
from channels.voucher import derive_channel_id

REFERENCE = Path(__file__).parent / "reference"


def _load(name):
    return json.loads((REFERENCE / f"{name}.json").read_text())


CALLDATA = _load("calldata")
SELECTORS = _load("selectors")
TRANSACTIONS = _load("transactions")["cases"]
V1, V2 = _load("v1"), _load("v2")

PAYER = parse_address("0x19E7E376E7C213B7E7e7e46cc70A5dD086DAff2A", field="payer")
PAYEE = parse_address("0x1563915e194D8CfBA1943570603F7606A3115508", field="payee")
TOKEN = parse_address("0x20c0000000000000000000000000000000000000", field="token")
SALT = parse_hash32("0x" + "77" * 32, field="salt")
DESCRIPTOR = Descriptor(PAYER, PAYEE, ZERO_ADDRESS, TOKEN, SALT, PAYER, parse_hash32("0x" + "99" * 32, field="hash"))
V1_ESCROW = parse_address(V1["escrowTestnet"], field="escrow")
V1_ID = ChannelId(bytes.fromhex(V1["channels"][0]["channelId"][2:]))
V2_ID = ChannelId(bytes.fromhex(V2["channels"][0]["channelId"][2:]))


def _signature(vouchers, amount):
    return bytes.fromhex(next(v for v in vouchers if v["cumulativeAmount"] == amount)["signature"][2:])


V2_CALLS = {
    "open": escrow.encode_open(escrow.OpenCall(PAYEE, ZERO_ADDRESS, TOKEN, Units(10_000), SALT, PAYER)),
    "topUp": escrow.encode_top_up(escrow.TopUpCall(DESCRIPTOR, Units(5_000))),
    "settle": escrow.encode_settle(DESCRIPTOR, Units(25), _signature(V2["vouchers"], "25")),
    "close": escrow.encode_close(DESCRIPTOR, Units(1_000_000), Units(25), _signature(V2["vouchers"], "1000000")),
    "requestClose": escrow.encode_request_close(DESCRIPTOR),
    "withdraw": escrow.encode_withdraw(DESCRIPTOR),
    "getChannelState": escrow.encode_get_channel_state(V2_ID),
}
V1_CALLS = {
    "approve": tip20.encode_approve(tip20.ApproveCall(V1_ESCROW, 10_000)),
    "open": escrow_v1.encode_open(escrow_v1.OpenCall(PAYEE, TOKEN, Units(10_000), SALT, PAYER)),
    "topUp": escrow_v1.encode_top_up(escrow_v1.TopUpCall(V1_ID, Units(5_000))),
    "settle": escrow_v1.encode_settle(V1_ID, Units(25), _signature(V1["vouchers"], "25")),
    "close": escrow_v1.encode_close(V1_ID, Units(25), _signature(V1["vouchers"], "25")),
    "getChannel": escrow_v1.encode_get_channel(V1_ID),
}


@pytest.mark.parametrize("name", V2_CALLS)
def test_v2_calldata(name):
    """Every v2 call we build is the reference's, byte for byte."""
    assert to_hex(V2_CALLS[name]) == CALLDATA["v2"][name]


@pytest.mark.parametrize("name", V1_CALLS)
def test_v1_calldata(name):
    """Every v1 call we build is the reference's, byte for byte."""
    assert to_hex(V1_CALLS[name]) == CALLDATA["v1"][name]


def test_calldata_reads_back():
    """The reference's open and topUp calldata decode to what they were made from."""
    v2 = {name: bytes.fromhex(data[2:]) for name, data in CALLDATA["v2"].items()}
    v1 = {name: bytes.fromhex(data[2:]) for name, data in CALLDATA["v1"].items()}
    assert escrow.decode_open(v2["open"]) == escrow.OpenCall(PAYEE, ZERO_ADDRESS, TOKEN, Units(10_000), SALT, PAYER)
    assert escrow.decode_top_up(v2["topUp"]) == escrow.TopUpCall(DESCRIPTOR, Units(5_000))
    assert escrow_v1.decode_open(v1["open"]) == escrow_v1.OpenCall(PAYEE, TOKEN, Units(10_000), SALT, PAYER)
    assert escrow_v1.decode_top_up(v1["topUp"]) == escrow_v1.TopUpCall(V1_ID, Units(5_000))
    assert tip20.decode_approve(v1["approve"]) == tip20.ApproveCall(V1_ESCROW, 10_000)


FUNCTIONS = [
    (signature, expected)
    for group in (SELECTORS["v2"]["functions"], SELECTORS["v1"]["functions"], SELECTORS["tip20"])
    for signature, expected in group.items()
]
EVENTS = [
    (signature, expected)
    for group in (SELECTORS["v2"]["events"], SELECTORS["v1"]["events"], SELECTORS["tip20Events"])
    for signature, expected in group.items()
]


def _constants(module):
    return {to_hex(value) for name, value in vars(module).items() if name[0] != "_" and name.isupper() and isinstance(value, bytes)}


def test_selectors_and_topics():
    """Hashing a signature gives the reference's selector or topic."""
    assert {s: to_hex(selector(s)) for s, _ in FUNCTIONS} == dict(FUNCTIONS)
    assert {s: to_hex(topic(s)) for s, _ in EVENTS} == dict(EVENTS)


@pytest.mark.parametrize(("module", "section"), [(escrow, "v2"), (escrow_v1, "v1")])
def test_no_constant_is_of_our_own_making(module, section):
    """Every selector and topic constant of an escrow module is in that escrow's published interface."""
    published = {*SELECTORS[section]["functions"].values(), *SELECTORS[section]["events"].values()}
    ours = {value for value in _constants(module) if len(value) in (10, 66)}
    assert len(ours) >= 15
    assert ours <= published


@pytest.mark.parametrize("case", TRANSACTIONS, ids=lambda case: case["name"])
def test_transactions(case):
    """A client's transaction decodes, re-encodes, and has the reference's sender, hashes and channel id."""
    signed = decode(bytes.fromhex(case["clientWire"][2:]))
    assert to_hex(signed.raw) == case["clientWire"]
    assert to_hex(signed.sender) == case.get("sender", case.get("recoveredSender")).lower()
    assert to_hex(signed.expiring_nonce_hash) == case["expiringNonceHash"]
    assert signed.tx.nonce_key == EXPIRING_NONCE_KEY
    if "encodeForSigning" in case:
        assert to_hex(signed.tx.sender_payload()) == case["encodeForSigning"]
    if signed.form is Form.COMPLETE:
        assert to_hex(signed.tx_hash) == case["txHash"]
    if "channelId" in case:
        place = Escrow(SessionProtocol.V2, signed.tx.chain_id, signed.tx.calls[0].to)
        call = escrow.decode_open(signed.tx.calls[0].data)
        opened = Descriptor(
            signed.sender, call.payee, call.operator, call.token, call.salt, call.authorized_signer,
            signed.expiring_nonce_hash,
        )  # fmt: skip
        assert to_hex(derive_channel_id(place, opened)) == case["channelId"]


@pytest.mark.parametrize("index", [1, 2])
def test_sponsored_forms_give_one_transaction(index):
    """T-21: both sponsored wire forms, co-signed, become the same broadcast bytes as the reference's."""
    reference = TRANSACTIONS[1]
    token = parse_address(reference["feeToken"], field="feeToken")
    signed = decode(bytes.fromhex(TRANSACTIONS[index]["clientWire"][2:]))
    assert to_hex(signed.tx.sponsor_hash(signed.sender, token)) == reference["feePayerSignHash"]
    cosigned = signed.cosign(token, b"\x44" * 32)
    assert to_hex(cosigned.raw) == reference["broadcastTx"]
    assert to_hex(cosigned.tx_hash) == reference["txHash"]
    assert to_hex(cosigned.fee_payer_signature) == reference["feePayerSignature"]
    assert decode(cosigned.raw) == cosigned
    assert cosigned.expiring_nonce_hash == signed.expiring_nonce_hash
