"""Webhooks: any order, any number, some missing, and the books are the same."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest

from mppnode.accounts.model import BillingProfile
from mppnode.config.secrets import Secret
from mppnode.gateways.stripe_events import StripeEvent, WebhookFault, WebhookReader, WebhookReason
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.ledger.credit_lists import payment_of
from tests.billing.kit import CENT, DOLLAR, HOUR, SECRET, Desk
from tests.support.stripe_peer import ACCOUNT, Mishap, sign


async def story(desk: Desk) -> list[dict[str, Any]]:
    """Six events of one purchase: paid twice told, refunded in part, disputed and won, and the refund fails."""
    account = await desk.account("acct_story")
    await desk.billing.buy(account, 2_000)
    (page,) = desk.peer.of("checkout.session")
    desk.peer.complete_checkout(page["id"])
    (intent,) = desk.peer.of("payment_intent")
    refund = desk.peer.refund(intent["id"], 500)
    dispute = desk.peer.dispute(intent["id"])
    desk.peer.close_dispute(dispute["id"], "won")
    refund["status"] = "failed"
    desk.peer.emit("refund.failed", refund)
    events = list(desk.peer.events)
    assert len(events) == 6, [event["type"] for event in events]
    return events


def renamed(events: list[dict[str, Any]], desk: Desk, number: int) -> list[StripeEvent]:
    """The same story of another account: its objects at the peer, and its events as they are read."""
    text = json.dumps(events)
    (intent,) = [one for one in desk.peer.of("payment_intent") if one["metadata"]["mppnode_account"] == "acct_story"]
    (refund,) = [one for one in desk.peer.of("refund") if one["payment_intent"] == intent["id"]]
    names = {intent["customer"]: f"cus_n{number}", intent["id"]: f"pi_n{number}", refund["id"]: f"re_n{number}", "acct_story": f"acct_n{number}", "evt_": f"evt_n{number}_"}
    for one in (intent, refund):
        copied = json.loads(replaced(json.dumps(one), names))
        desk.peer.objects[copied["id"]] = copied
    reader = WebhookReader([Secret(SECRET)], account=ACCOUNT, livemode=False, clock=desk.clock)
    made = []
    for event in json.loads(replaced(text, names)):
        body = json.dumps(event).encode()
        made.append(reader.read(body, sign(body, SECRET, desk.clock.now())))
    return made


def replaced(text: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


async def test_k6_k7_all_orders_of_a_story_end_equal(desk: Desk) -> None:
    """K6, K7: 720 orders of six events, each ten times and half of them in parallel, leave the same books."""
    events = await story(desk)
    ends = set()
    limit = asyncio.Semaphore(16)

    async def one(number: int, order: tuple[int, ...]) -> None:
        async with limit:
            name = f"acct_n{number}"
            await desk.account(name, billed=BillingProfile(customer=f"cus_n{number}"))
            happened = renamed(events, desk, number)
            for place, index in enumerate(order):
                if place % 2:
                    await asyncio.gather(*(desk.billing.hear(happened[index]) for _ in range(10)))
                else:
                    for _ in range(10):
                        await desk.billing.hear(happened[index])
            credit, account = await desk.credit(name), await desk.read(name)
            found = await desk.books.read(lambda: payment_of(f"pi_n{number}"))
            assert found is not None
            assert await desk.entries(name) == credit.balance
            ends.add((credit.prepaid, credit.invoiced, credit.overdraft, account.suspended_at, found[1].paid, found[1].worth))

    await asyncio.gather(*(one(number, order) for number, order in enumerate(permutations(range(6)))))
    assert ends == {(20 * DOLLAR, 0, 0, None, 2_000, 2_000)}


@pytest.mark.parametrize("dropped", range(6))
async def test_k7_reconciliation_heals_a_story_with_one_event_missing(desk: Desk, dropped: int) -> None:
    """K7: whichever event is never delivered, the daily comparison leaves the books as all six would."""
    events = await story(desk)
    for index, event in enumerate(events):
        if index != dropped:
            await desk.deliver(event)
    desk.clock.advance(60)
    report = await desk.billing.reconcile(desk.clock.now() - 86_400, desk.clock.now())
    assert (await desk.credit("acct_story")).prepaid == 20 * DOLLAR
    assert (report.clean, report.stripe.payments, report.stripe.paid, report.stripe.refunded) == (True, 1, 2_000, 0)
    assert await desk.entries("acct_story") == 20 * DOLLAR
    again = await desk.billing.reconcile(desk.clock.now() - 86_400, desk.clock.now())
    assert (again.booked, again.differences, again.ledger) == (0, [], again.stripe)


async def test_k7_reconciliation_books_a_story_nobody_told(desk: Desk) -> None:
    """K7: with no event at all, what Stripe has is booked, and the report says what was missing."""
    await story(desk)
    desk.clock.advance(60)
    report = await desk.billing.reconcile(desk.clock.now() - 86_400, desk.clock.now())
    assert (report.booked, report.ledger.paid, report.stripe.paid) == (1, 0, 2_000)
    assert (await desk.credit("acct_story")).prepaid == 20 * DOLLAR


async def test_k8_a_dispute_of_spent_credit_suspends_until_it_is_won(desk: Desk) -> None:
    """K8: a chargeback is a negative line; who has spent the money is suspended, and goes on when the bank gives it back."""
    account = await desk.account()
    await desk.billing.buy(account, 500)
    desk.peer.complete_checkout(desk.peer.of("checkout.session")[0]["id"])
    await desk.deliver_all()
    await desk.spend("acct_1", 3 * DOLLAR)
    seen = len(desk.peer.events)
    dispute = desk.peer.dispute(desk.peer.of("payment_intent")[0]["id"])
    await desk.deliver_all(seen)
    assert (await desk.credit("acct_1")).balance == -3 * DOLLAR
    assert (await desk.read("acct_1")).suspended_at == desk.clock.now()
    seen = len(desk.peer.events)
    desk.peer.close_dispute(dispute["id"], "won")
    await desk.deliver_all(seen)
    assert (await desk.credit("acct_1")).balance == 2 * DOLLAR
    assert (await desk.read("acct_1")).suspended_at is None


async def test_an_operators_suspension_is_not_lifted_by_a_payment(desk: Desk) -> None:
    """Billing ends only suspensions of its own."""
    account = await desk.account()
    await desk.billing.keeper.change(account.id, None, lambda found: replace(found, suspended_at=desk.clock.now()))
    await desk.billing.buy(account, 500)
    desk.peer.complete_checkout(desk.peer.of("checkout.session")[0]["id"])
    await desk.deliver_all()
    assert (await desk.credit("acct_1")).balance == 5 * DOLLAR
    assert (await desk.read("acct_1")).suspended_at is not None


async def test_a_webhook_with_a_bad_signature_or_of_another_mode_is_refused(desk: Desk) -> None:
    """K5, K8: a forged body and an event of the other mode book nothing."""
    events = await story(desk)
    body = json.dumps(events[0]).encode()
    for forged, header in ((body, None), (body, sign(body, "whsec_" + "x" * 32, desk.clock.now())), (body + b" ", sign(body, SECRET, desk.clock.now()))):
        with pytest.raises(WebhookFault):
            await desk.billing.webhook(forged, header)
    live = json.dumps({**events[0], "livemode": True}).encode()
    with pytest.raises(WebhookFault) as caught:
        await desk.billing.webhook(live, sign(live, SECRET, desk.clock.now()))
    assert caught.value.reason is WebhookReason.WRONG_MODE
    assert (await desk.credit("acct_story")).funds == 0


async def test_an_outage_within_a_webhook_changes_nothing_and_the_copy_books(desk: Desk) -> None:
    """When Stripe cannot be asked the fault is 503, and the same event books when it comes again."""
    events = await story(desk)
    await desk.deliver(events[0])
    await desk.deliver(events[1])
    refund = next(event for event in events if event["type"] == "charge.refunded")
    desk.peer.mishaps.extend([Mishap.BROKEN] * 3)
    with pytest.raises(NodeFault) as caught:
        await desk.deliver(refund)
    assert caught.value.reason is NodeReason.BILLING_UNAVAILABLE
    desk.peer.of("refund")[0]["status"] = "succeeded"
    await desk.deliver(refund)
    assert (await desk.credit("acct_story")).balance == 1_500 * CENT


async def test_an_invoices_payment_is_never_bought_credit(desk: Desk) -> None:
    """The payment of an invoice has no tags: it is booked by invoice.paid as such, raises the trust limit, in any order."""
    account = await desk.subscribed()
    assert account.billing.subscription is not None
    await desk.spend("acct_1", DOLLAR)
    assert desk.billing.meters is not None
    await desk.billing.meters.seal()
    await desk.billing.meters.send()
    desk.clock.advance(HOUR)
    desk.peer.close_invoice(account.billing.subscription)
    for event in (*desk.events("payment_intent.succeeded"), *desk.events("invoice.paid")):
        await desk.deliver(event)
        await desk.deliver(event)
    credit = await desk.credit("acct_1")
    assert (credit.prepaid, credit.invoiced, credit.balance) == (0, DOLLAR, 0)
    assert credit.overdraft == DOLLAR + 10 * CENT


async def test_a_failed_invoice_suspends_until_it_is_paid(desk: Desk) -> None:
    """A post-paid account whose invoice fails is suspended; when it is paid it goes on, also if the failure is told last."""
    account = await desk.subscribed()
    customer, subscription = account.billing.customer, account.billing.subscription
    assert customer is not None
    assert subscription is not None
    await desk.spend("acct_1", DOLLAR)
    assert desk.billing.meters is not None
    await desk.billing.meters.seal()
    await desk.billing.meters.send()
    desk.clock.advance(HOUR)
    desk.peer.objects[customer]["invoice_settings"]["default_payment_method"] = "pm_declined"
    invoice = desk.peer.close_invoice(subscription)
    (failed,) = desk.events("invoice.payment_failed")
    await desk.deliver(failed)
    assert (await desk.read("acct_1")).suspended_at == desk.clock.now()
    desk.peer.objects[customer]["invoice_settings"]["default_payment_method"] = "pm_visa"
    desk.peer.retry_invoice(invoice["id"])
    await desk.deliver(desk.events("invoice.paid")[0])
    assert (await desk.read("acct_1")).suspended_at is None
    await desk.deliver({**failed, "id": "evt_again"})
    assert (await desk.read("acct_1")).suspended_at is None


async def test_two_first_needs_end_with_one_customer(desk: Desk) -> None:
    """Parallel pages of an account without a customer make and use one."""
    account = await desk.account()
    await asyncio.gather(*(desk.billing.buy(account, 500) for _ in range(5)), desk.billing.portal(account))
    (customer,) = desk.peer.of("customer")
    assert (await desk.read("acct_1")).billing.customer == customer["id"]
    assert {page["sent"]["customer"] for page in desk.peer.of("checkout.session")} == {customer["id"]}


async def test_only_packs_are_sold_and_an_outage_is_never_the_customers_fault(desk: Desk) -> None:
    """Another amount is INVALID_FIELD naming it; Stripe being away is BILLING_UNAVAILABLE."""
    account = await desk.account()
    with pytest.raises(NodeFault) as caught:
        await desk.billing.buy(account, 501)
    assert (caught.value.reason, caught.value.field) == (NodeReason.INVALID_FIELD, "amount_cents")
    desk.peer.mishaps.extend([Mishap.LOCKED_OUT] * 3)
    with pytest.raises(NodeFault) as caught:
        await desk.billing.buy(account, 500)
    assert caught.value.reason is NodeReason.BILLING_UNAVAILABLE


async def test_a_saved_card_is_kept_and_an_older_one_told_late_is_not(desk: Desk) -> None:
    """The newest card counts, whatever order the events come in."""
    account = await desk.account()
    await desk.billing.add_card(account)
    desk.peer.complete_checkout(desk.peer.of("checkout.session")[0]["id"], card="pm_old")
    desk.clock.advance(60)
    await desk.billing.add_card(account)
    desk.peer.complete_checkout(desk.peer.of("checkout.session")[1]["id"], card="pm_new")
    older, newer = desk.events("setup_intent.succeeded")
    await desk.deliver(newer)
    await desk.deliver(older)
    assert (await desk.read("acct_1")).billing.card == "pm_new"


async def test_events_of_unknown_accounts_are_noted_and_harmless(desk: Desk) -> None:
    """A payment of an account of another node of the same Stripe account is logged once and books nothing."""
    intent = desk.peer.intent(500, None, {"mppnode_account": "acct_other", "mppnode_reference": "x"})
    desk.peer.confirm(intent, "pm_visa")
    await desk.deliver_all()
    await desk.deliver_all()
    assert [event for event, _ in desk.log if event == "billing.passed"] == ["billing.passed"]


async def test_k7_reconciliation_hears_of_late_ends_of_old_disputes_and_invoices(desk: Desk) -> None:
    """K7: a dispute won two months later and an invoice paid weeks later heal without their events; both sides agree."""
    account = await desk.account()
    await desk.billing.buy(account, 500)
    desk.peer.complete_checkout(desk.peer.of("checkout.session")[0]["id"])
    dispute = desk.peer.dispute(desk.peer.of("payment_intent")[0]["id"])
    await desk.deliver_all()
    assert (await desk.credit("acct_1")).balance == 0
    other = await desk.subscribed("acct_2")
    await desk.spend("acct_2", DOLLAR)
    assert desk.billing.meters is not None
    await desk.billing.meters.seal()
    await desk.billing.meters.send()
    desk.clock.advance(HOUR)
    desk.peer.objects[str(other.billing.customer)]["invoice_settings"]["default_payment_method"] = "pm_declined"
    invoice = desk.peer.close_invoice(str(other.billing.subscription))
    await desk.deliver(desk.events("invoice.payment_failed")[0])
    desk.clock.advance(50 * 86_400)
    desk.peer.close_dispute(dispute["id"], "won")
    desk.peer.objects[str(other.billing.customer)]["invoice_settings"]["default_payment_method"] = "pm_visa"
    desk.peer.retry_invoice(invoice["id"])
    report = await desk.billing.reconcile(desk.clock.now() - 86_400, desk.clock.now() + 1)
    assert (await desk.credit("acct_1")).balance == 5 * DOLLAR
    assert ((await desk.credit("acct_2")).balance, (await desk.read("acct_2")).suspended_at) == (0, None)
    assert (report.booked, report.clean) == (2, True)
    again = await desk.billing.reconcile(desk.clock.now() - 86_400, desk.clock.now() + 1)
    assert (again.ledger, again.booked, again.differences) == (again.stripe, 0, [])


async def test_a_deleted_customer_is_replaced_by_another_on_the_next_need(desk: Desk) -> None:
    """Customer, card and subscription are forgotten, and the next page is for a new customer, not the deleted one."""
    await desk.subscribed()
    (first,) = desk.peer.of("customer")
    desk.peer.emit("customer.deleted", first)
    await desk.deliver_all()
    await desk.deliver_all()
    account = await desk.read("acct_1")
    assert (account.billing.customer, account.billing.card, account.billing.subscription) == (None, None, None)
    await desk.billing.portal(account)
    assert len(desk.peer.of("customer")) == 2
    assert (await desk.read("acct_1")).billing.customer == desk.peer.of("customer")[1]["id"]


def test_stripes_package_is_not_imported_with_billing() -> None:
    """A node without Stripe does not load its package, of several thousand modules."""
    code = "import sys, mppnode.billing.service; sys.exit('stripe' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
