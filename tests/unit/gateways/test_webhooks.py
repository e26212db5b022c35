"""Stripe's webhooks: what is let in, what it says, and everything that is not (K5, K6, K7, K8)."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mppnode.config.secrets import Secret
from mppnode.gateways import stripe_events as events
from mppnode.gateways.stripe_events import WebhookFault, WebhookReader, WebhookReason
from mppnode.gateways.stripe_objects import Tags
from mppnode.kernel.clock import ManualClock
from tests.support.stripe_peer import ACCOUNT, NOW, sign

SECRET = "whsec_canaryCanaryCanary0123456789"
OLD = "whsec_oldoldoldoldoldoldold"
TAGS = {"mppnode_account": "acc-1", "mppnode_reference": "topup-7"}
READ = Tags("acc-1", "topup-7")


def reader(*secrets: str, livemode: bool = False, now: int = NOW) -> WebhookReader:
    return WebhookReader([Secret(text) for text in secrets or (SECRET,)], account=ACCOUNT, livemode=livemode, clock=ManualClock(now))


def event(kind: str, thing: dict[str, Any] | None = None, **changes: Any) -> bytes:
    body = {
        "id": "evt_1", "object": "event", "type": kind, "created": NOW - 5, "livemode": False, "api_version": "2026-10-28.endive",
        "data": {"object": thing if thing is not None else {"id": "cus_1"}}, "pending_webhooks": 1, "request": None,
    }
    return json.dumps(body | changes).encode()


def read(body: bytes, secret: str = SECRET) -> events.StripeEvent:
    return reader().read(body, sign(body, secret, NOW))


def refused(body: bytes, header: str | None, by: WebhookReader | None = None) -> WebhookFault:
    with pytest.raises(WebhookFault) as caught:
        (by or reader()).read(body, header)
    return caught.value


BODY = event("customer.deleted")
HEADER = sign(BODY, SECRET, NOW)

# ------------------------------------------------------------------------------------------------------- signatures


def test_a_signed_event_keeps_its_id_and_time() -> None:
    """What a ledger needs to take an event once, in any order, is there (K6, K7)."""
    assert read(BODY) == events.StripeEvent("evt_1", "customer.deleted", NOW - 5, events.CustomerDeleted("cus_1"))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, WebhookReason.NO_SIGNATURE),
        ("", WebhookReason.NO_SIGNATURE),
        (f"t={NOW}", WebhookReason.NO_SIGNATURE),
        (HEADER.partition(",")[2], WebhookReason.NO_SIGNATURE),
        (HEADER.replace("v1=", "v0="), WebhookReason.NO_SIGNATURE),
        (HEADER.replace("v1=", "V1="), WebhookReason.NO_SIGNATURE),
        (f"{HEADER},t={NOW}", WebhookReason.NO_SIGNATURE),
        (HEADER.replace("t=", "t=+"), WebhookReason.NO_SIGNATURE),
        (HEADER.replace("t=", "t= "), WebhookReason.NO_SIGNATURE),
        (HEADER.replace("t=", "t=-"), WebhookReason.NO_SIGNATURE),
        (HEADER.replace("t=1", "t=\u0661"), WebhookReason.NO_SIGNATURE),
        (HEADER + ",v1=" * 17, WebhookReason.NO_SIGNATURE),
        (HEADER + "," + "x" * 3000, WebhookReason.NO_SIGNATURE),
        (HEADER.replace("t=", "t=0"), WebhookReason.BAD_SIGNATURE),
        (HEADER[:-1], WebhookReason.BAD_SIGNATURE),
        (HEADER + "00", WebhookReason.BAD_SIGNATURE),
        (HEADER.replace("v1=", "v1=\u00e9"), WebhookReason.BAD_SIGNATURE),
        (f"t={NOW},v1={'0' * 64}", WebhookReason.BAD_SIGNATURE),
        (sign(BODY, "", NOW), WebhookReason.BAD_SIGNATURE),
        (sign(BODY, OLD, NOW), WebhookReason.BAD_SIGNATURE),
        (sign(BODY + b" ", SECRET, NOW), WebhookReason.BAD_SIGNATURE),
    ],
)
def test_a_header_that_is_not_stripes_is_refused(header: str | None, reason: WebhookReason) -> None:
    """K5: no signature, another scheme, two times, a huge header, an empty secret: each is refused for what it is."""
    assert refused(BODY, header).reason is reason


@pytest.mark.parametrize(("age", "good"), [(0, True), (300, True), (301, False), (-300, True), (-301, False), (-(10**6), False)])
def test_a_signature_is_good_for_five_minutes_both_ways(age: int, good: bool) -> None:
    """K5, K6: 300 seconds, into the past and into the future, to the second."""
    header = sign(BODY, SECRET, NOW)
    at = reader(now=NOW + age)
    if good:
        assert at.read(BODY, header).id == "evt_1"
    else:
        assert refused(BODY, header, at).reason is WebhookReason.STALE


def test_secrets_roll_without_a_gap() -> None:
    """While a secret is rolled, either one and a header with both are good; afterwards the old one is not."""
    both = reader(SECRET, OLD)
    two = f"{sign(BODY, OLD, NOW)},v1={HEADER.rpartition('=')[2]}"
    for header in (HEADER, sign(BODY, OLD, NOW), two, HEADER + f",v1={'0' * 64}", f"t={NOW},v1={'f' * 64},v0=xyz,{HEADER.partition(',')[2]}"):
        assert both.read(BODY, header).id == "evt_1"
    assert reader().read(BODY, two).id == "evt_1"
    assert refused(BODY, sign(BODY, OLD, NOW)).reason is WebhookReason.BAD_SIGNATURE


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_short", "whsec_" + " " * 40, "fifteen-letters"])
def test_a_weak_secret_makes_no_reader(secret: str) -> None:
    """K5: with an empty or short secret there is nothing to verify with, and nothing starts."""
    with pytest.raises(ValueError, match="not empty or short"):
        reader(SECRET, secret)
    with pytest.raises(ValueError, match="not empty or short"):
        WebhookReader([], account=ACCOUNT, livemode=False, clock=ManualClock(NOW))


@given(st.integers(0, len(BODY) - 1), st.integers(1, 255))
def test_any_changed_byte_of_the_body_is_refused(index: int, change: int) -> None:
    """K5: one byte of the body, anywhere, by any amount."""
    body = BODY[:index] + bytes([BODY[index] ^ change]) + BODY[index + 1 :]
    assert refused(body, HEADER).reason is WebhookReason.BAD_SIGNATURE


@given(st.integers(HEADER.index("v1=") + 3, len(HEADER) - 1), st.characters(codec="ascii"))
def test_any_changed_character_of_the_signature_is_refused(index: int, change: str) -> None:
    """K5: one character of the signature, or its time, changed to any other."""
    if change != HEADER[index]:
        refused(BODY, HEADER[:index] + change + HEADER[index + 1 :])
    digit = str((int(HEADER[2 + index % 10]) + 1) % 10)
    time = HEADER[: 2 + index % 10] + digit + HEADER[3 + index % 10 :]
    assert refused(BODY, time).reason is WebhookReason.BAD_SIGNATURE


def test_forged_headers_are_never_let_in() -> None:
    """K5: 20,000 headers of the right form and random content open nothing."""
    draw = random.Random(5)
    one = reader(SECRET, OLD)
    for _ in range(20_000):
        forged = f"t={NOW + draw.randrange(-300, 300)},v1={draw.getrandbits(256):064x}"
        assert refused(BODY, forged, one).reason is WebhookReason.BAD_SIGNATURE


@given(st.binary(max_size=200))
def test_nothing_is_parsed_before_the_signature_holds(body: bytes) -> None:
    """K5: without a signature a body is not even looked at; with one, whatever it is gives an event or a typed refusal."""
    assert refused(body, f"t={NOW},v1={'a' * 64}").reason is WebhookReason.BAD_SIGNATURE
    assert refused(body, sign(body, SECRET, NOW)).reason is WebhookReason.MALFORMED


def test_a_body_has_a_limit_before_it_is_hashed() -> None:
    """A body of more than 256 KiB is refused by its length alone."""
    largest = BODY[:-1] + b" " * ((256 << 10) - len(BODY)) + b"}"
    assert read(largest).id == "evt_1"
    assert refused(largest + b" ", None).reason is WebhookReason.TOO_LARGE


# ------------------------------------------------------------------------------------------------------------ whose


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"livemode": True}, WebhookReason.WRONG_MODE),
        ({"account": "acct_other"}, WebhookReason.WRONG_ACCOUNT),
        ({"context": "acct_other"}, WebhookReason.WRONG_ACCOUNT),
        ({"account": ""}, WebhookReason.WRONG_ACCOUNT),
        ({"account": [ACCOUNT]}, WebhookReason.WRONG_ACCOUNT),
        ({"livemode": None}, WebhookReason.MALFORMED),
        ({"livemode": 0}, WebhookReason.MALFORMED),
    ],
)
def test_other_modes_and_accounts_are_refused(changes: dict[str, Any], reason: WebhookReason) -> None:
    """K8: a test event does not reach a live node, nor does another account's, though the signature is right."""
    body = event("customer.deleted", **changes)
    assert refused(body, sign(body, SECRET, NOW)).reason is reason
    assert read(event("customer.deleted", account=ACCOUNT, context=None)).id == "evt_1"


