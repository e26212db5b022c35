"""Customers who pay afterwards: a subscription on a meter, invoices that are paid or not, and which payment it was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import stripe.params
from aiohttp import web

from mppnode.config.secrets import Secret
from mppnode.gateways import stripe_events as events
from mppnode.gateways.stripe_api import StripeGateway
from mppnode.gateways.stripe_events import HANDLED, StripeEvent, WebhookReader
from mppnode.gateways.stripe_faults import StripeFault, StripeFaultKind
from mppnode.gateways.stripe_objects import Invoice, Purpose, Tags
from mppnode.kernel.clock import Clock, ManualClock, SystemClock
from tests.support.stripe_peer import ACCOUNT, KEY, NOW, Mishap, StripePeer, running_peer
from tests.support.stripe_process import peer_process

Kind = StripeFaultKind
WHY = Purpose("acc-1", "postpaid-1")
OURS = Tags("acc-1", "postpaid-1")
SECRET = "whsec_canaryCanaryCanary0123456789"
DAY = 86_400
MICROS = 10_000
"""Of the meter's units, micro-dollars, in a cent."""


def gateway(session: aiohttp.ClientSession, url: str) -> StripeGateway:
    async def sleep(_: float) -> None:
        pass

    return StripeGateway(Secret(KEY), session=session, below=lambda top: 0, log=lambda event, **fields: None, base_url=url, sleep=sleep)


class Hooks:
    """A node's end of the webhooks: reads each as a node does, and keeps what happened."""

    def __init__(self, clock: Clock) -> None:
        self.reader = WebhookReader([Secret(SECRET)], account=ACCOUNT, livemode=False, clock=clock)
        self.heard: list[StripeEvent] = []
        self.url = ""

    async def hear(self, request: web.Request) -> web.Response:
        self.heard.append(self.reader.read(await request.read(), request.headers.get("Stripe-Signature")))
        return web.Response(status=204)


class Desk:
    """A peer with a clock, a gateway to it, and a customer with a card and a subscription."""

    def __init__(self, peer: StripePeer, clock: ManualClock, session: aiohttp.ClientSession) -> None:
        self.peer = peer
        self.clock = clock
        self.session = session
        self.stripe = gateway(session, peer.base_url)
        self.hooks = Hooks(clock)
        self.reports = 0

    async def customer(self, card: str | None = "pm_visa") -> str:
        made = await self.stripe.create_customer(WHY, email=None, key=f"customer-{len(self.peer.objects)}")
        if card is not None:
            await self.stripe.set_default_card(customer=made, payment_method=card, key=f"card-{made}")
        return made

    async def subscribe(self, customer: str, threshold_cents: int | None = None, key: str = "subscribe-1") -> str:
        price = self.peer.metered_price("usage")["id"]
        return await self.stripe.subscribe(WHY, customer=customer, price=price, key=key, threshold_cents=threshold_cents)

    async def use(self, customer: str, cents: int, identifier: str | None = None, at: int | None = None) -> bool:
        self.reports += 1
        ident, when = identifier or f"row-{self.reports}", self.clock.now() if at is None else at
        return await self.stripe.report_usage(event_name="usage", identifier=ident, customer=customer, value=cents * MICROS, timestamp=when)

    async def deliver(self, *kinds: str, times: int = 1) -> list[events.Happening]:
        """What the node read, of the events of these types, in this order."""
        before = len(self.hooks.heard)
        chosen = [event for kind in kinds for event in self.peer.events if event["type"] == kind]
        assert set(await self.peer.deliver(self.session, self.hooks.url, SECRET, chosen if kinds else None, times=times)) <= {204}
        return [event.what for event in self.hooks.heard[before:]]


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    clock = ManualClock(NOW)
    async with running_peer(clock=clock) as peer, aiohttp.ClientSession() as session:
        made = Desk(peer, clock, session)
        app = web.Application()
        app.router.add_post("/hook", made.hooks.hear)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        made.hooks.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
        try:
            yield made
        finally:
            await runner.cleanup()


