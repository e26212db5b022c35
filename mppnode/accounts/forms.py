"""What customers and operators may write about keys and accounts, read strictly.

A field that were dropped silently would be a limit its owner believes in and nobody keeps. So every field is honoured
or refused by name. A form holds only what was said: what was not said stays as it is.

Source: the node's own API (docs/accounts.md); ``model_pool`` and ``optimize_mode`` as in the seed service's keys.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, NoReturn

from channels.credit import NO_CAPS, SpendCaps
from channels.faults import ChannelFault
from channels.instants import UnixSeconds, parse_rfc3339
from channels.payment import CENTS_MAX, PICO_PER_CENT
from channels.units import Pico
from mppnode.accounts.model import (
    CAP_MAX,
    CONCURRENCY_MAX,
    RATE_MAX,
    RECHARGE_CENTS_MIN,
    TRUST_NAME,
    Account,
    AccountKind,
    Alerts,
    ApiKey,
    Postpaid,
    Prepaid,
    Recharge,
)
from mppnode.config.billing import PACK_CENTS_MAX, PACK_CENTS_MIN
from mppnode.gateways.alerts import check_alert_url
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.strategy import PriceCeiling, Strategy
from mppnode.kernel.strict_input import parse_object
from mppnode.kernel.wishes import Optimize

Json = Mapping[str, Any]

NAME_MAX: Final = 128  # shown in lists; nothing is decided by it
OVERLAP_S_MAX: Final = 7 * 86_400  # a key that two places know is a key too many: a week is time for any roll-out
OVERLAP_S: Final = 86_400  # unsaid: long enough for a deployment, and nobody forgets it for a week
REFERENCE_MAX: Final = 200  # an invoice's number or a ticket's address
_CEILING_CENTS_MAX: Final = 10**9  # as in a request: ten dollars a token
_POOL_MAX: Final = 64  # scored one by one on every request
_EPOCH_MAX: Final = 253_402_300_799  # the end of the year 9999, the last RFC 3339 can write
_MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,255}", re.ASCII)
_EMAIL: Final = re.compile(r"[!-?A-~]{1,64}@[!-?A-~]{1,255}", re.ASCII)
_REFERENCE: Final = re.compile(rf"[!-~](?:[ -~]{{0,{REFERENCE_MAX - 2}}}[!-~])?", re.ASCII)

_ROUTING: Final = (
    "model_pool",
    "optimize_mode",
    "routing_strategy",
    "allow_external",
    "max_input_price_per_million",
    "max_output_price_per_million",
)
_CEILING: Final = _ROUTING[4:]
_KEY: Final = ("name", *_ROUTING, "spend_caps", "rpm", "tpm", "concurrency", "expires_at")
_SETTINGS: Final = (*_ROUTING, "alerts", "recharge")
_OPENING: Final = ("trust", "kind", "email", "terms", "trust_limit_cents")
_OPERATED: Final = (*_SETTINGS, "email", "suspended", "terms", "trust_limit_cents")


@dataclass(frozen=True, slots=True)
class FormLimits:
    """Bounds of a form; the shape of ``mppnode.kernel.strict_input.JsonLimits``."""

    body_bytes: int = 32 * 1024
    """Sixty-four names of models and as much again."""
    depth: int = 3
    keys: int = 64


_LIMITS: Final = FormLimits()


@dataclass(frozen=True, slots=True)
class KeyForm:
    """What a key is to be: new values for fields of :class:`ApiKey`, and of its rates."""

    values: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    rates: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def applied(self, key: ApiKey) -> ApiKey:
        """The key as this form wants it."""
        return replace(key, **self.values, rates=replace(key.rates, **self.rates))


@dataclass(frozen=True, slots=True)
class AccountForm:
    """What an account's settings are to be. ``alerts`` and ``recharge``: a pair of said and wanted."""

    values: Mapping[str, Any]
    alerts: tuple[bool, tuple[str, int] | None] = (False, None)
    recharge: tuple[bool, Recharge | None] = (False, None)
    terms: Prepaid | Postpaid | None = None
    suspended: bool | None = None

    def applied(self, account: Account, *, secret: str, now: UnixSeconds) -> Account:
        """The account as this form wants it; a new address for alerts gets ``secret``, an old one keeps its own."""
        changed = replace(account, **self.values)
        said, alerts = self.alerts
        if said:
            changed = replace(changed, alerts=None if alerts is None else _alerts(account, alerts, secret))
        if self.recharge[0]:
            changed = replace(changed, billing=replace(changed.billing, recharge=self.recharge[1]))
        if self.terms is not None:
            changed = replace(changed, terms=self.terms)
        if self.suspended is not None:
            since = account.suspended_at or now
            changed = replace(changed, suspended_at=since if self.suspended else None)
        return changed


