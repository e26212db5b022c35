"""Paying payers' fees: nothing hostile is signed, nothing is signed before it is budgeted, and the hour has an end."""

import asyncio
import dataclasses

import pytest
import rlp

from channels import escrow as v2
from channels import escrow_v1 as v1
from channels import tip20
from channels.chain import Fate, Head, Receipt
from channels.descriptor import RESERVE_ADDRESS, Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, Address, Hash32
from channels.signature import CURVE_ORDER, address_of
from channels.sponsor import SponsorPolicy
from channels.tempo_tx import EXPIRING_NONCE_KEY, Call, Form, TempoTx, decode
from channels.units import Units
from channels.verify import Terms, VerifiedOpen, confirm_open, verify_open, verify_top_up
from channels.voucher import VoucherDomain, derive_channel_id
from channels.wire.credential import OpenPayload, TopUpPayload
from mppnode.chain.devchain import PATH_USD, DevChain
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.kernel.clock import ManualClock
from mppnode.ledger.base import Budget, BudgetSpent
from mppnode.treasury.sponsor import GAS_CEILING, Sponsor
from tests.support.hostile_rpc import HostileRpc

PAYER_KEY, SPONSOR_KEY = b"\x11" * 32, b"\x44" * 32
PAYER, PAYEE, SPONSOR = address_of(PAYER_KEY), address_of(b"\x22" * 32), address_of(SPONSOR_KEY)
CHAIN_ID, NOW = 31337, 1_900_000_000
V2 = Escrow(SessionProtocol.V2, CHAIN_ID, RESERVE_ADDRESS)
TERMS = Terms(V2, PAYEE, PATH_USD, sponsored=True)
SALT, DEPOSIT = Hash32(b"\x07" * 32), Units(10_000)
OPEN = v2.OpenCall(PAYEE, ZERO_ADDRESS, PATH_USD, DEPOSIT, SALT, PAYER)
DATA = v2.encode_open(OPEN)
GAS = 200_000  # an open uses 160,000 on the development chain, so 240,000 are allowed
FEE = 3_360  # what it pays for them
POLICY = SponsorPolicy(fee_tokens=(PATH_USD,), fee_units_max=Units(10_000))
BUDGET = Budget(grants_per_sender=3, total=Units(50_000))
RICH = Units(1_000_000)
TX = TempoTx(
    chain_id=CHAIN_ID,
    max_priority_fee_per_gas=1_000_000_000,
    max_fee_per_gas=25_000_000_000,
    gas=GAS,
    calls=(Call(RESERVE_ADDRESS, DATA),),
    nonce_key=EXPIRING_NONCE_KEY,
    nonce=0,
    valid_before=NOW + 25,
    valid_after=5,
    fee_token=None,
    sponsored=True,
)


class Grants:
    """The grants of a ledger in memory: one critical section, an hour's window, and open grants never forgotten."""

    def __init__(self, clock):
        self._clock = clock
        self.rows = {}
        self.fails = None

    async def grant(self, grant, budget):
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails
        if grant.tx_hash in self.rows:
            return False
        counted = [row for row in self.rows.values() if row[2] is None or row[1] > self._clock.now() - 3_600]
        if sum(1 for row in counted if row[0].sender == grant.sender) >= budget.grants_per_sender:
            raise BudgetSpent("the sender's")
        if sum(row[0].fee_max if row[2] is None else row[2] for row in counted) + grant.fee_max > budget.total:
            raise BudgetSpent("everybody's", total=True)
        self.rows[grant.tx_hash] = [grant, self._clock.now(), None]
        return True

    async def settle_grant(self, tx_hash, fee):
        self.rows[tx_hash][2] = fee

    async def open_grants(self, *, limit=200):
        return [grant for grant, _, fee in self.rows.values() if fee is None][:limit]

    @property
    def fees(self):
        return [fee for _, _, fee in self.rows.values()]


class Key:
    """A secret that counts how often it was needed."""

    def __init__(self, value):
        self._value = value
        self.revealed = 0

    def reveal(self):
        self.revealed += 1
        return self._value


