"""The gateway against a Stripe on loopback: every call, every way it can end, and what each end says about the money."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import stripe.params

from mppnode.config.secrets import Secret
from mppnode.gateways.stripe_api import Charge, ChargeOutcome, MeterError, StripeGateway
from mppnode.gateways.stripe_faults import StripeFault, StripeFaultKind
from mppnode.gateways.stripe_http import StripeLimits
from mppnode.gateways.stripe_objects import Purpose, Tags
from tests.support.stripe_peer import ACCOUNT, KEY, NOW, SHAPES, Mishap, RefusedError, StripePeer, check, running_peer

Kind = StripeFaultKind
WHY = Purpose("acc-1", "topup-7", {"plan": "small"})
PAGES = {"success_url": "https://node.example.com/ok", "cancel_url": "https://node.example.com/no"}
MAIL = "owner@customer.example"


class Bench:
    """A peer, a gateway, what was logged and how long it would have slept."""

    def __init__(self, peer: StripePeer, session: aiohttp.ClientSession) -> None:
        self.peer = peer
        self.session = session
        self.lines: list[str] = []
        self.slept: list[float] = []
        self.stripe = self.gateway()

    def gateway(self, **options: Any) -> StripeGateway:
        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)

        def log(event: str, **fields: object) -> None:
            self.lines.append(f"{event} {fields}")

        secret = Secret(options.pop("secret", KEY))
        options = {"base_url": self.peer.base_url, "limits": StripeLimits(), **options}
        return StripeGateway(secret, session=self.session, below=lambda top: top - 1, log=log, sleep=sleep, **options)

    async def customer(self) -> str:
        return await self.stripe.create_customer(WHY, email=MAIL, key="customer-1")

    async def charge(self, customer: str, card: str = "pm_visa", key: str = "charge-1", cents: int = 500) -> Charge:
        return await self.stripe.charge(WHY, customer=customer, payment_method=card, cents=cents, key=key)


@asynccontextmanager
async def bench_of(peer: StripePeer) -> AsyncIterator[Bench]:
    async with aiohttp.ClientSession() as session:
        yield Bench(peer, session)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_peer() as peer, bench_of(peer) as made:
        yield made


async def fault_of(call: Awaitable[Any]) -> StripeFault:
    with pytest.raises(StripeFault) as caught:
        await call
    return caught.value


# -------------------------------------------------------------------------------------------------------- the calls


async def test_the_key_is_asked_whose_it_is(bench: Bench) -> None:
    """A node learns its account at start, and does not start with a key of the other mode (K8)."""
    assert (await bench.stripe.start(livemode=False)).account == ACCOUNT
    fault = await fault_of(bench.stripe.start(livemode=True))
    assert (fault.kind, fault.code) == (Kind.REFUSED, "livemode_mismatch")


async def test_a_customer_carries_its_account(bench: Bench) -> None:
    """What a node makes says for whom, in metadata that its webhooks bring back."""
    customer = await bench.customer()
    made = bench.peer.objects[customer]
    assert made["metadata"] == {"mppnode_account": "acc-1", "mppnode_reference": "topup-7", "plan": "small"}
    assert made["email"] == MAIL


async def test_a_pack_is_sold_for_its_price_and_may_keep_the_card(bench: Bench) -> None:
    """The price, the reference and the wish to keep the card reach Checkout and its PaymentIntent."""
    customer = await bench.customer()
    page = await bench.stripe.sell_pack(WHY, customer=customer, cents=2_000, name="$20 credit", save_card=True, key="pack-key-1", **PAGES)
    sent = bench.peer.objects[page.id]["sent"]
    assert sent["line_items[0][price_data][unit_amount]"] == "2000"
    assert sent["client_reference_id"] == "topup-7" == sent["payment_intent_data[metadata][mppnode_reference]"]
    assert sent["payment_intent_data[setup_future_usage]"] == "off_session"
    assert page.url.startswith("https://checkout.example.com/")
    await bench.stripe.sell_pack(WHY, customer=customer, cents=2_000, name="$20 credit", save_card=False, key="pack-key-2", **PAGES)
    assert "payment_intent_data[setup_future_usage]" not in bench.peer.seen[-1].params


async def test_a_card_is_left_and_managed(bench: Bench) -> None:
    """A card is saved without a payment, and a portal opened for its owner."""
    customer = await bench.customer()
    page = await bench.stripe.save_card(WHY, customer=customer, key="card-key-1", **PAGES)
    assert bench.peer.objects[page.id]["sent"]["mode"] == "setup"
    url = await bench.stripe.open_portal(customer=customer, return_url="https://node.example.com/account", key="portal-1")
    assert url == f"https://billing.example.com/{customer}"


async def test_a_charge_succeeds_waits_or_asks_for_its_owner(bench: Bench) -> None:
    """The three ends of an off-session charge that are not a refusal are told apart."""
    customer = await bench.customer()
    ends = {card: (await bench.charge(customer, card, key=f"charge-{card}")).outcome for card in ("pm_visa", "pm_slow", "pm_action", "pm_auth")}
    assert ends == {
        "pm_visa": ChargeOutcome.SUCCEEDED,
        "pm_slow": ChargeOutcome.PROCESSING,
        "pm_action": ChargeOutcome.REQUIRES_ACTION,
        "pm_auth": ChargeOutcome.REQUIRES_ACTION,
    }


async def test_a_declined_charge_says_which_way(bench: Bench) -> None:
    """A declined card is a fault with both of Stripe's codes and the payment, and none of its words."""
    fault = await fault_of(bench.charge(await bench.customer(), "pm_declined"))
    assert (fault.kind, fault.code, fault.decline_code) == (Kind.DECLINED, "card_declined", "insufficient_funds")
    assert fault.payment is not None
    assert bench.peer.objects[fault.payment]["status"] == "requires_payment_method"


