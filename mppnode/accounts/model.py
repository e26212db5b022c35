"""Accounts and their keys as plain values: what the ledger keeps of them and every decision about them reads."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from channels.credit import FUNDS_MAX, NO_CAPS, AccountId, KeyId, SpendCaps
from channels.instants import UnixSeconds
from channels.payment import CENTS_MAX
from channels.units import Pico
from mppnode.kernel.keys import KeyDigest
from mppnode.kernel.strategy import PriceCeiling, Strategy
from mppnode.kernel.wishes import Optimize

_NAME_MAX: Final = 128  # shown in lists; nothing is decided by it
_POOL_MAX: Final = 64  # as in a request's own pool: each is scored on every request
TRUST_NAME: Final = re.compile(r"[!-~]{1,255}", re.ASCII)  # visible ASCII, so that a header can carry it
RECHARGE_CENTS_MIN: Final = 500  # 5 USD: below it the processor's fixed fee is a tenth of it
_EMAIL: Final = re.compile(r"[!-?A-~]{1,64}@[!-?A-~]{1,255}", re.ASCII)  # enough to tell it from something else
RATE_MAX: Final = 10**12  # per minute: above any machine, and its microseconds stay far below 2**96
CONCURRENCY_MAX: Final = 1024  # the holds of a budget are copied when one of them changes
NEVER: Final = UnixSeconds(0)
CAP_MAX: Final = Pico(FUNDS_MAX)  # no account holds more


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What a key or account wants of the router when a request does not say. None is no opinion.

    Has the shape of ``mppnode.routing.plan.Preferences``.
    """

    strategy: Strategy | None = None
    allow_external: bool | None = None
    ceiling: PriceCeiling | None = None
    """Whole cents per million tokens."""
    model_pool: tuple[str, ...] | None = None
    """The only models this may use, by ``model`` or through ``auto``; None is all."""
    optimize: Optimize | None = None

    def __post_init__(self) -> None:
        if self.model_pool is not None and not 1 <= len(self.model_pool) <= _POOL_MAX:
            raise ValueError(f"model_pool must name 1 to {_POOL_MAX} models")
        if self.ceiling is not None and min(self.ceiling.input_cents, self.ceiling.output_cents) < 0:
            raise ValueError("ceiling must not be negative")


