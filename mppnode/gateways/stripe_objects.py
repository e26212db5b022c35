"""The few Stripe objects the node reads, with the same strictness in an answer of the API and in a webhook.

Amounts are integers in the currency's smallest unit, as Stripe sends them (cents, for dollars). Fields nobody here uses
are not looked at: Stripe adds to its objects within an API version, and calls that compatible.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

ACCOUNT_KEY: Final = "mppnode_account"
REFERENCE_KEY: Final = "mppnode_reference"
AMOUNT_MAX: Final = 10**12
"""Above every amount Stripe takes (12 digits, in the currencies that have the smallest units)."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,255}", re.ASCII)  # Stripe promises at most 255 characters and no fixed prefix
_TOKEN = re.compile(r"[A-Za-z0-9_.-]{1,100}", re.ASCII)  # statuses, reasons and error codes
_CURRENCY = re.compile(r"[a-z]{3}", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9._:-]{1,200}", re.ASCII)  # Stripe: 200 for client_reference_id, 500 for a metadata value
_METADATA_MAX: Final = 50  # Stripe: 50 keys, of 40 characters, with values of 500
_METADATA_KEY_MAX: Final = 40
_METADATA_VALUE_MAX: Final = 500
_EXACT_MAX: Final = 2**53  # up to here a JSON number that some writer made a float is still exact


class BadShapeError(ValueError):
    """A field of an object of Stripe's is missing or not of its shape; the text names it and nothing of its value."""

    def __init__(self, where: str, detail: str) -> None:
        super().__init__(f"{where} {detail}")
        self.where = where