async def fault_of(call: Awaitable[Any]) -> StripeFault:
    with pytest.raises(StripeFault) as caught:
        await call
    return caught.value


# ------------------------------------------------------------------------------------------------------ subscriptions


async def test_a_subscription_bills_the_saved_card_for_what_the_meter_counts(desk: Desk) -> None:
    """The customer's default card is charged off session, for one metered price, with the account in the metadata."""
    customer = await desk.customer("pm_saved")
    made = desk.peer.objects[await desk.subscribe(customer, threshold_cents=5_000)]
    sent = {name: value for name, value in made["sent"].items() if not name.startswith("metadata")}
    assert desk.peer.objects[customer]["invoice_settings"] == {"default_payment_method": "pm_saved"}
    assert sent == {
        "customer": customer, "items[0][price]": desk.peer.of("price")[0]["id"], "collection_method": "charge_automatically", "off_session": "true",
        "payment_behavior": "error_if_incomplete", "billing_thresholds[amount_gte]": "5000",
    }  # fmt: skip
    assert made["metadata"] == {"mppnode_account": "acc-1", "mppnode_reference": "postpaid-1"}
    assert await desk.subscribe(customer, threshold_cents=5_000) == made["id"], "the same key finds the same subscription"
    assert not desk.peer.objects[await desk.subscribe(customer, key="subscribe-2")]["billing_thresholds"]


async def test_a_subscription_needs_a_card_and_a_price(desk: Desk) -> None:
    """Without a card, with a price that is not there or somebody else's card, nothing is made and the fault is invalid."""
    bare = await desk.customer(None)
    assert (await fault_of(desk.subscribe(bare))).kind is Kind.INVALID
    missing = desk.stripe.subscribe(WHY, customer=await desk.customer(), price="price_404", key="subscribe-3", threshold_cents=None)
    assert (await fault_of(missing)).code == "resource_missing"
    others = desk.stripe.set_default_card(customer=bare, payment_method="pm_others", key="card-key-9")
    assert (await fault_of(others)).code == "resource_missing"
    for cents in (49, 100_000_000):
        with pytest.raises(ValueError, match="cents must be"):
            await desk.subscribe(bare, threshold_cents=cents)
    assert desk.peer.of("subscription") == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"customer": "cus_other"}, "another_subscription"), ({"items": {"data": []}}, "another_subscription"),
        ({"items": {"data": [{"price": "price_other"}]}}, "another_subscription"), ({"status": "incomplete"}, "unexpected_status"),
        ({"status": None}, "unreadable_answer"), ({"items": None}, "unreadable_answer"), ({"id": "sub 1"}, "unreadable_answer"),
    ],
)  # fmt: skip
async def test_an_answer_about_another_subscription_is_not_success(desk: Desk, changes: dict[str, Any], code: str) -> None:
    """Customer, price and status of the answer must be those that were asked for; else the outcome is unknown."""
    customer = await desk.customer()
    desk.peer.override = lambda body: {**body, **changes}
    fault = await fault_of(desk.subscribe(customer))
    assert (fault.kind, fault.code) == (Kind.OUTCOME_UNKNOWN, code)


@pytest.mark.parametrize("changes", [{"id": "cus_other"}, {"invoice_settings": {"default_payment_method": None}}, {"invoice_settings": None}])
async def test_an_answer_about_another_card_is_not_success(desk: Desk, changes: dict[str, Any]) -> None:
    """A default card counts as set only if the answer says it is."""
    customer = await desk.customer(None)
    desk.peer.override = lambda body: {**body, **changes}
    fault = await fault_of(desk.stripe.set_default_card(customer=customer, payment_method="pm_visa", key="card-key-1"))
    assert fault.kind is Kind.OUTCOME_UNKNOWN


