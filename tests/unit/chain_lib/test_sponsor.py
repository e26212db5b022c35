"""What a fee payer signs for: every ceiling to the unit, and what it believes of another sponsor (F1, F2, F4, F5)."""

import dataclasses
import json
from pathlib import Path

import pytest
import rlp

from channels import escrow as v2
from channels import sponsor
from channels.chain import fee_of
from channels.descriptor import RESERVE_ADDRESS, Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32
from channels.signature import address_of
from channels.sponsor import SponsorPolicy, accept_remote, check, gas_allowed
from channels.tempo_tx import EXPIRING_NONCE_KEY, Call, Form, TempoTx, decode
from channels.units import Units
from channels.verify import Terms, VerifiedOpen, verify_open, verify_top_up
from channels.voucher import VoucherDomain, derive_channel_id
from channels.wire.credential import OpenPayload, TopUpPayload

REFERENCE = Path(__file__).parents[2] / "vectors" / "reference"
NOW, EXPIRES = 1_900_000_000, 1_900_000_300
KEY, SPONSOR = b"\x11" * 32, b"\x44" * 32
PAYER, PAYEE = address_of(KEY), address_of(b"\x22" * 32)
TOKEN, OTHER_TOKEN = Address(b"\x20" * 20), Address(b"\x21" * 20)
V2 = Escrow(SessionProtocol.V2, 42431, RESERVE_ADDRESS)
V1 = Escrow(SessionProtocol.V1, 42431, Address(b"\xe1" * 20))
SALT, DEPOSIT, GAS = Hash32(b"\x07" * 32), Units(10_000), 300_000
OPEN = v2.OpenCall(PAYEE, ZERO_ADDRESS, TOKEN, DEPOSIT, SALT, PAYER)
EXPECTED = Call(RESERVE_ADDRESS, v2.encode_open(OPEN))
POLICY = SponsorPolicy(fee_tokens=(TOKEN, OTHER_TOKEN))
TX = TempoTx(
    chain_id=42431,
    max_priority_fee_per_gas=1_000_000_000,
    max_fee_per_gas=25_000_000_000,
    gas=GAS,
    calls=(EXPECTED,),
    nonce_key=EXPIRING_NONCE_KEY,
    nonce=0,
    valid_before=NOW + 25,
    valid_after=5,
    fee_token=None,
    sponsored=True,
)


def judged(tx=TX, *, policy=POLICY, gas_max=GAS, now=NOW, expires=EXPIRES, chain_id=42431):
    return check(tx.sign(KEY), EXPECTED, policy, chain_id=chain_id, gas_max=gas_max, now=now, expires=expires)


def refused(tx=TX, **more):
    with pytest.raises(ChannelFault) as caught:
        judged(tx, **more)
    assert (caught.value.reason, caught.value.field) == (Reason.TRANSACTION_REJECTED, "transaction")
    return caught.value.detail


def test_a_good_transaction_is_paid_for():
    """The promise names our first token and the worst case, and co-signing keeps everything the sender signed."""
    promise = judged()
    assert (promise.fee_token, promise.fee_max) == (TOKEN, 7_500)
    assert (promise.valid_before, promise.signed) == (NOW + 25, TX.sign(KEY))
    final = decode(promise.cosign(SPONSOR).raw)
    assert (final.form, final.sender, final.fee_payer) == (Form.COSIGNED, PAYER, address_of(SPONSOR))
    assert dataclasses.replace(final.tx, fee_token=None) == TX