async def test_usage_is_reported_once_per_identifier(bench: Bench) -> None:
    """K12: a second report of an identifier is told, not made, whether Stripe replays it or refuses the duplicate."""
    customer = await bench.customer()
    usage = {"event_name": "inference_usage", "identifier": "row-1", "customer": customer, "value": 1_234, "timestamp": NOW}
    assert await bench.stripe.report_usage(**usage)
    assert not await bench.stripe.report_usage(**usage)
    bench.peer.answers.clear()  # the key is forgotten, the identifier is not
    assert not await bench.stripe.report_usage(**usage)
    span = {"meter": "mtr_1", "customer": customer, "since": NOW - 60, "until": NOW + 60}
    assert await bench.stripe.reported_usage(**span) == 1_234
    assert bench.peer.of("billing.meter_event")[0]["payload"]["value"] == "1234"
    # When Stripe has forgotten both, only what it has counted tells that the report was made.
    forgotten = bench.peer.of("billing.meter_event")[0]
    forgotten["identifier"] = "forgotten"
    assert await bench.stripe.reported_usage(**span) == usage["value"]


async def test_a_meter_is_found_by_name_and_tells_its_errors(bench: Bench) -> None:
    """The meter of an event name and the details of an error report can be asked for."""
    meter = bench.peer.add("billing.meter", "mtr", event_name="inference_usage", status="active")
    assert await bench.stripe.find_meter("inference_usage") == meter["id"]
    assert await bench.stripe.find_meter("other") is None
    kinds = [{"code": "timestamp_too_far_in_past", "error_count": 2, "sample_errors": [{"error_message": MAIL, "request": {"identifier": "row-9"}}]}]
    event = bench.peer.add(
        "v2.core.event", "evt", type="v1.billing.meter.error_report_triggered",
        data={"reason": {"error_count": 2, "error_types": kinds}}, related_object={"id": meter["id"], "type": "billing.meter", "url": "/x"},
    )
    event["created"] = "2026-10-28T00:00:00.000Z"
    assert await bench.stripe.meter_errors(event["id"]) == (MeterError("timestamp_too_far_in_past", 2, ("row-9",)),)


