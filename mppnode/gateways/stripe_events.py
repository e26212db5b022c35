"""Stripe's webhooks: from the bytes of a request to one of a closed set of events, or a typed refusal.

The signature is checked here and not by the ``stripe`` package, whose verifier reads the machine's clock, accepts a
timestamp any distance in the future, takes one secret, and puts body and header into its errors. Events come in any
order, any number of times: each carries its id, its time, and the state of the object, cumulative where Stripe's is.
What to do with a second copy is for whoever keeps the books.

Source: docs.stripe.com/webhooks (signatures), docs.stripe.com/api/events/types.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from channels.faults import ChannelFault
from channels.instants import parse_rfc3339
from mppnode.config.secrets import Secret
from mppnode.gateways.stripe_objects import (
    NO_TAGS,
    BadShapeError,
    Fields,
    Tags,
    read_dispute,
    read_invoice,
    read_payment,
    read_tags,
)
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault
from mppnode.kernel.strict_input import parse_object

TOLERANCE_S: Final = 300
"""How old, or how far ahead, a signature may be; Stripe's own default."""
SECRET_CHARS_MIN: Final = 16
"""After the prefix; Stripe's have 32. An empty key makes an HMAC that everybody can compute."""
SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - what every secret of Stripe's begins with

_HEADER_MAX: Final = 2048  # a timestamp and a signature for each secret being rolled: two, in Stripe's own practice
_SIGNATURES_MAX: Final = 16
_TIME = re.compile(r"[0-9]{1,12}", re.ASCII)
_SIGNATURE = re.compile(r"[0-9a-f]{64}", re.ASCII)
_EVENT_TYPE = re.compile(r"[a-z0-9_.]{1,128}", re.ASCII)
_THIN: Final = "v2.core.event"
_SNAPSHOT: Final = "event"


@dataclass(frozen=True)
class WebhookLimits:
    """Bounds of one webhook's body."""

    body_bytes: int = 256 << 10  # the largest snapshot, a Checkout Session with everything expanded, is a tenth of it
    depth: int = 32
    keys: int = 10_000


class WebhookReason(StrEnum):
    """Why a webhook is refused."""

    TOO_LARGE = "too_large"
    NO_SIGNATURE = "no_signature"
    BAD_SIGNATURE = "bad_signature"
    STALE = "stale"
    MALFORMED = "malformed"
    WRONG_MODE = "wrong_mode"
    WRONG_ACCOUNT = "wrong_account"


