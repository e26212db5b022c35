"""Journal, accounts, our transactions and the chain: each contradiction has a name, and none is invented."""

import asyncio
from dataclasses import replace

import pytest

from channels import escrow as v2
from channels.chain import Receipt
from channels.faults import ChannelFault, Reason
from channels.ids import Hash32
from channels.intent import IntentKind, IntentState, planned
from channels.model import BeginClose, ConfirmClosed, FixCapture, NodeId, ObserveChain
from channels.units import Units
from mppnode.treasury.reconcile import DailyReconcile, Reconciler
from mppnode.treasury.treasurer import JOB
from tests.support.builders import NOW, TX, V2, chain
from tests.unit.treasury.fakes import PAYEE, Desk

EARNED = Units(1_000)
CLOSED_BY = Hash32(b"\x0c" * 32)


class Audit(Desk):
    async def found(self):
        self.reconciler = Reconciler(self.ledger, self.chain)
        return [(difference.channel[0], difference.what) async for difference in self.reconciler.run()]

    async def settle(self, account, amount=EARNED):
        """A settlement of ours that is final everywhere."""
        intent = planned("s", account.id, IntentKind.SETTLE, amount, owner="n", now=NOW)
        await self.ledger.add_intent(intent)
        final = replace(intent, state=IntentState.FINAL, version=9, tx_hash=TX, block=60)
        await self.ledger.move_intent(intent, final)
        event = v2.Settled(account.id, account.descriptor.payer, PAYEE, amount, amount, amount)
        self.receipt(event)
        self.chain.states[account.id] = chain(10**9, amount, block=60)
        await self.books.apply(account.id, ObserveChain(self.chain.states[account.id]))

    async def close(self, account, amount=EARNED):
        """A close of ours that is final everywhere."""
        await self.books.apply(account.id, BeginClose("c", None))
        await self.books.apply(account.id, FixCapture())
        await self.books.apply(account.id, ConfirmClosed(CLOSED_BY, chain(0, block=70)))
        self.receipt(self.closed(account, amount), tx_hash=CLOSED_BY)

    @staticmethod
    def closed(account, amount):
        return v2.ChannelClosed(account.id, account.descriptor.payer, PAYEE, Units(amount), Units(10**9 - amount))

    def receipt(self, event, *, tx_hash=TX):
        logs = (v2.encode_event(V2, event),)
        self.chain.receipts[tx_hash] = Receipt(tx_hash, True, 60, PAYEE, logs, Hash32(bytes(32)))

    def tamper(self, account, **fields):
        self.ledger._accounts[account.id] = replace(self.ledger._accounts[account.id], **fields)


@pytest.fixture
async def audit():
    audit = Audit()
    audit.account = await audit.channel(1, earned=EARNED)
    return audit


async def test_books_that_agree_show_no_difference(audit):
    """Open, settled and closed channels agree, and the totals add up to the unit."""
    other, third = await audit.channel(2, earned=EARNED), await audit.channel(3)
    await audit.settle(audit.account)
    await audit.close(other)
    assert await audit.found() == []
    totals = audit.reconciler.totals
    figures = (totals.channels, totals.spent, totals.settled, totals.lost, totals.differences)
    assert figures == (3, 2 * EARNED, 2 * EARNED, 0, 0)
    assert third.spent == 0


async def test_withdrawn_money_is_counted_as_lost_and_is_no_difference(audit):
    """A payer who got out first cost what was consumed; the books agree with that."""
    await audit.books.apply(audit.account.id, ObserveChain(chain(0, block=70)))
    audit.chain.events = [(70, audit.closed(audit.account, 0))]
    assert await audit.found() == []
    assert audit.reconciler.totals.lost == EARNED


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"spent": Units(EARNED - 1)}, "journal/account"),
        ({"owed_pico": 5}, "journal/account"),
        ({"version": 99}, "journal/account"),
        ({"owed_pico": 10**15}, "account/law"),
        ({"spent": Units(EARNED + 1)}, "account/law"),
    ],
)
async def test_row_that_its_journal_does_not_explain(audit, fields, what):
    """A changed row is found, whether or not it breaks a law of its own."""
    audit.tamper(audit.account, **fields)
    assert (1, what) in await audit.found()


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (chain(10**9 + 1, block=90), ["deposit/chain"]),
        (chain(10**9, 400, block=90), ["settled/chain"]),
        (chain(10**9, EARNED + 1, block=90), ["settled/chain", "spent/chain"]),
        (chain(EARNED - 1, block=90), ["deposit/chain", "accepted/chain"]),
    ],
)
async def test_chain_that_says_something_else(audit, state, what):
    """Deposit, settled total, consumption and accepted vouchers are each held against the final block."""
    audit.chain.states[audit.account.id] = state
    assert await audit.found() == [(1, name) for name in what]


async def test_receipts_of_our_own_transactions(audit):
    """A final intent needs its receipt, a successful one, with the amount that was meant."""
    await audit.settle(audit.account)
    good = audit.chain.receipts[TX]
    payer = audit.account.descriptor.payer
    less = v2.Settled(audit.account.id, payer, PAYEE, EARNED, Units(1), Units(1))
    for broken in (None, replace(good, succeeded=False), replace(good, logs=()), replace(good, logs=(v2.encode_event(V2, less),))):
        audit.chain.receipts = {} if broken is None else {TX: broken}
        assert await audit.found() == [(1, "settle/receipt")]


