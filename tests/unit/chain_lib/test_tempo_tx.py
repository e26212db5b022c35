"""The 0x76 codec: one spelling, a recovered sender, and agreement with an independent implementation (T-18..T-21)."""

import dataclasses

import pytempo
import pytest
import rlp
from hypothesis import given, settings
from hypothesis import strategies as st

from channels.faults import ChannelFault, Reason
from channels.ids import Address
from channels.signature import CURVE_ORDER, address_of
from channels.tempo_tx import CALLS_MAX, EXPIRING_NONCE_KEY, RAW_MAX, Call, Form, SignedTx, TempoTx, decode

KEY, SPONSOR = b"\x11" * 32, b"\x44" * 32
TOKEN = Address(bytes.fromhex("20c0000000000000000000000000000000000000"))
TARGET = Address(b"\x4d" * 20)
TX = TempoTx(
    chain_id=42431,
    max_priority_fee_per_gas=1_000_000,
    max_fee_per_gas=24_000_000_000,
    gas=300_000,
    calls=(Call(TARGET, b"\x01\x02"),),
    nonce_key=EXPIRING_NONCE_KEY,
    nonce=0,
    valid_before=1_900_000_025,
    valid_after=1_700_000_000,
    fee_token=TOKEN,
)
SPONSORED = dataclasses.replace(TX, fee_token=None, sponsored=True)
COMPLETE, ENVELOPE = TX.sign(KEY), SPONSORED.sign(KEY)
PLACEHOLDER = dataclasses.replace(ENVELOPE, form=Form.PLACEHOLDER)
COSIGNED = ENVELOPE.cosign(TOKEN, SPONSOR)


def _edited(signed, index, value, *, prefix=None):
    items = rlp.decode(signed.raw[1:])
    items[index] = value
    return bytes((prefix or signed.raw[0],)) + rlp.encode(items)


def _refused(raw):
    with pytest.raises(ChannelFault) as caught:
        decode(raw)
    assert (caught.value.reason, caught.value.field) == (Reason.TRANSACTION_REJECTED, "transaction")
    return caught.value.detail


@pytest.mark.parametrize("signed", [COMPLETE, PLACEHOLDER, ENVELOPE, COSIGNED], ids=lambda signed: signed.form.value)
def test_the_four_forms_read_back(signed):
    """Each form decodes to itself, with the sender recovered from the signature."""
    assert decode(signed.raw) == signed
    assert decode(signed.raw).sender == address_of(KEY)
    assert decode(signed.raw).raw == signed.raw


def test_a_sponsor_changes_no_identity():
    """The expiring nonce hash, and so the channel id, is the same before and after co-signing (T-21)."""
    assert ENVELOPE.expiring_nonce_hash == PLACEHOLDER.expiring_nonce_hash == COSIGNED.expiring_nonce_hash
    assert PLACEHOLDER.cosign(TOKEN, SPONSOR).raw == COSIGNED.raw
    assert COSIGNED.fee_payer == address_of(SPONSOR)


def test_an_unfinished_form_has_no_hash():
    """Asking for the hash of a transaction without its fee payer, or co-signing a complete one, is our own mistake."""
    with pytest.raises(ValueError, match="fee payer"):
        _ = ENVELOPE.tx_hash
    with pytest.raises(ValueError, match="slot"):
        COMPLETE.cosign(TOKEN, SPONSOR)


def test_a_victim_in_the_slot_is_refused():
    """T-20: an envelope that names somebody other than its signer is refused, whoever is named."""
    detail = _refused(_edited(ENVELOPE, 11, address_of(b"\x22" * 32)))
    assert "did not sign" in detail


HIGH_S = COMPLETE.signature[:32] + (CURVE_ORDER - int.from_bytes(COMPLETE.signature[32:64])).to_bytes(32)
BROKEN = {
    "empty": b"",
    "type only": b"\x76",
    "another type": b"\x02" + COMPLETE.raw[1:],
    "trailing byte": COMPLETE.raw + b"\0",
    "truncated": COMPLETE.raw[:-1],
    "a string": b"\x76" + rlp.encode(b"hello"),
    "empty list": b"\x76\xc0",
    "13 items": b"\x76" + rlp.encode(rlp.decode(COMPLETE.raw[1:])[:13]),
    "key authorization": b"\x76" + rlp.encode([*rlp.decode(COMPLETE.raw[1:])[:13], [b"\1"], COMPLETE.signature]),
    "deep nesting": b"\x76" + b"\xc1" * 10_000,
    "too long": b"\x76" + bytes(RAW_MAX),
    "long length form": b"\x76\xf9\0\0",
    "access list": _edited(COMPLETE, 5, [[TARGET, []]]),
    "access list as bytes": _edited(COMPLETE, 5, b""),
    "authorization list": _edited(COMPLETE, 12, [[b"\1"]]),
    "no calls": _edited(COMPLETE, 4, []),
    "calls as bytes": _edited(COMPLETE, 4, b"\1"),
    "too many calls": _edited(COMPLETE, 4, [[TARGET, b"", b""]] * (CALLS_MAX + 1)),
    "contract creation": _edited(COMPLETE, 4, [[b"", b"", b"\1"]]),
    "two-field call": _edited(COMPLETE, 4, [[TARGET, b""]]),
    "call data as list": _edited(COMPLETE, 4, [[TARGET, b"", []]]),
    "chain id with leading zero": _edited(COMPLETE, 0, b"\0\xa5\xbf"),
    "nonce as zero byte": _edited(COMPLETE, 7, b"\0"),
    "gas beyond 64 bits": _edited(COMPLETE, 3, b"\1" * 9),
    "nonce key beyond 256 bits": _edited(COMPLETE, 6, b"\1" * 33),
    "gas as list": _edited(COMPLETE, 3, []),
    "fee token of 19 bytes": _edited(COMPLETE, 10, b"\1" * 19),
    "slot 01": _edited(COMPLETE, 11, b"\1"),
    "address slot under 0x76": _edited(COMPLETE, 11, address_of(KEY)),
    "empty slot under 0x78": _edited(ENVELOPE, 11, b""),
    "list slot under 0x78": _edited(COSIGNED, 11, [b"", b"\1", b"\1"], prefix=0x78),
    "fee token in an envelope": _edited(ENVELOPE, 10, TOKEN),
    "fee token beside a placeholder": _edited(PLACEHOLDER, 10, TOKEN),
    "cosigned without fee token": _edited(COSIGNED, 10, b""),
    "sponsor signature of two fields": _edited(COSIGNED, 11, [b"", b"\1"]),
    "sponsor parity 2": _edited(COSIGNED, 11, [b"\2", b"\1", b"\1"]),
    "sponsor r zero": _edited(COSIGNED, 11, [b"", b"", b"\1"]),
    "high-s signature": _edited(COMPLETE, 13, HIGH_S + bytes((55 - COMPLETE.signature[64],))),
    "v 0": _edited(COMPLETE, 13, COMPLETE.signature[:64] + b"\0"),
    "keychain signature": _edited(COMPLETE, 13, b"\x03" + address_of(KEY) + COMPLETE.signature),
    "no signature": _edited(COMPLETE, 13, b""),
    "signature as list": _edited(COMPLETE, 13, []),
    "r off the curve": _edited(COMPLETE, 13, (5).to_bytes(32) + COMPLETE.signature[32:]),
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN.keys())
def test_every_other_spelling_is_refused(raw):
    """T-18: whatever is not one of the four canonical forms is a rejected transaction, never an internal error."""
    assert _refused(raw)