def check_caps(caps: SpendCaps) -> None:
    """Raise ``ValueError`` for caps that nobody can have meant."""
    given = [cap for cap in (caps.day, caps.month, caps.total) if cap is not None]
    if any(not 0 <= cap <= CAP_MAX for cap in given):
        raise ValueError(f"a spend cap must be from 0 to {CAP_MAX} pico-dollars")
    # A day's cap above the month's could never bind: whoever writes that has mistaken one for the other.
    if given != sorted(given):
        raise ValueError("the spend cap of a shorter period must not be above that of a longer one")


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Requests and tokens per minute, and requests at once. None is no limit of its own, except for the last."""

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int = CONCURRENCY_MAX

    def __post_init__(self) -> None:
        for name, rate in (("rpm", self.rpm), ("tpm", self.tpm)):
            if rate is not None and not 1 <= rate <= RATE_MAX:
                raise ValueError(f"{name} must be from 1 to {RATE_MAX}")
        if not 1 <= self.concurrency <= CONCURRENCY_MAX:
            raise ValueError(f"concurrency must be from 1 to {CONCURRENCY_MAX}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey(Routing):
    """One key of an account. Its secret is not here and nowhere else; instants are Unix seconds."""

    id: KeyId
    account: AccountId
    name: str
    digest: KeyDigest
    prefix: str
    caps: SpendCaps = NO_CAPS
    rates: RateLimits = RateLimits()
    expires_at: UnixSeconds | None = None
    """The first second in which it is refused."""
    revoked_at: UnixSeconds | None = None
    rotated_to: str | None = None
    """The id of the key that takes its place."""
    grace_until: UnixSeconds | None = None
    """The first second in which a rotated key is refused; the overlap in which both work ends there."""
    created_at: UnixSeconds = NEVER

    def __post_init__(self) -> None:
        # slots=True makes a second class, which super() without arguments does not know
        Routing.__post_init__(self)
        check_caps(self.caps)
        if len(self.name) > _NAME_MAX or not self.name.isprintable():
            raise ValueError(f"name must be at most {_NAME_MAX} printable characters")
        if (self.rotated_to is None) != (self.grace_until is None):
            raise ValueError("a rotated key has a successor and a deadline, another one has neither")


class AccountKind(StrEnum):
    """Who is behind an account. Nothing is decided by it; operators and invoices show it."""

    USER = "user"
    ORGANISATION = "organisation"
    TRUST = "trust"


@dataclass(frozen=True, slots=True)
class Prepaid:
    """Spends what it has paid in."""

    @property
    def overdraft(self) -> Pico:
        """Pico-dollars it may owe: none."""
        return Pico(0)


@dataclass(frozen=True, slots=True)
class Postpaid:
    """Is billed afterwards and may owe up to ``trust_limit`` pico-dollars until it has paid."""

    trust_limit: Pico

    def __post_init__(self) -> None:
        if not 0 <= self.trust_limit <= CAP_MAX:
            raise ValueError(f"trust_limit must be from 0 to {CAP_MAX} pico-dollars")

    @property
    def overdraft(self) -> Pico:
        """Pico-dollars it may owe."""
        return self.trust_limit


@dataclass(frozen=True, slots=True)
class Recharge:
    """Buy ``amount_cents`` of credit with the card on file when less than ``threshold_cents`` is left."""

    threshold_cents: int
    amount_cents: int
    month_cap_cents: int
    """Most that is bought so in a UTC month."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold_cents <= CENTS_MAX:
            raise ValueError(f"threshold_cents must be from 1 to {CENTS_MAX}")
        if not RECHARGE_CENTS_MIN <= self.amount_cents <= CENTS_MAX:
            raise ValueError(f"amount_cents must be from {RECHARGE_CENTS_MIN} to {CENTS_MAX}")
        if not self.amount_cents <= self.month_cap_cents <= CENTS_MAX:
            raise ValueError(f"month_cap_cents must be from amount_cents to {CENTS_MAX}")


@dataclass(frozen=True, slots=True)
class Alerts:
    """Where an account is told of caps and of a low balance."""

    url: str
    secret: str = field(repr=False)
    """``whsec_`` and base64: what the receiver checks our signature with."""
    low_balance_cents: int = 0
    """Told once when the balance falls below it; zero for never."""

    def __post_init__(self) -> None:
        if not 0 <= self.low_balance_cents <= CENTS_MAX:
            raise ValueError(f"low_balance_cents must be from 0 to {CENTS_MAX}")


@dataclass(frozen=True, slots=True)
class BillingProfile:
    """What the payment processor knows this account by."""

    customer: str | None = None
    card: str | None = None
    """A payment method that may be charged while its owner is away."""
    subscription: str | None = None
    recharge: Recharge | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account(Routing):
    """Who pays: the owner of keys and of one pooled balance."""

    id: AccountId
    kind: AccountKind
    trust: str
    """The name that ``X-Trust`` and the claims of a JWT call it by; no two accounts share one."""
    terms: Prepaid | Postpaid = Prepaid()
    suspended_at: UnixSeconds | None = None
    email: str | None = None
    billing: BillingProfile = BillingProfile()
    alerts: Alerts | None = None
    created_at: UnixSeconds = NEVER

    def __post_init__(self) -> None:
        Routing.__post_init__(self)
        if TRUST_NAME.fullmatch(self.trust) is None:
            raise ValueError("trust must be 1 to 255 visible ASCII characters")
        if self.email is not None and _EMAIL.fullmatch(self.email) is None:
            raise ValueError("email must be an address")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a verified token is about, which accounts it may use, and the first second in which it may not any more."""

    subject: str
    trusts: tuple[str, ...]
    valid_until: UnixSeconds
