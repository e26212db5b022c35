"""When money moves: every trigger at its threshold and one unit below it, on a clock that moves only when told."""

import asyncio

import pytest

from channels.chain import Head
from channels.descriptor import CLOSE_GRACE_S
from channels.faults import ChannelFault, Reason
from channels.intent import IntentKind, planned
from channels.model import AcceptVoucher, BeginClose, Finish, HoldId, NodeId, Renew, Voucher
from channels.units import Units
from mppnode.kernel.tasks import TaskOwner
from mppnode.treasury.settler import Landed
from mppnode.treasury.treasurer import Treasurer, TreasuryPolicy
from mppnode.treasury.watcher import Seen
from tests.support.builders import NOW, TX, chain, pico, reserve, voucher
from tests.unit.treasury.fakes import FEE, Desk

DAY = 24 * 3600
POLICY = TreasuryPolicy(settle_fees=20, settle_age_s=6 * 3600, exposure_max=Units(50_000), idle_close_s=30 * DAY, at_once=2)
ME = NodeId("me.1")


class Enough(Exception):
    """The fake sleep's way to end a loop that never ends."""


class Eyes:
    """A watcher that has nothing to report unless told."""

    def __init__(self, clock):
        self.clock, self.changed, self.fault = clock, [], None
        self.checked_at = clock.monotonic()

    async def glance(self):
        if self.fault is not None:
            raise self.fault
        changed, self.changed = tuple(self.changed), []
        return Seen(Head(1, NOW), changed)

    async def sweep(self):
        self.checked_at = self.clock.monotonic()


class Hands:
    """Settler and closer in one: they note what they were asked for, and can be made to wait."""

    def __init__(self):
        self.done, self.gate, self.driving = [], None, set()

    def busy(self, channel):
        return channel in self.driving

    async def _wait(self):
        if self.gate is not None:
            await self.gate.wait()

    async def bring(self, account, kind, amount, *, deadline=None):
        self.done.append((str(kind), account.id[0], amount))
        await self._wait()
        return Landed(TX, chain(account.chain.deposit, amount, block=200))

    async def resume(self, intent, account):
        self.done.append(("resume", account.id[0], intent.id))

    async def close(self, account, why, *, deadline=None):
        self.done.append(("close", account.id[0], why, deadline))
        await self._wait()
        return account, TX

    def later(self, channel, *, at_once=False):
        self.done.append(("later", channel[0]))


class Office(Desk):
    def __init__(self, policy=POLICY):
        super().__init__()
        self.eyes, self.hands, self.broken = Eyes(self.clock), Hands(), []
        self.owner = TaskOwner(lambda name, error: self.broken.append((name, error)))
        self.treasurer = Treasurer(
            chain=self.chain,
            ledger=self.ledger,
            books=self.books,
            watcher=self.eyes,
            settler=self.hands,
            closer=self.hands,
            node=lambda: ME,
            owner=self.owner,
            clock=self.clock,
            log=self.log,
            policy=policy,
            sleep=self._glance,
        )
        self.turns = 0

    async def _glance(self, seconds):
        await self.owner.drain(deadline_s=5)
        self.clock.advance(seconds)
        await asyncio.sleep(0)
        self.turns -= 1
        if self.turns <= 0:
            raise Enough

    async def keep(self, turns):
        """Let the loop of a real process run for some turns."""
        self.turns = turns
        with pytest.raises(Enough):
            await self.treasurer.keep()

    async def turn(self):
        """One turn and everything it started; what was done."""
        self.hands.done.clear()
        await self.treasurer.turn()
        await self.owner.drain(deadline_s=5)
        assert self.broken == []
        return list(self.hands.done)


@pytest.mark.parametrize(
    ("earned", "waited_s", "settles"),
    [
        (20 * FEE - 1, 0, False),
        (20 * FEE, 0, True),
        (20 * FEE - 1, 6 * 3600 - 1, False),
        (20 * FEE - 1, 6 * 3600, True),
        (FEE + 1, 6 * 3600, True),
        (FEE, 6 * 3600, False),
        (0, 6 * 3600, False),
    ],
)
async def test_value_and_age_decide(earned, waited_s, settles):
    """Twenty fees settle at once, more than one fee after six hours, and what a fee would eat never."""
    office = Office()
    await office.channel(1, earned=earned)
    first = await office.turn()
    if waited_s:
        office.clock.advance(waited_s)
        first = await office.turn()
    assert first == ([("settle", 1, earned)] if settles else [])


async def test_value_must_be_worth_a_fee_when_fees_are_zero():
    """On a chain without fees the first unit is settled, and a channel without any is left alone."""
    office = Office()
    office.chain.fee_units = lambda gas: asyncio.sleep(0, Units(0))
    await office.channel(1, earned=20)
    await office.channel(2)
    assert await office.turn() == [("settle", 1, 20)]


@pytest.mark.parametrize(("each", "settled"), [(16_667, [1, 2, 3]), (16_666, [])])
async def test_exposure_is_summed_over_a_payer(each, settled):
    """Three channels of one payer that together owe too much are settled, all of them, and nobody else's."""
    office = Office()
    for number in (1, 2, 3):
        await office.channel(number, earned=each, payer=9)
    await office.channel(4, earned=each)
    done = await office.turn()
    office.clock.advance(POLICY.sweep_s)
    done += await office.turn()
    assert sorted({number for _, number, _ in done}) == settled


