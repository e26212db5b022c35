"""What the node asks of Stripe: customers, Checkout, cards on file, off-session charges, meters, lists to reconcile by.

One :class:`StripeGateway` per node, over one ``stripe.StripeClient``; nothing of the package's global state is used.
Amounts are integers in cents. The caller's key names what it wants once: Stripe keeps the answer of a key for at least
a day (docs.stripe.com/api/idempotent_requests), so a call may be repeated with its key within it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

import aiohttp
import stripe

from mppnode.config.secrets import Secret
from mppnode.gateways.stripe_faults import StripeFault, StripeFaultKind, safe_code
from mppnode.gateways.stripe_http import DUPLICATE_METER_EVENT, REPLAYED, StripeHttp, StripeLimits
from mppnode.gateways.stripe_objects import (
    BadShapeError,
    Dispute,
    Fields,
    Invoice,
    InvoicePayment,
    Payment,
    Purpose,
    Refund,
    Subscription,
    read_dispute,
    read_invoice,
    read_invoice_payment,
    read_payment,
    read_refund,
    read_subscription,
)
from mppnode.observe.logs import Log

T = TypeVar("T")

API_VERSION: Final = "2026-10-28.endive"
"""The version every request names, whatever the account's own default; the package in use was generated for it."""
BASE_URL: Final = "https://api.stripe.com"
CHARGE_CENTS_MAX: Final = 99_999_999
"""Stripe's largest amount in dollars. Source: docs.stripe.com/api/payment_intents/object, ``amount``."""
CHARGE_CENTS_MIN: Final = 50
"""Stripe's smallest charge in dollars. Source: docs.stripe.com/currencies#minimum-and-maximum-charge-amounts."""
METER_VALUE_MAX: Final = 10**12
"""Ours: a million dollars in micro-dollars. A single event with more is a mistake, and Stripe keeps few digits."""

_KEY = re.compile(r"[!-~]{8,200}", re.ASCII)  # Stripe takes 255 characters, of which the name of the call is ours
_IDENTIFIER = re.compile(r"[!-~]{1,100}", re.ASCII)  # docs.stripe.com/api/billing/meter-event/create
_PAGE: Final = 100
_UNKNOWN: Final = StripeFaultKind.OUTCOME_UNKNOWN


@dataclass(frozen=True)
class StripeIdentity:
    """Whose key this is, and whether its money is real."""

    account: str
    livemode: bool


@dataclass(frozen=True)
class Checkout:
    """A page of Stripe's where the customer pays or leaves a card; it expires by itself."""

    id: str
    url: str
    expires_at: int


class ChargeOutcome(StrEnum):
    """How far an off-session charge came; a declined one raises instead."""

    SUCCEEDED = "succeeded"
    PROCESSING = "processing"
    """The bank has not answered; a webhook will tell."""
    REQUIRES_ACTION = "requires_action"
    """The owner of the card must confirm: send them to a Checkout."""


@dataclass(frozen=True)
class Charge:
    """An off-session charge; ``replayed`` when Stripe answered with what an earlier request of the same key did."""

    payment: str
    outcome: ChargeOutcome
    amount: int
    replayed: bool


@dataclass(frozen=True)
class MeterError:
    """Why some meter events were not counted: a code of Stripe's, how many, and identifiers of a few of them."""

    code: str
    count: int
    identifiers: tuple[str, ...]


