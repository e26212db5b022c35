"""Money that comes two ways at once, in parts, or while the node dies: it is taken once and counted once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from channels.faults import ChannelFault, Reason
from channels.units import Pico
from mppnode.accounts.forms import AccountForm
from mppnode.accounts.keyring import Accounts
from mppnode.accounts.model import Postpaid, Prepaid, Recharge
from tests.billing.kit import CENT, DOLLAR, HOUR, Desk

RECHARGE = Recharge(200, 1_000, 2_000)


def taken(desk: Desk) -> int:
    """Cents Stripe has taken from anybody."""
    return sum(intent["amount_received"] for intent in desk.peer.of("payment_intent"))


async def low(desk: Desk) -> None:
    account = await desk.with_card("acct_1")
    await desk.give("acct_1", 3 * DOLLAR)
    await desk.change(account.id, recharge=RECHARGE)
    await desk.spend("acct_1", 2 * DOLLAR)


@pytest.mark.parametrize("first", ["purchase", "recharge", "neither"])
async def test_a_recharge_and_a_purchase_at_once_are_both_counted_once(desk: Desk, first: str) -> None:
    """Whichever comes first, what Stripe took is what the account has, and the loop and the webhooks agree."""
    await low(desk)
    await desk.billing.buy(await desk.read("acct_1"), 500)
    desk.peer.complete_checkout(desk.peer.of("checkout.session")[0]["id"])
    if first == "purchase":
        await desk.deliver_all()
    if first == "recharge":
        await desk.billing.recharger.work()
    await asyncio.gather(*(desk.billing.recharger.work() for _ in range(4)), *(desk.deliver_all() for _ in range(4)))
    await desk.deliver_all()
    credit = await desk.credit("acct_1")
    assert credit.balance == DOLLAR + taken(desk) * DOLLAR // 100 == await desk.entries("acct_1")
    assert taken(desk) == (500 if first == "purchase" else 1_500)


@pytest.mark.parametrize("point", ["book.before", "book.after"])
@pytest.mark.parametrize("told", [False, True])
async def test_a_node_that_dies_while_a_recharge_is_booked_takes_it_once(desk: Desk, point: str, told: bool) -> None:
    """Between charge and books, and after them: the next attempt, the webhook or both leave one payment, counted once."""
    await low(desk)
    keeper = desk.billing.keeper

    def dies(where: str) -> None:
        if where == point:
            raise ChannelFault(Reason.STORE_UNAVAILABLE)

    keeper._probe = dies
    with pytest.raises(ChannelFault):
        await desk.billing.recharger.work()
    keeper._probe = lambda _: None
    if told:
        await desk.deliver_all()
    for _ in range(3):
        desk.clock.advance(HOUR)
        await desk.billing.recharger.work()
        await desk.billing.recharger.look()
    assert (taken(desk), (await desk.credit("acct_1")).balance) == (1_000, 11 * DOLLAR)


async def test_an_invoice_that_is_paid_in_part_is_still_owed(desk: Desk) -> None:
    """A part that was paid does not make a failed attempt for the rest harmless."""
    account = await desk.subscribed()
    await desk.spend("acct_1", DOLLAR)
    assert desk.billing.meters is not None
    await desk.billing.meters.seal()
    await desk.billing.meters.send()
    desk.clock.advance(HOUR)
    desk.peer.objects[str(account.billing.customer)]["invoice_settings"]["default_payment_method"] = "pm_declined"
    invoice = desk.peer.close_invoice(str(account.billing.subscription))
    part = desk.peer.intent(60, account.billing.customer, {})
    desk.peer.confirm(part, "pm_visa")
    desk.peer.add(
        "invoice_payment", "inpay", invoice=invoice["id"], amount_requested=60, amount_paid=60, currency="usd", is_default=False, status="paid",
        payment={"type": "payment_intent", "payment_intent": part["id"]}, status_transitions={"canceled_at": None, "paid_at": desk.clock.now()},
    )  # fmt: skip
    invoice.update(amount_paid=60, amount_remaining=40)
    desk.peer.retry_invoice(invoice["id"])
    await desk.deliver(desk.events("invoice.payment_failed")[-1])
    assert (await desk.read("acct_1")).suspended_at is not None


async def test_terms_that_go_to_and_fro_bill_each_cent_once(desk: Desk) -> None:
    """Usage is paid by credit or by invoice, never by both, through every change of terms."""
    account = await desk.subscribed()
    meters = desk.billing.meters
    assert meters is not None

    async def use(dollars: int) -> None:
        await desk.books.change_account(account.id, lambda row: row, overdraft=100 * DOLLAR)
        await desk.spend("acct_1", dollars * DOLLAR)
        await meters.seal()
        await meters.send()
        desk.clock.advance(HOUR)

    async def turn(terms: Prepaid | Postpaid) -> None:
        desk_of = Accounts(desk.books, clock=desk.clock, entropy=lambda size: b"e" * size)
        await desk_of.change(account.id, AccountForm({}, terms=terms))

    def reported() -> int:
        return sum(int(event["payload"]["value"]) for event in desk.peer.of("billing.meter_event"))

    await use(1)  # billed
    await turn(Prepaid())
    await desk.give("acct_1", 5 * DOLLAR)
    await use(5)  # paid by credit
    await turn(Postpaid(Pico(DOLLAR)))
    await use(2)  # billed
    await turn(Prepaid())
    await use(1)  # owed, and reported by nobody while terms are prepaid
    await turn(Postpaid(Pico(DOLLAR)))
    await meters.seal()
    await meters.send()
    desk.clock.advance(HOUR)
    desk.peer.close_invoice(str(account.billing.subscription))
    for event in desk.events("invoice.paid"):
        await desk.deliver(event)
    credit = await desk.credit("acct_1")
    assert (reported(), credit.owed, credit.balance) == (4_000_000, 9 * DOLLAR, 0)
    assert (await desk.read("acct_1")).suspended_at is None


async def test_what_was_agreed_is_the_least_that_may_be_owed(desk: Desk) -> None:
    """Terms an operator sets leave a customer the limit of a beginner, and the one grown by what was paid, at least."""
    account = await desk.with_card("acct_1")
    accounts = Accounts(desk.books, clock=desk.clock, entropy=lambda size: b"e" * size)

    async def agree(cents: int) -> int:
        """As the admin API does it."""
        terms = Postpaid(Pico(cents * CENT))
        await desk.billing.subscribe(replace(account, terms=terms))
        changed, _ = await accounts.change(account.id, AccountForm({}, terms=terms))
        await desk.billing.subscribe(changed)
        return (await desk.credit("acct_1")).overdraft

    assert await agree(0) == DOLLAR
    assert await agree(700) == 7 * DOLLAR
    await desk.billing.buy(account, 2_000)
    desk.peer.complete_checkout(desk.peer.of("checkout.session")[0]["id"])
    await desk.deliver_all()
    assert await agree(50) == 3 * DOLLAR  # a dollar, and ten cents for each of twenty
    await accounts.change(account.id, AccountForm({}, terms=Prepaid()))
    assert (await desk.credit("acct_1")).overdraft == 0
    assert len(desk.peer.of("subscription")) == 1


@pytest.mark.parametrize("ended", ["subscription", "customer"])
async def test_who_is_billed_no_more_may_owe_no_more(desk: Desk, ended: str) -> None:
    """A subscription cancelled on the portal ends the trust, in any order and number of copies, and can be begun again."""
    account = await desk.subscribed()
    (old,) = desk.peer.of("subscription")
    await desk.spend("acct_1", DOLLAR // 2)
    kind = "customer.subscription.deleted" if ended == "subscription" else "customer.deleted"
    old["status"] = "canceled"
    desk.peer.emit(kind, old if ended == "subscription" else desk.peer.of("customer")[0])
    for _ in range(3):
        await desk.deliver(desk.events(kind)[0])
    assert (await desk.read("acct_1")).billing.subscription is None
    assert (await desk.credit("acct_1")).headroom == -DOLLAR // 2
    if ended == "subscription":
        await desk.billing.subscribe(account)
        assert (await desk.read("acct_1")).billing.subscription == desk.peer.of("subscription")[1]["id"]
        assert (await desk.credit("acct_1")).overdraft == DOLLAR
        await desk.deliver({**desk.events(kind)[0], "id": "evt_late"})
        assert (await desk.credit("acct_1")).overdraft == DOLLAR