def _alerts(account: Account, wanted: tuple[str, int], secret: str) -> Alerts:
    url, low = wanted
    known = account.alerts
    # Another receiver must not be able to forge what the one before it was sent, nor the other way round.
    return Alerts(url, known.secret if known is not None and known.url == url else secret, low)


@dataclass(frozen=True, slots=True)
class Opening:
    """A new account."""

    trust: str
    kind: AccountKind
    email: str | None
    terms: Prepaid | Postpaid


@dataclass(frozen=True, slots=True)
class Checkout:
    """What is to be bought: credit in cents, or None to put a card on file."""

    amount_cents: int | None


@dataclass(frozen=True, slots=True)
class Gift:
    """Credit an operator gives, or takes when it is negative; pico-dollars. Booked once per ``reference``."""

    amount: Pico
    reference: str


# ------------------------------------------------------------------------------------------------------------- readers


def read_key_form(body: bytes, *, now: UnixSeconds) -> KeyForm:
    """The form of a new or changed key; null removes what it names.

    Raises:
        NodeFault: ``INVALID_FIELD``, ``INVALID_JSON`` or ``BODY_TOO_LARGE``.
    """
    raw = _form(body, _KEY)
    values = _routing(raw)
    if "name" in raw:
        values["name"] = _name(raw["name"])
    if "spend_caps" in raw:
        values["caps"] = _caps(raw["spend_caps"])
    if "expires_at" in raw:
        values["expires_at"] = _maybe_future(raw["expires_at"], now)
    rates: dict[str, int | None] = {
        name: _maybe_whole(raw[name], name, 1, RATE_MAX) for name in ("rpm", "tpm") if name in raw
    }
    if "concurrency" in raw:
        rates["concurrency"] = _maybe_whole(raw["concurrency"], "concurrency", 1, CONCURRENCY_MAX) or CONCURRENCY_MAX
    return KeyForm(MappingProxyType(values), MappingProxyType(rates))


def read_rotation(body: bytes) -> int:
    """For how many seconds the old key goes on working; an empty body takes :data:`OVERLAP_S`. Raises as above."""
    raw = _form(body, ("overlap_s",)) if body else {}
    value = raw.get("overlap_s", OVERLAP_S)
    return _whole(value, "overlap_s", 0, OVERLAP_S_MAX)


def read_settings(body: bytes, *, private_alerts: bool = False) -> AccountForm:
    """What the owner of an account may change of it. Raises as above."""
    return _account_form(_form(body, _SETTINGS), private_alerts=private_alerts)


def read_operated(body: bytes, *, private_alerts: bool = False) -> AccountForm:
    """What an operator may: also terms, suspension and e-mail. Raises as above."""
    raw = _form(body, _OPERATED)
    form = _account_form(raw, private_alerts=private_alerts)
    values = dict(form.values)
    if "email" in raw:
        values["email"] = _maybe_email(raw["email"])
    suspended = raw.get("suspended")
    if "suspended" in raw and not isinstance(suspended, bool):
        _bad("suspended", "is not a boolean")
    return replace(form, values=MappingProxyType(values), terms=_terms(raw), suspended=suspended)


def read_opening(body: bytes) -> Opening:
    """A new account, as an operator writes it. Raises as above."""
    raw = _form(body, _OPENING)
    trust = raw.get("trust")
    if not isinstance(trust, str) or TRUST_NAME.fullmatch(trust) is None:
        _bad("trust", "is not 1 to 255 visible ASCII characters")
    kind = _choice(raw.get("kind", AccountKind.USER.value), "kind", [kind.value for kind in AccountKind])
    return Opening(trust, AccountKind(kind), _maybe_email(raw.get("email")), _terms(raw) or Prepaid())