class StripeGateway:
    """Stripe's API as the node uses it.

    Every method raises :class:`StripeFault`, and ``ValueError`` for a mistake of its caller's, before anything is sent.
    ``below`` draws a random integer from 0 to its argument, exclusive: the jitter of repeated attempts.
    """

    def __init__(
        self,
        secret: Secret[str],
        *,
        session: aiohttp.ClientSession,
        below: Callable[[int], int],
        log: Log,
        base_url: str = BASE_URL,
        limits: StripeLimits | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        on_call: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._limits = limits or StripeLimits()
        self._base_url = base_url
        self._http = StripeHttp(session, limits=self._limits, below=below, sleep=sleep, log=log, on_call=on_call)
        self.rekey(secret)

    def rekey(self, secret: Secret[str]) -> None:
        """Call with another key of the same account from now on."""
        client = stripe.StripeClient(
            secret.reveal(),
            stripe_version=API_VERSION,
            base_addresses={"api": self._base_url},
            max_network_retries=0,
            http_client=self._http,
        )
        self._api = client.v1
        self._events = client.v2.core.events

    async def start(self, *, livemode: bool) -> StripeIdentity:
        """Ask whose key this is; a node must not start with a key of the other mode."""
        account, _ = await _get(self._api.accounts.retrieve_current_async())
        balance, _ = await _get(self._api.balance.retrieve_async())
        found = _read(lambda: StripeIdentity(account.id(), balance.flag("livemode")))
        if found.livemode is not livemode:
            raise StripeFault(StripeFaultKind.REFUSED, "livemode_mismatch")
        return found

    async def create_customer(self, purpose: Purpose, *, email: str | None, key: str) -> str:
        """Make a customer for an account and return its id. Source: docs.stripe.com/api/customers/create."""
        params: stripe.params.CustomerCreateParams = {"metadata": purpose.metadata()}
        if email is not None:
            params["email"] = email
        made, _ = await _post(self._api.customers.create_async(params, _options("customer", key)))
        return _read(made.id, _UNKNOWN)

    async def sell_pack(
        self,
        purpose: Purpose,
        *,
        customer: str,
        cents: int,
        name: str,
        success_url: str,
        cancel_url: str,
        save_card: bool,
        key: str,
    ) -> Checkout:
        """A Checkout in which ``customer`` buys credit for ``cents``.

        Source: docs.stripe.com/api/checkout/sessions/create.
        """
        _check_cents(cents)
        metadata = purpose.metadata()
        # On the PaymentIntent too: refunds and disputes are reported by it, and know nothing of the session.
        intent: stripe.params.checkout.SessionCreateParamsPaymentIntentData = {"metadata": metadata}
        if save_card:
            intent["setup_future_usage"] = "off_session"
        params: stripe.params.checkout.SessionCreateParams = {
            "mode": "payment",
            "customer": customer,
            "client_reference_id": purpose.reference,
            "metadata": metadata,
            "payment_intent_data": intent,
            "line_items": [
                {
                    "quantity": 1,
                    "price_data": {"currency": "usd", "unit_amount": cents, "product_data": {"name": name}},
                }
            ],
            "success_url": success_url,
            "cancel_url": cancel_url,
        }
        made, _ = await _post(self._api.checkout.sessions.create_async(params, _options("pack", key)))
        return _read(lambda: _checkout(made), _UNKNOWN)

    async def save_card(
        self, purpose: Purpose, *, customer: str, success_url: str, cancel_url: str, key: str
    ) -> Checkout:
        """A Checkout in which ``customer`` leaves a card for later charges, and pays nothing."""
        metadata = purpose.metadata()
        params: stripe.params.checkout.SessionCreateParams = {
            "mode": "setup",
            "customer": customer,
            "client_reference_id": purpose.reference,
            "metadata": metadata,
            "setup_intent_data": {"metadata": metadata},
            "allowed_payment_method_types": ["card"],
            "success_url": success_url,
            "cancel_url": cancel_url,
        }
        made, _ = await _post(self._api.checkout.sessions.create_async(params, _options("card", key)))
        return _read(lambda: _checkout(made), _UNKNOWN)

    async def open_portal(self, *, customer: str, return_url: str, key: str) -> str:
        """The URL of a short-lived page where ``customer`` manages cards and invoices."""
        made, _ = await _post(
            self._api.billing_portal.sessions.create_async(
                {"customer": customer, "return_url": return_url}, _options("portal", key)
            )
        )
        return _read(lambda: made.url("url"), _UNKNOWN)

    async def set_default_card(self, *, customer: str, payment_method: str, key: str) -> None:
        """Have invoices of ``customer`` charged to a card that was saved for it. Source: docs.stripe.com/api/customers.

        Raises:
            StripeFault: ``INVALID`` when the card is not this customer's.
        """
        params: stripe.params.CustomerUpdateParams = {"invoice_settings": {"default_payment_method": payment_method}}
        made, _ = await _post(self._api.customers.update_async(customer, params, _options("default-card", key)))
        now = _read(lambda: (made.id(), made.inner("invoice_settings").ref("default_payment_method")), _UNKNOWN)
        if now != (customer, payment_method):
            raise StripeFault(_UNKNOWN, "another_card")

    async def subscribe(
        self, purpose: Purpose, *, customer: str, price: str, key: str, threshold_cents: int | None
    ) -> str:
        """Bill ``customer`` for what a meter counts, at a metered price, and return the subscription's id.

        Stripe charges the customer's default card (:meth:`set_default_card`) at the end of each period, and before it
        when ``threshold_cents`` are due. Its invoices carry the purpose, their PaymentIntents do not.

        Raises:
            StripeFault: ``DECLINED`` when something was due at once and the card refused; nothing is left behind then.

        Source: docs.stripe.com/api/subscriptions/create.
        """
        params: stripe.params.SubscriptionCreateParams = {
            "customer": customer,
            "items": [{"price": price}],  # no quantity: the meter has it
            "metadata": purpose.metadata(),
            "collection_method": "charge_automatically",
            "off_session": True,
            # The default leaves an incomplete subscription behind, which bills nothing and expires within a day.
            "payment_behavior": "error_if_incomplete",
        }
        if threshold_cents is not None:
            _check_cents(threshold_cents)
            params["billing_thresholds"] = {"amount_gte": threshold_cents}
        made, _ = await _post(self._api.subscriptions.create_async(params, _options("subscribe", key)))
        found = _read(lambda: read_subscription(made), _UNKNOWN)
        if (found.customer, found.prices) != (customer, (price,)):
            raise StripeFault(_UNKNOWN, "another_subscription")
        if found.status != "active":
            raise StripeFault(_UNKNOWN, "unexpected_status")
        return found.id

    async def charge(self, purpose: Purpose, *, customer: str, payment_method: str, cents: int, key: str) -> Charge:
        """Charge a card on file without its owner present.

        Raises:
            StripeFault: ``DECLINED`` when the bank says no; ``OUTCOME_UNKNOWN`` when money may have moved.

        Source: docs.stripe.com/payments/save-and-reuse, docs.stripe.com/api/payment_intents/create.
        """
        _check_cents(cents)
        params: stripe.params.PaymentIntentCreateParams = {
            "amount": cents,
            "currency": "usd",
            "customer": customer,
            "payment_method": payment_method,
            "allowed_payment_method_types": ["card"],  # the default, all the account has, may need a redirect
            "metadata": purpose.metadata(),
            "confirm": True,
            "off_session": True,
        }
        try:
            made, replayed = await _post(self._api.payment_intents.create_async(params, _options("charge", key)))
        except StripeFault as fault:
            if fault.code == "authentication_required" and fault.payment is not None:
                return Charge(fault.payment, ChargeOutcome.REQUIRES_ACTION, cents, replayed=False)
            raise
        payment = _read(lambda: read_payment(made), _UNKNOWN)
        if (payment.amount, payment.currency, payment.customer) != (cents, "usd", customer):
            raise StripeFault(_UNKNOWN, "another_payment", payment=payment.id)
        return Charge(payment.id, _outcome(payment, made), cents, replayed)

    async def payment(self, payment: str) -> Payment:
        """One PaymentIntent as it is now."""
        found, _ = await _get(self._api.payment_intents.retrieve_async(payment))
        return _read(lambda: read_payment(found))

    async def refund(self, refund: str) -> Refund:
        """One refund as it is now."""
        found, _ = await _get(self._api.refunds.retrieve_async(refund))
        return _read(lambda: read_refund(found))

    async def dispute(self, dispute: str) -> Dispute:
        """One dispute as it is now."""
        found, _ = await _get(self._api.disputes.retrieve_async(dispute))
        return _read(lambda: read_dispute(found))

    async def payments(self, since: int, until: int, *, customer: str | None = None) -> tuple[Payment, ...]:
        """The PaymentIntents made from ``since`` to before ``until`` (Unix seconds), newest first."""

        def page(after: str | None) -> Coroutine[Any, Any, stripe.ListObject[stripe.PaymentIntent]]:
            params: stripe.params.PaymentIntentListParams = {
                "limit": _PAGE,
                "created": {"gte": since, "lt": until},
            }
            if customer is not None:
                params["customer"] = customer
            if after is not None:
                params["starting_after"] = after
            return self._api.payment_intents.list_async(params)

        return await self._all(page, read_payment)

    async def refunds(self, since: int, until: int) -> tuple[Refund, ...]:
        """The refunds made from ``since`` to before ``until`` (Unix seconds), newest first."""

        def page(after: str | None) -> Coroutine[Any, Any, stripe.ListObject[stripe.Refund]]:
            params: stripe.params.RefundListParams = {"limit": _PAGE, "created": {"gte": since, "lt": until}}
            if after is not None:
                params["starting_after"] = after
            return self._api.refunds.list_async(params)

        return await self._all(page, read_refund)

    async def refunds_of(self, payment: str) -> tuple[Refund, ...]:
        """All refunds of one PaymentIntent, newest first."""

        def page(after: str | None) -> Coroutine[Any, Any, stripe.ListObject[stripe.Refund]]:
            params: stripe.params.RefundListParams = {"limit": _PAGE, "payment_intent": payment}
            if after is not None:
                params["starting_after"] = after
            return self._api.refunds.list_async(params)

        return await self._all(page, read_refund)

    async def disputes(self, since: int, until: int) -> tuple[Dispute, ...]:
        """The disputes opened from ``since`` to before ``until`` (Unix seconds), newest first."""

        def page(after: str | None) -> Coroutine[Any, Any, stripe.ListObject[stripe.Dispute]]:
            params: stripe.params.DisputeListParams = {"limit": _PAGE, "created": {"gte": since, "lt": until}}
            if after is not None:
                params["starting_after"] = after
            return self._api.disputes.list_async(params)

        return await self._all(page, read_dispute)

    async def subscriptions_of(self, customer: str) -> tuple[Subscription, ...]:
        """A customer's subscriptions that are not cancelled, newest first: what to look at when a key is forgotten."""

        def page(after: str | None) -> Coroutine[Any, Any, stripe.ListObject[stripe.Subscription]]:
            params: stripe.params.SubscriptionListParams = {"limit": _PAGE, "customer": customer}
            if after is not None:
                params["starting_after"] = after
            return self._api.subscriptions.list_async(params)

        return await self._all(page, read_subscription)

    async def invoices(self, since: int, until: int) -> tuple[Invoice, ...]:
        """The paid invoices made from ``since`` to before ``until`` (Unix seconds), newest first.

        An invoice is made before it is paid: ask again for a period that had unpaid ones.
        """

        def page(after: str | None) -> Coroutine[Any, Any, stripe.ListObject[stripe.Invoice]]:
            params: stripe.params.InvoiceListParams = {
                "limit": _PAGE,
                "status": "paid",
                "created": {"gte": since, "lt": until},
            }
            if after is not None:
                params["starting_after"] = after
            return self._api.invoices.list_async(params)

        return await self._all(page, read_invoice)

    async def payments_of(self, invoice: str) -> tuple[InvoicePayment, ...]:
        """The payments an invoice was paid with, newest first. Source: docs.stripe.com/api/invoice-payment/list."""

        def page(after: str | None) -> Coroutine[Any, Any, stripe.ListObject[stripe.InvoicePayment]]:
            params: stripe.params.InvoicePaymentListParams = {"limit": _PAGE, "invoice": invoice, "status": "paid"}
            if after is not None:
                params["starting_after"] = after
            return self._api.invoice_payments.list_async(params)

        found = await self._all(page, read_invoice_payment)
        if any(payment.invoice != invoice for payment in found):
            raise StripeFault(StripeFaultKind.UNREACHABLE, "another_invoice")
        return found

    async def report_usage(
        self, *, event_name: str, identifier: str, customer: str, value: int, timestamp: int
    ) -> bool:
        """Report ``value`` units used at ``timestamp`` (Unix seconds) to a meter; false when ``identifier`` was there.

        Stripe remembers an identifier for at least a day and no longer; older ones must be compared with
        :meth:`reported_usage` first. It takes times of the last 35 days.
        Source: docs.stripe.com/api/billing/meter-event/create.
        """
        if not 0 <= value <= METER_VALUE_MAX:
            raise ValueError(f"value must be from 0 to {METER_VALUE_MAX}")
        if _IDENTIFIER.fullmatch(identifier) is None:
            raise ValueError("identifier must be 1 to 100 printable characters")
        params: stripe.params.billing.MeterEventCreateParams = {
            "event_name": event_name,
            "identifier": identifier,
            "timestamp": timestamp,
            "payload": {"stripe_customer_id": customer, "value": str(value)},
        }
        options = _options("meter", f"identifier-{identifier}")
        try:
            made, replayed = await _post(self._api.billing.meter_events.create_async(params, options))
        except StripeFault as fault:
            if fault.code == DUPLICATE_METER_EVENT:
                return False
            raise
        if made.raw("identifier") != identifier:
            raise StripeFault(_UNKNOWN, "another_event")
        return not replayed

    async def find_meter(self, event_name: str) -> str | None:
        """The id of the active meter that counts ``event_name``."""

        def page(after: str | None) -> Coroutine[Any, Any, stripe.ListObject[stripe.billing.Meter]]:
            params: stripe.params.billing.MeterListParams = {"limit": _PAGE, "status": "active"}
            if after is not None:
                params["starting_after"] = after
            return self._api.billing.meters.list_async(params)

        meters = await self._all(page, lambda meter: (meter.id(), meter.raw("event_name")))
        return next((found for found, name in meters if name == event_name), None)

    async def reported_usage(self, *, meter: str, customer: str, since: int, until: int) -> int:
        """What Stripe has counted for ``customer`` between two whole minutes (Unix seconds); it counts late."""

        def page(after: str | None) -> Coroutine[Any, Any, stripe.ListObject[stripe.billing.MeterEventSummary]]:
            params: stripe.params.billing.MeterEventSummaryListParams = {
                "customer": customer,
                "start_time": since,
                "end_time": until,
                "limit": _PAGE,
            }
            if after is not None:
                params["starting_after"] = after
            return self._api.billing.meters.event_summaries.list_async(meter, params)

        return sum(await self._all(page, lambda summary: summary.exact("aggregated_value")))

    async def meter_errors(self, event: str) -> tuple[MeterError, ...]:
        """The details of a meter's error report, by the id of the event that announced it."""
        found, _ = await _get(self._events.retrieve_async(event))
        return _read(
            lambda: tuple(_meter_error(item) for item in found.inner("data").inner("reason").items("error_types"))
        )

    async def _all(
        self,
        page: Callable[[str | None], Coroutine[Any, Any, stripe.ListObject[Any]]],
        read: Callable[[Fields], T],
    ) -> tuple[T, ...]:
        """Every object of a list. The package's own paging has no bound."""
        found: list[T] = []
        after: str | None = None
        for _ in range(self._limits.pages):
            listed, _replayed = await _get(page(after))
            try:
                items = listed.items("data")
                found += [read(item) for item in items]
                if not listed.flag("has_more") or not items:
                    return tuple(found)
                after = items[-1].id()
            except BadShapeError:
                raise StripeFault(StripeFaultKind.UNREACHABLE, "unreadable_answer") from None
        raise StripeFault(StripeFaultKind.INVALID, "too_many_objects")


def _options(call: str, key: str) -> stripe.RequestOptions:
    if _KEY.fullmatch(key) is None:
        raise ValueError("an idempotency key must be 8 to 200 printable characters")
    # The call's name is part of it: a caller that uses one id for a customer and a charge means two things.
    return {"idempotency_key": f"{call}-{key}"}


def _check_cents(cents: int) -> None:
    if not CHARGE_CENTS_MIN <= cents <= CHARGE_CENTS_MAX:
        raise ValueError(f"cents must be from {CHARGE_CENTS_MIN} to {CHARGE_CENTS_MAX}")


async def _call(request: Coroutine[Any, Any, Any], lost: StripeFaultKind) -> tuple[Fields, bool]:
    """The answer as fields, and whether it is one Stripe had saved."""
    try:
        answer = (await request).last_response
        return Fields(answer.data, "answer"), answer.headers.get(REPLAYED) == "true"
    except (stripe.StripeError, AttributeError, LookupError, TypeError, ValueError):
        # Refusals are faults already; this is an answer the package or we could not read, and the package's classes
        # fail in whatever way the first thing they try on a strange answer fails.
        raise StripeFault(lost, "unreadable_answer") from None


async def _get(request: Coroutine[Any, Any, Any]) -> tuple[Fields, bool]:
    return await _call(request, StripeFaultKind.UNREACHABLE)


async def _post(request: Coroutine[Any, Any, Any]) -> tuple[Fields, bool]:
    return await _call(request, _UNKNOWN)


def _read(read: Callable[[], T], lost: StripeFaultKind = StripeFaultKind.UNREACHABLE) -> T:
    try:
        return read()
    except BadShapeError:
        raise StripeFault(lost, "unreadable_answer") from None


def _checkout(made: Fields) -> Checkout:
    return Checkout(id=made.id(), url=made.url("url"), expires_at=made.whole("expires_at"))


def _outcome(payment: Payment, made: Fields) -> ChargeOutcome:
    match payment.status:
        case "succeeded" if payment.received == payment.amount:
            return ChargeOutcome.SUCCEEDED
        case "processing":
            return ChargeOutcome.PROCESSING
        case "requires_action":
            return ChargeOutcome.REQUIRES_ACTION
        case "requires_payment_method" | "canceled":
            error = made.raw("last_payment_error")
            error = error if isinstance(error, dict) else {}
            raise StripeFault(
                StripeFaultKind.DECLINED,
                safe_code(error.get("code")) or payment.status,
                decline_code=safe_code(error.get("decline_code")),
                payment=payment.id,
            )
        case _:
            raise StripeFault(_UNKNOWN, "unexpected_status", payment=payment.id)


def _meter_error(error: Fields) -> MeterError:
    samples = [item.inner("request").raw("identifier") for item in error.items("sample_errors")]
    return MeterError(
        code=error.token("code"),
        count=error.whole("error_count"),
        identifiers=tuple(text for text in samples if isinstance(text, str) and _IDENTIFIER.fullmatch(text)),
    )