class World:
    """A development chain with fees, behind one node address, and a sponsor on it."""

    def __init__(self, *, finality_lag=0, budget=BUDGET):
        self.clock = ManualClock(NOW)
        self.dev = DevChain(self.clock, chain_id=CHAIN_ID, fees=True, finality_lag=finality_lag)
        for owner in (PAYER, SPONSOR):
            self.dev.fund(owner, RICH)
        self.wire = HostileRpc(self.dev, self.clock)
        self.chain = RpcChain(self.wire, self.clock, limits=RpcLimits(), sleep=self.sleep)
        self.ledger = Grants(self.clock)
        self.key = Key(SPONSOR_KEY)
        self.sponsor = Sponsor(
            self.ledger, self.chain, key=self.key, policy=POLICY, budget=budget, clock=self.clock
        )
        self.key.revealed = 0

    async def sleep(self, seconds):
        self.clock.advance(seconds)

    async def pay(self, payload, *, expires=None):
        """What the node does with an open credential, up to the bytes that would be broadcast."""
        now = self.clock.now()
        opened = verify_open(payload, TERMS, now=now)
        return await self.sponsor.pay_for_open(opened, V2, expires=expires or now + 300)

    def fresh(self, *, key=PAYER_KEY, salt=0, **changes):
        """An open of now that is unlike every other one."""
        call = dataclasses.replace(OPEN, salt=Hash32(salt.to_bytes(32)), authorized_signer=address_of(key))
        changes = {"valid_before": self.clock.now() + 25, "calls": (Call(RESERVE_ADDRESS, v2.encode_open(call)),), **changes}
        return opening(dataclasses.replace(TX, **changes), key=key)


def opening(tx, *, key=PAYER_KEY, raw=None):
    """An open credential whose descriptor is what the transaction says, as far as it can be read."""
    signed = tx.sign(key)
    try:
        call = v2.decode_open(tx.calls[-1].data)
    except ChannelFault:
        call = OPEN
    descriptor = Descriptor(
        signed.sender, call.payee, call.operator, call.token, call.salt, call.authorized_signer, signed.expiring_nonce_hash
    )
    channel = derive_channel_id(V2, descriptor)
    signature = VoucherDomain(V2).sign(channel, 100, key)
    return OpenPayload(channel, raw or signed.raw, descriptor, None, Units(100), signature)


@pytest.fixture
def world():
    return World()


async def _reason(awaitable):
    with pytest.raises(ChannelFault) as caught:
        await awaitable
    return caught.value.reason


# -------------------------------------------------------------------------------------------------------- an honest open


@pytest.mark.parametrize("form", [Form.ENVELOPE, Form.PLACEHOLDER])
async def test_an_honest_open_is_paid_for(world, form):
    """T-21: both wire forms open the channel they name; the sponsor pays the fee and the payer only the deposit."""
    payload = opening(TX, raw=dataclasses.replace(TX.sign(PAYER_KEY), form=form).raw)
    signed = await world.pay(payload)
    receipt = await world.chain.broadcast(signed.raw)
    opened = VerifiedOpen(signed, payload.descriptor, DEPOSIT)
    confirm_open(opened, payload.channel_id, V2, receipt.logs)
    assert (world.dev.balance(PAYER), world.dev.balance(SPONSOR)) == (RICH - DEPOSIT, RICH - FEE)
    (grant,) = await world.ledger.open_grants()
    assert (grant.tx_hash, grant.sender, grant.fee_max) == (receipt.tx_hash, PAYER, 5_000)
    assert signed.tx_hash == receipt.tx_hash
    assert await world.sponsor.settle_open_grants() == 1
    assert world.ledger.fees == [FEE]