async def test_a_period_is_listed_to_its_end(bench: Bench) -> None:
    """K7: reconciliation sees every payment, refund and dispute of a period, over as many pages as it takes."""
    customer = await bench.customer()
    for number in range(230):
        bench.peer.add(
            "payment_intent", "pi", amount=100 + number, amount_received=100, currency="usd", customer=customer, status="succeeded",
            metadata={"mppnode_account": "acc-1", "mppnode_reference": f"n{number}"}, latest_charge=None, payment_method=None,
        )
    refund = bench.peer.add("refund", "re", amount=40, currency="usd", payment_intent="pi_000002", charge="ch_1", status="succeeded")
    dispute = bench.peer.add("dispute", "du", amount=100, currency="usd", payment_intent="pi_000003", charge="ch_2", status="warning_needs_response", reason="fraudulent")
    found = await bench.stripe.payments(NOW, NOW + 10_000)
    assert len({payment.id for payment in found}) == 230
    assert found[0].tags == Tags("acc-1", "n229")
    assert [payment.amount for payment in await bench.stripe.payments(NOW + 2, NOW + 5)] == [102, 101, 100]
    assert len(await bench.stripe.payments(NOW, NOW + 10_000, customer="cus_999")) == 0
    assert await bench.stripe.refunds(NOW, NOW + 10_000) == await bench.stripe.refunds_of("pi_000002") == (await bench.stripe.refund(refund["id"]),)
    assert (await bench.stripe.disputes(NOW, NOW + 10_000))[0] == await bench.stripe.dispute(dispute["id"])
    assert (await bench.stripe.dispute(dispute["id"])).inquiry
    small = bench.gateway(limits=StripeLimits(pages=2))
    assert (await fault_of(small.payments(NOW, NOW + 10_000))).code == "too_many_objects"


@pytest.mark.parametrize("cents", [-1, 0, 49, 100_000_000])
async def test_amounts_stripe_does_not_take_are_not_sent(bench: Bench, cents: int) -> None:
    """A mistake in an amount is the caller's, and nobody is asked."""
    with pytest.raises(ValueError, match="cents must be"):
        await bench.charge("cus_1", cents=cents)
    assert bench.peer.seen == []


@pytest.mark.parametrize("key", ["", "short", "k" * 201, "with space", "line\nbreak-"])
async def test_a_key_that_would_not_arrive_whole_is_not_sent(bench: Bench, key: str) -> None:
    """An idempotency key is one header of printable characters."""
    with pytest.raises(ValueError, match="idempotency key"):
        await bench.charge("cus_1", key=key)
    assert bench.peer.seen == []


# --------------------------------------------------------------------------------------------------------- the ends

WAYS = [
    # mishaps in order, kind of a write (None: it ends well), payments made, requests sent
    ([Mishap.LOSE_ANSWER], None, 1, 2),
    ([Mishap.LOSE_REQUEST], None, 1, 2),
    ([Mishap.BUSY], None, 1, 2),
    ([Mishap.IN_USE], None, 1, 2),
    ([Mishap.BROKEN], None, 1, 2),
    ([Mishap.LOSE_ANSWER] * 3, Kind.OUTCOME_UNKNOWN, 1, 3),
    ([Mishap.LOSE_REQUEST] * 3, Kind.OUTCOME_UNKNOWN, 0, 3),
    ([Mishap.BROKEN] * 3, Kind.OUTCOME_UNKNOWN, 0, 3),
    ([Mishap.IN_USE] * 3, Kind.OUTCOME_UNKNOWN, 0, 3),
    ([Mishap.BROKEN_AFTER], Kind.OUTCOME_UNKNOWN, 1, 3),
    ([Mishap.BUSY] * 3, Kind.UNREACHABLE, 0, 3),
    ([Mishap.LOSE_ANSWER, Mishap.BUSY, Mishap.BUSY], Kind.OUTCOME_UNKNOWN, 1, 3),
    ([Mishap.BROKEN_FOR_GOOD], Kind.OUTCOME_UNKNOWN, 0, 1),
    ([Mishap.LOCKED_OUT], Kind.REFUSED, 0, 1),
    ([Mishap.LOSE_ANSWER, Mishap.LOCKED_OUT], Kind.OUTCOME_UNKNOWN, 1, 2),
    ([Mishap.GARBAGE], Kind.OUTCOME_UNKNOWN, 1, 1),
    ([Mishap.HUGE], Kind.OUTCOME_UNKNOWN, 1, 1),
    ([Mishap.REDIRECT], Kind.OUTCOME_UNKNOWN, 0, 1),
]


