"""What a ledger promises beyond accounts: pages, lives, leads, intents and sponsored gas, asked of each of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.intent import Intent, IntentKind, IntentState, adopted, ended, mined, planned, sent, signed
from channels.model import AcceptVoucher, BeginClose, ConfirmClosed, Finish, FixCapture, HoldId, NodeId, Renew
from channels.units import MAX_UINT96, Units
from mppnode.ledger.base import GRACE_S, LEASE_S, Budget, BudgetSpent, Grant, IntentExists, Ledger, Which
from mppnode.ledger.rows import BrokenRow
from tests.store.shops import LEDGERS, Shop, step
from tests.support.builders import CHANNEL, NOW, TX, chain, opening, pico, reserve, voucher

pytestmark = pytest.mark.parametrize("shop", LEDGERS, indirect=True)


def channel(n: int) -> ChannelId:
    return ChannelId(bytes([n]) * 32)


# ------------------------------------------------------------------------------------------------------------ pages


async def fill(ledger: Ledger) -> None:
    """Ten channels; 3 and 7 have a hold, 5 is closed."""
    for n in range(10):
        await ledger.transact(channel(n), step(opening(channel=channel(n))))
    for n in (3, 7):
        await ledger.transact(channel(n), step(reserve(10)))
    for command in (BeginClose("c", voucher(100)), FixCapture(), ConfirmClosed(TX, chain(0, block=3))):
        await ledger.transact(channel(5), step(command))


@pytest.mark.parametrize("which", Which)
async def test_pages_cover_every_account_once(shop: Shop, which: Which) -> None:
    """Whatever the size of a page, following the last id lists every wanted account, in order, once."""
    ledger = await shop.open()
    await fill(ledger)
    wanted = {Which.ALL: range(10), Which.NOT_CLOSED: [0, 1, 2, 3, 4, 6, 7, 8, 9], Which.HELD: [3, 7]}[which]
    for limit in (1, 3, 200):
        listed: list[int] = []
        after = None
        while page := await ledger.page(which, after=after, limit=limit):
            assert len(page) <= limit
            assert [await ledger.load(account.id) for account in page] == list(page)
            listed += [account.id[0] for account in page]
            after = page[-1].id
        assert listed == list(wanted)


async def test_a_hold_that_ended_leaves_its_page(shop: Shop) -> None:
    """The list of held accounts follows the holds."""
    ledger = await shop.open()
    await fill(ledger)
    await ledger.transact(channel(3), step(Finish(HoldId("h"), pico(4))))
    await ledger.transact(channel(8), step(reserve(10)))
    assert [account.id[0] for account in await ledger.page(Which.HELD)] == [7, 8]


@pytest.mark.parametrize("damage", ["holds = 'no JSON'", "holds = '{\"h\": [1]}'", "ladder = '[]'", "chain = '[\"-1\",\"0\",null,1]'"])
async def test_a_broken_row_stops_its_channel_alone(shop: Shop, damage: str) -> None:
    """Lists go on without it and report it, whoever asks for it gets the error, and the node lives."""
    ledger = await shop.open()
    await fill(ledger)
    await ledger.stop()
    await shop.sql(f"UPDATE channel SET {damage} WHERE id = {shop.literal(channel(3))}")
    reported: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    later = await shop.open()
    assert [account.id[0] for account in await later.page(Which.HELD)] == [7]
    assert len(await later.accounts()) == 9
    assert len(reported) == 2
    assert all(isinstance(error, BrokenRow) and "0x0303" in str(error) for error in reported)
    for asked in (later.load(channel(3)), later.transact(channel(3), step(AcceptVoucher(voucher(200))))):
        with pytest.raises(BrokenRow):
            await asked
    assert (await later.transact(channel(7), step(AcceptVoucher(voucher(200))))).account.accepted == 200


async def test_pages_use_the_indexes_made_for_them(shop: Shop) -> None:
    """Looking for a few live channels does not read all that ever were."""
    ledger = await shop.open()
    await fill(ledger)
    for index, condition in (("channel_live", "live = 1"), ("channel_unclosed", "phase <> 'closed'")):
        start = shop.literal(b"")
        plan = await shop.explain(f"SELECT ladder FROM channel WHERE {condition} AND id > {start} ORDER BY id LIMIT 5")
        assert index in plan


# ------------------------------------------------------------------------------------------------------------ soft


@pytest.mark.parametrize("asked", ["load", "replay", "refusal", "page"])
async def test_nothing_is_shown_that_a_power_cut_takes_back(shop: Shop, asked: str) -> None:
    """A relaxed commit marks its row; the first firm answer made from it writes the row firmly, whatever it says."""
    ledger = await shop.open()
    for command in (opening(), reserve(50)):
        await ledger.transact(CHANNEL, step(command))
    fold = step(Renew(HoldId("h"), pico(20), pico(20)))
    soft = "SELECT soft FROM channel"
    assert await shop.sql(soft) == [(0,)]
    made = await ledger.transact(CHANNEL, fold, relaxed=True)
    assert await shop.sql(soft) == [(1,)]
    await ledger.transact(CHANNEL, fold, relaxed=True)
    assert await shop.sql(soft) == [(1,)], "another relaxed step may be answered from it"
    if asked == "load":
        assert await ledger.load(CHANNEL) == made.account
    elif asked == "replay":
        assert (await ledger.transact(CHANNEL, fold)).result.replayed
    elif asked == "refusal":
        with pytest.raises(ChannelFault):
            await ledger.transact(CHANNEL, step(AcceptVoucher(voucher(1))))
    else:
        assert list(await ledger.page(Which.HELD)) == [made.account]
    assert await shop.sql(soft) == [(0,)]


async def test_an_answer_that_writes_nothing_makes_nothing_firm(shop: Shop) -> None:
    """A commit without a write syncs nothing, so what was soft before it is neither told nor believed to be on disk."""
    ledger = await shop.open()
    for command in (opening(), reserve(50)):
        await ledger.transact(CHANNEL, step(command))
    await ledger.transact(CHANNEL, step(Renew(HoldId("h"), pico(20), pico(20))), relaxed=True)
    heard: list[int] = []
    ledger.subscribe(lambda account: heard.append(account.version))
    assert await ledger.load(channel(9)) is None
    with pytest.raises(ChannelFault):
        await ledger.transact(channel(9), step(AcceptVoucher(voucher(1))))
    assert heard == []
    await ledger.load(CHANNEL)
    assert heard == [3]
    assert await shop.sql("SELECT soft FROM channel") == [(0,)]


async def test_what_another_life_left_soft_is_made_firm(shop: Shop) -> None:
    """The mark is in the row, so a store that did not make the relaxed commit knows of it too."""
    ledger = await shop.open()
    for command in (opening(), reserve(50)):
        await ledger.transact(CHANNEL, step(command))
    made = await ledger.transact(CHANNEL, step(Renew(HoldId("h"), pico(20), pico(20))), relaxed=True)
    await ledger.stop()
    assert await shop.sql("SELECT soft FROM channel") == [(1,)]
    later = await shop.open()
    assert await later.load(CHANNEL) == made.account
    assert await shop.sql("SELECT soft FROM channel") == [(0,)]


# ------------------------------------------------------------------------------------------------------------ lives


async def test_a_life_ends_when_nobody_has_heard_of_it(shop: Shop) -> None:
    """A lease may be late by the grace; after that the life is over for ever."""
    ledger = await shop.open()
    a, b = await ledger.join("a"), await ledger.join("b")
    assert await ledger.living() == {a, b}
    await shop.pass_time(int(LEASE_S + GRACE_S) - 2)
    assert await ledger.beat(a), "late, but nobody has fenced it"
    await shop.pass_time(3)
    assert await ledger.living() == {a}
    assert not await ledger.beat(b)
    assert await ledger.beat(a)
    assert await ledger.living() == {a}


async def test_a_name_is_one_process(shop: Shop) -> None:
    """Whoever starts under a name ends the life that had it, and every life is a new one."""
    ledger = await shop.open()
    first = await ledger.join("worker-1")
    second = await ledger.join("worker-1")
    other = await ledger.join("worker-2")
    assert len({first, second, other}) == 3
    assert await ledger.living() == {second, other}
    assert not await ledger.beat(first)
    assert await ledger.beat(second)


async def test_leaving_ends_a_life_and_its_jobs(shop: Shop) -> None:
    """A process that stops properly is not waited for."""
    ledger = await shop.open()
    a, b = await ledger.join("a"), await ledger.join("b")
    assert await ledger.lead("settle", a)
    assert not await ledger.lead("settle", b)
    await ledger.leave(a)
    assert await ledger.living() == {b}
    assert not await ledger.beat(a)
    assert await ledger.lead("settle", b)


async def test_a_job_has_one_leader_for_a_lease(shop: Shop) -> None:
    """The leader stays it by asking again; others wait until its term has run out. Jobs are apart."""
    ledger = await shop.open()
    a, b = await ledger.join("a"), await ledger.join("b")
    answers = await asyncio.gather(*(ledger.lead("watch", node) for node in (a, b, a, b)))
    assert sorted(answers) == [False, False, True, True]
    leader, follower = (a, b) if answers[0] else (b, a)
    assert await ledger.lead("settle", follower)
    await shop.pass_time(8)
    assert await ledger.lead("watch", leader)
    await shop.pass_time(8)
    assert not await ledger.lead("watch", follower)
    await shop.pass_time(8)
    assert await ledger.lead("watch", follower)
    assert not await ledger.lead("watch", leader)
    successor = await ledger.join("b" if follower == b else "a")
    assert await ledger.lead("watch", successor), "the leader's life has ended"


# ---------------------------------------------------------------------------------------------------------- intents


def wish(name: str, n: int = 1, amount: int = 7) -> Intent:
    return planned(name, channel(n), IntentKind.SETTLE, Units(amount), owner=NodeId("a"), now=NOW)


async def test_a_channel_has_one_active_intent(shop: Shop) -> None:
    """Of intents that race on a channel one gets in; when it has ended the next one does."""
    ledger = await shop.open()
    racing = [wish(str(n)) for n in range(6)]
    answers = await asyncio.gather(*(ledger.add_intent(intent) for intent in racing), return_exceptions=True)
    assert sum(answer is None for answer in answers) == 1
    assert sum(isinstance(answer, IntentExists) for answer in answers) == 5
    (found,) = await ledger.intents(active=True)
    assert found in racing
    await ledger.add_intent(wish("elsewhere", n=2))
    dead = ended(found, IntentState.DEAD, now=NOW)
    assert await ledger.move_intent(found, dead)
    await ledger.add_intent(wish("next"))
    assert [intent.id for intent in await ledger.intents(active=True)] == ["elsewhere", "next"]
    assert list(await ledger.intents(active=False, channel=channel(1))) == [dead, wish("next")]
    assert list(await ledger.intents(active=True, channel=channel(3))) == []
    with pytest.raises(IntentExists):
        await ledger.add_intent(wish("elsewhere", n=9))


async def test_an_intent_is_moved_by_one_only(shop: Shop) -> None:
    """Every step compares with what its mover saw: of two nodes one has to look again."""
    ledger = await shop.open()
    start = replace(wish("i", amount=MAX_UINT96), deadline=UnixSeconds(2**66))
    await ledger.add_intent(start)
    steps = [signed(start, bytes([n]) * 90, Hash32(bytes([n]) * 32), UnixSeconds(NOW + 25), now=NOW) for n in (1, 2)]
    answers = await asyncio.gather(*(ledger.move_intent(start, after) for after in steps))
    assert sorted(answers) == [False, True]
    (now,) = await ledger.intents(active=True)
    assert now == steps[answers.index(True)]
    on_its_way = sent(now, now=NOW)
    assert await ledger.move_intent(now, on_its_way)
    assert not await ledger.move_intent(now, adopted(now, NodeId("b"), now=NOW))
    taken = adopted(on_its_way, NodeId("b"), now=NOW)
    in_block = mined(taken, 2**70, now=NOW)
    assert await ledger.move_intent(on_its_way, taken)
    assert await ledger.move_intent(taken, in_block)
    assert list(await ledger.intents(active=True, channel=channel(1))) == [in_block]
    assert not await ledger.move_intent(wish("unknown"), replace(in_block, id="unknown"))


async def test_the_newest_intents_come_last(shop: Shop) -> None:
    """A limit keeps the newest, in the order they were made."""
    ledger = await shop.open()
    for n in range(1, 6):
        await ledger.add_intent(wish(f"i{n}", n=n))
    assert [intent.id for intent in await ledger.intents(active=True, limit=3)] == ["i3", "i4", "i5"]


async def test_intents_survive_the_process(shop: Shop) -> None:
    """What was signed is there, byte for byte, for the next process."""
    ledger = await shop.open()
    start = wish("i")
    made = signed(start, bytes(range(256)), Hash32(b"\x99" * 32), UnixSeconds(NOW + 25), now=NOW)
    await ledger.add_intent(start)
    assert await ledger.move_intent(start, made)
    await ledger.stop()
    assert list(await (await shop.open()).intents(active=True)) == [made]


# ----------------------------------------------------------------------------------------------------------- grants


def gas(n: int, fee: int = 10, sender: int = 1) -> Grant:
    return Grant(Hash32(bytes([n]) * 32), Address(bytes([sender]) * 20), Units(fee), UnixSeconds(NOW + n))


async def test_racing_grants_stay_within_the_budget(shop: Shop) -> None:
    """Ten wishes at once, money for three: three are granted, and a repeat of one of them is recognised."""
    ledger = await shop.open()
    budget = Budget(grants_per_sender=99, total=Units(35))
    answers = await asyncio.gather(*(ledger.grant(gas(n), budget) for n in range(10)), return_exceptions=True)
    assert sum(answer is True for answer in answers) == 3
    refused = [answer for answer in answers if isinstance(answer, BudgetSpent)]
    assert len(refused) == 7
    assert all(error.total for error in refused)
    granted = [n for n in range(10) if answers[n] is True]
    assert await ledger.grant(gas(granted[0]), budget) is False
    assert {grant.tx_hash[0] for grant in await ledger.open_grants()} == set(granted)


async def test_a_sender_has_a_share_of_the_hour(shop: Shop) -> None:
    """One sender's grants do not use up what others may ask for, and an hour later the count begins again."""
    ledger = await shop.open()
    budget = Budget(grants_per_sender=2, total=Units(1_000))
    assert await ledger.grant(gas(1), budget)
    assert await ledger.grant(gas(2), budget)
    with pytest.raises(BudgetSpent) as caught:
        await ledger.grant(gas(3), budget)
    assert not caught.value.total
    assert await ledger.grant(gas(4, sender=2), budget)
    await shop.pass_time(3_601)
    assert await ledger.grant(gas(3), budget)


