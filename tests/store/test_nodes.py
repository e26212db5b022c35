"""Several stores on the same books, as the nodes and workers of one operator are."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from functools import reduce
from itertools import pairwise

import pytest

from channels.account import fold, plan
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.model import (
    AcceptVoucher,
    Account,
    EndStreams,
    Finish,
    HoldId,
    NodeId,
    ObserveChain,
    ReleaseOrphans,
    Renew,
)
from channels.units import Units
from mppnode.ledger import postgres_wakeup
from mppnode.ledger.base import Budget, BudgetSpent, Grant, Ledger, Which
from tests.store.shops import PATIENCE_S, SHARED, Shop, step, told
from tests.support.builders import CHANNEL, NOW, POLICY, chain, opening, pico, reserve, voucher

pytestmark = pytest.mark.parametrize("shop", SHARED, indirect=True)
ROUNDS = int(os.environ.get("VOUCHER_RACE_ROUNDS", "50"))
OTHER = ChannelId(b"\x02" * 32)


async def pair(shop: Shop) -> tuple[Ledger, Ledger]:
    """Two nodes and an open channel."""
    a, b = await shop.open(), await shop.open()
    await a.transact(CHANNEL, step(opening(100, 10_000)))
    return a, b


async def whole(ledger: Ledger, channel: ChannelId) -> Account:
    """The account, checked against its journal: one entry per version."""
    account, journal = await ledger.load(channel), await ledger.journal(channel)
    assert account is not None
    assert reduce(fold, journal, None) == account
    assert len(journal) == account.version
    return account


# ---------------------------------------------------------------------------------------------------------- serial


async def test_racing_vouchers_end_at_the_highest(shop: Shop) -> None:
    """200 vouchers in random order at two nodes: the highest stands, none is counted twice, answers only rise."""
    a, b = await shop.open(), await shop.open()
    rng = random.Random(ROUNDS)
    for number in range(ROUNDS):
        channel = ChannelId(number.to_bytes(4) * 8)
        await rng.choice((a, b)).transact(channel, step(opening(100, 10_000, channel=channel)))
        amounts = [rng.randrange(101, 400) for _ in range(199)] + [400]
        rng.shuffle(amounts)
        answered: list[tuple[int, int]] = []

        async def send(amount: int, channel: ChannelId = channel, answered: list[tuple[int, int]] = answered) -> None:
            account = (await rng.choice((a, b)).transact(channel, step(AcceptVoucher(voucher(amount))))).account
            answered.append((account.version, account.accepted))

        answers = await asyncio.gather(*(send(amount) for amount in amounts), return_exceptions=True)
        refusals = {answer.reason for answer in answers if isinstance(answer, ChannelFault)}
        assert refusals <= {Reason.VOUCHER_TOO_LOW}
        assert all(answer is None or isinstance(answer, ChannelFault) for answer in answers)
        account = await whole(b, channel)
        assert account.accepted == 400
        assert account == await a.load(channel)
        assert len(set(answered)) == account.version - 1, "every accepted amount is one entry"
        assert sorted(answered, key=lambda pair: pair[1]) == sorted(answered)


async def test_racing_openings_make_one_channel(shop: Shop) -> None:
    """Nodes that are shown the same opening at the same moment agree on one account."""
    nodes = [await shop.open() for _ in range(3)]
    for number in range(10):
        channel = ChannelId(bytes([number]) * 32)
        answers = await asyncio.gather(*(node.transact(channel, step(opening(channel=channel))) for node in nodes))
        assert sum(not answer.result.replayed for answer in answers) == 1
        assert len({answer.account.version for answer in answers}) == 1
        await whole(nodes[0], channel)


async def test_racing_holds_never_exceed_the_voucher(shop: Shop) -> None:
    """Fifty requests at two nodes share 30 units: thirty of them get one each."""
    policy = type(POLICY)(holds_max=50)
    a, b = await pair(shop)
    wishes = [reserve(1, hold=f"h{n}", ticket=f"t{n}", preempt=False, stream=False) for n in range(50)]
    await a.transact(OTHER, step(opening(30, 1_000, channel=OTHER)))
    asked = [(a, b)[n % 2].transact(OTHER, step(wish, policy)) for n, wish in enumerate(wishes)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, ChannelFault)]
    assert {fault.reason for fault in refused} == {Reason.INSUFFICIENT_BALANCE}
    account = await whole(b, OTHER)
    assert (len(account.holds), account.headroom_pico, len(refused)) == (30, 0, 20)


async def test_many_channels_at_once_do_not_lock_each_other_out(shop: Shop) -> None:
    """Two nodes with the same forty channels, each in its own order, get every step through."""
    a, b = await shop.open(), await shop.open()
    channels = [ChannelId(bytes([n]) * 32) for n in range(40)]
    await asyncio.gather(*(a.transact(channel, step(opening(100, 10_000, channel=channel))) for channel in channels))

    def advance(account: Account | None) -> object:
        assert account is not None
        return plan(account, AcceptVoucher(voucher(account.accepted + 1)), now=NOW, policy=POLICY)

    for _ in range(5):
        work = [node.transact(channel, advance) for node, order in ((a, 1), (b, -1)) for channel in channels[::order]]  # type: ignore[arg-type]
        await asyncio.wait_for(asyncio.gather(*work), PATIENCE_S)
    for channel in channels:
        assert (await whole(a, channel)).accepted == 110


async def test_a_step_sees_what_another_node_committed(shop: Shop) -> None:
    """What a node remembers of an account is never what it decides on."""
    a, b = await pair(shop)
    for amount in range(101, 121):
        node, other = (a, b) if amount % 2 else (b, a)
        await node.transact(CHANNEL, step(AcceptVoucher(voucher(amount))))
        with pytest.raises(ChannelFault) as caught:
            await other.transact(CHANNEL, step(AcceptVoucher(voucher(amount - 1))))
        assert caught.value.numbers["accepted"] == amount
    await whole(a, CHANNEL)


async def test_a_released_hold_is_fenced_for_its_owner(shop: Shop) -> None:
    """A node that was taken for dead finds its hold gone: it can charge nothing more, not even by a relaxed fold."""
    a, b = await pair(shop)
    sleeper = await a.join("a")
    await a.transact(CHANNEL, step(reserve(50, owner=sleeper)))
    await a.transact(CHANNEL, step(Renew(HoldId("h"), pico(7), pico(40))))
    await shop.pass_time(16)
    assert sleeper not in await b.living()
    released = (await b.transact(CHANNEL, step(ReleaseOrphans(sleeper)))).account
    assert (dict(released.holds), released.spent) == ({}, 7)
    for command in (Renew(HoldId("h"), pico(9), pico(9)), Finish(HoldId("h"), pico(20))):
        for relaxed in (True, False):
            with pytest.raises(ChannelFault) as caught:
                await a.transact(CHANNEL, step(command), relaxed=relaxed)
            assert caught.value.reason is Reason.HOLD_FENCED
    assert not await a.beat(sleeper)
    assert await whole(a, CHANNEL) == released


async def test_nodes_share_one_budget(shop: Shop) -> None:
    """Grants that race on two nodes stay within what both may spend together."""
    a, b = await shop.open(), await shop.open()
    for number in range(8):
        budget = Budget(grants_per_sender=9, total=Units(10 * (number + 1)))
        wishes = [
            Grant(Hash32(bytes([number, n]) * 16), Address(bytes([number, n]) * 10), Units(10), UnixSeconds(NOW))
            for n in range(2)
        ]
        asked = (node.grant(wish, budget) for node, wish in zip((a, b), wishes, strict=True))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers if answer is not True] == [BudgetSpent]


async def test_a_newcomer_is_never_taken_for_dead(shop: Shop) -> None:
    """Whoever reads accounts first and lives second finds the owner of every hold it has read, however they race."""
    a, b = await shop.open(), await shop.open()
    channels = [ChannelId(bytes([n]) * 32) for n in range(30)]
    for channel in channels:
        await a.transact(channel, step(opening(channel=channel)))

    async def arrive(channel: ChannelId, number: int) -> None:
        owner = await a.join(f"node-{number}")
        await a.transact(channel, step(reserve(5, owner=owner)))

    async def sweep() -> None:
        for _ in range(15):
            seen = {hold.owner for account in await b.page(Which.HELD) for hold in account.holds.values()}
            assert seen <= await b.living()

    await asyncio.gather(sweep(), *(arrive(channel, number) for number, channel in enumerate(channels)))


# ------------------------------------------------------------------------------------------------------------- news


def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints are lost."""
    monkeypatch.setattr(postgres_wakeup.Wakeup, "_heard", lambda *_: None)