async def test_an_honest_top_up_is_paid_for(world):
    """A sponsored top-up adds to the deposit at the sponsor's expense."""
    payload = opening(TX)
    await world.chain.broadcast((await world.pay(payload)).raw)
    call = v2.encode_top_up(v2.TopUpCall(payload.descriptor, Units(500)))
    raw = dataclasses.replace(TX, calls=(Call(RESERVE_ADDRESS, call),)).sign(PAYER_KEY).raw
    top_up = TopUpPayload(payload.channel_id, raw, payload.descriptor, Units(500))
    signed = verify_top_up(top_up, payload.channel_id, payload.descriptor, TERMS, now=NOW)
    final = await world.sponsor.pay_for_top_up(signed, payload.descriptor, Units(500), V2, expires=NOW + 300)
    assert (await world.chain.broadcast(final.raw)).succeeded
    assert world.dev.balance(PAYER) == RICH - DEPOSIT - 500
    assert world.dev.balance(SPONSOR) == RICH - 2 * FEE


async def test_the_same_open_again_is_the_same_transaction(world):
    """F4: repeats, also in parallel and after they were mined, give the same bytes, one grant and one channel."""
    payload = opening(TX)
    finals = await asyncio.gather(*(world.pay(payload) for _ in range(5)))
    assert {final.raw for final in finals} == {finals[0].raw}
    assert len(world.ledger.rows) == 1
    receipt = await world.chain.broadcast(finals[0].raw)
    again = await world.pay(payload)
    assert await world.chain.broadcast(again.raw) == receipt
    assert len(world.ledger.rows) == 1
    assert (world.dev.balance(PAYER), world.dev.balance(SPONSOR)) == (RICH - DEPOSIT, RICH - FEE)


async def test_a_paid_transaction_is_found_again(world):
    """A repeat whose trial fails, since the first one took the payer's last money, leads to what the chain has."""
    payload = world.fresh(key=b"\x31" * 32)
    world.dev.fund(address_of(b"\x31" * 32), DEPOSIT)
    half = decode(payload.transaction)
    final = await world.pay(payload)
    assert await world.sponsor.find(half) is None
    await world.chain.broadcast(final.raw)
    assert await _reason(world.pay(payload)) is Reason.CHAIN_REJECTED
    assert await world.sponsor.find(half) == final


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


def _field(**changes):
    return opening(dataclasses.replace(TX, **changes))


def _raw(raw):
    return opening(TX, raw=raw)