# ------------------------------------------------------------------------------------------------------------- what

INTENT = {
    "id": "pi_1", "object": "payment_intent", "amount": 2000, "amount_received": 2000, "currency": "usd", "customer": "cus_1", "status": "succeeded",
    "payment_method": "pm_1", "latest_charge": "ch_1", "metadata": TAGS, "created": NOW, "livemode": False, "setup_future_usage": None, "last_payment_error": None,
}
SESSION = {
    "id": "cs_1", "object": "checkout.session", "mode": "payment", "payment_status": "paid", "payment_intent": "pi_1", "amount_total": 2000, "currency": "usd",
    "customer": "cus_1", "metadata": TAGS, "client_reference_id": "topup-7",
}
SETUP = {"id": "seti_1", "object": "setup_intent", "customer": "cus_1", "payment_method": "pm_1", "usage": "off_session", "metadata": TAGS}
CHARGE = {"id": "ch_1", "object": "charge", "payment_intent": "pi_1", "amount": 2000, "amount_refunded": 500, "currency": "usd", "customer": "cus_1", "metadata": TAGS}
REFUND = {"id": "re_1", "object": "refund", "charge": "ch_1", "payment_intent": "pi_1", "amount": 500, "currency": "usd", "status": "failed"}
DISPUTE = {"id": "du_1", "object": "dispute", "charge": "ch_1", "payment_intent": "pi_1", "amount": 2000, "currency": "usd", "reason": "fraudulent", "status": "needs_response", "created": NOW}
INVOICE = {
    "id": "in_1", "object": "invoice", "status": "paid", "customer": "cus_1", "currency": "usd", "amount_due": 2000, "amount_paid": 2000, "amount_remaining": 0,
    "attempt_count": 1, "created": NOW, "last_finalization_error": None,
    "parent": {"type": "subscription_details", "quote_details": None, "subscription_details": {"subscription": "sub_1", "metadata": TAGS}},
}
OPEN = INVOICE | {"status": "open", "amount_paid": 500, "amount_remaining": 1500, "attempt_count": 2}
QUOTED = {"type": "quote_details", "quote_details": {"quote": "qt_1"}, "subscription_details": None}
PAID = events.PaymentSucceeded("pi_1", 2000, "usd", "cus_1", READ)
OPENED = events.DisputeOpened("du_1", "ch_1", "pi_1", 2000, "usd", "fraudulent", inquiry=False)
FAILED = events.PaymentFailed("pi_1", 2000, "usd", "cus_1", READ, None, None)
CARD_ERROR = {"code": "card_declined", "decline_code": "insufficient_funds", "message": "words"}