@pytest.mark.parametrize(("mishaps", "kind", "made", "sent"), WAYS, ids=lambda value: "+".join(item.name for item in value) if isinstance(value, list) else "")
async def test_every_end_of_a_charge_says_what_is_known(bench: Bench, mishaps: list[Mishap], kind: Kind | None, made: int, sent: int) -> None:
    """However a charge goes wrong it is made at most once, and never called undone when it may be done."""
    customer = await bench.customer()
    before = len(bench.peer.seen)
    bench.peer.mishaps.extend(mishaps)
    if kind is None:
        assert (await bench.charge(customer)).outcome is ChargeOutcome.SUCCEEDED
    else:
        assert (await fault_of(bench.charge(customer))).kind is kind
    requests = bench.peer.seen[before:]
    assert len(requests) == sent
    assert len({request.key for request in requests}) == 1
    assert len(bench.peer.of("payment_intent")) == made
    assert bench.slept == [1.0, 2.0][: sent - 1]


async def test_an_unknown_charge_is_found_by_its_key(bench: Bench) -> None:
    """K9: after an unknown end the same key finds the one payment, marked as a replay, and a list has it too."""
    customer = await bench.customer()
    bench.peer.mishaps.extend([Mishap.LOSE_ANSWER] * 3)
    assert (await fault_of(bench.charge(customer))).kind is Kind.OUTCOME_UNKNOWN
    found = await bench.charge(customer)
    assert found.replayed
    assert [payment["id"] for payment in bench.peer.of("payment_intent")] == [found.payment]
    assert [payment.id for payment in await bench.stripe.payments(NOW, NOW + 100, customer=customer)] == [found.payment]


async def test_a_silent_stripe_is_an_unknown_outcome(bench: Bench) -> None:
    """No answer within the limit says nothing about the effect, which the repeat then finds."""
    customer = await bench.customer()
    bench.peer.mishaps.append(Mishap.SILENT)
    hasty = bench.gateway(limits=StripeLimits(timeout_s=0.3, attempts=1))
    charge = {"customer": customer, "payment_method": "pm_visa", "cents": 500, "key": "charge-1"}
    assert (await fault_of(hasty.charge(WHY, **charge))).kind is Kind.OUTCOME_UNKNOWN
    assert (await bench.stripe.charge(WHY, **charge)).replayed


async def test_nobody_there_is_unreachable(bench: Bench, unused_tcp_port: int) -> None:
    """A connection that was refused carried nothing: the charge is not unknown."""
    nowhere = bench.gateway(base_url=f"http://127.0.0.1:{unused_tcp_port}")
    fault = await fault_of(nowhere.charge(WHY, customer="cus_1", payment_method="pm_visa", cents=500, key="charge-1"))
    assert (fault.kind, fault.code) == (Kind.UNREACHABLE, "no_connection")
    assert len(bench.slept) == 2


@pytest.mark.parametrize("mishap", [Mishap.LOSE_ANSWER, Mishap.BROKEN, Mishap.GARBAGE, Mishap.REDIRECT])
async def test_a_question_without_an_answer_is_unreachable(bench: Bench, mishap: Mishap) -> None:
    """Reading changes nothing, so a read is never an unknown outcome."""
    bench.peer.mishaps.extend([mishap] * 6)  # aiohttp repeats a GET once by itself when a kept connection breaks
    assert (await fault_of(bench.stripe.payments(NOW, NOW + 10))).kind is Kind.UNREACHABLE


async def test_the_same_key_for_another_amount_is_invalid(bench: Bench) -> None:
    """Stripe compares what a key was used for; the second charge is refused and not made."""
    customer = await bench.customer()
    await bench.charge(customer)
    fault = await fault_of(bench.charge(customer, cents=600))
    assert (fault.kind, fault.code) == (Kind.INVALID, "idempotency_error")
    assert len(bench.peer.of("payment_intent")) == 1


