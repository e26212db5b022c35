"""Ids, digests and signatures agree byte for byte with the reference client."""

import json
from pathlib import Path

import pytest

from channels.descriptor import Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault
from channels.ids import ZERO_ADDRESS, Hash32, parse_address, parse_channel_id, parse_hash32, parse_hex, to_hex
from channels.signature import address_of, parse_signature
from channels.voucher import VoucherDomain, derive_channel_id, domain_separator

REFERENCE = Path(__file__).parent / "reference"


def _load(name):
    return json.loads((REFERENCE / f"{name}.json").read_text())


KEYS = _load("keys")
V1 = _load("v1")
V2 = _load("v2")


def _escrow(case, protocol):
    name = "escrow" if "escrow" in case else "escrowContract"
    return Escrow(protocol, case["chainId"], parse_address(case[name], field="escrow"))


def descriptor_of(data):
    return Descriptor(
        payer=parse_address(data["payer"], field="payer"),
        payee=parse_address(data["payee"], field="payee"),
        operator=parse_address(data["operator"], field="operator") if "operator" in data else ZERO_ADDRESS,
        token=parse_address(data["token"], field="token"),
        salt=parse_hash32(data["salt"], field="salt"),
        authorized_signer=parse_address(data["authorizedSigner"], field="authorizedSigner"),
        expiring_nonce_hash=(
            parse_hash32(data["expiringNonceHash"], field="expiringNonceHash")
            if "expiringNonceHash" in data
            else Hash32(bytes(32))
        ),
    )


def _key_of(address):
    return next(
        bytes.fromhex(key["privateKey"][2:]) for key in KEYS.values() if key["address"].lower() == address.lower()
    )


def _vouchers():
    return [(SessionProtocol.V1, case) for case in V1["vouchers"]] + [
        (SessionProtocol.V2, case) for case in V2["vouchers"]
    ]


@pytest.mark.parametrize("name", [name for name in KEYS if isinstance(KEYS[name], dict)])
def test_private_keys_have_the_reference_addresses(name):
    """A private key yields the address the reference client shows."""
    key = KEYS[name]
    assert to_hex(address_of(bytes.fromhex(key["privateKey"][2:]))) == key["address"].lower()


@pytest.mark.parametrize("case", V1["channels"])
def test_v1_channel_ids_and_domains(case):
    """A v1 channel id and its domain separator equal the reference's."""
    escrow = _escrow(case, SessionProtocol.V1)
    assert to_hex(derive_channel_id(escrow, descriptor_of(case))) == case["channelId"]
    assert to_hex(domain_separator(escrow)) == case["domainSeparator"]


@pytest.mark.parametrize("case", V2["channels"])
def test_v2_channel_ids(case):
    """A v2 channel id equals the reference's, on every chain and for every operator and signer."""
    escrow = _escrow(case, SessionProtocol.V2)
    assert to_hex(derive_channel_id(escrow, descriptor_of(case["descriptor"]))) == case["channelId"]


@pytest.mark.parametrize("case", V2["domainSeparators"])
def test_v2_domain_separators(case):
    """The reserve's domain separator equals the reference's on every chain."""
    escrow = Escrow(SessionProtocol.V2, case["chainId"], parse_address(V2["precompile"], field="escrow"))
    assert to_hex(domain_separator(escrow)) == case["domainSeparator"]


@pytest.mark.parametrize(("protocol", "case"), _vouchers())
def test_vouchers(protocol, case):
    """Digest, signature and recovery of every reference voucher are reproduced exactly."""
    domain = VoucherDomain(_escrow(case, protocol))
    channel_id = parse_channel_id(case["channelId"])
    cumulative = int(case["cumulativeAmount"])
    assert to_hex(domain.digest(channel_id, cumulative)) == case["digest"]
    assert to_hex(domain.sign(channel_id, cumulative, _key_of(case["signer"]))) == case["signature"]
    signature = parse_signature(bytes.fromhex(case["signature"][2:]))
    domain.verify(channel_id, cumulative, signature, parse_address(case["signer"], field="signer"))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_signature_forms(version):
    """Only the canonical 65-byte form is accepted, in either letter case, whatever the reference client lets pass."""
    section = {"v1": V1, "v2": V2}[version]
    voucher = section["vouchers"][1]
    domain = VoucherDomain(_escrow(voucher, SessionProtocol(version)))
    accepted = []
    for case in section["signatureAcceptance"]["cases"]:
        signer = parse_address(case.get("expectedSigner", voucher["signer"]), field="signer")
        try:
            signature = parse_signature(parse_hex(case["signature"], field="signature", length_max=4096))
            domain.verify(parse_channel_id(voucher["channelId"]), int(voucher["cumulativeAmount"]), signature, signer)
        except ChannelFault:
            continue
        accepted.append(case["name"].split()[0])
    assert accepted == ["canonical", "uppercase"]
