"""Post-paid usage: sealed once, reported until it is certain, exact at Stripe whatever gets lost."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise

import orjson
import pytest

from channels.credit import AccountId
from mppnode.accounts.model import BillingProfile
from mppnode.billing.meters import VALUE_MAX, Meters, read_report
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.ledger.credit_rows import TaskState
from mppnode.ledger.talk import Talk
from tests.billing.kit import CENT, DOLLAR, HOUR, Desk
from tests.support.stripe_peer import Mishap

DAY = 86_400


def meters(desk: Desk) -> Meters:
    assert desk.billing.meters is not None
    return desk.billing.meters


def counted(desk: Desk) -> int:
    return sum(int(event["payload"]["value"]) for event in desk.peer.of("billing.meter_event"))


async def use(desk: Desk, pico: int = CENT) -> None:
    await desk.spend("acct_1", pico)
    await meters(desk).seal()


async def test_usage_is_sealed_once_a_minute_and_reported_exactly(desk: Desk) -> None:
    """What is reported equals the account's total; two seals in a minute make one report."""
    await desk.subscribed()
    for _ in range(5):
        await use(desk)
        await meters(desk).send()
        desk.clock.advance(20)
    desk.clock.advance(60)
    await meters(desk).seal()
    assert await meters(desk).send() == 1
    assert counted(desk) == (await desk.credit("acct_1")).reported_micro == 50_000
    reports = [read_report(task) for task in await desk.tasks("meter")]
    assert all(b.at // 60 > a.at // 60 for a, b in pairwise(reports))
    assert reports[-1].total == 50_000
    assert all(report.at <= desk.clock.now() for report in reports)


async def test_two_reports_never_share_a_minute(desk: Desk) -> None:
    """Usage of the minute that was reported already is reported in the next: what Stripe counts there is this report."""
    await desk.subscribed()
    desk.clock.advance(60 - desk.clock.now() % 60 + 5)
    await use(desk)
    desk.clock.advance(50)
    await desk.spend("acct_1", CENT)
    desk.clock.advance(20)
    await meters(desk).seal()
    first, second = [read_report(task).at for task in await desk.tasks("meter")]
    assert (second // 60 - first // 60, second <= desk.clock.now()) == (1, True)


@pytest.mark.parametrize("lost", [Mishap.LOSE_ANSWER, Mishap.GARBAGE, Mishap.BROKEN_AFTER, Mishap.BROKEN])
@pytest.mark.parametrize("pause", [60, HOUR, 21 * HOUR, 30 * HOUR])
async def test_k12_lost_answers_are_counted_once_also_after_identifiers_are_forgotten(
    desk: Desk, lost: Mishap, pause: int
) -> None:
    """K12: a report whose outcome is unknown is counted once, whether asked again in a minute or after Stripe forgot."""
    await desk.subscribed()
    await use(desk)
    desk.peer.mishaps.extend([lost] * 3)
    await meters(desk).send()
    for seconds in (*[pause] * 4, 21 * HOUR, HOUR):  # a saved 500 stays one until what was counted is looked at
        desk.clock.advance(seconds)
        await meters(desk).send()
    assert counted(desk) == 10_000
    (task,) = await desk.tasks("meter")
    assert task.state is TaskState.DONE


async def test_p45_old_usage_is_parked_with_an_error(desk: Desk) -> None:
    """P-45: nothing older than 34 days is sent; it is parked and said so."""
    await desk.subscribed()
    await use(desk)
    desk.clock.advance(35 * DAY)
    assert await meters(desk).send() == 0
    (task,) = await desk.tasks("meter")
    assert (task.state, counted(desk), read_report(task).why) == (TaskState.PARKED, 0, "too_old")
    assert any(event == "meter.parked" for event, _ in desk.log)


async def test_a_minute_with_something_elses_usage_is_parked(desk: Desk) -> None:
    """When Stripe counted what no report of ours explains, nothing is sent again: billing twice is worse than late."""
    account = await desk.subscribed()
    await use(desk)
    desk.peer.mishaps.extend([Mishap.BROKEN] * 3)
    await meters(desk).send()
    (task,) = await desk.tasks("meter")
    assert account.billing.customer is not None
    await desk.stripe.report_usage(
        event_name="usage", identifier="another", customer=account.billing.customer, value=7, timestamp=read_report(task).at
    )
    desk.clock.advance(25 * HOUR)
    await meters(desk).send()
    (task,) = await desk.tasks("meter")
    assert (task.state, counted(desk)) == (TaskState.PARKED, 7)


async def test_p46_reconciliation_compares_what_stripe_counted(desk: Desk) -> None:
    """P-46: a clean day has no differences; usage Stripe counted and we never reported is one."""
    account = await desk.subscribed()
    await use(desk)
    await meters(desk).send()
    desk.clock.advance(3 * HOUR)
    since, until = desk.clock.now() - DAY, desk.clock.now()
    assert (await desk.billing.reconcile(since, until)).differences == []
    assert account.billing.customer is not None
    await desk.stripe.report_usage(
        event_name="usage", identifier="another", customer=account.billing.customer, value=7, timestamp=until - 2 * HOUR
    )
    report = await desk.billing.reconcile(since, until)
    assert [(one.what, one.ours, one.theirs) for one in report.differences] == [("meter", 10_000, 10_007)]
    assert not report.clean


async def test_what_forgotten_reports_came_to_is_still_proved(desk: Desk) -> None:
    """Old reports are forgotten once a day; the account's total is proved by those that are left, and a lost one shows."""
    await desk.subscribed()
    for days in (1, 1, 100, 1, 1):
        await use(desk)
        await meters(desk).send()
        desk.clock.advance(days * DAY)
    workers = desk.billing.workers
    assert (await workers.forget(), await workers.forget()) == (1, 0)
    assert [read_report(task).total for task in await desk.tasks("meter")] == [40_000, 50_000]
    until = desk.clock.now()
    assert (await desk.billing.reconcile(until - 3 * DAY, until)).differences == []
    lost = (await desk.tasks("meter"))[-1]

    def lose() -> Talk[None]:
        yield "DELETE FROM outbox WHERE id = ?", (lost.id,)

    await desk.books.write(lose, of="")
    found = (await desk.billing.reconcile(until - 3 * DAY, until)).differences
    assert ("reports", 50_000, 40_000) in [(one.what, one.ours, one.theirs) for one in found]


async def test_subscribing_needs_terms_and_a_card_and_happens_once(desk: Desk) -> None:
    """Prepaid accounts and accounts without a card are refused; twice, and a lost answer, make one subscription."""
    for account, field in ((await desk.account("acct_a"), "terms"), (await desk.account("acct_b", prepaid=False), "card")):
        with pytest.raises(NodeFault) as caught:
            await desk.billing.subscribe(account)
        assert (caught.value.reason, caught.value.field) == (NodeReason.CONFLICT, field)
    account = await desk.with_card("acct_1", prepaid=False)
    customer = account.billing.customer
    assert customer is not None
    await desk.stripe.set_default_card(customer=customer, payment_method="pm_visa", key="12345678")
    await desk.billing.subscribe(account)
    await desk.billing.subscribe(account)
    # what is left when the node died before it could store the answer, and the key is forgotten
    await desk.change(account.id, subscription=None)
    desk.clock.advance(2 * DAY)
    await desk.billing.subscribe(account)
    (made,) = desk.peer.of("subscription")
    assert (await desk.read("acct_1")).billing == BillingProfile(customer, "pm_visa", made["id"])
    assert (await desk.credit("acct_1")).overdraft == DOLLAR


async def test_a_report_that_is_too_much_stays_parked_and_holds_nobody_up(desk: Desk) -> None:
    """An operator's retry of a report no meter takes parks it again, and the other customers' reports go on."""
    await desk.subscribed()
    await desk.subscribed("acct_2")
    await use(desk)
    (task,) = await desk.tasks("meter")
    huge = replace(read_report(task), value=VALUE_MAX + 1, customer=str((await desk.read("acct_2")).billing.customer))
    document = orjson.dumps(asdict(huge)).decode()
    await desk.books.add_task(replace(task, id="meter_huge", account=AccountId("acct_2"), document=document, created_ms=0))
    assert await meters(desk).send() == 1
    (parked,) = await desk.tasks("meter", "acct_2")
    assert (parked.state, read_report(parked).why) == (TaskState.PARKED, "too_much")