async def test_a_subscription_whose_answer_was_lost_is_made_once(desk: Desk) -> None:
    """K9: lost answers end unknown, and a list finds the one subscription when the key is forgotten."""
    customer = await desk.customer()
    desk.peer.mishaps.extend([Mishap.LOSE_ANSWER] * 3)
    assert (await fault_of(desk.subscribe(customer))).kind is Kind.OUTCOME_UNKNOWN
    desk.clock.advance(DAY)  # the key is forgotten: only the list can tell
    (found,) = await desk.stripe.subscriptions_of(customer)
    assert found.prices == tuple(price["id"] for price in desk.peer.of("price"))
    assert (found.customer, found.status, found.tags) == (customer, "active", Tags("acc-1", "postpaid-1"))
    assert await desk.stripe.subscriptions_of(await desk.customer()) == ()


async def test_a_lost_subscription_is_found_by_its_key_within_a_day(desk: Desk) -> None:
    """K9: the same key finds the one subscription for a day, and makes another one after it."""
    customer = await desk.customer()
    desk.peer.mishaps.extend([Mishap.LOSE_ANSWER] * 3)
    assert (await fault_of(desk.subscribe(customer))).kind is Kind.OUTCOME_UNKNOWN
    desk.clock.advance(DAY - 1)
    assert [await desk.subscribe(customer)] == [made["id"] for made in desk.peer.of("subscription")]
    desk.clock.advance(1)
    await desk.subscribe(customer)
    assert len(await desk.stripe.subscriptions_of(customer)) == 2


# ----------------------------------------------------------------------------------------------------------- invoices


async def test_an_invoice_names_its_payment_only_when_asked(desk: Desk) -> None:
    """What was used is invoiced and paid; the payment is found by the invoice, and its refund and dispute by the payment."""
    customer = await desk.customer()
    subscription = await desk.subscribe(customer)
    await desk.use(customer, 700)
    await desk.use(customer, 234)
    desk.clock.advance(DAY)
    closed = desk.peer.close_invoice(subscription)
    (paid,) = await desk.stripe.payments_of(closed["id"])
    assert paid.payment is not None
    assert (paid.invoice, paid.amount, paid.currency, paid.payment.startswith("pi_")) == (closed["id"], 934, "usd", True)
    assert await desk.deliver() == [
        events.PaymentSucceeded(paid.payment, 934, "usd", customer, Tags(None, None)),
        events.InvoicePaid(closed["id"], customer, 934, "usd", subscription, OURS),
    ]
    assert (await desk.stripe.payment(paid.payment)).received == 934
    desk.peer.refund(paid.payment, 34)
    desk.peer.dispute(paid.payment)
    told = await desk.deliver("charge.dispute.created", "charge.refunded")
    assert [getattr(what, "payment", None) for what in told] == [paid.payment] * 2
    assert await desk.stripe.invoices(NOW, NOW + 2 * DAY) == (
        Invoice(closed["id"], "paid", customer, 934, 934, 0, "usd", subscription, 1, NOW + DAY, OURS),
    )
    assert await desk.stripe.invoices(NOW, NOW + DAY) == ()


async def test_a_failed_invoice_is_told_each_time_and_paid_with_another_card(desk: Desk) -> None:
    """Every attempt is told with its number; nothing counts as paid until the invoice is, by the one payment it has."""
    customer = await desk.customer("pm_declined")
    subscription = await desk.subscribe(customer)
    await desk.use(customer, 500)
    desk.clock.advance(DAY)
    invoice = desk.peer.close_invoice(subscription)["id"]
    desk.peer.retry_invoice(invoice)
    assert await desk.deliver("invoice.payment_failed") == [events.InvoiceFailed(invoice, customer, 500, "usd", count, None, subscription, OURS, 500) for count in (1, 2)]
    assert {what.decline_code for what in await desk.deliver("payment_intent.payment_failed") if isinstance(what, events.PaymentFailed)} == {"insufficient_funds"}
    assert await desk.stripe.payments_of(invoice) == ()
    assert await desk.stripe.invoices(NOW, NOW + 2 * DAY) == ()
    await desk.stripe.set_default_card(customer=customer, payment_method="pm_visa", key="new-card-1")
    desk.peer.retry_invoice(invoice)
    assert await desk.deliver("invoice.paid") == [events.InvoicePaid(invoice, customer, 500, "usd", subscription, OURS)]
    assert [paid.amount for paid in await desk.stripe.payments_of(invoice)] == [500]
    assert len(desk.peer.of("payment_intent")) == 1


