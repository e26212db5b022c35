"""Automatic recharge: charged once, capped, and never again while the first may have been made."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from channels.credit import FUNDS_MAX, FundsKind, MoveFunds
from mppnode.accounts.model import Alerts, Recharge
from mppnode.billing.booking import Bookkeeper
from mppnode.billing.recharge import DECLINED_MS, KEY_FORGOTTEN_MS, Recharger, read_order
from mppnode.config.accounts import TrustLimits
from mppnode.ledger.credit_rows import TaskState
from mppnode.observe.logs import quiet
from tests.billing.kit import DOLLAR, HOUR, Desk
from tests.support.stripe_peer import Mishap

WISH = Recharge(threshold_cents=200, amount_cents=1_000, month_cap_cents=2_500)
ALERTS = Alerts("https://hooks.example.com/a", "whsec_" + "A" * 43 + "=")


async def low(desk: Desk, card: str = "pm_visa", wish: Recharge = WISH) -> None:
    """An account that has just fallen below its threshold."""
    await desk.with_card(card=card, recharge=wish, alerts=ALERTS)
    await desk.give("acct_1", 5 * DOLLAR)
    await desk.spend("acct_1", 4 * DOLLAR)


async def work(desk: Desk, seconds: float = 61) -> None:
    desk.clock.advance(seconds)
    await desk.billing.recharger.work()


def paid(desk: Desk) -> int:
    return sum(one["amount_received"] for one in desk.peer.of("payment_intent"))


async def test_a_low_balance_is_recharged_once_and_the_webhook_changes_nothing(desk: Desk) -> None:
    """The card is charged when the balance falls below the threshold; answer and webhook book one payment."""
    await low(desk)
    for _ in range(3):
        await work(desk)
    assert (await desk.credit("acct_1")).balance == 11 * DOLLAR
    await desk.deliver_all()
    assert (await desk.credit("acct_1")).balance == 11 * DOLLAR
    assert (len(desk.peer.of("payment_intent")), await desk.entries("acct_1")) == (1, 11 * DOLLAR)
    (task,) = await desk.tasks("recharge")
    assert (task.state, read_order(task).stage) == (TaskState.DONE, "paid")


async def test_a_month_has_its_cap_and_says_so_once(desk: Desk) -> None:
    """Two recharges of 10 fit a cap of 25, the third is not made until the next month; its owner is told."""
    await low(desk)
    for _ in range(4):
        await work(desk)
        credit = await desk.credit("acct_1")
        if credit.balance > 2 * DOLLAR:
            await desk.spend("acct_1", credit.balance - DOLLAR)
    await work(desk)
    assert paid(desk) == 2_000
    assert [read_order(task).stage for task in await desk.tasks("recharge")] == ["paid", "paid", "month_cap"]
    assert sum("month_cap" in task.document for task in await desk.tasks("alert")) == 1
    desk.clock.advance(31 * 86_400)
    await desk.billing.recharger.look()
    await work(desk)
    assert paid(desk) == 3_000


async def test_declines_are_tried_again_slowly_and_then_switched_off(desk: Desk) -> None:
    """A declined card is tried after 1, 6 and 24 hours under new keys, then recharge is off and an alert is written."""
    await low(desk, "pm_declined")
    await work(desk)
    attempts = [len(desk.peer.of("payment_intent"))]
    for pause in DECLINED_MS:
        await work(desk, pause / 1000 - 60)
        attempts.append(len(desk.peer.of("payment_intent")))
        await work(desk, 120)
        attempts.append(len(desk.peer.of("payment_intent")))
    assert attempts == [1, 1, 2, 2, 3, 3, 4]
    (task,) = await desk.tasks("recharge")
    assert task.state is TaskState.PARKED
    assert (await desk.read("acct_1")).billing.recharge is None
    assert any("recharge.failed" in task.document for task in await desk.tasks("alert"))
    await desk.billing.recharger.look()
    assert len(await desk.tasks("recharge")) == 1


@pytest.mark.parametrize("mishap", [Mishap.LOSE_ANSWER, Mishap.GARBAGE, Mishap.BROKEN_AFTER])
async def test_a_lost_answer_is_repeated_under_the_same_key(desk: Desk, mishap: Mishap) -> None:
    """Whatever becomes of the answer, the card is charged once; a saved 500 is resolved by looking at the payments."""
    await low(desk)
    desk.peer.mishaps.extend([mishap] * (1 if mishap is Mishap.BROKEN_AFTER else 3))
    await work(desk)
    for _ in range(30):
        await work(desk, HOUR)
    assert (paid(desk), len(desk.peer.of("payment_intent"))) == (1_000, 1)
    assert (await desk.credit("acct_1")).balance == 11 * DOLLAR


async def test_an_attempt_that_was_never_made_is_made_again_after_a_day(desk: Desk) -> None:
    """An attempt older than 23 hours is looked for; when Stripe has none, a new one is made."""
    await low(desk)
    desk.peer.mishaps.extend([Mishap.BROKEN] * 3)
    await work(desk)
    assert paid(desk) == 0
    await work(desk, KEY_FORGOTTEN_MS / 1000)
    await work(desk)
    assert (paid(desk), (await desk.credit("acct_1")).balance) == (1_000, 11 * DOLLAR)


async def test_a_card_that_needs_its_owner_parks_with_an_alert(desk: Desk) -> None:
    """Requires-action is nothing we can do alone: no second attempt, and the owner is told."""
    await low(desk, "pm_auth")
    for _ in range(3):
        await work(desk, HOUR)
    (task,) = await desk.tasks("recharge")
    assert (task.state, len(desk.peer.of("payment_intent"))) == (TaskState.PARKED, 1)
    assert any("requires_action" in task.document for task in await desk.tasks("alert"))


async def test_money_on_its_way_holds_back_another_recharge(desk: Desk) -> None:
    """While a bank has not answered nothing else is charged, and what arrives is booked."""
    await low(desk, "pm_slow")
    await work(desk)
    await desk.give("acct_1", 5 * DOLLAR)
    await desk.spend("acct_1", 5 * DOLLAR)
    await work(desk)
    await work(desk, HOUR)
    (intent,) = desk.peer.of("payment_intent")
    desk.peer.settle(intent["id"])
    await work(desk, HOUR)
    assert (await desk.credit("acct_1")).balance == 11 * DOLLAR
    assert len(desk.peer.of("payment_intent")) == 1


async def test_an_order_that_is_not_needed_any_more_takes_nothing(desk: Desk) -> None:
    """Somebody who topped up in the meantime, or is suspended, is not charged."""
    await low(desk)
    await desk.give("acct_1", 9 * DOLLAR)
    await work(desk)
    assert desk.peer.of("payment_intent") == []
    (task,) = await desk.tasks("recharge")
    assert read_order(task).stage == "enough"


async def test_two_nodes_that_both_lead_charge_once(desk: Desk) -> None:
    """Workers that run at the same time, on two orders of one account, take one payment."""
    await low(desk)
    (task,) = await desk.tasks("recharge")
    await desk.books.add_task(replace(task, id="recharge_other"))
    other = Recharger(desk.stripe, Bookkeeper(desk.books, TrustLimits()), log=quiet)
    desk.clock.advance(61)
    await asyncio.gather(desk.billing.recharger.work(), other.work(), desk.billing.recharger.work())
    await work(desk)
    assert (paid(desk), (await desk.credit("acct_1")).balance) == (1_000, 11 * DOLLAR)
    assert [seen.path for seen in desk.peer.seen if seen.method == "POST"].count("/v1/payment_intents") == 1


async def test_k8_money_an_account_cannot_hold_is_taken_once_and_booked_when_it_can(desk: Desk) -> None:
    """A charge that does not fit the account is neither repeated by an operator's retry, days later, nor lost by it."""
    await low(desk)
    full = FUNDS_MAX - 10 * DOLLAR + 1 - (await desk.credit("acct_1")).funds
    (task,) = await desk.tasks("recharge")
    desk.peer.mishaps.extend([Mishap.LOSE_ANSWER] * 3)
    await work(desk)  # it is charged; how it ended is not known yet
    await desk.give("acct_1", full)
    for _ in range(3):
        await work(desk, HOUR)
    (task,) = await desk.tasks("recharge")
    assert (task.state, paid(desk)) == (TaskState.PARKED, 1_000)
    desk.clock.advance(3 * 86_400)
    await desk.books.apply((await desk.read("acct_1")).id, MoveFunds(FundsKind.GRANT, "back", -full))
    await desk.books.move_task(task, replace(task, state=TaskState.DUE, due_ms=0))
    await work(desk)
    await work(desk, HOUR)
    assert paid(desk) == 1_000
    assert (await desk.credit("acct_1")).balance == 11 * DOLLAR