STORIES: list[tuple[str, dict[str, Any], events.Happening]] = [
    ("checkout.session.completed", SESSION, events.PaymentSucceeded("pi_1", 2000, "usd", "cus_1", READ, checkout="cs_1")),
    ("checkout.session.async_payment_succeeded", SESSION, events.PaymentSucceeded("pi_1", 2000, "usd", "cus_1", READ, checkout="cs_1")),
    ("checkout.session.completed", SESSION | {"payment_status": "unpaid"}, events.Ignored("checkout.session.completed")),
    ("checkout.session.completed", SESSION | {"payment_status": "no_payment_required"}, events.Ignored("checkout.session.completed")),
    ("checkout.session.completed", SESSION | {"mode": "setup", "payment_intent": None}, events.Ignored("checkout.session.completed")),
    ("checkout.session.async_payment_failed", SESSION | {"payment_status": "unpaid"}, FAILED),
    ("payment_intent.succeeded", INTENT, PAID),
    ("payment_intent.succeeded", INTENT | {"amount_received": 1500}, events.PaymentSucceeded("pi_1", 1500, "usd", "cus_1", READ)),
    ("payment_intent.succeeded", INTENT | {"setup_future_usage": "off_session"}, events.PaymentSucceeded("pi_1", 2000, "usd", "cus_1", READ, saved_card="pm_1")),
    ("payment_intent.succeeded", INTENT | {"customer": {"id": "cus_1", "object": "customer"}}, PAID),
    ("payment_intent.succeeded", INTENT | {"metadata": {}, "customer": None}, events.PaymentSucceeded("pi_1", 2000, "usd", None, Tags(None, None))),
    ("payment_intent.payment_failed", INTENT | {"status": "requires_payment_method"}, FAILED),
    ("payment_intent.payment_failed", INTENT | {"last_payment_error": CARD_ERROR}, events.PaymentFailed("pi_1", 2000, "usd", "cus_1", READ, "card_declined", "insufficient_funds")),
    ("setup_intent.succeeded", SETUP, events.CardSaved("cus_1", "pm_1", READ)),
    ("setup_intent.succeeded", SETUP | {"usage": "on_session"}, events.Ignored("setup_intent.succeeded")),
    ("charge.refunded", CHARGE, events.Refunded("ch_1", "pi_1", 2000, 500, "usd", "cus_1", READ)),
    ("refund.failed", REFUND, events.RefundFailed("re_1", "ch_1", "pi_1", 500, "usd")),
    ("charge.dispute.created", DISPUTE, OPENED),
    ("charge.dispute.funds_withdrawn", DISPUTE, OPENED),
    ("charge.dispute.created", DISPUTE | {"status": "warning_needs_response"}, events.DisputeOpened("du_1", "ch_1", "pi_1", 2000, "usd", "fraudulent", inquiry=True)),
    ("charge.dispute.closed", DISPUTE | {"status": "won"}, events.DisputeWon("du_1", "ch_1", "pi_1", 2000, "usd")),
    ("charge.dispute.closed", DISPUTE | {"status": "warning_closed"}, events.DisputeWon("du_1", "ch_1", "pi_1", 2000, "usd")),
    ("charge.dispute.closed", DISPUTE | {"status": "lost"}, events.DisputeLost("du_1", "ch_1", "pi_1", 2000, "usd")),
    ("invoice.paid", INVOICE, events.InvoicePaid("in_1", "cus_1", 2000, "usd", "sub_1", READ)),
    ("invoice.paid", INVOICE | {"amount_due": 0, "amount_paid": 0}, events.InvoicePaid("in_1", "cus_1", 0, "usd", "sub_1", READ)),
    ("invoice.paid", INVOICE | {"amount_paid": 0, "amount_remaining": 2000}, events.InvoicePaid("in_1", "cus_1", 0, "usd", "sub_1", READ)),
    ("invoice.paid", INVOICE | {"parent": None}, events.InvoicePaid("in_1", "cus_1", 2000, "usd", None)),
    ("invoice.paid", INVOICE | {"parent": QUOTED}, events.InvoicePaid("in_1", "cus_1", 2000, "usd", None)),
    ("invoice.paid", INVOICE | {"customer": None}, events.Ignored("invoice.paid")),
    ("invoice.payment_failed", OPEN, events.InvoiceFailed("in_1", "cus_1", 1500, "usd", 2, None, "sub_1", READ, 2000)),
    ("invoice.payment_failed", OPEN | {"last_finalization_error": {"code": "card_declined"}}, events.InvoiceFailed("in_1", "cus_1", 1500, "usd", 2, "card_declined", "sub_1", READ, 2000)),
    ("invoice.payment_failed", OPEN | {"customer": None}, events.Ignored("invoice.payment_failed")),
    ("customer.deleted", {"id": "cus_1"}, events.CustomerDeleted("cus_1")),
    ("customer.subscription.deleted", {"id": "sub_1", "customer": "cus_1"}, events.SubscriptionEnded("sub_1", "cus_1")),
    ("invoice.created", {"anything": ["at", "all"]}, events.Ignored("invoice.created")),
]


