"""Whose money it is, and who may end a suspension: tags, customers, subscriptions and operators against each other."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from channels.instants import UnixMillis
from mppnode.accounts.forms import AccountForm
from mppnode.accounts.keyring import Accounts
from mppnode.ledger.credit_rows import AccountRow
from mppnode.ledger.credits import Credits
from tests.billing.kit import DOLLAR, Desk


def operator(books: Credits) -> Accounts:
    return Accounts(books, clock=books.clock, entropy=os.urandom)


async def in_debt(desk: Desk) -> None:
    """An account that billing has suspended: a chargeback took back what was spent."""
    account = await desk.account()
    await desk.billing.buy(account, 500)
    desk.peer.complete_checkout(desk.peer.of("checkout.session")[0]["id"])
    await desk.deliver_all()
    await desk.spend("acct_1", 3 * DOLLAR)
    seen = len(desk.peer.events)
    desk.peer.dispute(desk.peer.of("payment_intent")[0]["id"])
    await desk.deliver_all(seen)
    assert (await desk.read("acct_1")).suspended_at is not None


async def win(desk: Desk) -> None:
    seen = len(desk.peer.events)
    desk.peer.close_dispute(desk.peer.of("dispute")[0]["id"], "won")
    await desk.deliver_all(seen)


async def test_an_operator_who_suspends_a_suspended_account_keeps_it_suspended(desk: Desk) -> None:
    """What billing suspended and an operator suspends as well is not let go by money that comes."""
    await in_debt(desk)
    await operator(desk.books).change((await desk.read("acct_1")).id, AccountForm({}, suspended=True))
    await win(desk)
    assert (await desk.credit("acct_1")).balance == 2 * DOLLAR
    assert (await desk.read("acct_1")).suspended_at is not None
    await operator(desk.books).change((await desk.read("acct_1")).id, AccountForm({}, suspended=False))
    assert (await desk.read("acct_1")).suspended_at is None


async def test_an_unpaid_account_that_an_operator_resumes_is_not_suspended_again_for_the_same_invoice(desk: Desk) -> None:
    """An operator's word ends what billing had against an account; only something new begins it again."""
    account = await desk.subscribed()
    await desk.spend("acct_1", DOLLAR)
    assert desk.billing.meters is not None
    await desk.billing.meters.seal()
    await desk.billing.meters.send()
    desk.clock.advance(3_600)
    desk.peer.objects[str(account.billing.customer)]["invoice_settings"]["default_payment_method"] = "pm_declined"
    desk.peer.close_invoice(str(account.billing.subscription))
    await desk.deliver(desk.events("invoice.payment_failed")[0])
    assert (await desk.read("acct_1")).suspended_at is not None
    await operator(desk.books).change(account.id, AccountForm({}, suspended=False))
    await desk.billing.keeper.take_in(account.id, event="evt_else")
    assert (await desk.read("acct_1")).suspended_at is None
    await desk.deliver({**desk.events("invoice.payment_failed")[0], "id": "evt_second_attempt"})
    assert (await desk.read("acct_1")).suspended_at is not None


@pytest.mark.parametrize("own", [True, False])
async def test_a_payment_tagged_for_one_account_by_the_customer_of_another_is_nobodys(desk: Desk, own: bool) -> None:
    """A tag that somebody else's customer carries books nothing and keeps no card; the same day's comparison neither."""
    mine, theirs = await desk.with_card("acct_1"), await desk.with_card("acct_2")
    payer = mine if own else theirs
    intent = desk.peer.intent(500, payer.billing.customer, {"mppnode_account": "acct_1", "mppnode_reference": "x"})
    intent["setup_future_usage"] = "off_session"
    desk.peer.confirm(intent, "pm_stolen")
    await desk.deliver_all()
    desk.clock.advance(60)
    report = await desk.billing.reconcile(desk.clock.now() - 600, desk.clock.now())
    assert (await desk.credit("acct_1")).balance == (5 * DOLLAR if own else 0)
    assert (await desk.credit("acct_2")).balance == 0
    assert (await desk.read("acct_1")).billing.card == ("pm_stolen" if own else "pm_visa")
    assert report.foreign == (0 if own else 1)


