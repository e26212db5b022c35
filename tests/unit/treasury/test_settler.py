"""One transaction from the wish to the proof: what is signed, how often, for which fee, and when it counts."""

import asyncio
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from channels import escrow as v2
from channels import intent as steps
from channels import tip20
from channels.chain import Fate
from channels.faults import ChannelFault, Reason
from channels.ids import Address, Hash32
from channels.instants import UnixSeconds
from channels.intent import IntentKind, IntentState
from channels.signature import address_of
from channels.tempo_tx import Call, decode
from channels.units import Units
from mppnode.chain.devchain import PATH_USD, DevChain, LocalTransport
from mppnode.chain.rpc import CLOCK_APART_S, VALIDITY_S, RpcChain, RpcLimits
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import ManualClock
from mppnode.observe.metric_labels import Vocabulary
from mppnode.observe.metrics import Metrics
from mppnode.treasury.settler import Settler
from tests.support.builders import NOW, V2, chain
from tests.unit.treasury.fakes import KEY, Desk, channel_id, terms

AMOUNT = Units(50_000)
DEADLINE = UnixSeconds(NOW + 780)


class Bench(Desk):
    """Processes that settle over one ledger and one chain."""

    async def worker(self, name, metrics=None):
        me = await self.ledger.join(name)
        return Settler(
            self.chain,
            self.ledger,
            key=Secret(KEY),
            fee_token=Address(b"\x20" * 20),
            clock=self.clock,
            entropy=self.random,
            node=lambda: me,
            sleep=self._pause,
            metrics=metrics,
        )

    async def _pause(self, seconds):
        self.clock.advance(seconds)
        await asyncio.sleep(0)

    async def states(self):
        return [intent.state for intent in await self.ledger.intents(active=False)]


@pytest.fixture
async def bench():
    bench = Bench()
    bench.account = await bench.channel(1, earned=AMOUNT)
    return bench


async def reason(awaitable):
    with pytest.raises(ChannelFault) as caught:
        await awaitable
    return caught.value.reason


@pytest.mark.parametrize("kind", IntentKind)
async def test_final_transaction_with_its_effect_lands(bench, kind):
    """Settled or closed for exactly what was asked, at a final block, and the same wish again sends nothing more."""
    worker = await bench.worker("one")
    landed = await worker.bring(bench.account, kind, AMOUNT)
    assert await bench.states() == [IntentState.FINAL]
    again = await worker.bring(bench.account, kind, AMOUNT)
    assert (again.tx_hash, len(bench.chain.sent)) == (landed.tx_hash, 1)


async def test_block_that_is_not_final_is_no_proof(bench):
    """A receipt above the final block leaves the intent open, however often one looks."""
    bench.chain.final = bench.chain.block - 1
    worker = await bench.worker("one")
    assert await reason(worker.bring(bench.account, IntentKind.SETTLE, AMOUNT)) is Reason.CHAIN_OUTCOME_UNKNOWN
    assert await bench.states() == [IntentState.MINED]
    bench.chain.final = bench.chain.block
    await worker.bring(bench.account, IntentKind.SETTLE, AMOUNT)
    assert (await bench.states(), len(set(bench.chain.sent))) == ([IntentState.FINAL], 1)


def counting(bench):
    registry = CollectorRegistry()
    return registry.get_sample_value, Metrics(registry, clock=bench.clock, vocabulary=Vocabulary())


async def test_a_settlement_the_books_know_already_is_counted_whole(bench):
    """Taken up after a restart, with books that have seen its effect, it has paid what its own event says."""
    value, metrics = counting(bench)
    bench.chain.final = bench.chain.block - 1
    await reason((await bench.worker("one")).bring(bench.account, IntentKind.SETTLE, AMOUNT))
    bench.chain.final = bench.chain.block
    known = replace(bench.account, chain=replace(bench.account.chain, settled=AMOUNT))
    await (await bench.worker("one", metrics)).bring(known, IntentKind.SETTLE, AMOUNT)
    assert value("mppnode_settled_usd_total") == AMOUNT / 10**6


async def test_a_transaction_the_chain_refuses_is_counted_as_dead(bench):
    """Signed and refused at once, it ended as surely as one whose time has passed."""
    value, metrics = counting(bench)

    def refuse(_raw):
        raise ChannelFault(Reason.CHAIN_REJECTED, detail="no")

    bench.chain.on_send = refuse
    worker = await bench.worker("one", metrics)
    assert await reason(worker.bring(bench.account, IntentKind.SETTLE, AMOUNT)) is Reason.CHAIN_REJECTED
    assert await bench.states() == [IntentState.DEAD]
    assert value("mppnode_transactions_total", {"kind": "settle", "result": "dead"}) == 1