@given(st.binary(max_size=300), st.sampled_from([0x76, 0x78]))
def test_any_bytes_are_a_fault_or_a_transaction(body, prefix):
    """Random bytes never raise anything but the fault."""
    _refused(bytes((prefix,)) + body)


@given(st.data())
def test_a_changed_byte_never_keeps_sender_and_meaning(data):
    """Flip any byte: the transaction is refused, or it is somebody else's, or a different one; never a second spelling."""
    signed = data.draw(st.sampled_from([COMPLETE, ENVELOPE, COSIGNED]))
    index = data.draw(st.integers(min_value=0, max_value=len(signed.raw) - 1))
    flip = data.draw(st.integers(min_value=1, max_value=255))
    raw = bytearray(signed.raw)
    raw[index] ^= flip
    try:
        other = decode(bytes(raw))
    except ChannelFault as fault:
        if fault.reason is not Reason.TRANSACTION_REJECTED:
            raise
        return
    assert other != signed
    assert other.raw == raw
    assert (other.sender, other.tx.sender_payload()) != (signed.sender, signed.tx.sender_payload()) or (
        signed.form is Form.COSIGNED and other.fee_payer != signed.fee_payer
    )


UINT = st.integers(min_value=0, max_value=2**64 - 1)
TXS = st.builds(
    TempoTx,
    chain_id=st.integers(min_value=1, max_value=2**64 - 1),
    max_priority_fee_per_gas=st.just(0),
    max_fee_per_gas=UINT,
    gas=st.integers(min_value=1, max_value=2**64 - 1),
    calls=st.lists(
        st.builds(Call, st.binary(min_size=20, max_size=20).map(Address), st.binary(max_size=80), UINT), min_size=1, max_size=3
    ).map(tuple),
    nonce_key=st.integers(min_value=0, max_value=2**256 - 1),
    nonce=UINT,
    valid_before=st.integers(min_value=2**32, max_value=2**64 - 1),
    valid_after=st.integers(min_value=1, max_value=2**32),
    fee_token=st.none() | st.just(TOKEN),
)


def _pytempo(tx, *, sponsored):
    return pytempo.TempoTransaction.create(
        chain_id=tx.chain_id,
        gas_limit=tx.gas,
        max_fee_per_gas=tx.max_fee_per_gas,
        max_priority_fee_per_gas=tx.max_priority_fee_per_gas,
        nonce=tx.nonce,
        nonce_key=tx.nonce_key,
        valid_before=tx.valid_before,
        valid_after=tx.valid_after,
        fee_token=None if tx.fee_token is None else bytes(tx.fee_token),
        awaiting_fee_payer=sponsored,
        calls=tuple(pytempo.Call.create(to=bytes(c.to), value=c.value, data=c.data) for c in tx.calls),
    )


@settings(max_examples=40)
@given(TXS)
def test_agreement_with_pytempo(tx):
    """An independent implementation signs the same bytes and encodes the same transaction."""
    theirs = _pytempo(tx, sponsored=False)
    assert theirs.encode_for_signing() == tx.sender_payload()
    signed = tx.sign(KEY)
    assert theirs.sign("0x" + KEY.hex()).encode() == signed.raw
    assert decode(signed.raw) == signed


@settings(max_examples=20)
@given(TXS)
def test_sponsored_agreement_with_pytempo(tx):
    """The sender's half under sponsorship is the same as the independent implementation's."""
    ours = dataclasses.replace(tx, fee_token=None, sponsored=True)
    assert _pytempo(ours, sponsored=True).encode_for_signing() == ours.sender_payload()
    signed = ours.sign(KEY)
    assert isinstance(decode(signed.raw), SignedTx)
    assert decode(signed.cosign(TOKEN, SPONSOR).raw).fee_payer == address_of(SPONSOR)