def read_checkout(body: bytes) -> Checkout:
    """What is to be bought. Raises as above."""
    raw = _form(body, ("amount_cents", "card"))
    if len(raw) != 1:
        _bad("amount_cents", "or card must be given, and not both")
    if "card" in raw:
        if raw["card"] is not True:
            _bad("card", "is not true")
        return Checkout(None)
    return Checkout(_whole(raw["amount_cents"], "amount_cents", PACK_CENTS_MIN, PACK_CENTS_MAX))


def read_gift(body: bytes) -> Gift:
    """Credit to give or take. Raises as above."""
    raw = _form(body, ("amount_cents", "reference"))
    cents = _whole(raw.get("amount_cents"), "amount_cents", -CENTS_MAX, CENTS_MAX)
    if cents == 0:
        _bad("amount_cents", "is zero")
    return Gift(Pico(cents * PICO_PER_CENT), read_reference(raw.get("reference")))


def read_reference(value: Any) -> str:
    """The name under which an operator's booking happens once. Raises ``INVALID_FIELD``."""
    if not isinstance(value, str) or len(value) > REFERENCE_MAX or _REFERENCE.fullmatch(value) is None:
        _bad("reference", f"is not 1 to {REFERENCE_MAX} printable ASCII characters")
    return value


def read_instant(value: Any, name: str) -> int:
    """A moment in milliseconds since 1970, from Unix seconds or RFC 3339 with a zone. Raises ``INVALID_FIELD``."""
    if type(value) is int:
        return _whole(value, name, 0, _EPOCH_MAX) * 1000
    try:
        return parse_rfc3339(value, field=name)
    except ChannelFault:
        _bad(name, "is neither an RFC 3339 time nor whole Unix seconds")


def known(names: Collection[str], allowed: Collection[str]) -> None:
    """Refuse the first name that is not allowed, with the one it may have been meant to be.

    What is refused is named only if it is written like a name: the rest of a stranger's text is not repeated.
    """
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(name[:64], list(allowed), n=1)
            shown = name if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name, re.ASCII) else "a field"
            _bad(shown, f"is not known here{f'; did you mean {near[0]}?' if near else ''}")


# --------------------------------------------------------------------------------------------------------------- parts


def _form(body: bytes, allowed: Collection[str]) -> dict[str, Any]:
    raw = parse_object(body, limits=_LIMITS)
    known(raw, allowed)
    return raw


def _account_form(raw: Json, *, private_alerts: bool) -> AccountForm:
    alerts = _object(raw.get("alerts"), "alerts", ("url", "low_balance_cents"))
    recharge = _object(raw.get("recharge"), "recharge", ("threshold_cents", "amount_cents", "month_cap_cents"))
    return AccountForm(
        MappingProxyType(_routing(raw)),
        ("alerts" in raw, None if alerts is None else _wanted_alerts(alerts, private=private_alerts)),
        ("recharge" in raw, None if recharge is None else _recharge(recharge)),
    )


def _routing(raw: Json) -> dict[str, Any]:
    """What was said of the router, under the names of :class:`Routing`."""
    values: dict[str, Any] = {}
    if "model_pool" in raw:
        values["model_pool"] = _maybe_pool(raw["model_pool"])
    if "optimize_mode" in raw:
        mode = _maybe_choice(raw["optimize_mode"], "optimize_mode", [each.value for each in Optimize])
        values["optimize"] = None if mode is None else Optimize(mode)
    if "routing_strategy" in raw:
        name = _maybe_choice(raw["routing_strategy"], "routing_strategy", [each.value for each in Strategy])
        values["strategy"] = None if name is None else Strategy(name)
    if "allow_external" in raw:
        if raw["allow_external"] is not None and not isinstance(raw["allow_external"], bool):
            _bad("allow_external", "is not a boolean")
        values["allow_external"] = raw["allow_external"]
    if any(name in raw for name in _CEILING):
        values["ceiling"] = _maybe_ceiling(raw)
    return values