def _pays_less(account):
    return v2.Settled(account.id, account.descriptor.payer, account.descriptor.payee, AMOUNT, AMOUNT, Units(AMOUNT - 1))


def _pays_a_stranger(account):
    return v2.Settled(account.id, account.descriptor.payer, Address(b"\x66" * 20), AMOUNT, AMOUNT, AMOUNT)


def _settles_another(account):
    return v2.Settled(channel_id(2), account.descriptor.payer, account.descriptor.payee, AMOUNT, AMOUNT, AMOUNT)


@pytest.mark.parametrize("event", [None, _pays_less, _pays_a_stranger, _settles_another])
async def test_success_without_its_effect_is_never_final(bench, event, monkeypatch):
    """A receipt that says "succeeded" counts only with the event of our channel, our payee and our amount (C5)."""
    told = None if event is None else event(bench.account)
    monkeypatch.setattr("tests.unit.treasury.fakes.effect_of", lambda _data: told)
    worker, heard = await bench.worker("one"), []
    worker.on_no_effect = heard.append
    for _ in range(2):
        assert await reason(worker.bring(bench.account, IntentKind.SETTLE, AMOUNT)) is Reason.CHAIN_OUTCOME_UNKNOWN
        bench.clock.advance(1_000)
    assert await bench.states() == [IntentState.MINED]
    assert {intent.amount for intent in heard} == {AMOUNT}, "people are told"
    assert len(set(bench.chain.sent)) == 1


async def test_nothing_else_is_signed_while_the_first_may_live(bench):
    """An unknown outcome is not an end: the same bytes go out again, other bytes do not exist."""
    bench.chain.on_send = bench.chain.nowhere
    worker = await bench.worker("one")
    for kind in (IntentKind.SETTLE, IntentKind.CLOSE, IntentKind.SETTLE):
        assert await reason(worker.bring(bench.account, kind, AMOUNT)) is Reason.CHAIN_OUTCOME_UNKNOWN
    assert await bench.states() == [IntentState.SENT]
    assert len(bench.chain.sent) > 3
    assert len(set(bench.chain.sent)) == 1


async def test_after_a_proven_death_the_fee_rises_and_the_deadline_stays(bench):
    """The next attempt offers half as much again, for the deadline of the first, whoever asks for it (C6)."""
    bench.chain.on_send, bench.chain.fate = bench.chain.nowhere, Fate.EXPIRED
    worker = await bench.worker("one")
    deadlines = (DEADLINE, None, DEADLINE + 60)
    for deadline in deadlines:
        asked = worker.bring(bench.account, IntentKind.CLOSE, AMOUNT, deadline=deadline)
        assert await reason(asked) is Reason.CHAIN_REJECTED
    intents = await bench.ledger.intents(active=False)
    assert [(i.state, i.attempt, i.deadline) for i in intents] == [(IntentState.DEAD, n, DEADLINE) for n in (1, 2, 3)]
    fees = [decode(i.raw).tx.max_fee_per_gas for i in intents]
    tips = [decode(i.raw).tx.max_priority_fee_per_gas for i in intents]
    assert (fees, tips) == ([1_000, 1_500, 2_250], [100, 150, 225])


async def test_refused_attempts_cost_nothing(bench):
    """While the chain would refuse it nothing is signed, one row tells of it, and the fee is the first one at last."""
    bench.chain.refusing = True
    worker = await bench.worker("one")
    for _ in range(5):
        assert await reason(worker.bring(bench.account, IntentKind.SETTLE, AMOUNT)) is Reason.CHAIN_REJECTED
    assert (await bench.states(), bench.chain.sent) == ([IntentState.DEAD], [])
    bench.chain.refusing = False
    await worker.bring(bench.account, IntentKind.SETTLE, AMOUNT)
    assert decode(bench.chain.sent[0]).tx.max_fee_per_gas == 1_000


async def test_revert_counts_when_it_is_final(bench):
    """A final revert ends the intent without effect; the caller hears that it did not happen."""
    bench.chain.on_send = lambda raw: bench.chain.mine(raw, succeeded=False)
    worker = await bench.worker("one")
    assert await reason(worker.bring(bench.account, IntentKind.SETTLE, AMOUNT)) is Reason.CHAIN_REJECTED
    assert await bench.states() == [IntentState.REVERTED]


