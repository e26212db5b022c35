"""The running bill: covered by a durable hold, renewed early, and the payer asked once, early and for no more than needed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from channels.account import fold, plan
from channels.descriptor import RESERVE_ADDRESS, ChainSnapshot, Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.model import (
    AcceptVoucher,
    Account,
    Command,
    Event,
    HoldId,
    Open,
    Outcome,
    Plan,
    RecordTopUp,
    ReleaseOrphans,
    Reserve,
    Voucher,
)
from channels.policy import Policy
from channels.units import PICO_PER_UNIT, Pico, Units
from mppnode.kernel.clock import ManualClock
from mppnode.kernel.tasks import TaskOwner
from mppnode.rails.tab import NeedVoucher, SessionTab, TabPolicy

CHANNEL = ChannelId(b"\x01" * 32)
HOLD = HoldId("hold")
TOKEN = 10 * PICO_PER_UNIT  # ten units a token: 10 USD per million
PAYER = Address(b"\x02" * 20)


def descriptor() -> Descriptor:
    zero = Hash32(bytes(32))
    return Descriptor(PAYER, Address(b"\x03" * 20), ZERO_ADDRESS, Address(b"\x04" * 20), zero, PAYER, zero)


class FakeBooks:
    """The pure machine with no disk: the same plans, committed at once, and counted."""

    def __init__(self, deposit: int, accepted: int, protocol: SessionProtocol = SessionProtocol.V2) -> None:
        self.commits: list[Command] = []
        self.listener = lambda _: None
        self.account: Account | None = None
        escrow = Escrow(protocol, 1, RESERVE_ADDRESS)
        snapshot = ChainSnapshot(Units(deposit), Units(0), None, 1)
        self.now(Open(CHANNEL, escrow, descriptor(), snapshot, Voucher(Units(accepted), b"s" * 65)))

    def now(self, command: Command) -> Plan[Outcome]:
        planned = plan(self.account, command, now=UnixSeconds(1), policy=Policy())
        self.account = planned.account
        self.commits.append(command)
        self.listener(planned.account)
        return planned

    async def apply(self, _: ChannelId, command: Command) -> Plan[Outcome]:
        await asyncio.sleep(0)
        return self.now(command)


class Rig:
    def __init__(self, *, deposit: int = 100_000, accepted: int = 1_000, cap_tokens: int = 10_000, reserve: int = 0, first_tokens: int = 64, policy: TabPolicy | None = None, protocol: SessionProtocol = SessionProtocol.V2) -> None:
        self.clock = ManualClock()
        self.books = FakeBooks(deposit, accepted, protocol)
        self.errors: list[BaseException] = []
        want = Pico(first_tokens * TOKEN + reserve)
        reserved = self.books.now(Reserve(HOLD, "ticket", UnixSeconds(100), Pico(TOKEN), want))
        self.tab = SessionTab(
            reserved.account,
            HOLD,
            reserved.result.granted,
            challenge_id="ticket",
            token_pico=TOKEN,
            reserve_pico=reserve,
            unit_pico=1_000 * PICO_PER_UNIT,
            cap_pico=cap_tokens * TOKEN,
            books=self.books,  # type: ignore[arg-type]
            owner=TaskOwner(lambda _, error: self.errors.append(error)),
            clock=self.clock,
            policy=policy or TabPolicy(),
        )
        self.books.listener = self.tab.observe
        self.changes = 0
        self.tab.on_change = self._changed

    def _changed(self) -> None:
        self.changes += 1

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        assert not self.errors

    async def consume(self, tokens: int, *, seconds_each: float = 0.01, start: int = 0) -> list[NeedVoucher]:
        """Deliver tokens at a pace, answering nothing; returns what was asked."""
        asked = []
        for number in range(start + 1, start + tokens + 1):
            self.clock.advance(seconds_each)
            if not self.tab.cover(number * TOKEN):
                await self.settle()
                if not self.tab.cover(number * TOKEN):
                    need = self.tab.ask()
                    return [*asked, need] if need else asked
            need = self.tab.ask()
            if need is not None:
                asked.append(need)
            await self.settle()
        return asked


async def test_nothing_is_covered_beyond_the_durable_hold() -> None:
    """A total above what was granted is refused at once, whatever the voucher would allow."""
    rig = Rig(accepted=50_000)
    assert rig.tab.cover(64 * TOKEN)
    assert not rig.tab.cover(65 * TOKEN)
    await rig.settle()
    assert rig.tab.cover(65 * TOKEN)
    assert rig.changes > 0


async def test_the_hold_is_renewed_before_it_is_used_up() -> None:
    """A stream at an even pace never meets the end of its hold."""
    rig = Rig(accepted=90_000)
    for number in range(1, 2_000):
        rig.clock.advance(0.01)
        assert rig.tab.cover(number * TOKEN), number
        await rig.settle()
    assert len(rig.books.commits) < 200


@pytest.mark.parametrize("reserve", [0, 5_000 * PICO_PER_UNIT])
async def test_a_crash_costs_at_most_one_window(reserve: int) -> None:
    """At every moment, releasing the hold as a restart does charges at most W less than what was delivered."""
    rig = Rig(accepted=90_000, reserve=reserve, policy=TabPolicy(window_units_max=300))
    worst = 0
    for number in range(1, 3_000):
        rig.clock.advance(0.001)
        if rig.tab.cover(number * TOKEN):
            account = rig.books.account
            assert account is not None
            crashed = plan(account, ReleaseOrphans(), now=UnixSeconds(2), policy=Policy()).account
            worst = max(worst, number * TOKEN - crashed.owed_pico)
            assert crashed.owed_pico <= number * TOKEN
        await rig.settle()
    assert worst <= max(300 * PICO_PER_UNIT, 64 * TOKEN)


async def test_the_first_charge_is_recorded_soon_when_it_is_large() -> None:
    """A prompt charged with the first token does not wait for half a window."""
    rig = Rig(accepted=90_000, first_tokens=2_000)
    rig.tab._window = 10 * TOKEN
    assert rig.tab.cover(1_000 * TOKEN)
    await rig.settle()
    assert rig.books.account is not None
    assert rig.books.account.owed_pico == 1_000 * TOKEN


async def test_it_asks_once_and_early() -> None:
    """One need-voucher while none is answered, before the headroom is gone, above what was consumed."""
    rig = Rig(accepted=3_000, deposit=100_000)
    asked = await rig.consume(300)
    assert len(asked) == 1
    (need,) = asked
    assert need.accepted == 3_000
    assert need.deposit == 100_000
    assert 3_000 < need.required <= 3_000 + TabPolicy().preauthorise_units_max


async def test_it_asks_again_after_each_voucher_and_never_starves_an_honest_payer() -> None:
    """A payer who answers each ask within a second never meets an uncovered token."""
    rig = Rig(accepted=1_000, deposit=1_000_000)
    outstanding: tuple[float, NeedVoucher] | None = None
    asked = 0
    for number in range(1, 3_000):
        rig.clock.advance(0.01)
        assert rig.tab.cover(number * TOKEN), number
        need = rig.tab.ask()
        if need is not None:
            assert outstanding is None
            asked += 1
            outstanding = (rig.clock.monotonic() + 0.3, need)
        if outstanding is not None and rig.clock.monotonic() >= outstanding[0]:
            rig.books.now(AcceptVoucher(Voucher(outstanding[1].required, b"v" * 65)))
            outstanding = None
        await rig.settle()
    assert 5 <= asked <= 40


async def test_it_never_asks_for_more_than_the_request_can_cost() -> None:
    """With the worst case authorised nothing is asked, and before it no voucher goes beyond it."""
    rig = Rig(accepted=1_000, deposit=1_000_000, cap_tokens=150)
    asked = await rig.consume(100)
    assert [need.required for need in asked] == [1_500]
    enough = Rig(accepted=2_000, deposit=1_000_000, cap_tokens=150)
    assert await enough.consume(150) == []


async def test_the_deposit_is_used_up_before_a_top_up_is_asked_for() -> None:
    """While the deposit covers more than was accepted, the payer is asked to sign up to it, not to move money."""
    rig = Rig(accepted=1_000, deposit=1_500)
    asked = await rig.consume(95)
    assert [need.required for need in asked] == [1_500]
    rig.books.now(AcceptVoucher(Voucher(Units(1_500), b"w" * 65)))
    asked = await rig.consume(20, start=95)
    assert [need.required > 1_500 for need in asked] == [True]
    account = rig.books.account
    assert account is not None
    deeper = replace(account.chain, deposit=Units(9_000), block=2)
    rig.books.now(RecordTopUp(Hash32(b"c" * 32), Hash32(b"t" * 32), deeper))
    rig.books.now(AcceptVoucher(Voucher(asked[0].required, b"x" * 65)))
    await rig.settle()
    assert rig.tab.cover(160 * TOKEN)


async def test_a_v1_stream_ends_with_its_deposit() -> None:
    """A v1 payer cannot top up beside a stream: it is not asked to, and the stream is told why it ends."""
    rig = Rig(accepted=1_000, deposit=1_000, protocol=SessionProtocol.V1)
    assert await rig.consume(200) == []
    assert rig.tab.ended is not None
    assert rig.tab.ended.reason is Reason.VOUCHER_EXCEEDS_DEPOSIT


async def test_a_voucher_that_lands_between_the_commit_and_its_news_is_not_missed() -> None:
    """The renewal that found nothing must not put the tab to sleep over a voucher committed meanwhile."""
    rig = Rig(accepted=640, deposit=10_000)
    assert rig.tab.cover(64 * TOKEN)
    assert not rig.tab.cover(65 * TOKEN)
    original = rig.books.apply

    async def late(channel: ChannelId, command: Command) -> Plan[Outcome]:
        planned = await original(channel, command)
        rig.books.now(AcceptVoucher(Voucher(Units(5_000), b"v" * 65)))
        return planned

    rig.books.apply = late  # type: ignore[method-assign]
    await rig.settle()
    rig.books.apply = original  # type: ignore[method-assign]
    rig.tab.cover(65 * TOKEN)
    await rig.settle()
    assert rig.tab.cover(65 * TOKEN)


async def test_a_fenced_tab_says_so() -> None:
    """When a newer request takes the channel, the older one learns it from the commit."""
    rig = Rig(accepted=50_000)
    rig.books.now(Reserve(HoldId("newer"), "ticket-2", UnixSeconds(100), Pico(TOKEN), Pico(TOKEN)))
    assert rig.tab.ended is not None
    assert rig.tab.ended.reason is Reason.HOLD_FENCED
    await rig.tab.finish(Pico(TOKEN))


async def test_finish_charges_the_exact_total_once() -> None:
    """The bill is the exact total, to the pico, and the hold is gone."""
    rig = Rig(accepted=1_000)
    assert rig.tab.cover(30 * TOKEN)
    await rig.tab.finish(Pico(30 * TOKEN + 7))
    account = rig.books.account
    assert account is not None
    assert account.owed_pico == 30 * TOKEN + 7
    assert not account.holds
    assert rig.tab.receipt(rig.clock.now_millis()).spent == 300


async def test_an_overcount_becomes_credit_and_is_never_captured() -> None:
    """When the usage report is below what was recorded, the rest is credit: shown as spent, but not taken."""
    rig = Rig(accepted=1_000)
    assert rig.tab.cover(50 * TOKEN)
    await rig.settle()
    await rig.tab.finish(Pico(30 * TOKEN))
    account = rig.books.account
    assert account is not None
    assert account.owed_pico == 30 * TOKEN
    assert account.capturable == 300
    assert account.headroom_pico == 1_000 * PICO_PER_UNIT - 30 * TOKEN


def test_the_fake_is_the_machine() -> None:
    """The rig's books fold exactly what they plan."""
    rig = FakeBooks(10, 5)
    assert rig.account is not None
    event: Event
    planned = plan(rig.account, AcceptVoucher(Voucher(Units(7), b"q" * 65)), now=UnixSeconds(1), policy=Policy())
    account: Account = rig.account
    for event in planned.events:
        account = fold(account, event)
    assert account == planned.account
    with pytest.raises(ChannelFault):
        plan(rig.account, AcceptVoucher(Voucher(Units(11), b"q" * 65)), now=UnixSeconds(1), policy=Policy())