SIGNED = TX.sign(PAYER_KEY)
GOOD = Call(RESERVE_ADDRESS, DATA)
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
    "nonce key zero": _field(nonce_key=0),
    "nonce key one": _field(nonce_key=1),
    "nearly the expiring key": _field(nonce_key=EXPIRING_NONCE_KEY - 1),
    "a nonce": _field(nonce=1),
    "no end": _field(valid_before=None),
    "the end now": _field(valid_before=NOW),
    "an end long ago": _field(valid_before=1),
    "an end after a minute": _field(valid_before=NOW + 61),
    "an end in sixteen minutes": _field(valid_before=NOW + 960),
    "an end in ages": _field(valid_before=2**64 - 1),
    "a start to come": _field(valid_after=NOW + 1),
    # gas and fees
    "no gas": _field(gas=0),
    "gas beyond the margin": _field(gas=240_001),
    "gas beyond the ceiling": _field(gas=GAS_CEILING + 1),
    "all gas": _field(gas=2**64 - 1),
    "too little gas to run": _field(gas=159_999),
    "no fee": _field(max_fee_per_gas=0, max_priority_fee_per_gas=0),
    "a fee per gas beyond the cap": _field(max_fee_per_gas=100_000_000_001),
    "all fee": _field(max_fee_per_gas=2**128 - 1),
    "a priority above the fee": _field(max_priority_fee_per_gas=25_000_000_001),
    "a priority above the cap": _field(max_fee_per_gas=52 * 10**9, max_priority_fee_per_gas=50 * 10**9 + 1, gas=160_000),
    "a total fee above the cap": _field(max_fee_per_gas=60_000_000_000),
    # another chain
    "another chain": _field(chain_id=1),
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
    assert await _reason(world.pay(HOSTILE[name])) in (
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
        await _reason(world.pay(HOSTILE[name]))
    assert world.wire.seen.total() == 0


async def test_the_challenge_bounds_what_is_paid_for(world):
    """F4: an open that would outlive its challenge is refused, one that ends with it is not."""
    assert await _reason(world.pay(opening(TX), expires=NOW + 24)) is Reason.TRANSACTION_REJECTED
    assert world.key.revealed == 0
    await world.pay(opening(TX), expires=NOW + 25)


# ------------------------------------------------------------------------------------------------------- failing closed


async def test_an_open_that_would_revert_is_not_signed(world):
    """F3: a payer without the deposit is found out by the trial."""
    assert await _reason(world.pay(world.fresh(key=b"\x31" * 32))) is Reason.CHAIN_REJECTED
    assert world.key.revealed == 0
    assert world.ledger.rows == {}


async def test_a_sponsor_without_money_signs_nothing(world):
    """The envelope is tried with its fee payer: when that is poor, nothing is granted."""
    world.sponsor = Sponsor(
        world.ledger, world.chain, key=Key(b"\x55" * 32), policy=POLICY, budget=BUDGET, clock=world.clock
    )
    assert await _reason(world.pay(opening(TX))) is Reason.CHAIN_REJECTED
    assert world.ledger.rows == {}


@pytest.mark.parametrize("method", ["eth_estimateGas", "eth_call"])
async def test_without_a_trial_nothing_is_signed(world, method):
    """F3: when the chain cannot be asked, the answer is no."""
    world.wire.lost[method] = 3
    assert await _reason(world.pay(opening(TX))) is Reason.CHAIN_UNAVAILABLE
    assert world.key.revealed == 0


async def test_a_measurement_is_not_believed_beyond_reason(world):
    """A node that claims an open needs all the gas there is does not move our ceiling."""
    world.wire.lies["eth_estimateGas"] = lambda _params, _result: hex(10**9)
    assert await _reason(world.pay(_field(gas=GAS_CEILING + 1))) is Reason.TRANSACTION_REJECTED


async def test_nothing_leaves_before_the_grant_is_durable(world):
    """When the ledger cannot write the grant down, nobody gets the signature."""
    world.ledger.fails = ChannelFault(Reason.STORE_UNAVAILABLE)
    assert await _reason(world.pay(opening(TX))) is Reason.STORE_UNAVAILABLE
    world.ledger.fails = None
    assert (await world.pay(opening(TX))).form is Form.COSIGNED


async def test_a_slow_trial_does_not_stretch_the_validity(world):
    """What expires while the chain is asked is not signed any more."""

    def slowly(_params, result):
        world.clock.advance(25)
        return result

    world.wire.lies["eth_estimateGas"] = slowly
    assert await _reason(world.pay(opening(TX))) is Reason.TRANSACTION_REJECTED
    assert world.key.revealed == 0


# --------------------------------------------------------------------------------------------------------------- budgets


async def test_parallel_opens_stay_within_the_budget(world):
    """F3: fifty payers at once get as many grants as the hour's budget holds, and not one more."""
    keys = [bytes([number]) * 32 for number in range(0x50, 0x82)]
    for key in keys:
        world.dev.fund(address_of(key), DEPOSIT)
    payloads = [world.fresh(key=key, salt=number) for number, key in enumerate(keys)]
    results = await asyncio.gather(*(world.pay(payload) for payload in payloads), return_exceptions=True)
    finals = [result for result in results if not isinstance(result, ChannelFault)]
    assert len(finals) == BUDGET.total // 5_000 == 10
    assert {result.reason for result in results if isinstance(result, ChannelFault)} == {Reason.RATE_LIMITED}
    for final in finals:
        assert (await world.chain.broadcast(final.raw)).succeeded
    assert RICH - world.dev.balance(SPONSOR) == 10 * FEE <= BUDGET.total


async def test_one_sender_has_a_budget_of_its_own(world):
    """A sender gets three grants an hour, and using them up stops nobody else."""
    finals = [await world.pay(world.fresh(salt=salt)) for salt in range(3)]
    assert await _reason(world.pay(world.fresh(salt=3))) is Reason.RATE_LIMITED
    assert world.sponsor.offering
    world.dev.fund(address_of(b"\x31" * 32), DEPOSIT)
    await world.pay(world.fresh(key=b"\x31" * 32))
    for final in finals:
        assert (await world.chain.broadcast(final.raw)).succeeded
    await world.sponsor.settle_open_grants()
    world.clock.advance(3_601)
    await world.pay(world.fresh(salt=4))


async def test_opens_of_the_same_money_cost_no_more_than_their_grants():
    """F3: of parallel opens that share one deposit's worth of money one succeeds; the others' fees are in the budget."""
    world = World()
    poor = b"\x31" * 32
    world.dev.fund(address_of(poor), DEPOSIT)
    finals = [await world.pay(world.fresh(key=poor, salt=salt)) for salt in range(3)]
    receipts = [await world.chain.broadcast(final.raw) for final in finals]
    assert [receipt.succeeded for receipt in receipts] == [True, False, False]
    assert RICH - world.dev.balance(SPONSOR) == 3 * FEE
    assert await world.sponsor.settle_open_grants() == 3
    assert world.ledger.fees == [FEE] * 3


async def test_a_spent_budget_ends_the_offer_for_a_while():
    """When everybody's budget is gone, challenges stop promising fees, so that payers who pay themselves get in."""
    world = World(budget=Budget(grants_per_sender=9, total=Units(5_000)))
    assert world.sponsor.offering
    await world.pay(world.fresh(salt=1))
    assert await _reason(world.pay(world.fresh(salt=2))) is Reason.RATE_LIMITED
    assert not world.sponsor.offering
    world.clock.advance(60)
    assert world.sponsor.offering


# ------------------------------------------------------------------------------------------------- what became of grants


async def test_a_grant_nobody_used_is_given_back_when_it_is_dead(world):
    """F4: the budget is tied up until a final block has outlived the transaction, and not a second less."""
    await world.pay(opening(TX))
    world.clock.advance(84)
    assert await world.sponsor.settle_open_grants() == 0
    world.clock.advance(1)
    assert await world.sponsor.settle_open_grants() == 1
    assert world.ledger.fees == [0]


async def test_a_fee_counts_when_it_is_final():
    """A reorganisation may take a mined open back: its grant is settled only beyond that."""
    world = World(finality_lag=3)
    final = await world.pay(opening(TX))
    await world.chain.broadcast(final.raw)
    assert await world.sponsor.settle_open_grants() == 0
    world.dev.reorg(1)
    assert await world.sponsor.settle_open_grants() == 0
    await world.chain.broadcast(final.raw)
    world.clock.advance(10)
    assert await world.sponsor.settle_open_grants() == 1
    assert world.ledger.fees == [FEE]


async def test_a_halted_chain_keeps_the_budget_tied_up(world):
    """F4: while no blocks are made nothing is dead, however long our clock runs; sent bytes may yet be mined."""
    final = await world.pay(opening(TX))
    world.dev.halt()
    await world.chain.send(final.raw)
    world.clock.advance(20)
    assert await world.sponsor.settle_open_grants() == 0
    world.dev.resume()
    assert await world.sponsor.settle_open_grants() == 1
    assert world.ledger.fees == [FEE]


@pytest.mark.parametrize("skip", [3_600, -3_600])
async def test_clock_skips_free_no_budget(world, skip):
    """F4: our clock jumping an hour either way declares nothing dead and makes no budget: chain time decides."""
    for salt in range(3):
        await world.pay(world.fresh(salt=salt))
    world.clock.advance(skip)
    world.dev.travel(-skip)  # the chain's own time goes on as before
    assert await world.sponsor.settle_open_grants() == 0
    assert await _reason(world.pay(world.fresh(salt=9))) is Reason.RATE_LIMITED


async def test_a_disputed_grant_does_not_tie_up_the_others(world):
    """One grant whose outcome cannot be read is reported after the rest has been settled."""
    first, second = [await world.pay(world.fresh(salt=salt)) for salt in (1, 2)]
    for final in (first, second):
        await world.chain.broadcast(final.raw)
    bad = "0x" + first.tx_hash.hex()
    world.wire.lies["eth_getTransactionReceipt"] = lambda params, result: {} if params[0] == bad else result
    assert await _reason(world.sponsor.settle_open_grants()) is Reason.CHAIN_UNAVAILABLE
    assert world.ledger.fees == [None, FEE]
    world.wire.lies.clear()
    assert await world.sponsor.settle_open_grants() == 1
    assert world.ledger.fees == [FEE, FEE]


# ------------------------------------------------------------------------------------------------------ thousands of them


class ToyChain:
    """A chain where every trial passes, and what is mined reverts at the sponsor's expense."""

    def __init__(self, clock):
        self._clock = clock
        self.charged = 0
        self._mined = {}

    async def gas_of(self, _tx, _sender):
        return 160_000

    async def rehearse(self, _tx, _sender, *, fee_payer):
        return None

    async def finalised(self):
        return Head(1, self._clock.now())

    def mine(self, signed):
        """Include a transaction once, in time, and charge its sponsor the worst case."""
        if signed.tx_hash in self._mined or signed.tx.valid_before <= self._clock.now():
            return
        fee = signed.tx.gas * signed.tx.max_fee_per_gas // 10**12
        self.charged += fee
        log = tip20.encode_event(tip20.Transferred(PATH_USD, SPONSOR, FEE_MANAGER, fee))
        self._mined[signed.tx_hash] = Receipt(signed.tx_hash, False, 1, signed.sender, (log,), Hash32(bytes(32)))

    async def outcome(self, tx_hash, *, valid_before):
        dead = self._clock.now() >= valid_before + 60
        return self._mined.get(tx_hash) or (Fate.EXPIRED if dead else Fate.PENDING)


FEE_MANAGER = Address(bytes.fromhex("feec000000000000000000000000000000000000"))


async def test_ten_thousand_hostile_opens_cost_the_budget_at_most():
    """F3: opens that all revert at full price, from forty senders, repeated and late, cost an hour's budget an hour."""
    clock = ManualClock(NOW)
    chain, ledger = ToyChain(clock), Grants(clock)
    budget = Budget(grants_per_sender=10, total=Units(40_000))
    sponsor = Sponsor(ledger, chain, key=Key(SPONSOR_KEY), policy=POLICY, budget=budget, clock=clock)
    keys = [bytes([number]) * 32 for number in range(1, 41)]
    descriptor = opening(TX).descriptor
    waiting, granted, refusals, hours = [], 0, [], 0
    for number in range(10_000):
        if number % 25 == 0:
            clock.advance(18)  # 400 steps are two hours
        if number % 250 == 0:
            await sponsor.settle_open_grants()
        if number % 4 == 0:
            tx = dataclasses.replace(TX, valid_before=clock.now() + 25, valid_after=number + 1)
            signed = tx.sign(keys[number % len(keys)])
        try:
            waiting.append(await sponsor.pay_for_open(VerifiedOpen(signed, descriptor, DEPOSIT), V2, expires=clock.now() + 300))
            granted += 1
        except ChannelFault as fault:
            refusals.append(fault.reason)
        if number % 7 == 0:  # some are sent at once, some late, some never
            for final in waiting[::2]:
                chain.mine(final)
            waiting.clear()
        hours = (clock.now() - NOW) // 3_600 + 1
        assert chain.charged <= budget.total * hours
    assert granted > 10
    assert len(refusals) > 9_000
    assert set(refusals) == {Reason.RATE_LIMITED}
    assert 0 < chain.charged <= budget.total * hours


def test_co_signed_bytes_read_back():
    """The envelope that was checked is the one that is sent: decoding it gives the same sender and calls."""
    final = decode(SIGNED.cosign(PATH_USD, SPONSOR_KEY).raw)
    assert (final.sender, final.tx.calls, final.fee_payer) == (PAYER, (GOOD,), SPONSOR)