@pytest.mark.parametrize(("kind", "thing", "what"), STORIES)
def test_what_happened_is_read_from_the_object(kind: str, thing: dict[str, Any], what: events.Happening) -> None:
    """K7, K8: each event is the state of its object, cumulative and signed by type, whatever came before it."""
    assert read(event(kind, thing)).what == what


def test_the_table_tells_every_handled_type() -> None:
    """No event type is handled without a story above, or the thin ones below."""
    thin = {kind for kind in events.HANDLED if kind.startswith("v1.")}
    assert events.HANDLED - thin == {kind for kind, _, what in STORIES if kind != "invoice.created"}


BROKEN: list[tuple[str, dict[str, Any]]] = [
    *[("payment_intent.succeeded", INTENT | {name: value}) for name, value in (
        ("id", None), ("id", "pi_1\n"), ("amount_received", "2000"), ("amount_received", -1), ("amount_received", 20.0), ("amount_received", True),
        ("amount_received", 10**13), ("currency", "USD"), ("currency", None), ("customer", 7), ("customer", {"no": "id"}), ("status", "processing"),
        ("metadata", []), ("metadata", {"a": 1}), ("metadata", {"mppnode_account": "a b"}), ("metadata", {str(n): "x" for n in range(51)}),
    )],
    ("checkout.session.completed", SESSION | {"payment_intent": None}),
    ("checkout.session.completed", SESSION | {"amount_total": None}),
    ("checkout.session.completed", SESSION | {"payment_status": None}),
    ("checkout.session.async_payment_succeeded", SESSION | {"payment_status": "unpaid"}),
    ("setup_intent.succeeded", SETUP | {"payment_method": None}),
    ("charge.refunded", CHARGE | {"amount_refunded": 2001}),
    ("charge.refunded", CHARGE | {"amount_refunded": None}),
    ("charge.dispute.created", DISPUTE | {"charge": None}),
    ("charge.dispute.closed", DISPUTE | {"status": "under_review"}),
    *[("invoice.paid", INVOICE | {name: value}) for name, value in (
        ("id", "in 1"), ("status", "open"), ("status", None), ("amount_paid", -1), ("amount_paid", "2000"), ("amount_paid", 20.0), ("amount_remaining", None),
        ("amount_due", None), ("currency", "USD"), ("customer", 7), ("attempt_count", None), ("parent", 7), ("parent", {"type": "subscription_details"}),
        ("parent", {"type": "subscription_details", "subscription_details": {"subscription": None}}), ("parent", {"subscription_details": {}}),
    )],
    *[("invoice.payment_failed", OPEN | {name: value}) for name, value in (
        ("amount_remaining", None), ("amount_remaining", 1.5), ("attempt_count", "2"), ("last_finalization_error", 7), ("last_finalization_error", {"code": "two words"}),
    )],
    ("customer.deleted", {}),
    ("customer.subscription.deleted", {"id": "sub_1"}),
]