async def test_one_key_for_two_calls_means_two_things(bench: Bench) -> None:
    """A caller that derives keys from one id may use it for a customer and for a charge."""
    customer = await bench.stripe.create_customer(WHY, email=None, key="same-key-1")
    assert (await bench.charge(customer, key="same-key-1")).outcome is ChargeOutcome.SUCCEEDED
    assert await bench.stripe.create_customer(WHY, email=None, key="same-key-1") == customer


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"amount": 501}, Kind.OUTCOME_UNKNOWN),
        ({"currency": "eur"}, Kind.OUTCOME_UNKNOWN),
        ({"customer": "cus_other"}, Kind.OUTCOME_UNKNOWN),
        ({"amount": 500.0}, Kind.OUTCOME_UNKNOWN),
        ({"amount_received": 499}, Kind.OUTCOME_UNKNOWN),
        ({"status": "requires_capture"}, Kind.OUTCOME_UNKNOWN),
        ({"status": None}, Kind.OUTCOME_UNKNOWN),
        ({"id": "pi_/../x"}, Kind.OUTCOME_UNKNOWN),
        ({"status": "canceled"}, Kind.DECLINED),
        ({"status": "requires_payment_method", "last_payment_error": {"code": "card_declined"}}, Kind.DECLINED),
    ],
)
async def test_an_answer_about_another_payment_is_not_success(bench: Bench, changes: dict[str, Any], kind: Kind) -> None:
    """K9: amount, currency, customer and status of the answer must be those of the charge that was asked for."""
    customer = await bench.customer()
    bench.peer.override = lambda body: {**body, **changes}
    assert (await fault_of(bench.charge(customer))).kind is kind


ODD: list[dict[str, Any]] = [
    {}, {"object": "list"}, {"object": "list", "data": 7}, {"object": "list", "data": [7], "has_more": False}, {"object": "list", "data": [], "has_more": "no"},
    {"object": 7}, {"object": []}, {"object": "payment_intent", "metadata": 7}, {"object": "customer", "sources": [[[]]], "id": {}}, {"error": "no"},
    {"object": "v2.core.event", "data": [], "type": 7}, {"object": "v2.core.event", "type": "v1.billing.meter.error_report_triggered", "data": 7},
    {"object": "list", "data": [{"object": "list", "data": {"object": "event"}}], "url": 7, "has_more": False}, {"deleted": "yes", "object": "account"},
    {"object": "billing.meter_event_summary", "aggregated_value": 1.5}, {"object": "list", "data": [{"id": "mes_1", "aggregated_value": 1.5}], "has_more": False},
]


@pytest.mark.parametrize("answer", ODD, ids=str)
async def test_an_answer_of_any_shape_ends_in_a_fault(bench: Bench, answer: dict[str, Any]) -> None:
    """Whatever stands between the node and Stripe answers, the caller sees one kind of fault."""
    customer = await bench.customer()
    event = bench.peer.add("v2.core.event", "evt")
    price = bench.peer.metered_price("usage")["id"]
    bench.peer.override = lambda _: answer
    span = {"meter": "mtr_1", "customer": customer, "since": NOW, "until": NOW + 60}
    usage = {"event_name": "usage", "identifier": "row-1", "customer": customer, "value": 1, "timestamp": NOW}
    reads: list[Awaitable[Any]] = [
        bench.stripe.start(livemode=False), bench.stripe.payments(NOW, NOW + 9), bench.stripe.meter_errors(event["id"]), bench.stripe.reported_usage(**span),
        bench.stripe.payment(customer), bench.stripe.invoices(NOW, NOW + 9), bench.stripe.payments_of("in_1"), bench.stripe.subscriptions_of(customer),
    ]
    writes: list[Awaitable[Any]] = [
        bench.charge(customer), bench.stripe.create_customer(WHY, email=None, key="customer-2"), bench.stripe.report_usage(**usage),
        bench.stripe.open_portal(customer=customer, return_url=PAGES["success_url"], key="portal-1"),
        bench.stripe.save_card(WHY, customer=customer, key="card-key-1", **PAGES),
        bench.stripe.set_default_card(customer=customer, payment_method="pm_visa", key="default-1"),
        bench.stripe.subscribe(WHY, customer=customer, price=price, key="subscribe-1", threshold_cents=None),
    ]
    for read in reads:
        assert (await fault_of(read)).kind is Kind.UNREACHABLE
    for write in writes:
        assert (await fault_of(write)).kind is Kind.OUTCOME_UNKNOWN


