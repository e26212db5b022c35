"""What every store of accounts promises, asked of each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest

from channels.account import fold, plan
from channels.descriptor import ChainSnapshot
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.model import AcceptVoucher, Account, Finish, HoldId, Outcome, Plan, Renew, VoucherAccepted
from channels.policy import Policy
from channels.store import ChannelStore, Step
from channels.testing.memory_store import MemoryStore
from channels.units import MAX_UINT96, PICO_PER_UNIT, Pico, Units
from tests.store.shops import LEDGERS, open_shop, step
from tests.support.builders import CHANNEL, NOW, chain, opening, pico, reserve, voucher

OTHER = ChannelId(b"\x01" * 32)


@pytest.fixture(params=["memory", *LEDGERS])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ChannelStore]:
    if request.param == "memory":
        yield MemoryStore()
        return
    async with open_shop(request.param, tmp_path) as shop:
        yield await shop.open()


async def folded(store: ChannelStore, channel: ChannelId = CHANNEL) -> Account | None:
    return reduce(fold, await store.journal(channel), None)


async def test_a_channel_nobody_opened_is_none(store: ChannelStore) -> None:
    """No such channel is an answer, not an error."""
    assert await store.load(CHANNEL) is None
    assert list(await store.accounts()) == []
    assert list(await store.journal(CHANNEL)) == []


async def test_journal_and_account_are_committed_together(store: ChannelStore) -> None:
    """After every step the journal folds to the account, entry by entry."""
    hold = HoldId("h")
    commands = [opening(), AcceptVoucher(voucher(300)), reserve(50), Renew(hold, pico(20), pico(90)), Finish(hold, pico(33.5))]
    for command in commands:
        made = await store.transact(CHANNEL, step(command))
        assert await store.load(CHANNEL) == made.account == await folded(store)
        assert len(await store.journal(CHANNEL)) == made.account.version


async def test_fifty_concurrent_steps_are_serial(store: ChannelStore) -> None:
    """Each step sees what the one before it committed: fifty reservations share the money and none is lost."""
    policy = Policy(holds_max=50)
    await store.transact(CHANNEL, step(opening(49, 1_000)))
    seen: list[int] = []

    def taking(n: int) -> Step[Outcome]:
        def run(account: Account | None) -> Plan[Outcome]:
            assert account is not None
            made = plan(account, reserve(1, hold=f"h{n}", ticket=f"t{n}", preempt=False, stream=False), now=NOW, policy=policy)
            seen.append(made.account.version)
            return made

        return run

    answers = await asyncio.gather(*(store.transact(CHANNEL, taking(n)) for n in range(50)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, ChannelFault)]
    assert [fault.reason for fault in refused] == [Reason.INSUFFICIENT_BALANCE], "49 units, 50 wishes"
    account = await store.load(CHANNEL)
    assert account is not None
    assert (len(account.holds), account.headroom_pico) == (49, 0)
    assert sorted(set(seen)) == list(range(2, 51)), "every version was made by one step"
    assert await folded(store) == account


async def test_channels_do_not_disturb_each_other(store: ChannelStore) -> None:
    """Concurrent steps on two channels, one of them refusing, end as if each were alone."""
    await store.transact(CHANNEL, step(opening()))
    await store.transact(OTHER, step(opening(channel=OTHER)))
    answers = await asyncio.gather(
        store.transact(CHANNEL, step(AcceptVoucher(voucher(200)))),
        store.transact(OTHER, step(AcceptVoucher(voucher(9_999)))),
        store.transact(CHANNEL, step(AcceptVoucher(voucher(300)))),
        store.transact(OTHER, step(AcceptVoucher(voucher(150)))),
        return_exceptions=True,
    )
    assert isinstance(answers[1], ChannelFault)
    first, second = await store.load(CHANNEL), await store.load(OTHER)
    assert first is not None
    assert second is not None
    assert (first.accepted, second.accepted) == (300, 150)


async def test_subscribers_hear_every_commit_in_order_and_before_the_asker(store: ChannelStore) -> None:
    """What a listener is told is durable, complete and in the order of the versions."""
    heard: list[int] = []
    store.subscribe(lambda account: heard.append(account.version))
    at_answer: list[tuple[int, int]] = []

    async def ask(command: object) -> None:
        made = await store.transact(CHANNEL, step(command))
        at_answer.append((made.account.version, max(heard)))

    await ask(opening())
    await asyncio.gather(*(ask(AcceptVoucher(voucher(100 + n))) for n in range(1, 20)))
    assert heard == list(range(1, 21))
    assert all(told >= version for version, told in at_answer)


async def test_a_replay_writes_and_tells_nothing(store: ChannelStore) -> None:
    """A plan without events is an answer only."""
    await store.transact(CHANNEL, step(opening()))
    heard: list[Account] = []
    store.subscribe(heard.append)
    made = await store.transact(CHANNEL, step(AcceptVoucher(voucher(100))))
    assert made.result.replayed
    assert heard == []
    assert len(await store.journal(CHANNEL)) == 1


@pytest.mark.parametrize("error", [ChannelFault(Reason.RATE_LIMITED), ValueError("a bug"), AssertionError("a broken law")])
async def test_a_step_that_raises_changes_nothing(store: ChannelStore, error: Exception) -> None:
    """Whatever a step raises reaches its asker, and neither the account nor anybody else notices."""
    await store.transact(CHANNEL, step(opening()))
    before, journal = await store.load(CHANNEL), list(await store.journal(CHANNEL))

    def fail(_: Account | None) -> Plan[Outcome]:
        raise error

    failed, good = await asyncio.gather(
        store.transact(CHANNEL, fail), store.transact(OTHER, step(opening(channel=OTHER))), return_exceptions=True
    )
    assert failed is error
    assert isinstance(good, Plan)
    assert await store.load(CHANNEL) == before
    assert list(await store.journal(CHANNEL)) == journal


async def test_an_account_that_breaks_a_law_is_not_written(store: ChannelStore) -> None:
    """A plan that would charge beyond the voucher is refused by the store itself."""
    await store.transact(CHANNEL, step(opening()))
    before = await store.load(CHANNEL)

    def overcharge(account: Account | None) -> Plan[Outcome]:
        assert account is not None
        wrong = replace(account, owed_pico=101 * PICO_PER_UNIT, version=account.version + 1)
        return Plan(wrong, (VoucherAccepted(account.ladder),), Outcome())

    with pytest.raises(AssertionError):
        await store.transact(CHANNEL, overcharge)
    assert await store.load(CHANNEL) == before


async def test_the_largest_amounts_survive(store: ChannelStore) -> None:
    """uint96 units, their pico, and block numbers beyond 64 bits come back as they went in."""
    top, block = MAX_UINT96, 2**63
    there = ChainSnapshot(Units(top), Units(0), None, block)
    await store.transact(CHANNEL, step(opening(top, on_chain=there)))
    most = Pico(top * PICO_PER_UNIT)
    await store.transact(CHANNEL, step(reserve(1, top)))
    account = (await store.transact(CHANNEL, step(Renew(HoldId("h"), most, most)))).account
    assert (account.spent, account.owed_pico, account.chain.block) == (top, most, block)
    assert await folded(store) == account


async def test_accounts_are_listed_whole_and_in_a_fixed_order(store: ChannelStore) -> None:
    """The same books give the same list."""
    ids = [ChannelId(bytes([n]) * 32) for n in (9, 2, 5)]
    for channel in ids:
        await store.transact(channel, step(opening(channel=channel, on_chain=chain(1_000))))
    listed = await store.accounts()
    assert [account.id for account in listed] == sorted(ids)
    assert list(listed) == [await store.load(channel) for channel in sorted(ids)]


async def test_a_cancelled_asker_loses_only_its_answer(store: ChannelStore) -> None:
    """What was committed stays committed, and the store goes on."""
    await store.transact(CHANNEL, step(opening()))
    begun: Callable[[], object] = asyncio.Event().set

    async def ask() -> None:
        begun()
        await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))

    task = asyncio.ensure_future(ask())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    account = (await store.transact(CHANNEL, step(AcceptVoucher(voucher(300))))).account
    assert account.accepted == 300
    assert await folded(store) == account


async def test_a_relaxed_commit_is_told_when_somebody_may_be_shown_it(store: ChannelStore) -> None:
    """Subscribers hear what survives a power cut, so a relaxed commit waits for the next firm answer."""
    heard: list[int] = []
    store.subscribe(lambda account: heard.append(account.version))
    for command in (opening(), reserve(50)):
        await store.transact(CHANNEL, step(command))
    folded_to = Renew(HoldId("h"), pico(20), pico(20))
    made = await store.transact(CHANNEL, step(folded_to), relaxed=True)
    again = await store.transact(CHANNEL, step(folded_to), relaxed=True)
    assert (made.account.version, again.result.replayed, heard) == (3, True, [1, 2])
    assert await store.load(CHANNEL) == made.account
    assert heard == [1, 2, 3]
    await store.transact(CHANNEL, step(Renew(HoldId("h"), pico(30), pico(30))), relaxed=True)
    await store.transact(CHANNEL, step(Finish(HoldId("h"), pico(31))))
    assert heard[-1] == max(heard)
    assert sorted(set(heard)) == heard
    assert await folded(store) == await store.load(CHANNEL)