async def test_what_is_too_little_to_charge_is_carried_on(desk: Desk) -> None:
    """An invoice of less than Stripe charges is paid with nothing, and the next one asks for both."""
    customer = await desk.customer()
    subscription = await desk.subscribe(customer)
    totals = []
    for cents in (49, 1, 0):
        if cents:
            await desk.use(customer, cents)
        desk.clock.advance(DAY)
        totals.append(desk.peer.close_invoice(subscription)["total"])
    assert totals == [49, 1, 0]
    assert [what.amount for what in await desk.deliver("invoice.paid") if isinstance(what, events.InvoicePaid)] == [0, 50, 0]
    invoices = await desk.stripe.invoices(NOW, NOW + 9 * DAY)
    assert [len(await desk.stripe.payments_of(invoice.id)) for invoice in invoices] == [0, 1, 0]


async def test_a_threshold_closes_an_invoice_early_and_late_usage_is_lost(desk: Desk) -> None:
    """Past its threshold a subscription is due; usage of a closed period that comes later is never invoiced."""
    customer = await desk.customer()
    subscription = await desk.subscribe(customer, threshold_cents=1_000)
    await desk.use(customer, 999)
    desk.clock.advance(1)
    assert desk.peer.over_threshold() == []
    await desk.use(customer, 1)
    desk.clock.advance(1)
    assert desk.peer.over_threshold() == [subscription]
    assert desk.peer.close_invoice(subscription)["amount_paid"] == 1_000
    await desk.use(customer, 300, at=NOW)
    desk.clock.advance(DAY)
    assert desk.peer.close_invoice(subscription)["total"] == 0
    meter = desk.peer.of("billing.meter")[0]["id"]
    assert await desk.stripe.reported_usage(meter=meter, customer=customer, since=NOW - 60, until=NOW + 60) == 1_300 * MICROS, "counted, though not billed"


async def test_events_of_an_invoice_come_in_any_order_any_number_of_times(desk: Desk) -> None:
    """Each copy reads the same, in the order it was sent in."""
    customer = await desk.customer()
    subscription = await desk.subscribe(customer)
    await desk.use(customer, 100)
    desk.clock.advance(DAY)
    desk.peer.close_invoice(subscription)
    heard = await desk.deliver("invoice.paid", "payment_intent.succeeded", times=3)
    assert [type(what) for what in heard] == [events.InvoicePaid] * 3 + [events.PaymentSucceeded] * 3
    assert len({event.id for event in desk.hooks.heard}) == 2


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"status": "open"}, "unreadable_answer"), ({"amount_paid": None}, "unreadable_answer"), ({"payment": None}, "unreadable_answer"),
        ({"payment": {"type": "payment_intent", "payment_intent": None}}, "unreadable_answer"), ({"invoice": "in_other"}, "another_invoice"),
        ({"amount_paid": 1.5}, "unreadable_answer"),
    ],
)  # fmt: skip
async def test_a_payment_of_an_invoice_is_read_strictly(desk: Desk, changes: dict[str, Any], code: str) -> None:
    """A payment that is not paid, names no PaymentIntent or is of another invoice is nobody's money."""
    link = {"id": "inpay_1", "object": "invoice_payment", "invoice": "in_1", "status": "paid", "amount_paid": 5, "currency": "usd", "created": NOW}
    link["payment"] = {"type": "payment_intent", "payment_intent": "pi_1"}
    desk.peer.override = lambda body: {"object": "list", "url": "/v1/invoice_payments", "has_more": False, "data": [{**link, **changes}]}
    fault = await fault_of(desk.stripe.payments_of("in_1"))
    assert (fault.kind, fault.code) == (Kind.UNREACHABLE, code)