async def test_k8_a_card_is_not_charged_for_an_account_that_is_full(desk: Desk) -> None:
    """What could not be booked is not taken."""
    await low(desk)
    funds = (await desk.credit("acct_1")).funds
    await desk.books.apply((await desk.read("acct_1")).id, MoveFunds(FundsKind.INVOICE, "long ago", FUNDS_MAX - funds))
    await desk.spend("acct_1", FUNDS_MAX - funds)
    for _ in range(3):
        await work(desk)
        await desk.billing.recharger.look()
        desk.clock.advance(86_400)
    assert paid(desk) == 0


@pytest.mark.parametrize("how", ["off", "suspended"])
async def test_a_card_is_not_charged_after_its_owner_has_switched_recharge_off(desk: Desk, how: str) -> None:
    """An attempt that Stripe never got is not made again once nobody wants it; it is looked for instead."""
    await low(desk)
    desk.peer.mishaps.extend([Mishap.BROKEN] * 3)
    await work(desk)
    assert paid(desk) == 0
    if how == "off":
        await desk.change((await desk.read("acct_1")).id, recharge=None)
    else:
        await desk.billing.keeper.change((await desk.read("acct_1")).id, None, lambda found: replace(found, suspended_at=desk.clock.now()))
    for _ in range(4):
        await work(desk, HOUR)
    assert paid(desk) == 0
    (task,) = await desk.tasks("recharge")
    assert task.state is TaskState.DONE


async def test_an_attempt_that_was_made_is_booked_also_after_recharge_was_switched_off(desk: Desk) -> None:
    """Money that was taken counts, whoever has changed his mind since."""
    await low(desk)
    desk.peer.mishaps.extend([Mishap.LOSE_ANSWER] * 3)
    await work(desk)
    await desk.change((await desk.read("acct_1")).id, recharge=None)
    for _ in range(3):
        await work(desk, HOUR)
    assert (paid(desk), (await desk.credit("acct_1")).balance) == (1_000, 11 * DOLLAR)