def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks without a hint."""
    for name in ("_EASE_S", "_INTERVAL_MAX_S"):
        monkeypatch.setattr(postgres_wakeup, name, 3_600.0)


@pytest.mark.parametrize("broken", [silent, patient], ids=["by polling", "by hints"])
async def test_what_another_node_commits_is_told(shop: Shop, broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream waits on one node and its voucher comes in at another: either way of hearing of it is enough alone."""
    broken(monkeypatch)
    a, b = await pair(shop)
    heard: list[Account] = []
    b.subscribe(heard.append)
    b.follow(lambda: {CHANNEL})
    await told(lambda: len(heard) == 1)  # new interest is looked up at once
    for amount in range(101, 106):
        made = await a.transact(CHANNEL, step(AcceptVoucher(voucher(amount))))
        await told(lambda made=made: heard[-1] == made.account)  # type: ignore[misc]
    assert [account.version for account in heard] == sorted({account.version for account in heard})


async def test_many_changes_at_once_are_all_told(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hundred channels change in one moment: more than one hint can carry, and none is missed."""
    patient(monkeypatch)
    a, b = await shop.open(), await shop.open()
    channels = [ChannelId(number.to_bytes(4) * 8) for number in range(300)]
    await asyncio.gather(*(a.transact(channel, step(opening(channel=channel))) for channel in channels))
    heard: dict[ChannelId, int] = {}
    b.subscribe(lambda account: heard.update({account.id: account.accepted}))
    b.follow(lambda: channels)
    await told(lambda: len(heard) == 300)
    await asyncio.gather(*(a.transact(channel, step(AcceptVoucher(voucher(200)))) for channel in channels))
    await told(lambda: set(heard.values()) == {200})


async def test_a_broken_row_does_not_silence_the_others(shop: Shop) -> None:
    """Somebody follows a channel whose row was damaged: the news of other channels still come."""
    a, b = await pair(shop)
    await a.transact(OTHER, step(opening(channel=OTHER)))
    await shop.sql(f"UPDATE channel SET holds = 'no JSON' WHERE id = {shop.literal(OTHER)}")
    heard: list[tuple[ChannelId, int]] = []
    b.subscribe(lambda account: heard.append((account.id, account.accepted)))
    b.follow(lambda: [CHANNEL, OTHER])
    await told(lambda: heard == [(CHANNEL, 100)])
    await a.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
    await told(lambda: heard == [(CHANNEL, 100), (CHANNEL, 200)])


async def test_only_what_is_followed_is_told(shop: Shop) -> None:
    """A node hears of its own commits and of others' on channels that somebody waits for."""
    a, b = await pair(shop)
    await a.transact(OTHER, step(opening(channel=OTHER)))
    heard: list[ChannelId] = []
    interest = {CHANNEL}
    b.subscribe(lambda account: heard.append(account.id))
    b.follow(lambda: interest)
    await told(lambda: heard == [CHANNEL])
    await a.transact(OTHER, step(AcceptVoucher(voucher(200))))
    await a.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
    await told(lambda: len(heard) == 2)
    assert heard == [CHANNEL, CHANNEL]
    interest = {OTHER}
    await told(lambda: len(heard) == 3)
    assert heard[-1] == OTHER
    assert (await a.load(OTHER)) == await b.load(OTHER)


async def test_news_never_comes_twice_or_out_of_order(shop: Shop) -> None:
    """Both nodes commit to one channel and follow it: each hears rising versions, and in the end the last one."""
    a, b = await pair(shop)
    heard: dict[str, list[int]] = {"a": [], "b": []}
    for name, node in (("a", a), ("b", b)):
        node.subscribe(lambda account, name=name: heard[name].append(account.version))  # type: ignore[misc]
        node.follow(lambda: [CHANNEL])

    def advance(account: Account | None) -> object:
        assert account is not None
        return plan(account, AcceptVoucher(voucher(account.accepted + 1)), now=NOW, policy=POLICY)

    for _ in range(40):
        await asyncio.gather(*(node.transact(CHANNEL, advance) for node in (a, b)))  # type: ignore[arg-type]
    await told(lambda: heard["a"][-1] == heard["b"][-1] == 81)
    for versions in heard.values():
        assert all(x < y for x, y in pairwise(versions))
    await whole(a, CHANNEL)


async def test_a_voucher_is_heard_of_behind_our_own_relaxed_commit(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that looks at the chain right after a voucher came in elsewhere must not hide it from its own stream."""
    a, b = await pair(shop)
    heard: list[Account] = []
    b.subscribe(heard.append)
    await b.transact(CHANNEL, step(reserve(50)))
    await a.transact(CHANNEL, step(AcceptVoucher(voucher(500))))
    look = ObserveChain(chain(10_000, block=9))
    made = await b.transact(CHANNEL, step(look), relaxed=True)
    assert made.account.accepted == 500
    assert heard[-1].accepted == 100
    b.follow(lambda: [CHANNEL])
    await told(lambda: heard[-1] == made.account)


async def test_folds_of_our_own_are_not_news(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relaxed folds stay relaxed while somebody follows the channel: looking for news does not sync each of them."""
    silent(monkeypatch)  # so that the look that finds the other channel is one at all of them
    a, b = await pair(shop)
    await b.transact(OTHER, step(opening(channel=OTHER)))
    heard: list[tuple[ChannelId, int]] = []
    a.subscribe(lambda account: heard.append((account.id, account.version)))
    a.follow(lambda: [CHANNEL, OTHER])
    await told(lambda: (OTHER, 1) in heard)
    await a.transact(CHANNEL, step(reserve(50)))
    for n in (10, 20):
        await a.transact(CHANNEL, step(Renew(HoldId("h"), pico(n), pico(n))), relaxed=True)
    await b.transact(OTHER, step(AcceptVoucher(voucher(200))))
    await told(lambda: (OTHER, 2) in heard)
    assert [version for channel, version in heard if channel == CHANNEL][-1] == 2
    assert sorted(await shop.sql("SELECT soft, version FROM channel")) == [(0, 2), (1, 4)]


async def test_an_owner_elsewhere_is_asked_to_end_its_stream(shop: Shop) -> None:
    """The wish to end a stream reaches the node that runs it, which bills it exactly."""
    a, b = await pair(shop)
    owner = NodeId("a")
    await a.transact(CHANNEL, step(reserve(50, owner=owner)))
    ended = asyncio.Event()

    def on_commit(account: Account) -> None:
        if any(hold.ending for hold in account.holds.values()):
            ended.set()

    a.subscribe(on_commit)
    a.follow(lambda: [CHANNEL])
    await b.transact(CHANNEL, step(EndStreams()))
    await asyncio.wait_for(ended.wait(), PATIENCE_S)
    with pytest.raises(ChannelFault) as caught:
        await b.transact(CHANNEL, step(reserve(5, hold="g", ticket="u", preempt=False)))
    assert caught.value.reason is Reason.CHANNEL_BUSY
    await a.transact(CHANNEL, step(Finish(HoldId("h"), pico(13))))
    account = (await b.transact(CHANNEL, step(reserve(5, hold="g", ticket="u", preempt=False)))).account
    assert (account.spent, list(account.holds)) == (13, ["g"])


async def test_stores_may_start_together_on_nothing(shop: Shop) -> None:
    """Workers start at the same moment: one makes the tables, the others wait for them."""
    nodes = [shop.make() for _ in range(5)]
    await asyncio.gather(*(node.start() for node in nodes))
    try:
        await nodes[0].transact(CHANNEL, step(opening()))
        assert len({repr(await node.load(CHANNEL)) for node in nodes}) == 1
    finally:
        await asyncio.gather(*(node.stop() for node in nodes))