async def test_live_stream_is_not_settled():
    """What a live stream was charged may be given back: it counts only when its report is in."""
    office = Office()
    account = await office.channel(1, earned=FEE)
    highest, hold = account.accepted + 40 * FEE, HoldId("live")
    await office.books.apply(account.id, AcceptVoucher(voucher(highest)))
    await office.books.apply(account.id, reserve(40 * FEE, hold="live", ticket="other"))
    await office.books.apply(account.id, Renew(hold, pico(40 * FEE), pico(40 * FEE)))
    assert await office.turn() == []
    await office.books.apply(account.id, Finish(hold, pico(40 * FEE)))
    office.clock.advance(POLICY.sweep_s)
    assert await office.turn() == [("settle", 1, highest)]


async def test_close_requests_go_in_the_order_of_their_deadlines():
    """Whose exit ends first is captured first, with a deadline two minutes before that exit."""
    office = Office()
    for number, requested_at in ((1, NOW + 30), (2, NOW + 10), (3, NOW + 20)):
        await office.leaving(number, requested_at=requested_at, earned=2 * FEE)
    margin = CLOSE_GRACE_S - POLICY.margin_s
    assert await office.turn() == [
        ("close", 2, "payer-leaves", NOW + 10 + margin),
        ("close", 3, "payer-leaves", NOW + 20 + margin),
        ("close", 1, "payer-leaves", NOW + 30 + margin),
    ]


async def test_closes_do_not_queue_behind_settlements():
    """With every settlement slot taken, the close of a leaving payer still starts."""
    office = Office()
    for number in (1, 2, 3):
        await office.channel(number, earned=20 * FEE)
    await office.leaving(9, requested_at=NOW, earned=2 * FEE)
    office.hands.gate = asyncio.Event()
    await office.treasurer.turn()
    for _ in range(5):
        await asyncio.sleep(0)
    started = [entry[:2] for entry in office.hands.done]
    assert sorted(started) == [("close", 9), ("settle", 1), ("settle", 2)]
    office.hands.gate.set()
    await office.owner.drain(deadline_s=5)
    assert ("settle", 3, 20 * FEE) in office.hands.done


@pytest.mark.parametrize(("earned", "closes"), [(FEE, False), (FEE + 1, True)])
async def test_leaving_payer_is_worth_a_close_above_one_fee(earned, closes):
    """A payer who flaps with a balance below a fee costs nothing at all."""
    office = Office()
    await office.turn()
    account = await office.leaving(1, requested_at=NOW, earned=earned)
    office.eyes.changed = [account]
    assert [entry[0] for entry in await office.turn()] == (["close"] if closes else [])


@pytest.mark.parametrize(("idle_s", "closes"), [(30 * DAY - 1, False), (30 * DAY, True)])
async def test_idle_channels_are_closed(idle_s, closes):
    """Nobody's money lies in a forgotten channel for longer than thirty days."""
    office = Office()
    await office.channel(1, earned=5)
    await office.channel(2)  # never used: nothing is owed, and closing it would only cost a fee
    office.clock.advance(idle_s)
    assert await office.turn() == ([("close", 1, "idle", None)] if closes else [])


async def test_half_done_closes_are_taken_over_at_the_second_look():
    """A close that is still half done one sweep later is driven on, unless this process does that already."""
    office = Office()
    account = await office.channel(1, earned=5)
    await office.books.apply(account.id, BeginClose("c", Voucher(Units(5), bytes(65))))
    looks = []
    for _ in range(2):
        looks.append(await office.turn())
        office.clock.advance(POLICY.sweep_s)
    assert looks == [[], [("later", 1)]]
    office.hands.driving.add(account.id)
    assert await office.turn() == []


async def _owned_by(office, number, owner):
    account = await office.channel(number, earned=5)
    intent = planned(f"of {owner}", account.id, IntentKind.SETTLE, Units(5), owner=NodeId(owner), now=NOW)
    await office.ledger.add_intent(intent)


@pytest.mark.parametrize("leads", [True, False])
async def test_every_process_goes_on_with_its_own_and_with_dead_ones(leads):
    """Transactions of this process and of dead ones are resumed by leader and follower alike; others' never."""
    office = Office()
    await office.ledger.join("me")
    other = await office.ledger.join("other")
    if not leads:
        await office.ledger.lead("treasury", other)
    await _owned_by(office, 1, ME)
    await _owned_by(office, 2, "gone.7")
    await _owned_by(office, 3, other)
    await office.keep(1)
    await office.owner.drain(deadline_s=5)
    assert sorted(office.hands.done) == [("resume", 1, f"of {ME}"), ("resume", 2, "of gone.7")]


async def test_blind_leader_raises_one_alarm_per_blindness():
    """A minute without a sweep is reported once, and again after it was cured and came back."""
    office = Office()
    await office.ledger.join("me")
    office.eyes.fault = ChannelFault(Reason.CHAIN_UNAVAILABLE)
    await office.keep(31)
    assert office.said("treasury.blind") == []
    await office.keep(60)
    assert len(office.said("treasury.blind")) == 1
    office.eyes.fault = None
    await office.keep(10)
    office.eyes.fault = ChannelFault(Reason.CHAIN_UNAVAILABLE)
    await office.keep(60)
    assert len(office.said("treasury.blind")) == 2


async def test_follower_raises_no_alarm_and_does_not_look():
    """While another process leads it is that one which looks, and that one which would say if it could not."""
    office = Office()
    other = await office.ledger.join("other")
    for _ in range(20):
        await office.ledger.lead("treasury", other)
        await office.ledger.beat(other)
        await office.keep(4)
    assert office.said("treasury.blind") == []
    assert office.treasurer._swept_at is None


async def test_settling_believes_a_final_block_alone():
    """The state a settlement starts from is read at the final block: a top-up above it is not in the books yet."""
    office = Office()
    await office.channel(1, earned=20 * FEE)
    office.chain.final, office.chain.block = 150, 160
    await office.turn()
    reads = [at for kind, _, at in office.chain.asked if kind == "state"]
    assert set(reads) == {150}