@pytest.mark.parametrize(("kind", "thing"), BROKEN)
def test_a_known_event_that_is_malformed_is_refused_by_field(kind: str, thing: dict[str, Any]) -> None:
    """A field that is missing or of another kind is a refusal that names it; nothing is guessed."""
    body = event(kind, thing)
    fault = refused(body, sign(body, SECRET, NOW))
    assert fault.reason is WebhookReason.MALFORMED
    assert fault.detail


@pytest.mark.parametrize(
    "body",
    [
        b"[]", b"{}", b"null", BODY.replace(b'"event"', b'"charge"'), BODY.replace(b'"event"', b"[]"), BODY.replace(b"evt_1", b"evt 1"),
        BODY[:-1] + b', "id": "evt_2"}', BODY.replace(b'"created": ', b'"created": 1e'), BODY.replace(b'"data"', b'"date"'), b'{"a":' * 40 + b"1" + b"}" * 40,
        BODY.replace(b"customer.deleted", b"Customer Deleted"),
    ],
)
def test_an_envelope_that_is_malformed_is_refused(body: bytes) -> None:
    """Two readers could not differ about an event: equal keys, other kinds of object and deep nesting are refused."""
    assert refused(body, sign(body, SECRET, NOW)).reason is WebhookReason.MALFORMED