LIMITS = {
    "gas": ({"gas": GAS}, {"gas": GAS + 1}),
    "some gas": ({"gas": 1}, {"gas": 0}),
    "fee per gas": ({"max_fee_per_gas": 100_000_000_000}, {"max_fee_per_gas": 100_000_000_001}),
    "some fee": ({"max_fee_per_gas": 1, "max_priority_fee_per_gas": 1}, {"max_fee_per_gas": 0, "max_priority_fee_per_gas": 0}),
    "priority within fee": ({"max_priority_fee_per_gas": 25_000_000_000}, {"max_priority_fee_per_gas": 25_000_000_001}),
    "priority": (
        {"max_fee_per_gas": 60_000_000_000, "max_priority_fee_per_gas": 50_000_000_000},
        {"max_fee_per_gas": 60_000_000_000, "max_priority_fee_per_gas": 50_000_000_001},
    ),
    "still valid": ({"valid_before": NOW + 1}, {"valid_before": NOW}),
    "not for long": ({"valid_before": NOW + 60}, {"valid_before": NOW + 61}),
    "valid already": ({"valid_after": NOW}, {"valid_after": NOW + 1}),
    "at some time": ({"valid_after": None}, {"valid_before": None}),
    "nonce": ({"nonce": 0}, {"nonce": 1}),
    "nonce key": ({"nonce_key": EXPIRING_NONCE_KEY}, {"nonce_key": EXPIRING_NONCE_KEY - 1}),
    "chain": ({"chain_id": 42431}, {"chain_id": 42432}),
    "calls": ({"calls": (EXPECTED,)}, {"calls": (EXPECTED, EXPECTED)}),
    "value": ({"calls": (EXPECTED,)}, {"calls": (dataclasses.replace(EXPECTED, value=1),)}),
    "calldata": ({"calls": (EXPECTED,)}, {"calls": (dataclasses.replace(EXPECTED, data=EXPECTED.data + b"\0"),)}),
    "target": ({"calls": (EXPECTED,)}, {"calls": (dataclasses.replace(EXPECTED, to=TOKEN),)}),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_to_the_unit(name):
    """T-19: each field passes at its limit and is refused one beyond it."""
    within, beyond = LIMITS[name]
    assert judged(dataclasses.replace(TX, **within)).fee_max > 0
    refused(dataclasses.replace(TX, **beyond))


def test_the_total_fee_has_a_ceiling_of_its_own():
    """Gas and price may both be allowed and their product too much."""
    assert judged(policy=dataclasses.replace(POLICY, fee_units_max=Units(7_500))).fee_max == 7_500
    assert "total fee" in refused(policy=dataclasses.replace(POLICY, fee_units_max=Units(7_499)))


def test_the_challenge_bounds_the_validity():
    """F4: a transaction that outlives the challenge it answers is not paid for."""
    judged(expires=NOW + 25)
    refused(expires=NOW + 24)
    refused(now=NOW + 25)


def test_only_open_slots_are_filled():
    """A payer who pays itself needs no sponsor, and one who has a sponsor needs no second."""
    paid = dataclasses.replace(TX, sponsored=False, fee_token=TOKEN).sign(KEY)
    cosigned = TX.sign(KEY).cosign(TOKEN, SPONSOR)
    for signed in (paid, cosigned):
        with pytest.raises(ChannelFault):
            check(signed, EXPECTED, POLICY, chain_id=42431, gas_max=GAS, now=NOW, expires=EXPIRES)


def test_gas_is_measured_with_a_margin():
    """Half as much again as the trial used, rounded down."""
    assert [gas_allowed(gas) for gas in (0, 1, 2, 100_001)] == [0, 1, 3, 150_001]


# ------------------------------------------------------------------------------------------------- the call, rebuilt


def opening(tx, **changes):
    signed = tx.sign(KEY)
    descriptor = Descriptor(PAYER, PAYEE, ZERO_ADDRESS, TOKEN, SALT, PAYER, signed.expiring_nonce_hash)
    channel = derive_channel_id(V2, descriptor)
    signature = VoucherDomain(V2).sign(channel, 100, KEY)
    return OpenPayload(channel, changes.get("raw", signed.raw), descriptor, PAYER, Units(100), signature)


@pytest.mark.parametrize("form", [Form.ENVELOPE, Form.PLACEHOLDER])
def test_both_sponsored_forms_are_verified_when_we_sponsor(form):
    """T-21: with sponsored terms both spellings give the same channel; without them both are refused."""
    raw = dataclasses.replace(TX.sign(KEY), form=form).raw
    terms = Terms(V2, PAYEE, TOKEN, sponsored=True)
    opened = verify_open(opening(TX, raw=raw), terms, now=NOW)
    assert sponsor.open_call(opened, V2) == EXPECTED
    promise = check(opened.signed, EXPECTED, POLICY, chain_id=42431, gas_max=GAS, now=NOW, expires=EXPIRES)
    assert promise.cosign(SPONSOR).raw == judged().cosign(SPONSOR).raw
    with pytest.raises(ChannelFault) as caught:
        verify_open(opening(TX, raw=raw), dataclasses.replace(terms, sponsored=False), now=NOW)
    assert "sponsors no fees" in caught.value.detail


def test_sponsored_terms_still_take_payers_who_pay():
    """An offer to pay the fee is no demand; but nobody else's sponsorship is accepted."""
    terms = Terms(V2, PAYEE, TOKEN, sponsored=True)
    paying = dataclasses.replace(TX, sponsored=False, fee_token=TOKEN)
    assert verify_open(opening(paying), terms, now=NOW).signed.form is Form.COMPLETE
    with pytest.raises(ChannelFault):
        verify_open(opening(TX, raw=TX.sign(KEY).cosign(TOKEN, SPONSOR).raw), terms, now=NOW)


def test_v1_fees_are_not_sponsored():
    """A v1 open begins with an approval, which nobody pays for unseen: not verified, and no call is built for it."""
    opened = VerifiedOpen(TX.sign(KEY), Descriptor(PAYER, PAYEE, ZERO_ADDRESS, TOKEN, SALT, PAYER, SALT), DEPOSIT)
    with pytest.raises(ChannelFault):
        sponsor.open_call(opened, V1)
    with pytest.raises(ChannelFault):
        sponsor.top_up_call(opened.descriptor, DEPOSIT, V1)
    with pytest.raises(ChannelFault) as caught:
        verify_open(opening(TX), Terms(V1, PAYEE, TOKEN, sponsored=True), now=NOW)
    assert "sponsors no fees" in caught.value.detail


def test_a_top_up_is_rebuilt_too():
    """The call of a sponsored top-up is made of the stored descriptor and the named amount."""
    descriptor = opening(TX).descriptor
    expected = Call(RESERVE_ADDRESS, v2.encode_top_up(v2.TopUpCall(descriptor, Units(500))))
    assert sponsor.top_up_call(descriptor, Units(500), V2) == expected
    tx = dataclasses.replace(TX, calls=(expected,))
    channel = derive_channel_id(V2, descriptor)
    payload = TopUpPayload(channel, tx.sign(KEY).raw, descriptor, Units(500))
    signed = verify_top_up(payload, channel, descriptor, Terms(V2, PAYEE, TOKEN, sponsored=True), now=NOW)
    assert check(signed, expected, POLICY, chain_id=42431, gas_max=GAS, now=NOW, expires=EXPIRES).fee_max == 7_500
    with pytest.raises(ChannelFault):
        check(signed, EXPECTED, POLICY, chain_id=42431, gas_max=GAS, now=NOW, expires=EXPIRES)


def test_the_reference_clients_open_is_paid_for():
    """The recorded open of the reference client passes, and ends as the bytes the reference server broadcast."""
    case = json.loads((REFERENCE / "transactions.json").read_text())["cases"][1]
    signed = decode(bytes.fromhex(case["clientWire"][2:]))
    opened = VerifiedOpen(signed, _descriptor(case["descriptor"]), Units(10_000))
    token = Address(bytes.fromhex(case["feeToken"][2:]))
    now = signed.tx.valid_before - 25
    promise = check(
        signed,
        sponsor.open_call(opened, V2),
        SponsorPolicy(fee_tokens=(token,)),
        chain_id=42431,
        gas_max=signed.tx.gas,
        now=now,
        expires=now + 300,
    )
    assert derive_channel_id(V2, opened.descriptor) == ChannelId(bytes.fromhex(case["channelId"][2:]))
    assert promise.fee_max == fee_of(signed.tx.gas, signed.tx.max_fee_per_gas)
    assert promise.cosign(SPONSOR).raw == bytes.fromhex(case["broadcastTx"][2:])


def _descriptor(member):
    values = {name: bytes.fromhex(value[2:]) for name, value in member.items()}
    return Descriptor(
        payer=values["payer"],
        payee=values["payee"],
        operator=values["operator"],
        token=values["token"],
        salt=values["salt"],
        authorized_signer=values["authorizedSigner"],
        expiring_nonce_hash=values["expiringNonceHash"],
    )


# --------------------------------------------------------------------------------------------------- remote sponsors


ASKED = TX.sign(KEY)
TRUSTED = (address_of(SPONSOR),)


def answered(tx=TX, *, sender=KEY, by=SPONSOR, token=TOKEN):
    return tx.sign(sender).cosign(token, by).raw


def items_of(raw):
    return rlp.decode(raw[1:])


def _with(raw, index, value, *, prefix=0x76):
    items = items_of(raw)
    items[index] = value
    return bytes((prefix,)) + rlp.encode(items)


def test_an_honest_remote_sponsor_is_believed():
    """What comes back is what was asked for, plus a known sponsor's signature, whichever form was sent."""
    for asked in (ASKED, dataclasses.replace(ASKED, form=Form.PLACEHOLDER)):
        signed = accept_remote(asked, answered(), POLICY, sponsors=TRUSTED)
        assert (signed.fee_payer, signed.tx.fee_token) == (address_of(SPONSOR), TOKEN)
    assert accept_remote(ASKED, answered(token=OTHER_TOKEN), POLICY, sponsors=TRUSTED).tx.fee_token == OTHER_TOKEN


def _under_the_same_signature(**changes):
    """The sender's signature over another payload is somebody's, and a sponsor can sign for that somebody."""
    changed = dataclasses.replace(TX, **changes)
    raw = dataclasses.replace(ASKED, tx=changed, form=Form.PLACEHOLDER).raw
    return decode(raw).cosign(TOKEN, SPONSOR).raw


REMOTE = {
    "gas changed under the same signature": _under_the_same_signature(gas=GAS + 1),
    "calls changed under the same signature": _under_the_same_signature(calls=(EXPECTED, EXPECTED)),
    "not co-signed": ASKED.raw,
    "placeholder": dataclasses.replace(ASKED, form=Form.PLACEHOLDER).raw,
    "a complete one": dataclasses.replace(TX, sponsored=False, fee_token=TOKEN).sign(KEY).raw,
    "nothing": b"",
    "noise": b"\x76\xc0",
    "truncated": answered()[:-1],
    "trailing byte": answered() + b"\0",
    "another sponsor": answered(by=b"\x55" * 32),
    "the sender as sponsor": answered(by=KEY),
    "another fee token": answered(token=Address(b"\x66" * 20)),
    "another sender": answered(sender=b"\x33" * 32),
    "fee token swapped after signing": _with(answered(), 10, OTHER_TOKEN),
    "sponsor signature of another transaction": _with(
        answered(), 11, items_of(answered(dataclasses.replace(TX, gas=1)))[11]
    ),
    "sponsor parity flipped": _with(
        answered(), 11, [b"" if items_of(answered())[11][0] else b"\1", *items_of(answered())[11][1:]]
    ),
    "sender signature swapped": _with(answered(), 13, TX.sign(b"\x33" * 32).signature),
    "access list": _with(answered(), 5, [[TOKEN, []]]),
    "authorization list": _with(answered(), 12, [[b"\1"]]),
    "sender's address in the slot": _with(answered(), 11, PAYER),
    "envelope prefix": _with(answered(), 11, PAYER, prefix=0x78),
    **{
        f"{name} changed": answered(dataclasses.replace(TX, **{name: value}))
        for name, value in {
            "chain_id": 1,
            "max_priority_fee_per_gas": 2,
            "max_fee_per_gas": 26_000_000_000,
            "gas": GAS + 1,
            "calls": (EXPECTED, EXPECTED),
            "nonce_key": 0,
            "nonce": 1,
            "valid_before": NOW + 26,
            "valid_after": 6,
        }.items()
    },
}


@pytest.mark.parametrize("name", REMOTE)
def test_a_compromised_remote_sponsor_gets_nowhere(name):
    """F5: any other answer is refused, whether the sender's fields, the sponsor or the fee token changed."""
    with pytest.raises(ChannelFault) as caught:
        accept_remote(ASKED, REMOTE[name], POLICY, sponsors=TRUSTED)
    assert caught.value.reason is Reason.TRANSACTION_REJECTED
