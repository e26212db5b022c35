"""Reads ``[accounts]`` and ``[admin]``: who may use the node without a channel, and who manages them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from mppnode.config.secrets import Secret
from mppnode.config.section import Section, flag_of, text_of
from mppnode.config.urls import check_base_url

TRUST_START_CENTS: Final = 100  # 1 USD: what a stranger who promises to pay may cost. Source: seed service's terms
TRUST_MAX_CENTS: Final = 10_000
TRUST_GROWTH_BPS: Final = 1_000  # ten cents for each dollar paid
_TOKEN_CHARS_MIN: Final = 32  # of a random token in hex: 128 bits
_SECRET_BYTES_MIN: Final = 32  # RFC 7518, section 3.2: as long as HS256's hash
_CENTS_MAX: Final = 99_999_999
_LEEWAY_MAX_S: Final = 300
_CLAIM = re.compile(r"[A-Za-z0-9_./:-]{1,100}", re.ASCII)
_NAMED = re.compile(r"[!-~]{1,255}", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,253}", re.ASCII)

TrustRuleName = Literal["when_several", "always"]


@dataclass(frozen=True, slots=True)
class JwtConfig:
    """``[accounts.jwt]``: whose tokens are taken. Exactly one of ``secret`` and ``jwks_url`` is set."""

    issuer: str
    audience: str
    secret: Secret[bytes] | None = None
    jwks_url: str | None = None
    leeway_s: int = 30
    subject_claim: str = "sub"
    trusts_claim: str = "trusts"


@dataclass(frozen=True, slots=True)
class TrustLimits:
    """How much a post-paid customer may owe: at first, at most, and how fast one grows into the other."""

    start_cents: int = TRUST_START_CENTS
    max_cents: int = TRUST_MAX_CENTS
    growth_bps: int = TRUST_GROWTH_BPS
    """Hundredths of a percent of what was paid."""


@dataclass(frozen=True, slots=True)
class AccountsConfig:
    """``[accounts]``."""

    trust_rule: TrustRuleName = "when_several"
    """When a request must name its account in ``X-Trust``."""
    sign_up: bool = False
    """Whether the first verified token that names an unknown account opens it."""
    top_up_url: str | None = None
    """Where customers buy credit: shown to those who have none left."""
    jwt: JwtConfig | None = None
    trust_limits: TrustLimits = TrustLimits()
    private_alert_urls: bool = False
    """Whether alerts may be sent to private addresses and over http: for development."""


NO_ACCOUNTS_SECTION: Final = AccountsConfig()


@dataclass(frozen=True, slots=True)
class AdminConfig:
    """``[admin]``: the operator's own API, on a port of its own."""

    token: Secret[str]
    host: str = "127.0.0.1"
    port: int = 8403


def read_accounts(section: Section) -> AccountsConfig:
    """The ``[accounts]`` table; problems are noted in the section."""
    jwt = read_jwt(section.section("jwt")) if "jwt" in section.values else None
    limits = section.section("trust_limits", optional=True)
    start = limits.whole("start_cents", 0, _CENTS_MAX, TRUST_START_CENTS)
    most = limits.whole("max_cents", 0, _CENTS_MAX, max(TRUST_MAX_CENTS, start))
    growth = limits.whole("growth_bps", 0, 10_000, TRUST_GROWTH_BPS)
    if most < start:
        limits.problem("max_cents", "must be at least start_cents")
    limits.done()
    config = AccountsConfig(
        trust_rule=section.get("trust_rule", _rule, "when_several", fallback="when_several"),
        sign_up=section.get("sign_up", flag_of, False, fallback=False),
        top_up_url=section.get("top_up_url", _page, None, fallback=None),
        jwt=jwt,
        trust_limits=TrustLimits(start, most, growth),
        private_alert_urls=section.get("private_alert_urls", flag_of, False, fallback=False),
    )
    section.done()
    return config


def read_jwt(section: Section) -> JwtConfig:
    """The ``[accounts.jwt]`` table."""

    def secret(text: str) -> Secret[bytes]:
        if len(text.encode()) < _SECRET_BYTES_MIN:
            raise ValueError(f"must have at least {_SECRET_BYTES_MIN} bytes")
        return Secret(text.encode())

    shared = section.secret("secret", secret, required=False)
    published = section.get("jwks_url", _page, None, fallback=None)
    if (shared is None) == (published is None):
        section.problem("secret", "or jwks_url must be given, and not both")
    config = JwtConfig(
        issuer=section.text("issuer", _NAMED, "https://issuer.example"),
        audience=section.text("audience", _NAMED, "mppnode"),
        secret=shared,
        jwks_url=published,
        leeway_s=section.whole("leeway_s", 0, _LEEWAY_MAX_S, 30),
        subject_claim=section.text("subject_claim", _CLAIM, "sub", "sub"),
        trusts_claim=section.text("trusts_claim", _CLAIM, "trusts", "trusts"),
    )
    section.done()
    return config


def read_admin(section: Section) -> AdminConfig:
    """The ``[admin]`` table."""

    def token(text: str) -> Secret[str]:
        if len(text) < _TOKEN_CHARS_MIN or not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError(f"must have at least {_TOKEN_CHARS_MIN} visible ASCII characters")
        return Secret(text)

    config = AdminConfig(
        token=section.secret("token", token) or Secret(""),
        host=section.text("host", _HOST, "127.0.0.1", "127.0.0.1"),
        port=section.whole("port", 0, 65_535, 8403),
    )
    section.done()
    return config


def _rule(value: Any) -> TrustRuleName:
    if value == "always":
        return "always"
    if value == "when_several":
        return "when_several"
    raise ValueError('must be "when_several" or "always"')


def _page(value: Any) -> str:
    text = text_of(value)
    check_base_url(text.partition("?")[0])
    if not urlsplit(text).hostname:
        raise ValueError("must be a URL")
    return text
