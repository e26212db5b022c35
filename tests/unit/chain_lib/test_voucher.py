"""A voucher counts for one channel, one amount, one escrow and one signer."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from channels.descriptor import RESERVE_ADDRESS, Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32
from channels.signature import address_of
from channels.voucher import VoucherDomain, derive_channel_id

KEY = b"\x11" * 32
SIGNER = address_of(KEY)
V2 = Escrow(SessionProtocol.V2, 42431, RESERVE_ADDRESS)
V1 = Escrow(SessionProtocol.V1, 42431, Address(b"\xe1" * 20))
CHANNEL = ChannelId(b"\x07" * 32)
DESCRIPTOR = Descriptor(
    SIGNER, Address(b"\x02" * 20), ZERO_ADDRESS, Address(b"\x03" * 20), Hash32(b"\x04" * 32), SIGNER, Hash32(b"\x05" * 32)
)


@pytest.mark.parametrize(
    ("escrow", "channel", "amount", "signer"),
    [
        (V2, ChannelId(b"\x08" * 32), 25, SIGNER),
        (V2, CHANNEL, 26, SIGNER),
        (V2, CHANNEL, 25, address_of(b"\x22" * 32)),
        (V1, CHANNEL, 25, SIGNER),
        (dataclasses.replace(V2, chain_id=4217), CHANNEL, 25, SIGNER),
        (dataclasses.replace(V2, address=Address(b"\xaa" * 20)), CHANNEL, 25, SIGNER),
        (dataclasses.replace(V2, protocol=SessionProtocol.V1), CHANNEL, 25, SIGNER),
    ],
)
def test_a_voucher_is_good_for_nothing_else(escrow, channel, amount, signer):
    """T-36: another channel, amount, signer, escrow, chain or protocol makes the signature invalid."""
    signature = VoucherDomain(V2).sign(CHANNEL, 25, KEY)
    VoucherDomain(V2).verify(CHANNEL, 25, signature, SIGNER)
    with pytest.raises(ChannelFault) as caught:
        VoucherDomain(escrow).verify(channel, amount, signature, signer)
    assert caught.value.reason is Reason.INVALID_SIGNATURE


@pytest.mark.parametrize(("escrow", "beyond"), [(V1, 2**128), (V2, 2**96)])
def test_amounts_end_with_the_escrows_type(escrow, beyond):
    """T-34: the largest amount of the type is signed and verified, one more is refused."""
    domain = VoucherDomain(escrow)
    domain.verify(CHANNEL, beyond - 1, domain.sign(CHANNEL, beyond - 1, KEY), SIGNER)
    for amount in (beyond, -1):
        with pytest.raises(ChannelFault) as caught:
            domain.digest(CHANNEL, amount)
        assert (caught.value.reason, caught.value.field) == (Reason.INVALID_PAYLOAD, "cumulativeAmount")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Descriptor)])
def test_every_term_is_in_the_id(field):
    """T-16: altering any one descriptor member alters the v2 id; v1 ignores exactly operator and nonce hash."""
    value = getattr(DESCRIPTOR, field)
    altered = dataclasses.replace(DESCRIPTOR, **{field: bytes(len(value) - 1) + b"\x99"})
    assert derive_channel_id(V2, altered) != derive_channel_id(V2, DESCRIPTOR)
    ignored = field in ("operator", "expiring_nonce_hash")
    assert (derive_channel_id(V1, altered) == derive_channel_id(V1, DESCRIPTOR)) is ignored


@given(st.integers(min_value=0, max_value=2**96 - 1), st.integers(min_value=0, max_value=2**96 - 1))
def test_digests_tell_amounts_apart(one, other):
    """Two amounts never share a digest."""
    domain = VoucherDomain(V2)
    assert (domain.digest(CHANNEL, one) == domain.digest(CHANNEL, other)) is (one == other)