def _maybe_pool(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not 1 <= len(value) <= _POOL_MAX:
        _bad("model_pool", f"is not an array of 1 to {_POOL_MAX} model names")
    for index, name in enumerate(value):
        if not isinstance(name, str) or _MODEL.fullmatch(name) is None:
            _bad(f"model_pool[{index}]", "is not a model name")
    return tuple(dict.fromkeys(value))


def _maybe_ceiling(raw: Json) -> PriceCeiling | None:
    paid_in, paid_out = (_maybe_whole(raw.get(name), name, 0, _CEILING_CENTS_MAX) for name in _CEILING)
    if paid_in is None and paid_out is None:
        return None
    # One ceiling alone leaves the other price unbounded, which nobody with a budget means.
    if paid_in is None:
        _bad(_CEILING[0], "is missing although the output ceiling is set")
    if paid_out is None:
        _bad(_CEILING[1], "is missing although the input ceiling is set")
    return PriceCeiling(paid_in, paid_out)


def _caps(value: Any) -> SpendCaps:
    raw = _object(value, "spend_caps", ("day", "month", "total"))
    if raw is None:
        return NO_CAPS
    cents = [
        _maybe_whole(raw.get(name), f"spend_caps.{name}", 0, CAP_MAX // PICO_PER_CENT)
        for name in ("day", "month", "total")
    ]
    given = [cap for cap in cents if cap is not None]
    if given != sorted(given):
        _bad("spend_caps", "of a shorter period must not be above that of a longer one")
    return SpendCaps(*(None if cap is None else Pico(cap * PICO_PER_CENT) for cap in cents))


def _wanted_alerts(raw: Json, *, private: bool) -> tuple[str, int]:
    url = raw.get("url")
    if not isinstance(url, str):
        _bad("alerts.url", "is not a string")
    try:
        check_alert_url(url, development=private)
    except ValueError as error:
        _bad("alerts.url", str(error))
    return url, _whole(raw.get("low_balance_cents", 0), "alerts.low_balance_cents", 0, CENTS_MAX)


def _recharge(raw: Json) -> Recharge:
    threshold = _whole(raw.get("threshold_cents"), "recharge.threshold_cents", 1, CENTS_MAX)
    amount = _whole(raw.get("amount_cents"), "recharge.amount_cents", RECHARGE_CENTS_MIN, CENTS_MAX)
    # Required, never "as often as it takes": a runaway program must not empty a card.
    cap = _whole(raw.get("month_cap_cents"), "recharge.month_cap_cents", amount, CENTS_MAX)
    return Recharge(threshold, amount, cap)


def _terms(raw: Json) -> Prepaid | Postpaid | None:
    limit = raw.get("trust_limit_cents")
    if "terms" not in raw:
        if limit is not None:
            _bad("terms", "is missing: a trust limit is for postpaid")
        return None
    if _choice(raw["terms"], "terms", ["prepaid", "postpaid"]) == "prepaid":
        if limit is not None:
            _bad("trust_limit_cents", "is for postpaid only")
        return Prepaid()
    return Postpaid(Pico(_whole(limit, "trust_limit_cents", 0, CENTS_MAX) * PICO_PER_CENT))


def _name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > NAME_MAX or not value.isprintable():
        _bad("name", f"is not at most {NAME_MAX} printable characters")
    return value


def _maybe_email(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or _EMAIL.fullmatch(value) is None):
        _bad("email", "is not an address")
    return value


def _maybe_future(value: Any, now: UnixSeconds) -> UnixSeconds | None:
    if value is None:
        return None
    at = read_instant(value, "expires_at") // 1000
    if at <= now:
        _bad("expires_at", "is not in the future; to end a key, delete it")
    return UnixSeconds(at)


def _object(value: Any, name: str, allowed: Collection[str]) -> Json | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        _bad(name, "is not an object")
    try:
        known(value, allowed)
    except NodeFault as fault:
        _bad(f"{name}.{fault.field}", fault.detail)
    return value


def _choice(value: Any, name: str, allowed: Collection[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        _bad(name, "is not one of " + ", ".join(allowed))
    return value


def _maybe_choice(value: Any, name: str, allowed: Collection[str]) -> str | None:
    return None if value is None else _choice(value, name, allowed)


def _maybe_whole(value: Any, name: str, low: int, high: int) -> int | None:
    return None if value is None else _whole(value, name, low, high)


def _whole(value: Any, name: str, low: int, high: int) -> int:
    # type() and not isinstance(): True is an int, and a caller who sends it meant something else.
    if type(value) is not int or not low <= value <= high:
        _bad(name, f"is not an integer from {low} to {high}")
    return value


def _bad(name: str, detail: str) -> NoReturn:
    raise NodeFault(NodeReason.INVALID_FIELD, field=name, detail=detail) from None