@pytest.mark.parametrize(("paid", "what"), [(None, "close/chain"), (EARNED + 1, "spent/chain"), (EARNED - 1, "close/chain")])
async def test_end_of_a_closed_channel(audit, paid, what):
    """A closed channel has an end on chain, which paid what was fixed and never more than was spent."""
    await audit.close(audit.account)
    if paid is None:
        audit.chain.receipts.clear()
    else:
        audit.receipt(audit.closed(audit.account, paid), tx_hash=CLOSED_BY)
    assert await audit.found() == [(1, what)]


async def test_what_moves_meanwhile_is_no_difference(audit):
    """A settlement that lands between two reads, and one in flight, are told apart from a contradiction."""
    fresh = chain(10**9, 400, block=90)
    states, looks = audit.chain.channel_states, []

    async def moving(escrow, ids, *, at_block=None):
        looks.append(at_block)
        answer = await states(escrow, ids, at_block=at_block)
        if len(looks) == 1:  # the chain was ahead of the books; the watcher hears of it before the second look
            await audit.books.apply(audit.account.id, ObserveChain(replace(fresh, block=at_block)))
            audit.chain.states[audit.account.id] = fresh
            return [replace(fresh, block=at_block - 1, settled=Units(300))]
        return answer

    audit.chain.channel_states = moving
    assert (await audit.found(), len(looks)) == ([], 2)


async def test_transaction_in_flight_explains_another_total(audit):
    """While an intent is open the chain may say the old total or the new one."""
    await audit.ledger.add_intent(planned("s", audit.account.id, IntentKind.SETTLE, EARNED, owner="n", now=NOW))
    audit.chain.states[audit.account.id] = chain(10**9, EARNED, block=90)
    assert await audit.found() == []


async def test_books_ahead_of_the_final_block_are_no_difference(audit):
    """What the books were told of a newer block cannot be held against an older one."""
    await audit.books.apply(audit.account.id, ObserveChain(chain(10**9, 400, block=150)))
    assert await audit.found() == []
    audit.chain.final = audit.chain.block = 160
    assert await audit.found() == [(1, "settled/chain")]


async def test_the_end_of_a_channel_is_searched_backwards_in_steps_nodes_accept(audit):
    """A withdrawal seen late is found, with no query wider than a public node answers, and no further than a day back."""
    audit.chain.events = [(5_000, audit.closed(audit.account, 0))]
    await audit.books.apply(audit.account.id, ObserveChain(chain(0, block=9_500)))
    assert await audit.found() == []
    spans = [(first, last) for kind, first, last in audit.chain.asked if kind == "logs"]
    assert spans == [(7_501, 9_500), (5_501, 7_500), (3_501, 5_500)]
    audit.chain.events = []
    assert await audit.found() == [(1, "close/chain")]
    assert min(first for kind, first, _ in audit.chain.asked if kind == "logs") == 0


DAY = 86_400


class Nights(Audit):
    """A daily comparison on a manual clock that ends after so many sleeps."""

    def daily(self, node="node.1"):
        return DailyReconcile(self.ledger, self.chain, node=lambda: NodeId(node), clock=self.clock, log=self.log)

    async def nights(self, daily, count, leader="node.1"):
        """Its sleeps, while ``leader`` keeps the lead."""
        slept = []

        async def sleep(seconds):
            if len(slept) == count:
                raise asyncio.CancelledError
            slept.append(seconds)
            self.clock.advance(seconds)
            assert await self.ledger.lead(JOB, NodeId(leader))

        with pytest.raises(asyncio.CancelledError):
            await daily.keep(sleep)
        return slept


async def test_the_daily_comparison_runs_on_the_leader_alone():
    """An hour after the start and then once a day, on the one node that leads the treasury."""
    nights = Nights()
    await nights.channel(1, earned=EARNED)
    first = await nights.ledger.join("first")
    assert await nights.nights(nights.daily("node.2"), 1, first) == [3_600.0]
    assert nights.said("reconcile.done") == []
    nights = Nights()
    await nights.channel(1, earned=EARNED)
    assert await nights.nights(nights.daily(), 2) == [3_600.0, float(DAY)]
    assert len(nights.said("reconcile.done")) == 2


async def test_a_failed_comparison_is_tried_again_within_the_hour():
    """A chain that cannot be asked delays the comparison, and does not skip it."""
    nights = Nights()
    await nights.channel(1, earned=EARNED)
    answers = nights.chain.finalised

    async def away():
        nights.chain.finalised = answers
        raise ChannelFault(Reason.CHAIN_UNAVAILABLE, detail="away")

    nights.chain.finalised = away
    assert await nights.nights(nights.daily(), 3) == [3_600.0, 3_600.0, float(DAY)]
    assert len(nights.said("reconcile.done")) == 2


async def test_what_has_not_moved_for_two_days_is_not_asked_about_again():
    """Closed channels pile up for ever; the chain is asked about one of them for two days and no longer."""
    nights = Nights()
    account = await nights.channel(1, earned=EARNED)
    await nights.close(account)
    nights.chain.receipts.clear()  # an answer that would be a difference, were it asked for
    assert (await nights.daily().run()).differences == 1
    nights.clock.advance(2 * DAY + 1)
    assert (await nights.daily().run()).differences == 0
