"""Transactions that are not what a payer's open is: none of them is ever signed."""

import dataclasses

import pytest
import rlp

from channels import escrow as v2
from channels import escrow_v1 as v1
from channels import tip20
from channels.descriptor import RESERVE_ADDRESS
from channels.faults import Reason
from channels.ids import Address
from channels.signature import CURVE_ORDER
from channels.tempo_tx import EXPIRING_NONCE_KEY, Call, Form
from channels.units import Units
from mppnode.chain.devchain import PATH_USD
from mppnode.treasury.sponsor import GAS_CEILING
from tests.unit.treasury.sponsor_kit import (
    DATA,
    DEPOSIT,
    GOOD,
    NOW,
    OPEN,
    PAYEE,
    PAYER,
    RICH,
    SALT,
    SIGNED,
    SPONSOR,
    TX,
    field,
    opening,
    reason,
    world,
)

__all__ = ["world"]


# ------------------------------------------------------------------------------------------------- hostile transactions


def _items(signed, index, value, *, prefix=None):
    items = rlp.decode(signed.raw[1:])
    items[index] = value
    return bytes((prefix or signed.raw[0],)) + rlp.encode(items)


def _calls(*calls):
    return opening(dataclasses.replace(TX, calls=calls))


def _data(data):
    return _calls(Call(RESERVE_ADDRESS, data))


def _argument(**changes):
    return _data(v2.encode_open(dataclasses.replace(OPEN, **changes)))


def _dirty(word):
    at = 4 + 32 * word
    return _data(DATA[:at] + b"\x01" + DATA[at + 1 :])


def _raw(raw):
    return opening(TX, raw=raw)


