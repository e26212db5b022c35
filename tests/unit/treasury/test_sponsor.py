"""Paying payers' fees: nothing hostile is signed, nothing is signed before it is budgeted, and the hour has an end."""

import asyncio
import dataclasses

import pytest

from channels import escrow as v2
from channels import tip20
from channels.chain import Fate, Head, Receipt
from channels.descriptor import RESERVE_ADDRESS
from channels.faults import ChannelFault, Reason
from channels.ids import Address, Hash32
from channels.signature import address_of
from channels.tempo_tx import Call, Form, decode
from channels.units import Units
from channels.verify import VerifiedOpen, confirm_open, verify_top_up
from channels.wire.credential import TopUpPayload
from mppnode.chain.devchain import PATH_USD
from mppnode.kernel.clock import ManualClock
from mppnode.ledger.base import Budget
from mppnode.treasury.sponsor import GAS_CEILING, Sponsor
from tests.unit.treasury.sponsor_kit import (
    BUDGET,
    DEPOSIT,
    FEE,
    GOOD,
    NOW,
    PAYER,
    PAYER_KEY,
    POLICY,
    RICH,
    SIGNED,
    SPONSOR,
    SPONSOR_KEY,
    TERMS,
    TX,
    V2,
    Grants,
    Key,
    World,
    field,
    opening,
    reason,
    world,
)

__all__ = ["world"]


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
    assert await reason(world.pay(payload)) is Reason.CHAIN_REJECTED
    assert await world.sponsor.find(half) == final


# ------------------------------------------------------------------------------------------------------- failing closed


async def test_an_open_that_would_revert_is_not_signed(world):
    """F3: a payer without the deposit is found out by the trial."""
    assert await reason(world.pay(world.fresh(key=b"\x31" * 32))) is Reason.CHAIN_REJECTED
    assert world.key.revealed == 0
    assert world.ledger.rows == {}


async def test_a_sponsor_without_money_signs_nothing(world):
    """The envelope is tried with its fee payer: when that is poor, nothing is granted."""
    world.sponsor = Sponsor(
        world.ledger, world.chain, key=Key(b"\x55" * 32), policy=POLICY, budget=BUDGET, clock=world.clock
    )
    assert await reason(world.pay(opening(TX))) is Reason.CHAIN_REJECTED
    assert world.ledger.rows == {}


@pytest.mark.parametrize("method", ["eth_estimateGas", "eth_call"])
async def test_without_a_trial_nothing_is_signed(world, method):
    """F3: when the chain cannot be asked, the answer is no."""
    world.wire.lost[method] = 3
    assert await reason(world.pay(opening(TX))) is Reason.CHAIN_UNAVAILABLE
    assert world.key.revealed == 0


async def test_a_measurement_is_not_believed_beyond_reason(world):
    """A node that claims an open needs all the gas there is does not move our ceiling."""
    world.wire.lies["eth_estimateGas"] = lambda _params, _result: hex(10**9)
    assert await reason(world.pay(field(gas=GAS_CEILING + 1))) is Reason.TRANSACTION_REJECTED


async def test_nothing_leaves_before_the_grant_is_durable(world):
    """When the ledger cannot write the grant down, nobody gets the signature."""
    world.ledger.fails = ChannelFault(Reason.STORE_UNAVAILABLE)
    assert await reason(world.pay(opening(TX))) is Reason.STORE_UNAVAILABLE
    world.ledger.fails = None
    assert (await world.pay(opening(TX))).form is Form.COSIGNED


async def test_a_slow_trial_does_not_stretch_the_validity(world):
    """What expires while the chain is asked is not signed any more."""

    def slowly(_params, result):
        world.clock.advance(25)
        return result

    world.wire.lies["eth_estimateGas"] = slowly
    assert await reason(world.pay(opening(TX))) is Reason.TRANSACTION_REJECTED
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
    assert await reason(world.pay(world.fresh(salt=3))) is Reason.RATE_LIMITED
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
    assert await reason(world.pay(world.fresh(salt=2))) is Reason.RATE_LIMITED
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
    assert await reason(world.pay(world.fresh(salt=9))) is Reason.RATE_LIMITED


async def test_a_disputed_grant_does_not_tie_up_the_others(world):
    """One grant whose outcome cannot be read is reported after the rest has been settled."""
    first, second = [await world.pay(world.fresh(salt=salt)) for salt in (1, 2)]
    for final in (first, second):
        await world.chain.broadcast(final.raw)
    bad = "0x" + first.tx_hash.hex()
    world.wire.lies["eth_getTransactionReceipt"] = lambda params, result: {} if params[0] == bad else result
    assert await reason(world.sponsor.settle_open_grants()) is Reason.CHAIN_UNAVAILABLE
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