async def test_the_budget_counts_what_was_really_paid(shop: Shop) -> None:
    """A settled grant makes room for what it did not cost; one that never was included makes room for all."""
    ledger = await shop.open()
    budget = Budget(grants_per_sender=99, total=Units(30))
    for n in (1, 2, 3):
        assert await ledger.grant(gas(n), budget)
    with pytest.raises(BudgetSpent):
        await ledger.grant(gas(4, fee=15), budget)
    await ledger.settle_grant(gas(1).tx_hash, Units(0))
    await ledger.settle_grant(gas(2).tx_hash, Units(5))
    assert list(await ledger.open_grants()) == [gas(3)]
    with pytest.raises(BudgetSpent):
        await ledger.grant(gas(4, fee=16), budget)
    assert await ledger.grant(gas(4, fee=15), budget)
    assert [grant.tx_hash[0] for grant in await ledger.open_grants()] == [3, 4]
    assert list(await ledger.open_grants(limit=1)) == [gas(3)]
    assert await ledger.grant(gas(1), budget) is False, "settled is still granted"


async def test_the_largest_fees_survive(shop: Shop) -> None:
    """Sums beyond 64 bits are compared as what they are."""
    ledger = await shop.open()
    budget = Budget(grants_per_sender=99, total=Units(MAX_UINT96))
    assert await ledger.grant(gas(1, fee=MAX_UINT96 - 1), budget)
    with pytest.raises(BudgetSpent):
        await ledger.grant(gas(2, fee=2), budget)
    assert await ledger.grant(gas(2, fee=1), budget)
    await ledger.settle_grant(gas(1).tx_hash, Units(MAX_UINT96))
    assert list(await ledger.open_grants()) == [gas(2, fee=1)]


# ------------------------------------------------------------------------------------------------------ life cycle


async def test_a_stopped_ledger_answers_nothing(shop: Shop) -> None:
    """After the end every question is refused at once, whatever it is about."""
    ledger = await shop.open()
    await ledger.transact(CHANNEL, step(opening()))
    await ledger.stop()
    asked = [
        ledger.load(CHANNEL),
        ledger.transact(CHANNEL, step(AcceptVoucher(voucher(200)))),
        ledger.page(Which.ALL),
        ledger.journal(CHANNEL),
        ledger.join("a"),
        ledger.living(),
        ledger.intents(active=True),
        ledger.grant(gas(1), Budget(1, Units(1))),
    ]
    for answer in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(answer, ChannelFault)
        assert answer.reason is Reason.STORE_UNAVAILABLE
