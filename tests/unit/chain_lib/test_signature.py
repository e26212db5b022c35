"""One signature form, one byte string per signature (P21, T-32, T-33)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from channels.faults import ChannelFault, Reason
from channels.keccak import keccak256
from channels.signature import CURVE_ORDER, address_of, parse_signature, recover, sign

KEY = b"\x11" * 32
DIGEST = keccak256(b"a message")
GOOD = sign(DIGEST, KEY)
R, S = GOOD[:32], int.from_bytes(GOOD[32:64])


def _with(*, r=R, s=S, v=GOOD[64]):
    return r + s.to_bytes(32) + bytes((v,))


REFUSED = {
    "empty": b"",
    "one byte short": GOOD[:64],
    "compact EIP-2098": R + (S | ((GOOD[64] - 27) << 255)).to_bytes(32),
    "one byte long": GOOD + b"\0",
    "ten kilobytes": bytes(10_000),
    "keychain wrapper v1": b"\x03" + address_of(KEY) + GOOD,
    "keychain wrapper v2": b"\x04" + address_of(KEY) + GOOD,
    "P256": b"\x01" + bytes(129),
    "WebAuthn": b"\x02" + bytes(200),
    "all zeros": bytes(65),
    "v 0": _with(v=0),
    "v 1": _with(v=1),
    "v 26": _with(v=26),
    "v 29": _with(v=29),
    "v 35 (EIP-155)": _with(v=35),
    "high-s twin": _with(s=CURVE_ORDER - S, v=55 - GOOD[64]),
    "high-s, same v": _with(s=CURVE_ORDER - S),
    "s zero": _with(s=0),
    "s just above half": _with(s=CURVE_ORDER // 2 + 1),
    "s the order": _with(s=CURVE_ORDER),
    "s maximal": _with(s=2**256 - 1),
    "r zero": _with(r=bytes(32)),
    "r the order": _with(r=CURVE_ORDER.to_bytes(32)),
    "r maximal": _with(r=b"\xff" * 32),
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED.keys())
def test_other_forms_are_refused(raw):
    """Whatever is not canonical secp256k1 is an invalid signature, never an internal error."""
    with pytest.raises(ChannelFault) as caught:
        parse_signature(raw)
    assert caught.value.reason is Reason.INVALID_SIGNATURE
    assert caught.value.field == "signature"


def test_half_the_order_is_still_low():
    """The bound of low s is inclusive, as in EIP-2."""
    raw = _with(s=CURVE_ORDER // 2)
    assert parse_signature(raw) == raw


def test_r_off_the_curve_recovers_to_nobody():
    """An r that is no x coordinate (5 has none on secp256k1) is refused at recovery."""
    with pytest.raises(ChannelFault) as caught:
        recover(DIGEST, parse_signature(_with(r=(5).to_bytes(32))))
    assert caught.value.reason is Reason.INVALID_SIGNATURE


@given(st.binary(max_size=140))
def test_any_bytes_are_canonical_or_a_fault(raw):
    """No input gets through changed, and none raises anything but the fault."""
    try:
        assert parse_signature(raw) == raw
    except ChannelFault as fault:
        if fault.reason is not Reason.INVALID_SIGNATURE:
            raise


@given(
    st.integers(min_value=1, max_value=CURVE_ORDER - 1),
    st.integers(min_value=1, max_value=CURVE_ORDER // 2),
    st.sampled_from([27, 28]),
)
def test_recovery_of_any_well_formed_signature_ends(r, s, v):
    """A well-formed signature recovers to a 20-byte address or is refused."""
    signature = parse_signature(r.to_bytes(32) + s.to_bytes(32) + bytes((v,)))
    try:
        assert len(recover(DIGEST, signature)) == 20
    except ChannelFault as fault:
        if fault.reason is not Reason.INVALID_SIGNATURE:
            raise


@given(st.integers(min_value=1, max_value=CURVE_ORDER - 1), st.binary(min_size=32, max_size=32))
def test_what_we_sign_we_accept(secret, digest):
    """Our signatures are canonical for every key and digest, and recover to the key's address."""
    key = secret.to_bytes(32)
    signature = sign(digest, key)
    assert parse_signature(signature) == signature
    assert recover(digest, signature) == address_of(key)