class Fields:
    """One JSON object, read field by field. Every getter raises :class:`BadShapeError`."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise BadShapeError(where, "must be an object")
        self._values: Mapping[str, Any] = value
        self._where = where

    def _path(self, name: str) -> str:
        return f"{self._where}.{name}"

    def raw(self, name: str) -> Any:
        """The value as it came, or ``None``."""
        return self._values.get(name)

    def inner(self, name: str) -> Fields:
        """The object under ``name``."""
        return Fields(self.raw(name), self._path(name))

    def items(self, name: str) -> list[Fields]:
        """The objects of the list under ``name``."""
        value = self.raw(name)
        if not isinstance(value, list):
            raise BadShapeError(self._path(name), "must be a list")
        return [Fields(item, f"{self._path(name)}[{index}]") for index, item in enumerate(value)]

    def text(self, name: str, pattern: re.Pattern[str]) -> str:
        """Text of exactly one shape."""
        value = self.raw(name)
        if not isinstance(value, str) or pattern.fullmatch(value) is None:
            raise BadShapeError(self._path(name), "is missing or not of its shape")
        return value

    def token(self, name: str) -> str:
        """A word of Stripe's, such as a status."""
        return self.text(name, _TOKEN)

    def maybe_token(self, name: str) -> str | None:
        """As :meth:`token`, for one that may be absent or null."""
        return None if self.raw(name) is None else self.token(name)

    def id(self, name: str = "id") -> str:
        """The id of an object."""
        return self.text(name, _ID)

    def ref(self, name: str) -> str | None:
        """The id of a related object, which Stripe writes as text, as the whole object, or as null."""
        value = self.raw(name)
        if value is None:
            return None
        return self.inner(name).id() if isinstance(value, Mapping) else self.id(name)

    def must_ref(self, name: str) -> str:
        """As :meth:`ref`, for one that must be there."""
        found = self.ref(name)
        if found is None:
            raise BadShapeError(self._path(name), "is missing")
        return found

    def whole(self, name: str, *, most: int = AMOUNT_MAX) -> int:
        """An integer from 0 to ``most``."""
        value = self.raw(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise BadShapeError(self._path(name), f"must be an integer from 0 to {most}")
        return value

    def exact(self, name: str) -> int:
        """A whole number that Stripe may write with a decimal point (``5.0``), as its meters do."""
        value = self.raw(name)
        exact = isinstance(value, int | float) and not isinstance(value, bool)
        if not exact or not 0 <= value <= _EXACT_MAX or value != int(value):
            raise BadShapeError(self._path(name), "must be a whole number")
        return int(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.raw(name)
        if not isinstance(value, bool):
            raise BadShapeError(self._path(name), "must be true or false")
        return value

    def currency(self) -> str:
        """The ISO 4217 code under ``currency``, in lower case."""
        return self.text("currency", _CURRENCY)

    def url(self, name: str) -> str:
        """An address the customer is sent to."""
        value = self.raw(name)
        if not isinstance(value, str) or re.fullmatch(r"https?://[!-~]{1,4000}", value, re.ASCII) is None:
            raise BadShapeError(self._path(name), "must be a URL")
        return value

    def metadata(self) -> dict[str, str]:
        """The object's metadata; empty when it has none."""
        value = self.raw("metadata")
        if value is None:
            return {}
        if not isinstance(value, Mapping) or len(value) > _METADATA_MAX:
            raise BadShapeError(self._path("metadata"), f"must be an object of at most {_METADATA_MAX} keys")
        if not all(isinstance(text, str) and len(text) <= _METADATA_VALUE_MAX for text in value.values()):
            raise BadShapeError(self._path("metadata"), f"must have text of at most {_METADATA_VALUE_MAX} characters")
        return dict(value)


@dataclass(frozen=True)
class Purpose:
    """Which account an object of Stripe's is for, and which of the caller's own records; carried as metadata.

    Raises:
        ValueError: for names Stripe would not keep whole, or metadata beyond its limits.
    """

    account: str
    reference: str
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, text in (("account", self.account), ("reference", self.reference)):
            if _NAME.fullmatch(text) is None:
                raise ValueError(f"{name} must be 1 to 200 of A-Z a-z 0-9 . _ : -")
        if len(self.extra) > _METADATA_MAX - 2 or {ACCOUNT_KEY, REFERENCE_KEY} & set(self.extra):
            raise ValueError("extra metadata has too many keys or one of ours")
        if not all(
            0 < len(key) <= _METADATA_KEY_MAX and "[" not in key and len(text) <= _METADATA_VALUE_MAX
            for key, text in self.extra.items()
        ):
            raise ValueError("extra metadata has a key or a value that Stripe does not take")

    def metadata(self) -> dict[str, str]:
        """What is written on Stripe's objects."""
        return {**self.extra, ACCOUNT_KEY: self.account, REFERENCE_KEY: self.reference}


@dataclass(frozen=True)
class Tags:
    """What :class:`Purpose` wrote, read back; ``None`` where an object was not made by a node."""

    account: str | None
    reference: str | None


NO_TAGS: Final = Tags(None, None)


def read_tags(fields: Fields) -> Tags:
    """Read the metadata of an object. Raises :class:`BadShapeError`."""
    metadata = fields.metadata()
    found = [metadata.get(key) for key in (ACCOUNT_KEY, REFERENCE_KEY)]
    if any(text is not None and _NAME.fullmatch(text) is None for text in found):
        raise BadShapeError("metadata", "has a name of ours that no node wrote")
    return Tags(account=found[0], reference=found[1])


@dataclass(frozen=True)
class Payment:
    """A PaymentIntent: what was asked and what was received, in the currency's smallest unit."""

    id: str
    status: str
    amount: int
    received: int
    currency: str
    customer: str | None
    payment_method: str | None
    charge: str | None
    tags: Tags
    created: int
    livemode: bool


def read_payment(fields: Fields) -> Payment:
    """Read a PaymentIntent. Raises :class:`BadShapeError`. Source: docs.stripe.com/api/payment_intents/object."""
    return Payment(
        id=fields.id(),
        status=fields.token("status"),
        amount=fields.whole("amount"),
        received=fields.whole("amount_received"),
        currency=fields.currency(),
        customer=fields.ref("customer"),
        payment_method=fields.ref("payment_method"),
        charge=fields.ref("latest_charge"),
        tags=read_tags(fields),
        created=fields.whole("created"),
        livemode=fields.flag("livemode"),
    )


@dataclass(frozen=True)
class Refund:
    """One refund of one charge; ``pending`` and ``failed`` ones are listed too, so look at ``status``."""

    id: str
    status: str | None
    amount: int
    currency: str
    payment: str | None
    charge: str | None
    created: int


def read_refund(fields: Fields) -> Refund:
    """Read a Refund. Raises :class:`BadShapeError`. Source: docs.stripe.com/api/refunds/object."""
    return Refund(
        id=fields.id(),
        status=fields.maybe_token("status"),
        amount=fields.whole("amount"),
        currency=fields.currency(),
        payment=fields.ref("payment_intent"),
        charge=fields.ref("charge"),
        created=fields.whole("created"),
    )


@dataclass(frozen=True)
class Dispute:
    """A dispute; an ``inquiry`` is one for which the bank has taken no money yet, and may never."""

    id: str
    status: str
    reason: str
    amount: int
    currency: str
    payment: str | None
    charge: str
    created: int

    @property
    def inquiry(self) -> bool:
        """Whether no money was withdrawn. Source: docs.stripe.com/disputes/how-disputes-work (inquiries)."""
        return self.status.startswith("warning_")


def read_dispute(fields: Fields) -> Dispute:
    """Read a Dispute. Raises :class:`BadShapeError`. Source: docs.stripe.com/api/disputes/object."""
    return Dispute(
        id=fields.id(),
        status=fields.token("status"),
        reason=fields.token("reason"),
        amount=fields.whole("amount"),
        currency=fields.currency(),
        payment=fields.ref("payment_intent"),
        charge=fields.must_ref("charge"),
        created=fields.whole("created"),
    )


@dataclass(frozen=True)
class Subscription:
    """A subscription: whom it bills, at which prices, and for which account and record of ours."""

    id: str
    status: str
    customer: str
    prices: tuple[str, ...]
    tags: Tags
    created: int


def read_subscription(fields: Fields) -> Subscription:
    """Read a Subscription. Raises :class:`BadShapeError`. Source: docs.stripe.com/api/subscriptions/object."""
    return Subscription(
        id=fields.id(),
        status=fields.token("status"),
        customer=fields.must_ref("customer"),
        prices=tuple(item.must_ref("price") for item in fields.inner("items").items("data")),
        tags=read_tags(fields),
        created=fields.whole("created"),
    )


@dataclass(frozen=True)
class Invoice:
    """An invoice: what it asked for, what it got, and what is still to be paid, in the currency's smallest unit.

    None of the three is the usage it is about: Stripe moves amounts that are too small to charge, and what customers
    have to their credit, from one invoice to the next.
    """

    id: str
    status: str | None
    customer: str | None
    amount_due: int
    amount_paid: int
    amount_remaining: int
    currency: str
    subscription: str | None
    attempts: int
    created: int
    tags: Tags = NO_TAGS
    """Of the subscription it is for."""


def read_invoice(fields: Fields) -> Invoice:
    """Read an Invoice. Raises :class:`BadShapeError`. Source: docs.stripe.com/api/invoices/object."""
    subscription, tags = None, NO_TAGS
    if fields.raw("parent") is not None:
        parent = fields.inner("parent")
        if parent.token("type") == "subscription_details":
            details = parent.inner("subscription_details")
            subscription, tags = details.must_ref("subscription"), read_tags(details)
    return Invoice(
        id=fields.id(),
        status=fields.maybe_token("status"),
        customer=fields.ref("customer"),
        amount_due=fields.whole("amount_due"),
        amount_paid=fields.whole("amount_paid"),
        amount_remaining=fields.whole("amount_remaining"),
        currency=fields.currency(),
        subscription=subscription,
        attempts=fields.whole("attempt_count"),
        created=fields.whole("created"),
        tags=tags,
    )


@dataclass(frozen=True)
class InvoicePayment:
    """Money that was paid for an invoice, in the currency's smallest unit.

    ``payment`` is the PaymentIntent that refunds and disputes will name; ``None`` where the money took another way,
    such as an invoice an operator marked as paid by bank transfer. It may have received more than ``amount``, for
    other invoices.
    """

    id: str
    invoice: str
    payment: str | None
    amount: int
    currency: str
    created: int


def read_invoice_payment(fields: Fields) -> InvoicePayment:
    """Read a paid InvoicePayment. Raises :class:`BadShapeError`. Source: docs.stripe.com/api/invoice-payment/object."""
    if fields.token("status") != "paid":
        raise BadShapeError("invoice_payment.status", "is not paid")
    by = fields.inner("payment")
    return InvoicePayment(
        id=fields.id(),
        invoice=fields.must_ref("invoice"),
        payment=by.must_ref("payment_intent") if by.token("type") == "payment_intent" else None,
        amount=fields.whole("amount_paid"),
        currency=fields.currency(),
        created=fields.whole("created"),
    )