async def test_two_workers_pay_one_fee(bench):
    """Two processes that want the same settlement at once send one transaction between them (C7)."""
    workers = [await bench.worker(name) for name in ("one", "two")]
    asked = [worker.bring(bench.account, IntentKind.SETTLE, AMOUNT) for worker in workers]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert len(set(bench.chain.sent)) == 1
    assert await bench.states() == [IntentState.FINAL]
    faults = [answer.reason for answer in answers if isinstance(answer, ChannelFault)]
    assert set(faults) <= {Reason.CHAIN_OUTCOME_UNKNOWN}
    assert len(faults) < 2


async def test_transaction_of_a_living_process_is_its_own(bench):
    """Nobody takes a transaction from an owner that is alive; when its life has ended, the same bytes are sent on."""
    bench.chain.on_send = bench.chain.nowhere
    first = await bench.worker("one")
    assert await reason(first.bring(bench.account, IntentKind.SETTLE, AMOUNT)) is Reason.CHAIN_OUTCOME_UNKNOWN
    [sent] = set(bench.chain.sent)
    bench.chain.sent.clear()
    await bench.ledger.join("one")  # the same name: a process started again, its earlier life is over
    bench.chain.on_send = bench.chain.mine
    second = await bench.worker("two")
    await second.bring(bench.account, IntentKind.SETTLE, AMOUNT)
    assert set(bench.chain.sent) == {sent}
    assert await bench.states() == [IntentState.FINAL]


async def test_lost_compare_and_set_stops_the_loser(bench):
    """Whoever finds its intent moved by another does not send what it has signed."""
    worker = await bench.worker("one")
    move, moved = bench.ledger.move_intent, []

    async def overtaken(before, after):
        if after.state is IntentState.SIGNED and not moved:
            moved.append(await move(before, steps.adopted(before, "other", now=NOW)))
        return await move(before, after)

    bench.ledger.move_intent = overtaken
    assert await reason(worker.bring(bench.account, IntentKind.SETTLE, AMOUNT)) is Reason.CHAIN_OUTCOME_UNKNOWN
    assert (moved, bench.chain.sent, await bench.states()) == ([True], [], [IntentState.PLANNED])


async def test_withdrawn_channel_is_told_apart_from_our_own_close(bench):
    """A channel that is gone was closed by us only if its end paid what we fixed."""
    worker = await bench.worker("one")
    bench.chain.states[bench.account.id] = chain(0)
    payer, payee = terms(1).payer, terms(1).payee
    for paid, expected in ((AMOUNT, None), (0, Reason.CHANNEL_FINALIZED)):
        event = v2.ChannelClosed(bench.account.id, payer, payee, Units(paid), Units(10**9 - paid))
        bench.chain.events = [(90, event)]
        if expected is None:
            landed = await worker.bring(bench.account, IntentKind.CLOSE, AMOUNT)
            assert landed.chain.deposit == 0
        else:
            assert await reason(worker.bring(bench.account, IntentKind.CLOSE, AMOUNT)) is expected
    assert (bench.chain.sent, await bench.states()) == ([], [])
    assert landed.tx_hash == Hash32(bytes(32))


@pytest.mark.parametrize(("skew_s", "lives_s"), [(0, 25), (3_600, 25), (40, 25), (-40, 25), (-3_600, -3_600 + 85)])
async def test_wrong_clock_signs_nothing_that_lives_long(skew_s, lives_s):
    """Validity follows the chain's time, so a clock that is an hour fast does not lock a channel for that hour."""
    clock, wrong = ManualClock(NOW), ManualClock(NOW + skew_s)
    dev = DevChain(clock, chain_id=V2.chain_id)
    rpc = RpcChain(LocalTransport(dev), wrong, limits=RpcLimits())
    pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(Address(b"\x77" * 20), Units(0))))
    tx = await rpc.prepare(address_of(KEY), (pay,), fee_token=PATH_USD, entropy=bytes(8))
    assert tx.valid_before - NOW == lives_s


async def test_chain_that_makes_its_time_up_cannot_lock_a_channel():
    """A node whose blocks are an hour ahead gets a transaction that is dead a minute later than usual, not an hour."""
    clock = ManualClock(NOW)
    dev = DevChain(clock, chain_id=V2.chain_id)
    dev.travel(3_600)
    rpc = RpcChain(LocalTransport(dev), clock, limits=RpcLimits())
    pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(Address(b"\x77" * 20), Units(0))))
    tx = await rpc.prepare(address_of(KEY), (pay,), fee_token=PATH_USD, entropy=bytes(8))
    assert tx.valid_before - NOW == VALIDITY_S + CLOCK_APART_S