THIN = {
    "id": "evt_test_1", "object": "v2.core.event", "type": "v1.billing.meter.error_report_triggered", "livemode": False, "created": "2030-03-17T17:46:40.500Z",
    "context": None, "reason": None, "related_object": {"id": "mtr_1", "type": "billing.meter", "url": "/v1/billing/meters/mtr_1"},
}


def thin(**changes: Any) -> bytes:
    return json.dumps(THIN | changes).encode()


def test_meter_errors_come_as_thin_events() -> None:
    """P-45: an error report names its meter and carries the id its details are fetched by."""
    assert read(thin()) == events.StripeEvent("evt_test_1", THIN["type"], NOW, events.MeterErrors("mtr_1"))
    assert read(thin(type="v1.billing.meter.no_meter_found", related_object=None)).what == events.MeterErrors(None)
    assert read(thin(type="v2.core.account.created")).what == events.Ignored("v2.core.account.created")
    for changes in ({"created": NOW}, {"created": "yesterday"}, {"related_object": None}, {"related_object": {"id": 1}}):
        body = thin(**changes)
        assert refused(body, sign(body, SECRET, NOW)).reason is WebhookReason.MALFORMED


def test_no_secret_is_in_a_refusal_or_a_repr() -> None:
    """A refusal and the reader say nothing of the secret, the header or what the body held."""
    one = reader()
    body = event("payment_intent.succeeded", INTENT | {"currency": "canary-value"})
    texts = [repr(one), str(vars(one))]
    for fault in (refused(body, sign(body, SECRET, NOW)), refused(body, HEADER), refused(b"canary-value", sign(b"canary-value", SECRET, NOW))):
        texts += [str(fault), repr(fault), repr(vars(fault))]
    for text in texts:
        assert SECRET not in text
        assert "canary-value" not in text
        assert HEADER.rpartition("=")[2] not in text


def test_webhooks_need_no_package() -> None:
    """A node without the extra can read its settings and webhooks: the package is for calls alone."""
    code = "import sys, mppnode.gateways.stripe_events, mppnode.config.billing; print('stripe' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