class WebhookFault(Exception):
    """A webhook is refused; the text says why, and nothing of what it held."""

    def __init__(self, reason: WebhookReason, detail: str = "") -> None:
        super().__init__(f"webhook refused: {reason}{f' ({detail})' if detail else ''}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class PaymentSucceeded:
    """Money arrived. Stripe says so twice for one Checkout, so ``payment`` is what may count once."""

    payment: str
    amount: int
    currency: str
    customer: str | None
    tags: Tags
    checkout: str | None = None
    saved_card: str | None = None
    """The payment method, where the customer agreed to be charged again with it."""


@dataclass(frozen=True)
class PaymentFailed:
    """An attempt to pay failed; the same payment may still succeed later."""

    payment: str
    amount: int
    currency: str
    customer: str | None
    tags: Tags
    code: str | None
    decline_code: str | None


@dataclass(frozen=True)
class CardSaved:
    """A card can be charged without its owner present."""

    customer: str
    payment_method: str
    tags: Tags


@dataclass(frozen=True)
class Refunded:
    """``refunded`` is all that was ever given back of the charge, not what this event added."""

    charge: str
    payment: str | None
    amount: int
    refunded: int
    currency: str
    customer: str | None
    tags: Tags


@dataclass(frozen=True)
class RefundFailed:
    """A refund came back: what the charge has refunded in all is less again, and is to be looked up."""

    refund: str
    charge: str | None
    payment: str | None
    amount: int
    currency: str


@dataclass(frozen=True)
class DisputeOpened:
    """A customer's bank questions a charge; with ``inquiry`` it has taken no money yet."""

    dispute: str
    charge: str
    payment: str | None
    amount: int
    currency: str
    reason: str
    inquiry: bool


@dataclass(frozen=True)
class DisputeWon:
    """The money of a dispute is ours again, or was never taken."""

    dispute: str
    charge: str
    payment: str | None
    amount: int
    currency: str


@dataclass(frozen=True)
class DisputeLost:
    """The money of a dispute is gone."""

    dispute: str
    charge: str
    payment: str | None
    amount: int
    currency: str


@dataclass(frozen=True)
class InvoicePaid:
    """An invoice is settled, with ``amount`` of money; 0 where nothing was due, or too little to charge.

    Which payments it was is asked for with ``payments_of``: the invoice does not name them, and some of the amount may
    be money an operator only says has come.
    """

    invoice: str
    customer: str
    amount: int
    currency: str
    subscription: str | None
    tags: Tags = NO_TAGS
    """Of the subscription."""


@dataclass(frozen=True)
class InvoiceFailed:
    """An attempt to charge for an invoice failed; ``amount`` is still to be paid, and Stripe may try again.

    ``code`` is of the invoice itself. Why the bank said no is told by the failed payment, in an event of its own.
    """

    invoice: str
    customer: str
    amount: int
    currency: str
    attempts: int
    code: str | None
    subscription: str | None = None
    tags: Tags = NO_TAGS
    """Of the subscription."""
    due: int = 0
    """What was to be paid in all, before a part of it was."""


@dataclass(frozen=True)
class CustomerDeleted:
    """A customer and its cards are gone from Stripe."""

    customer: str


@dataclass(frozen=True)
class SubscriptionEnded:
    """Nothing a customer uses is invoiced any more: it was cancelled, by an operator or on the portal's page."""

    subscription: str
    customer: str


@dataclass(frozen=True)
class MeterErrors:
    """Stripe could not use some meter events; the details are fetched by the event's id."""

    meter: str | None


@dataclass(frozen=True)
class Ignored:
    """An event nobody here needs."""

    type: str


Happening = (
    PaymentSucceeded
    | PaymentFailed
    | CardSaved
    | Refunded
    | RefundFailed
    | DisputeOpened
    | DisputeWon
    | DisputeLost
    | InvoicePaid
    | InvoiceFailed
    | CustomerDeleted
    | SubscriptionEnded
    | MeterErrors
    | Ignored
)


@dataclass(frozen=True)
class StripeEvent:
    """One webhook: its id (the same in every copy), when Stripe made it (Unix seconds), and what happened."""

    id: str
    type: str
    created: int
    what: Happening


class WebhookReader:
    """Turns webhook requests into events, for one Stripe account in one mode.

    Raises:
        ValueError: for no secret, or one that is too short to keep anybody out.
    """

    def __init__(
        self,
        secrets: Sequence[Secret[str]],
        *,
        account: str,
        livemode: bool,
        clock: Clock,
        limits: WebhookLimits | None = None,
    ) -> None:
        if not secrets or any(not is_strong(secret.reveal()) for secret in secrets):
            raise ValueError("a webhook needs secrets that are not empty or short")
        self._keys = tuple(Secret(secret.reveal().encode()) for secret in secrets)
        self._account = account
        self._livemode = livemode
        self._clock = clock
        self._limits = limits or WebhookLimits()

    def read(self, body: bytes, header: str | None) -> StripeEvent:
        """The event in ``body``, the raw bytes of the request, under its ``Stripe-Signature`` header.

        Raises:
            WebhookFault: for everything that is not a fresh, well-formed event of Stripe's for this account.

        Source: docs.stripe.com/webhooks#verify-manually.
        """
        if len(body) > self._limits.body_bytes:
            raise WebhookFault(WebhookReason.TOO_LARGE)
        at = self._verify(body, header)
        if abs(self._clock.now() - at) > TOLERANCE_S:
            raise WebhookFault(WebhookReason.STALE)
        try:
            return self._event(Fields(parse_object(body, limits=self._limits), "event"))
        except NodeFault as fault:
            raise WebhookFault(WebhookReason.MALFORMED, fault.detail) from None
        except BadShapeError as error:
            raise WebhookFault(WebhookReason.MALFORMED, str(error)) from None

    def _verify(self, body: bytes, header: str | None) -> int:
        """The signed time. The order matters: nothing in the body is looked at before this returns."""
        time, signatures = _signatures(header)
        signed = time.encode() + b"." + body
        good = False
        for key in self._keys:
            expected = hmac.new(key.reveal(), signed, hashlib.sha256).hexdigest()
            for signature in signatures:
                # No early exit: which secret of several matched would show in the time.
                good |= hmac.compare_digest(expected, signature)
        if not good:
            raise WebhookFault(WebhookReason.BAD_SIGNATURE)
        return int(time)

    def _event(self, event: Fields) -> StripeEvent:
        kind = event.raw("object")
        if kind not in (_SNAPSHOT, _THIN):  # not a set, which would have to hash whatever came
            raise BadShapeError("event.object", "is neither a snapshot nor a thin event")
        if event.flag("livemode") is not self._livemode:
            raise WebhookFault(WebhookReason.WRONG_MODE)
        for name in ("account", "context"):
            # Absent or null for the account that owns the endpoint; set for accounts connected to it.
            if event.raw(name) is not None and event.raw(name) != self._account:
                raise WebhookFault(WebhookReason.WRONG_ACCOUNT)
        what = event.text("type", _EVENT_TYPE)
        if kind == _THIN:
            created = _instant(event.raw("created"))
            happening = _thin(what, event)
        else:
            created = event.whole("created")
            read = _READERS.get(what)
            happening = Ignored(what) if read is None else read(what, event.inner("data").inner("object"))
        return StripeEvent(id=event.id(), type=what, created=created, what=happening)


def is_strong(secret: str) -> bool:
    """Whether a webhook secret is long enough to be one."""
    return len(secret.removeprefix(SECRET_PREFIX).strip()) >= SECRET_CHARS_MIN


def _signatures(header: str | None) -> tuple[str, list[str]]:
    """The one ``t`` and all ``v1`` of a header; other schemes, such as the ``v0`` of test events, count for nothing."""
    if not header or len(header) > _HEADER_MAX:
        raise WebhookFault(WebhookReason.NO_SIGNATURE)
    times: list[str] = []
    found: list[str] = []
    for item in header.split(","):
        name, _, value = item.partition("=")
        if name == "t":
            times.append(value)
        elif name == "v1":
            found.append(value)
    if len(times) != 1 or _TIME.fullmatch(times[0]) is None or not 0 < len(found) <= _SIGNATURES_MAX:
        raise WebhookFault(WebhookReason.NO_SIGNATURE)
    if not all(_SIGNATURE.fullmatch(signature) for signature in found):
        raise WebhookFault(WebhookReason.BAD_SIGNATURE)
    return times[0], found


def _instant(value: Any) -> int:
    """Unix seconds of a thin event's RFC 3339 time."""
    try:
        return parse_rfc3339(value if isinstance(value, str) else "") // 1000
    except (ChannelFault, ValueError):
        raise BadShapeError("event.created", "is not a time") from None


def _thin(kind: str, event: Fields) -> Happening:
    if kind == "v1.billing.meter.error_report_triggered":
        return MeterErrors(event.inner("related_object").id())
    if kind == "v1.billing.meter.no_meter_found":
        return MeterErrors(None)
    return Ignored(kind)


def _checkout(kind: str, session: Fields) -> Happening:
    """A finished Checkout Session. Source: docs.stripe.com/api/checkout/sessions/object."""
    # A card on file is told by its SetupIntent, which names the card; a session that is not paid yet ends in
    # checkout.session.async_payment_succeeded or _failed.
    if session.token("mode") != "payment" or session.token("payment_status") == "no_payment_required":
        return Ignored(kind)
    tags = read_tags(session)
    payment = session.must_ref("payment_intent")
    amount, currency, customer = session.whole("amount_total"), session.currency(), session.ref("customer")
    if kind == "checkout.session.async_payment_failed":
        return PaymentFailed(payment, amount, currency, customer, tags, None, None)
    if session.token("payment_status") != "paid":
        if kind == "checkout.session.async_payment_succeeded":
            raise BadShapeError("event.data.object.payment_status", "is not paid")
        return Ignored(kind)
    return PaymentSucceeded(payment, amount, currency, customer, tags, checkout=session.id())


def _intent_succeeded(_: str, intent: Fields) -> Happening:
    payment = read_payment(intent)
    if payment.status != "succeeded":
        raise BadShapeError("event.data.object.status", "is not succeeded")
    reusable = intent.raw("setup_future_usage") == "off_session"
    return PaymentSucceeded(
        payment.id,
        payment.received,
        payment.currency,
        payment.customer,
        payment.tags,
        saved_card=payment.payment_method if reusable else None,
    )


def _intent_failed(_: str, intent: Fields) -> Happening:
    payment = read_payment(intent)
    error = intent.inner("last_payment_error") if intent.raw("last_payment_error") is not None else None
    return PaymentFailed(
        payment.id,
        payment.amount,
        payment.currency,
        payment.customer,
        payment.tags,
        error.maybe_token("code") if error else None,
        error.maybe_token("decline_code") if error else None,
    )


def _card_saved(kind: str, intent: Fields) -> Happening:
    customer = intent.ref("customer")
    if customer is None or intent.token("usage") != "off_session":
        return Ignored(kind)
    return CardSaved(customer, intent.must_ref("payment_method"), read_tags(intent))


def _refunded(_: str, charge: Fields) -> Happening:
    amount, refunded = charge.whole("amount"), charge.whole("amount_refunded")
    if refunded > amount:
        raise BadShapeError("event.data.object.amount_refunded", "is more than the charge")
    return Refunded(
        charge.id(),
        charge.ref("payment_intent"),
        amount,
        refunded,
        charge.currency(),
        charge.ref("customer"),
        read_tags(charge),
    )


def _refund_failed(_: str, refund: Fields) -> Happening:
    return RefundFailed(
        refund.id(),
        refund.ref("charge"),
        refund.ref("payment_intent"),
        refund.whole("amount"),
        refund.currency(),
    )


def _dispute_opened(_: str, fields: Fields) -> Happening:
    found = read_dispute(fields)
    return DisputeOpened(
        found.id, found.charge, found.payment, found.amount, found.currency, found.reason, inquiry=found.inquiry
    )


def _dispute_closed(_: str, fields: Fields) -> Happening:
    found = read_dispute(fields)
    match found.status:
        case "won" | "warning_closed" | "prevented":
            return DisputeWon(found.id, found.charge, found.payment, found.amount, found.currency)
        case "lost":
            return DisputeLost(found.id, found.charge, found.payment, found.amount, found.currency)
        case _:
            raise BadShapeError("event.data.object.status", "is not one a closed dispute has")


def _invoice_paid(kind: str, fields: Fields) -> Happening:
    found = read_invoice(fields)
    if found.status != "paid":
        raise BadShapeError("event.data.object.status", "is not paid")
    # What remains is not looked at: an operator may call an invoice paid that was paid elsewhere, or not at all.
    if found.customer is None:
        return Ignored(kind)  # of an account of Stripe's own kind: no customer a node made
    return InvoicePaid(found.id, found.customer, found.amount_paid, found.currency, found.subscription, found.tags)


def _invoice_failed(kind: str, fields: Fields) -> Happening:
    found = read_invoice(fields)
    error = fields.inner("last_finalization_error") if fields.raw("last_finalization_error") is not None else None
    code = error.maybe_token("code") if error else None
    if found.customer is None:
        return Ignored(kind)
    return InvoiceFailed(
        found.id,
        found.customer,
        found.amount_remaining,
        found.currency,
        found.attempts,
        code,
        found.subscription,
        found.tags,
        found.amount_due,
    )


def _customer_deleted(_: str, customer: Fields) -> Happening:
    return CustomerDeleted(customer.id())


def _subscription_ended(_: str, subscription: Fields) -> Happening:
    return SubscriptionEnded(subscription.id(), subscription.must_ref("customer"))


_READERS: Final[Mapping[str, Callable[[str, Fields], Happening]]] = MappingProxyType(
    {
        "checkout.session.completed": _checkout,
        "checkout.session.async_payment_succeeded": _checkout,
        "checkout.session.async_payment_failed": _checkout,
        "payment_intent.succeeded": _intent_succeeded,
        "payment_intent.payment_failed": _intent_failed,
        "setup_intent.succeeded": _card_saved,
        "charge.refunded": _refunded,
        "refund.failed": _refund_failed,
        "charge.dispute.created": _dispute_opened,
        # An inquiry that became a dispute is told by this one: it was "created" long ago, without money.
        "charge.dispute.funds_withdrawn": _dispute_opened,
        "charge.dispute.closed": _dispute_closed,
        "invoice.paid": _invoice_paid,
        "invoice.payment_failed": _invoice_failed,
        "customer.deleted": _customer_deleted,
        "customer.subscription.deleted": _subscription_ended,
    }
)
HANDLED: Final = frozenset({*_READERS, "v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found"})
"""The event types an endpoint has to be subscribed to."""