async def test_a_late_payment_of_a_deleted_customer_is_still_its_accounts_but_its_card_is_not(desk: Desk) -> None:
    """Money that was on its way when a customer was deleted is booked; a card that went with the customer is not kept."""
    account = await desk.account()
    await desk.billing.buy(account, 500)
    (first,) = desk.peer.of("customer")
    (page,) = desk.peer.of("checkout.session")
    desk.peer.complete_checkout(page["id"])
    late = list(desk.peer.events)
    for event in late:
        if event["type"] == "payment_intent.succeeded":
            event["data"]["object"]["setup_future_usage"] = "off_session"
    desk.peer.emit("customer.deleted", first)
    await desk.deliver(desk.events("customer.deleted")[0])
    for event in late:
        await desk.deliver(event)
    assert (await desk.credit("acct_1")).balance == 5 * DOLLAR
    assert (await desk.read("acct_1")).billing.card is None


async def test_an_invoice_that_is_not_for_usage_gives_no_credit(desk: Desk) -> None:
    """An operator's own invoice to a customer, for something else, is neither credit when paid nor a debt when it fails."""
    account = await desk.subscribed()
    await desk.spend("acct_1", DOLLAR)
    assert desk.billing.meters is not None
    await desk.billing.meters.seal()
    await desk.billing.meters.send()
    desk.clock.advance(3_600)
    desk.peer.objects[str(account.billing.customer)]["invoice_settings"]["default_payment_method"] = "pm_declined"
    invoice = desk.peer.close_invoice(str(account.billing.subscription))
    invoice["parent"] = None
    for event in desk.events("invoice.payment_failed"):
        await desk.deliver({**event, "data": {"object": {**event["data"]["object"], "parent": None}}})
    assert (await desk.read("acct_1")).suspended_at is None
    desk.peer.objects[str(account.billing.customer)]["invoice_settings"]["default_payment_method"] = "pm_visa"
    desk.peer.retry_invoice(invoice["id"])
    for event in desk.events("invoice.paid"):
        await desk.deliver({**event, "data": {"object": {**event["data"]["object"], "parent": None}}})
    await desk.billing.reconcile(desk.clock.now() - 7_200, desk.clock.now() + 1)
    assert (await desk.credit("acct_1")).invoiced == 0


async def test_a_dispute_in_another_currency_is_not_taken_for_cents(desk: Desk) -> None:
    """An amount that is not dollars is not booked as if it were; somebody is told."""
    account = await desk.account()
    await desk.billing.buy(account, 500)
    desk.peer.complete_checkout(desk.peer.of("checkout.session")[0]["id"])
    dispute = desk.peer.dispute(desk.peer.of("payment_intent")[0]["id"])
    dispute["currency"] = "jpy"
    for event in desk.peer.events:
        if event["type"].startswith("charge.dispute"):
            event["data"]["object"]["currency"] = "jpy"
        await desk.deliver(event)
    await desk.billing.reconcile(desk.clock.now() - 600, desk.clock.now() + 1)
    assert (await desk.credit("acct_1")).balance == 5 * DOLLAR
    assert ("billing.passed", "not in dollars") in [(name, fields.get("why")) for name, fields in desk.log]


async def test_the_secret_of_alerts_is_in_no_repr(desk: Desk) -> None:
    """Rows and accounts say nothing of what their owner's alerts are signed with."""
    row = AccountRow((await desk.account()).id, "t", None, '{"alerts":["https://x.example","whsec_canary",0]}', UnixMillis(0))
    assert "canary" not in repr(row) + str(replace(row, trust="u"))
