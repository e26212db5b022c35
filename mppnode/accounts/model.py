"""Accounts and their keys as plain values: what the ledger keeps of them and every decision about them reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from channels.instants import UnixSeconds
from channels.units import Pico
from mppnode.kernel.keys import KeyDigest
from mppnode.kernel.strategy import PriceCeiling, Strategy
from mppnode.kernel.wishes import Optimize

_NAME_MAX: Final = 128  # shown in lists; nothing is decided by it
_POOL_MAX: Final = 64  # as in a request's own pool: each is scored on every request
TRUST_NAME: Final = re.compile(r"[!-~]{1,255}", re.ASCII)  # visible ASCII, so that a header can carry it
RATE_MAX: Final = 10**12  # per minute: above any machine, and its microseconds stay far below 2**96
CONCURRENCY_MAX: Final = 1024  # the holds of a budget are copied when one of them changes
CAP_MAX: Final = Pico(10**21)  # a billion dollars: beyond it is a typing error


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


@dataclass(frozen=True, slots=True)
class SpendCaps:
    """The most a key may spend, in pico-dollars, by UTC day, UTC month and for good. None is no cap of its own."""

    day: Pico | None = None
    month: Pico | None = None
    total: Pico | None = None

    def __post_init__(self) -> None:
        given = [cap for cap in (self.day, self.month, self.total) if cap is not None]
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

    id: str
    account: str
    name: str
    digest: KeyDigest
    prefix: str
    caps: SpendCaps = SpendCaps()
    rates: RateLimits = RateLimits()
    expires_at: UnixSeconds | None = None
    """The first second in which it is refused."""
    revoked_at: UnixSeconds | None = None
    rotated_to: str | None = None
    """The id of the key that takes its place."""
    grace_until: UnixSeconds | None = None
    """The first second in which a rotated key is refused; the overlap in which both work ends there."""

    def __post_init__(self) -> None:
        # slots=True makes a second class, which super() without arguments does not know
        Routing.__post_init__(self)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Account(Routing):
    """Who pays: the owner of keys and of one pooled balance."""

    id: str
    kind: AccountKind
    trust: str
    """The name that ``X-Trust`` and the claims of a JWT call it by; no two accounts share one."""
    terms: Prepaid | Postpaid = Prepaid()
    suspended_at: UnixSeconds | None = None

    def __post_init__(self) -> None:
        Routing.__post_init__(self)
        if TRUST_NAME.fullmatch(self.trust) is None:
            raise ValueError("trust must be 1 to 255 visible ASCII characters")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a verified token is about, which accounts it may use, and the first second in which it may not any more."""

    subject: str
    trusts: tuple[str, ...]
    valid_until: UnixSeconds
