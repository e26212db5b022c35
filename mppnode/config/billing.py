"""Reads ``[billing]``: the Stripe account that customers without a channel pay through."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from mppnode.config.secrets import Secret
from mppnode.config.section import Section, flag_of, text_of
from mppnode.config.urls import check_base_url

WEBHOOK_SECRETS_MAX: Final = 4
"""One in use and those being rolled; each costs an HMAC per webhook."""
PACKS_MAX: Final = 20
"""What a person can choose between."""
PACK_CENTS_MIN: Final = 50
"""Stripe's smallest charge in dollars. Source: docs.stripe.com/currencies#minimum-and-maximum-charge-amounts."""
PACK_CENTS_MAX: Final = 99_999_999
"""Stripe's largest amount in dollars."""

_SECRET_KEY = re.compile(r"(?:sk|rk)_(live|test)_[A-Za-z0-9_]{16,500}", re.ASCII)
_WEBHOOK_SECRET = re.compile(r"whsec_[!-~]{16,500}", re.ASCII)  # 16: shorter ones can be tried out; Stripe's have 32
_PRICE = re.compile(r"price_[A-Za-z0-9_]{1,100}", re.ASCII)
_METER = re.compile(r"[A-Za-z0-9_.-]{1,100}", re.ASCII)  # docs.stripe.com/api/billing/meter/create, event_name
_QUERY = re.compile(r"[A-Za-z0-9._~=&{}-]{0,500}", re.ASCII)  # braces: Stripe fills in {CHECKOUT_SESSION_ID}
_LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|::1", re.ASCII)


@dataclass(frozen=True)
class BillingConfig:
    """A Stripe account and what is sold through it; amounts are cents (US dollars)."""

    secret_key: Secret[str]
    webhook_secrets: tuple[Secret[str], ...]
    success_url: str
    cancel_url: str
    return_url: str
    packs_cents: tuple[int, ...]
    meter: str | None
    """The ``event_name`` of the meter post-paid usage is reported to; without one, nobody is post-paid."""
    livemode: bool
    meter_price: str | None = None
    """The price (``price_...``) on that meter to which post-paid customers are subscribed."""
    threshold_cents: int | None = None
    """Unbilled usage from which an invoice is made at once; None waits for the end of the month."""
    api_base: str | None = None
    """Another address than Stripe's, for tests and mocks."""


def read_billing(section: Section) -> BillingConfig:
    """The ``[billing]`` table; problems are noted in the section."""
    livemode = section.get("livemode", flag_of, fallback=False)

    def secret_key(text: str) -> Secret[str]:
        match = _SECRET_KEY.fullmatch(text)
        if match is None:
            raise ValueError("must be a secret or restricted key of Stripe's, such as sk_test_...")
        if (match.group(1) == "live") is not livemode:
            raise ValueError(f"is a {match.group(1)} key, but livemode says otherwise")
        return Secret(text)

    config = BillingConfig(
        secret_key=section.secret("secret_key", secret_key) or Secret(""),
        webhook_secrets=_webhook_secrets(section),
        success_url=section.get("success_url", _page, fallback=""),
        cancel_url=section.get("cancel_url", _page, fallback=""),
        return_url=section.get("return_url", _page, fallback=""),
        packs_cents=section.get("packs_cents", _packs, fallback=()),
        meter=section.text("meter", _METER, "inference_usage", None) or None,
        livemode=livemode,
        meter_price=section.text("meter_price", _PRICE, "price_...", None) or None,
        threshold_cents=section.whole("threshold_cents", PACK_CENTS_MIN, PACK_CENTS_MAX, 0) or None,
        api_base=section.get("api_base", lambda value: check_base_url(text_of(value)), None, fallback=None),
    )
    if config.meter is not None and config.meter_price is None:
        section.problem("meter_price", "is required with meter: nobody would be billed for what is reported")
    section.done()
    return config


def _webhook_secrets(section: Section) -> tuple[Secret[str], ...]:
    def read(text: str) -> Secret[str]:
        # An empty key makes an HMAC that everybody can compute: nothing starts with one.
        if _WEBHOOK_SECRET.fullmatch(text) is None:
            raise ValueError("must be a webhook signing secret: whsec_ and at least 16 characters")
        return Secret(text)

    found = section.secrets("webhook_secrets", read)
    if len(found) > WEBHOOK_SECRETS_MAX:
        section.problem("webhook_secrets", f"must be at most {WEBHOOK_SECRETS_MAX}")
    if len({secret.reveal() for secret in found}) != len(found):
        section.problem("webhook_secrets", "names one secret twice")
    return found


def _page(value: Any) -> str:
    """The address of a page the customer's browser is sent to. Raises ``ValueError``."""
    text = text_of(value)
    place, mark, query = text.partition("?")
    check_base_url(place)
    if _QUERY.fullmatch(query) is None:
        raise ValueError("has a query with characters that need escaping")
    parts = urlsplit(place)
    if parts.scheme == "http" and _LOOPBACK.fullmatch(parts.hostname or "") is None:
        raise ValueError("must use https, or be on loopback")
    return f"{place}{mark}{query}"


def _packs(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= PACKS_MAX:
        raise ValueError(f"must be a list of 1 to {PACKS_MAX} amounts in cents")
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool) or not PACK_CENTS_MIN <= item <= PACK_CENTS_MAX:
            raise ValueError(f"must be integers from {PACK_CENTS_MIN} to {PACK_CENTS_MAX}, in cents")
    if sorted(set(value)) != value:
        raise ValueError("must rise, without the same amount twice")
    return tuple(value)