BODY = rlp.decode(SIGNED.raw[1:])
R, S, V = SIGNED.signature[:32], SIGNED.signature[32:64], SIGNED.signature[64]
PAY = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYER, Units(1))))
APPROVE = Call(PATH_USD, tip20.encode_approve(tip20.ApproveCall(RESERVE_ADDRESS, 10_000)))
DEX = Address(bytes.fromhex("dec0000000000000000000000000000000000000"))
SWAP = Call(DEX, b"\xf0\x12\x2b\x75" + bytes(128))
DESCRIPTOR = opening(TX).descriptor
V1_OPEN = v1.encode_open(v1.OpenCall(PAYEE, PATH_USD, DEPOSIT, SALT, PAYER))
HOSTILE = {
    # other calls
    "a second call": _calls(GOOD, PAY),
    "a call before": _calls(PAY, GOOD),
    "the same call twice": _calls(GOOD, GOOD),
    "approve before": _calls(APPROVE, GOOD),
    "approve and swap before": _calls(APPROVE, SWAP, GOOD),
    "an empty call behind": _calls(GOOD, Call(PAYEE, b"")),
    "sixteen calls": _calls(*[GOOD] * 16),
    "native value": _calls(dataclasses.replace(GOOD, value=1)),
    "another contract": _calls(dataclasses.replace(GOOD, to=DEX)),
    "the token as target": _calls(dataclasses.replace(GOOD, to=PATH_USD)),
    "the sponsor as target": _calls(dataclasses.replace(GOOD, to=SPONSOR)),
    "a plain transfer": _calls(PAY),
    "an approval alone": _calls(APPROVE),
    "a contract creation": _raw(_items(SIGNED, 4, [[b"", b"", DATA]])),
    "no calls": _raw(_items(SIGNED, 4, [])),
    # other calldata
    "no calldata": _data(b""),
    "a selector alone": _data(v2.OPEN),
    "a trailing byte": _data(DATA + b"\0"),
    "a trailing word": _data(DATA + bytes(32)),
    "kilobytes behind": _data(DATA + b"\xff" * 12_000),
    "a missing byte": _data(DATA[:-1]),
    "dirty payee": _dirty(0),
    "dirty operator": _dirty(1),
    "dirty token": _dirty(2),
    "dirty deposit": _dirty(3),
    "dirty signer": _dirty(5),
    "top-up instead": _data(v2.encode_top_up(v2.TopUpCall(DESCRIPTOR, DEPOSIT))),
    "settle instead": _data(v2.encode_settle(DESCRIPTOR, Units(1), bytes(65))),
    "close instead": _data(v2.encode_close(DESCRIPTOR, Units(1), Units(1), bytes(65))),
    "request close instead": _data(v2.encode_request_close(DESCRIPTOR)),
    "withdraw instead": _data(v2.encode_withdraw(DESCRIPTOR)),
    "a v1 open": _data(V1_OPEN),
    "an unknown function": _data(b"\x01\x02\x03\x04" + DATA[4:]),
    "another payee": _argument(payee=PAYER),
    "another token": _argument(token=DEX),
    "an operator": _argument(operator=PAYER),
    # lists that cost gas
    "an access list": _raw(_items(SIGNED, 5, [[PATH_USD, [bytes(32)]]])),
    "an authorisation list": _raw(_items(SIGNED, 12, [[b"\1"]])),
    "a key authorisation": _raw(b"\x78" + rlp.encode([*BODY[:13], [b"\1"], BODY[13]])),
    # nonces and time
    "nonce key zero": field(nonce_key=0),
    "nonce key one": field(nonce_key=1),
    "nearly the expiring key": field(nonce_key=EXPIRING_NONCE_KEY - 1),
    "a nonce": field(nonce=1),
    "no end": field(valid_before=None),
    "the end now": field(valid_before=NOW),
    "an end long ago": field(valid_before=1),
    "an end after a minute": field(valid_before=NOW + 61),
    "an end in sixteen minutes": field(valid_before=NOW + 960),
    "an end in ages": field(valid_before=2**64 - 1),
    "a start to come": field(valid_after=NOW + 1),
    # gas and fees
    "no gas": field(gas=0),
    "gas beyond the margin": field(gas=240_001),
    "gas beyond the ceiling": field(gas=GAS_CEILING + 1),
    "all gas": field(gas=2**64 - 1),
    "too little gas to run": field(gas=159_999),
    "no fee": field(max_fee_per_gas=0, max_priority_fee_per_gas=0),
    "a fee per gas beyond the cap": field(max_fee_per_gas=100_000_000_001),
    "all fee": field(max_fee_per_gas=2**128 - 1),
    "a priority above the fee": field(max_priority_fee_per_gas=25_000_000_001),
    "a priority above the cap": field(max_fee_per_gas=52 * 10**9, max_priority_fee_per_gas=50 * 10**9 + 1, gas=160_000),
    "a total fee above the cap": field(max_fee_per_gas=60_000_000_000),
    # another chain
    "another chain": field(chain_id=1),
    # forms
    "a payer who pays": opening(dataclasses.replace(TX, sponsored=False, fee_token=PATH_USD)),
    "another sponsor's signature": _raw(SIGNED.cosign(PATH_USD, b"\x55" * 32).raw),
    "a victim in the slot": _raw(_items(SIGNED, 11, SPONSOR)),
    "an empty slot in an envelope": _raw(_items(SIGNED, 11, b"")),
    "slot 01": _raw(_items(SIGNED, 11, b"\1", prefix=0x76)),
    "an address slot under 0x76": _raw(_items(SIGNED, 11, PAYER, prefix=0x76)),
    "a fee token the sender did not sign": _raw(_items(SIGNED, 10, PATH_USD)),
    "a fee token beside a placeholder": _raw(_items(dataclasses.replace(SIGNED, form=Form.PLACEHOLDER), 10, PATH_USD)),
    "another type": _raw(b"\x77" + SIGNED.raw[1:]),
    # signatures
    "somebody else's signature": _raw(_items(SIGNED, 13, TX.sign(b"\x33" * 32).signature)),
    "the high-s twin": _raw(_items(SIGNED, 13, R + (CURVE_ORDER - int.from_bytes(S)).to_bytes(32) + bytes((55 - V,)))),
    "v as zero or one": _raw(_items(SIGNED, 13, R + S + bytes((V - 27,)))),
    "a compact signature": _raw(_items(SIGNED, 13, R + S)),
    "a keychain signature": _raw(_items(SIGNED, 13, b"\x03" + PAYER + SIGNED.signature)),
    "r zero": _raw(_items(SIGNED, 13, bytes(32) + S + bytes((V,)))),
    # bytes
    "a byte after the list": _raw(SIGNED.raw + b"\0"),
    "a missing last byte": _raw(SIGNED.raw[:-1]),
    "a long length form": _raw(SIGNED.raw[:1] + b"\xfa\0" + SIGNED.raw[2:]),
    "a nonce as zero byte": _raw(_items(SIGNED, 7, b"\0")),
    "no bytes": _raw(b"\x78"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_transactions_are_never_signed(world, name):
    """F1, F2, T-18..T-20: each is refused with the key untouched, nothing granted and nothing paid."""
    assert await reason(world.pay(HOSTILE[name])) in (
        Reason.TRANSACTION_REJECTED,
        Reason.DESCRIPTOR_MISMATCH,
        Reason.CHAIN_REJECTED,
    )
    assert world.key.revealed == 0
    assert world.ledger.rows == {}
    assert world.dev.balance(SPONSOR) == RICH


def test_there_are_enough_hostile_transactions():
    """At least fifty different ones, none of which is the good one."""
    raws = {payload.transaction for payload in HOSTILE.values()}
    assert len(raws) == len(HOSTILE) >= 50
    assert SIGNED.raw not in raws


async def test_what_is_wrong_by_itself_costs_no_question(world):
    """A transaction that cannot be right is refused before the chain is asked anything."""
    for name in ("all gas", "an end after a minute", "a total fee above the cap", "a nonce"):
        await reason(world.pay(HOSTILE[name]))
    assert world.wire.seen.total() == 0


async def test_the_challenge_bounds_what_is_paid_for(world):
    """F4: an open that would outlive its challenge is refused, one that ends with it is not."""
    assert await reason(world.pay(opening(TX), expires=NOW + 24)) is Reason.TRANSACTION_REJECTED
    assert world.key.revealed == 0
    await world.pay(opening(TX), expires=NOW + 25)