async def test_money_that_came_another_way_has_no_payment(desk: Desk) -> None:
    """What an operator recorded, or an old charge, is listed with its amount and without a PaymentIntent."""
    for number, kind in enumerate(("payment_record", "charge")):
        desk.peer.add("invoice_payment", "inpay", invoice="in_1", amount_paid=5 + number, currency="usd", status="paid", payment={"type": kind, kind: "x_1"})
    desk.peer.add("invoice_payment", "inpay", invoice="in_2", amount_paid=9, currency="usd", status="paid", payment={"type": "charge"})
    assert [(paid.payment, paid.amount) for paid in await desk.stripe.payments_of("in_1")] == [(None, 6), (None, 5)]


async def test_invoices_are_listed_to_their_end(desk: Desk) -> None:
    """K7: every paid invoice of a period, over as many pages as it takes, and none that is not paid."""
    for number in range(130):
        desk.peer.add(
            "invoice", "in", status="open" if number % 10 == 0 else "paid", customer="cus_1", amount_due=1, amount_paid=1, amount_remaining=0, currency="usd",
            attempt_count=1, parent=None,
        )  # fmt: skip
    found = await desk.stripe.invoices(NOW, NOW + 1)
    assert (len(found), {invoice.status for invoice in found}, {invoice.subscription for invoice in found}) == (117, {"paid"}, {None})


# -------------------------------------------------------------------------------------------------------- the meter


async def test_an_identifier_is_forgotten_after_a_day(desk: Desk) -> None:
    """K12: within a day a second report is told and not made; after it Stripe counts it again, so what it counted is asked first."""
    customer = await desk.customer()
    desk.peer.metered_price("usage")
    assert await desk.use(customer, 5, "row-x", NOW)
    desk.clock.advance(DAY - 1)
    assert not await desk.use(customer, 5, "row-x", NOW)
    desk.clock.advance(1)
    assert await desk.use(customer, 5, "row-x", NOW)
    meter = await desk.stripe.find_meter("usage")
    assert meter is not None
    assert await desk.stripe.reported_usage(meter=meter, customer=customer, since=NOW - 60, until=NOW + 60) == 10 * MICROS


@pytest.mark.parametrize(("age", "code"), [(35 * DAY + 1, "timestamp_too_far_in_past"), (35 * DAY, None), (-300, None), (-301, "timestamp_in_future")])
async def test_usage_is_taken_for_thirty_five_days(desk: Desk, age: int, code: str | None) -> None:
    """Usage of more than 35 days ago, or of more than five minutes ahead, is invalid and says which."""
    customer = await desk.customer()
    report = desk.use(customer, 5, at=NOW - age)
    if code is None:
        assert await report
    else:
        fault = await fault_of(report)
        assert (fault.kind, fault.code) == (Kind.INVALID, code)


# --------------------------------------------------------------------------------------------------------- the peer


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("SubscriptionCreateParamsItem", {"price"}), ("SubscriptionCreateParamsBillingThresholds", {"amount_gte"}),
        ("CustomerUpdateParamsInvoiceSettings", {"default_payment_method"}), ("InvoiceListParamsCreated", {"gte", "lt"}),
    ],
)  # fmt: skip
def test_inner_names_are_published_too(name: str, fields: set[str]) -> None:
    """What stands inside a parameter is Stripe's, as the parameter itself."""
    assert fields <= set(getattr(stripe.params, name).__annotations__)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (stripe.Invoice, {"id", "status", "customer", "amount_due", "amount_paid", "amount_remaining", "currency", "attempt_count", "created", "parent", "last_finalization_error"}),
        (stripe.Invoice.Parent, {"type", "subscription_details"}), (stripe.Invoice.Parent.SubscriptionDetails, {"subscription", "metadata"}),
        (stripe.InvoicePayment, {"id", "invoice", "status", "amount_paid", "currency", "created", "payment"}),
        (stripe.InvoicePayment.Payment, {"type", "payment_intent"}), (stripe.Subscription, {"id", "status", "customer", "items"}),
        (stripe.SubscriptionItem, {"price"}), (stripe.Customer, {"invoice_settings"}), (stripe.Customer.InvoiceSettings, {"default_payment_method"}),
    ],
)  # fmt: skip
def test_what_is_read_is_published(kind: Any, names: set[str]) -> None:
    """Each field the gateway reads is one of the pinned version's objects."""
    assert names <= set(kind.__annotations__)
    assert "payment_intent" not in stripe.Invoice.__annotations__, "an invoice that names its payment needs no second question"


