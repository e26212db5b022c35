"""Every operation of the ledger fails once, in four ways, and nothing is lost, doubled or half done.

The story is a channel's whole life: open, hold, vouchers, renewals, a buffered answer, a settlement, a top-up, the
close. For n = 1, 2, 3 and so on its n-th operation fails; then the process goes on, or a new one starts on the same
files. When a run meets no fault the sweep has covered them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from pathlib import Path

import pytest

from channels.account import check, fold
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.intent import Intent, IntentKind, IntentState, ended, mined, planned, sent, signed
from channels.model import (
    AcceptVoucher,
    Account,
    BeginClose,
    Command,
    ConfirmClosed,
    EndStreams,
    Finish,
    FixCapture,
    HoldId,
    NodeId,
    ObserveChain,
    Phase,
    RecordTopUp,
    Renew,
)
from channels.units import Units
from mppnode.ledger.base import IntentExists, Ledger
from mppnode.ledger.books import Books
from mppnode.ledger.life import Life, Sweeper
from tests.fault.faulty import Faulty, Mode
from tests.store.shops import LEDGERS, Shop, open_shop
from tests.support.builders import NOW, POLICY, TX, buffered, chain, decide, opening, pico, reserve, voucher

OPERATIONS_MIN = 25
H, G = HoldId("h"), HoldId("g")


def commands(channel: ChannelId, owner: NodeId) -> list[Command | IntentKind]:
    """The story; a kind stands for the whole life of a transaction of that kind."""
    return [
        opening(100, channel=channel),
        reserve(10, 20, owner=owner),
        AcceptVoucher(voucher(200)),
        Renew(H, pico(7), pico(40)),
        Renew(H, pico(9.5), pico(9.5)),  # a fold alone: the kind that may be lost in a power cut
        buffered(30, owner=owner),
        Finish(G, pico(12)),
        Renew(H, pico(40), pico(120)),
        AcceptVoucher(voucher(400)),
        EndStreams(),
        Renew(H, pico(110), pico(300)),
        Finish(H, pico(100.25)),
        IntentKind.SETTLE,
        ObserveChain(chain(1_000, settled=100, block=5)),
        RecordTopUp(Hash32(b"\x0c" * 32), TX, chain(1_500, settled=100, block=6)),
        AcceptVoucher(voucher(1_200)),
        BeginClose("close", voucher(1_200)),
        FixCapture(),
        IntentKind.CLOSE,
        ConfirmClosed(TX, chain(0, block=9)),
    ]


@dataclass
class Teller:
    """A process that tells the story of one channel; it repeats a step whose outcome it does not know."""

    ledger: Ledger
    shop: Shop
    channel: ChannelId
    owner: NodeId
    answered: int = 0
    """The highest voucher that was answered with success."""
    expected: list[Account | None] = field(default_factory=lambda: [None])
    """The account before the step that is being told, and after it."""
    intents: dict[IntentKind, Intent] = field(default_factory=dict)
    """The last state of each transaction that is known to be durable."""

    def __post_init__(self) -> None:
        self.books = Books(self.ledger, clock=self.shop.clock, policy=POLICY)

    async def tell(self, retry: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]) -> None:
        for chapter in commands(self.channel, self.owner):
            if isinstance(chapter, IntentKind):
                for step in self._steps(chapter):
                    await retry(step)
            else:
                before = self.expected[-1]
                self.expected = [before, decide(before, chapter).account]
                await retry(lambda command=chapter: self._apply(command))  # type: ignore[misc]

    async def _apply(self, command: Command) -> None:
        try:
            made = await self.books.apply(self.channel, command)
        except ChannelFault as fault:
            if fault.reason is not Reason.HOLD_FENCED or not isinstance(command, Finish):
                raise
            return  # told again: the bill was settled the first time
        assert made.account == self.expected[-1], "a step and its repeat have one outcome"
        if isinstance(command, AcceptVoucher):
            self.answered = command.voucher.cumulative

    # ------------------------------------------------------------------------------------------------ transactions

    def _steps(self, kind: IntentKind) -> list[Callable[[], Awaitable[None]]]:
        amount = Units(100)
        wish = planned(f"{kind}-{self.channel.hex()}", self.channel, kind, amount, owner=self.owner, now=NOW)
        states = [wish]
        for move in (
            lambda intent: signed(intent, kind.encode(), TX, UnixSeconds(NOW + 20), now=NOW),
            lambda intent: sent(intent, now=NOW),
            lambda intent: mined(intent, 7, now=NOW),
            lambda intent: ended(intent, IntentState.FINAL, now=NOW),
        ):
            states.append(move(states[-1]))
        moves = [lambda pair=pair: self._move(*pair) for pair in pairwise(states)]  # type: ignore[misc]
        return [lambda: self._add(wish), *moves]

    async def _add(self, wish: Intent) -> None:
        try:
            await self.ledger.add_intent(wish)
        except IntentExists:  # told again: it was added the first time
            assert list(await self.ledger.intents(active=True, channel=self.channel)) == [wish]
        self.intents[wish.kind] = wish

    async def _move(self, before: Intent, after: Intent) -> None:
        if not await self.ledger.move_intent(before, after):
            found = await self.ledger.intents(active=False, channel=self.channel)
            assert [intent for intent in found if intent.id == after.id] == [after], "told again: it was moved the first time"
        self.intents[after.kind] = after


async def judge(ledger: Ledger, teller: Teller) -> Account | None:
    """What must hold of the books whatever failed: the step has happened or it has not, and nothing else is different."""
    account = await ledger.load(teller.channel)
    assert account in teller.expected, "a step happened in part"
    journal = await ledger.journal(teller.channel)
    assert reduce(fold, journal, None) == account
    if account is not None:
        check(account)
        assert account.accepted >= teller.answered, "an answered voucher is lost"
        assert account.version == len(journal)
    stored = {intent.kind: intent for intent in await ledger.intents(active=False, channel=teller.channel)}
    for kind, known in teller.intents.items():
        assert stored[kind].version in (known.version, known.version + 1), "a transaction is not where it was left"
        assert (stored[kind].amount, stored[kind].raw or known.raw) == (known.amount, known.raw or stored[kind].raw)
    return account


@pytest.fixture(params=LEDGERS)
async def shop(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Shop]:
    async with open_shop(request.param, tmp_path) as found:
        yield found


@asynccontextmanager
async def opened(shop: Shop) -> AsyncIterator[Ledger]:
    """A store of its own life time: an exclusive one must be gone before the next begins."""
    ledger = shop.make()
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.stop()


def channel_of(n: int) -> ChannelId:
    return ChannelId(n.to_bytes(32, "big"))


@pytest.mark.parametrize("mode", Mode)
async def test_a_process_goes_on_after_any_fault(shop: Shop, mode: Mode) -> None:
    """Whatever operation fails however, the same step told again brings the channel to the very end it would have had."""
    async with opened(shop) as ledger:
        owner = await ledger.join("node")
        n, faulty = 0, Faulty(ledger, fail_at=0, mode=mode)
        while n == 0 or faulty.failed is not None:
            n += 1
            faulty = Faulty(ledger, fail_at=n, mode=mode)
            teller = Teller(faulty, shop, channel_of(n), owner)  # type: ignore[arg-type]

            async def again(step: Callable[[], Awaitable[None]], faulty: Faulty = faulty, teller: Teller = teller) -> None:
                try:
                    await faulty.give_up_on(asyncio.ensure_future(step()))
                except ChannelFault as fault:
                    if fault.reason is not Reason.STORE_UNAVAILABLE:
                        raise
                    await judge(ledger, teller)
                    await step()

            await teller.tell(again)
            account = await judge(ledger, teller)
            assert account == teller.expected[-1]
            assert account is not None
            assert account.close is not None
            assert (account.phase, account.close.capture, account.owed_pico) == (Phase.CLOSED, 112, pico(112.25))
        assert n > OPERATIONS_MIN


class Died(Exception):
    """The process ends here."""


@pytest.mark.parametrize("mode", [Mode.BEFORE, Mode.AFTER])
async def test_a_new_process_recovers_after_any_fault(shop: Shop, mode: Mode) -> None:
    """Killed at any operation, the next process finds the step done or not done, ends what was open and can close."""
    n, failed, told = 0, True, list[Teller]()
    while failed:
        n += 1
        async with opened(shop) as ledger:
            life = Life(ledger, "node", clock=shop.clock, sleep=asyncio.sleep, on_lost=lambda _: None)
            await life.begin()
            if told:
                await recover(ledger, shop, told.pop(), life)
            faulty = Faulty(ledger, fail_at=n, mode=mode)
            told.append(Teller(faulty, shop, channel_of(n), life.id))  # type: ignore[arg-type]

            async def once(step: Callable[[], Awaitable[None]], faulty: Faulty = faulty) -> None:
                try:
                    await faulty.give_up_on(asyncio.ensure_future(step()))
                except ChannelFault as fault:
                    raise Died from fault

            try:
                await told[0].tell(once)
            except Died:
                assert faulty.failed is not None
            failed = faulty.failed is not None
    assert n > OPERATIONS_MIN


async def recover(ledger: Ledger, shop: Shop, teller: Teller, life: Life) -> None:
    """Go on as a node that has just joined: sweep, take up the transaction; then close for what was charged."""
    left = await judge(ledger, teller)
    books = Books(ledger, clock=shop.clock, policy=POLICY)
    await Sweeper(ledger, books, life, ours=lambda _: False).sweep()
    for intent in await ledger.intents(active=True, channel=teller.channel):
        assert await ledger.move_intent(intent, end_of(intent))
    account = await ledger.load(teller.channel)
    if account is None:
        assert left is None
        return
    assert left is not None
    assert not account.holds
    assert (account.owed_pico, account.spent, account.accepted) == (left.owed_pico, left.spent, left.accepted)
    if account.phase is Phase.OPEN:
        await books.apply(teller.channel, BeginClose("recovered", None))
    if account.phase is not Phase.CLOSED:
        fixed = (await books.apply(teller.channel, FixCapture())).account
        assert fixed.close is not None
        assert fixed.close.capture == min(left.spent, left.owed_pico // pico(1))
        await books.apply(teller.channel, ConfirmClosed(TX, chain(0, block=10)))
    closed = await ledger.load(teller.channel)
    assert closed is not None
    assert closed.phase is Phase.CLOSED


def end_of(intent: Intent) -> Intent:
    """What the chain says in the end of a transaction that a crash left behind."""
    if intent.state is IntentState.MINED:
        return ended(intent, IntentState.FINAL, now=NOW)
    return ended(intent, IntentState.DEAD, now=NOW)


async def test_the_faulty_port_fails_once_and_as_it_says() -> None:
    """Before its effect nothing happened, after it all did; every other operation is the port's own."""

    class Port:
        done = 0

        async def act(self) -> int:
            self.done += 1
            for _ in range(9):  # like a port that really waits
                await asyncio.sleep(0)
            return self.done

        def look(self) -> int:
            return self.done

    for mode, effects in ((Mode.BEFORE, 2), (Mode.AFTER, 3), (Mode.HANGS, 2), (Mode.HANGS_AFTER, 3)):
        faulty = Faulty(Port(), fail_at=2, mode=mode)
        assert await faulty.act() == 1
        with pytest.raises(ChannelFault):
            await faulty.give_up_on(asyncio.ensure_future(faulty.act()))
        await faulty.give_up_on(asyncio.ensure_future(faulty.act()))
        assert (faulty.look(), faulty.operations, faulty.failed) == (effects, 3, "act")