async def test_what_stripe_refuses_is_told_apart(bench: Bench) -> None:
    """A refused key and an invalid request are not repeated, and are different faults."""
    wrong = bench.gateway(secret="sk_test_wrongWrongWrongWrong")
    assert (await fault_of(wrong.start(livemode=False))).kind is Kind.REFUSED
    fault = await fault_of(bench.charge("cus_404"))
    assert (fault.kind, fault.code) == (Kind.INVALID, "resource_missing")
    assert len(bench.peer.seen) == 2


# ---------------------------------------------------------------------------------------------------------- secrets


async def test_no_secret_leaves_by_a_fault_a_log_or_a_repr(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the key nor a customer's address is in any fault, its causes, our log, the package's, or a repr."""
    caplog.set_level(logging.INFO)
    customer = await bench.customer()
    calls: list[tuple[Callable[[], Awaitable[Any]], list[Mishap]]] = [
        (lambda: bench.charge(customer, "pm_declined", key="declined-1"), []),
        (lambda: bench.charge("cus_404", key="missing-1"), []),
        (lambda: bench.charge(customer, key="garbage-1"), [Mishap.GARBAGE]),
        (lambda: bench.charge(customer, key="broken-1"), [Mishap.BROKEN] * 3),
        (lambda: bench.charge(customer, key="lost-key-1"), [Mishap.LOSE_ANSWER] * 3),
        (lambda: bench.charge(customer, key="busy-key-1"), [Mishap.BUSY] * 3),
        (lambda: bench.stripe.create_customer(WHY, email="not an address", key="bad-mail-1"), []),
    ]
    texts = [repr(bench.stripe), str(vars(bench.stripe))]
    for call, mishaps in calls:
        bench.peer.mishaps.extend(mishaps)
        fault = await fault_of(call())
        chain: BaseException | None = fault
        while chain is not None:
            texts += [str(chain), repr(chain), repr(vars(chain))]
            chain = chain.__cause__ or chain.__context__
    texts += [*bench.lines, caplog.text]
    for text in texts:
        assert KEY not in text
        assert MAIL not in text
        assert "upstream text" not in text
    assert sum("stripe_call_failed" in line for line in bench.lines) >= len(calls)


async def test_stripe_hears_nothing_about_the_machine(bench: Bench) -> None:
    """The package's reports on operating system and timings are not sent; the pinned version and the key are."""
    await bench.stripe.start(livemode=False)
    for seen in bench.peer.seen:
        names = {name.lower() for name in seen.headers}
        assert not names & {"x-stripe-client-user-agent", "x-stripe-client-telemetry"}
        assert seen.headers["Authorization"] == f"Bearer {KEY}"


# --------------------------------------------------------------------------------------------------------- the peer


@pytest.mark.parametrize(("endpoint", "shape"), [(key, shape) for key, shape in SHAPES.items() if shape.source], ids=lambda value: str(value[1]) if isinstance(value, tuple) else "")
def test_the_peer_takes_what_stripe_publishes(endpoint: tuple[str, str], shape: Any) -> None:
    """Each name the peer takes is published by Stripe for that endpoint, and all that is required is asked for."""
    where: Any = stripe.params
    for part in shape.source.split("."):
        where = getattr(where, part)
    names = {name.partition("[")[0] for name in shape.params}
    assert names <= set(where.__annotations__), endpoint
    assert where.__required_keys__ <= {name.partition("[")[0] for name in shape.must} | {"payload"}


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"amount": "500"}, "currency"),
        ({"amount": "500", "currency": "usd", "colour": "red"}, "colour"),
        ({"amount": "5.00", "currency": "usd"}, "amount"),
        ({"amount": "500", "currency": "usd", "payment_method_types[0]": "card"}, "payment_method_types[0]"),
    ],
)
def test_the_peer_refuses_what_is_unknown_or_missing(params: dict[str, str], param: str) -> None:
    """A parameter that is not published, or not there, is refused by name."""
    with pytest.raises(RefusedError) as caught:
        check(SHAPES["POST", "/v1/payment_intents"], params)
    assert caught.value.error["param"] == param