async def test_what_checkout_does_is_told_as_stripe_tells_it(desk: Desk) -> None:
    """A pack and a card, bought and left on Checkout's page, come as events the node handles, with their purpose."""
    pages = {"success_url": "https://node.example.com/ok", "cancel_url": "https://node.example.com/no"}
    customer = await desk.customer(None)
    pack = await desk.stripe.sell_pack(WHY, customer=customer, cents=2_000, name="$20", save_card=True, key="pack-key-1", **pages)
    card = await desk.stripe.save_card(WHY, customer=customer, key="card-key-1", **pages)
    desk.peer.complete_checkout(pack.id, "pm_declined")
    payment = desk.peer.complete_checkout(pack.id)["id"]
    desk.peer.complete_checkout(card.id, "pm_saved")
    tags = Tags("acc-1", "postpaid-1")
    heard = await desk.deliver()
    assert heard[1:] == [
        events.PaymentSucceeded(payment, 2_000, "usd", customer, tags, saved_card="pm_visa"),
        events.PaymentSucceeded(payment, 2_000, "usd", customer, tags, checkout=pack.id),
        events.CardSaved(customer, "pm_saved", tags),
        events.Ignored("checkout.session.completed"),
    ]
    assert isinstance(heard[0], events.PaymentFailed)
    desk.peer.close_dispute(desk.peer.dispute(payment, inquiry=True)["id"], "warning_closed")
    assert {event["type"] for event in desk.peer.events} <= HANDLED


async def test_a_peer_outlives_whoever_talks_to_it(tmp_path: Path) -> None:
    """In a process of its own the peer keeps what it was told, also over its own death, and delivers to whoever listens."""
    state = tmp_path / "peer.json"
    hooks = Hooks(SystemClock())
    async with peer_process(state) as peer, aiohttp.ClientSession() as session:
        node = gateway(session, peer.base_url)
        customer = await node.create_customer(WHY, email=None, key="customer-1")
        await peer.tell("mishaps", names=["LOSE_ANSWER"] * 3)
        charge = {"customer": customer, "payment_method": "pm_visa", "cents": 500, "key": "charge-1"}
        assert (await fault_of(node.charge(WHY, **charge))).kind is Kind.OUTCOME_UNKNOWN
        assert json.loads(state.read_text())["mishaps"] == []
    async with peer_process(state) as peer, aiohttp.ClientSession() as session:
        node = gateway(session, peer.base_url)
        again = await node.charge(WHY, **charge)
        assert again.replayed
        assert [payment["id"] for payment in await peer.of("payment_intent")] == [again.payment]
        await peer.tell("refund", payment=again.payment, cents=200)
        server = await asyncio.start_server(lambda reader, writer: hear(hooks, reader, writer), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
        first, second = [event["id"] for event in (await peer.state())["events"]]
        assert await peer.tell("deliver", url=url, secret=SECRET, ids=[second, first], times=2) == [204] * 4
        server.close()
        with pytest.raises(AssertionError, match="no story"):
            await peer.tell("handle")
    assert [event.id for event in hooks.heard] == [second, second, first, first]
    assert isinstance(hooks.heard[0].what, events.Refunded)


async def hear(hooks: Hooks, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A webhook endpoint of ten lines."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in head.split("\r\n"))}
    hooks.heard.append(hooks.reader.read(await reader.readexactly(int(fields["content-length"])), fields["stripe-signature"]))
    writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
    await writer.drain()
    writer.close()
