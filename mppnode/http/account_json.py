"""Accounts, keys, money and usage as the API and the operator's commands show them.

Amounts are shown three ways: exact dollars for people, whole millionths (rounded down) for arithmetic, and exact
pico-dollars as a string, because they pass what JSON readers keep exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from channels.credit import CreditAccount, SpendCaps, Spending
from channels.instants import UnixMillis, UnixSeconds, to_rfc3339
from channels.payment import PICO_PER_CENT
from channels.units import PICO_PER_UNIT
from mppnode.accounts.model import Account, ApiKey, Postpaid, Routing
from mppnode.ledger.credit_lists import Group, Sums
from mppnode.ledger.credit_rows import Entry, RequestRow, Task

_PICO_PER_USD: Final = 10**12
_PLACES_MIN: Final = 6
_DAY_MS: Final = 86_400_000

Json = dict[str, Any]


def usd(pico: int) -> str:
    """Pico-dollars as dollars, exactly, with six places or as many as it takes: ``1_500_000 -> "0.0000015"``."""
    sign, digits = ("-", -pico) if pico < 0 else ("", pico)
    places = f"{digits % _PICO_PER_USD:012d}".rstrip("0").ljust(_PLACES_MIN, "0")
    return f"{sign}{digits // _PICO_PER_USD}.{places}"


def amount(pico: int) -> Json:
    """An amount in its three forms."""
    return {"usd": usd(pico), "micro_usd": pico // PICO_PER_UNIT, "pico_usd": str(int(pico))}


def key_json(key: ApiKey, spending: Spending | None = None, *, now: UnixSeconds) -> Json:
    """A key without its secret; ``spending`` is what it has spent so far."""
    shown: Json = {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "prefix": key.prefix,
        "status": _status(key, now),
        **_routing(key),
        "spend_caps": _caps(key.caps),
        "rpm": key.rates.rpm,
        "tpm": key.rates.tpm,
        "concurrency": key.rates.concurrency,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "rotated_to": key.rotated_to,
        "grace_until": key.grace_until,
    }
    if spending is not None:
        spent = spending.at(now)
        shown["spent"] = {"day": usd(spent.spent_day), "month": usd(spent.spent_month), "total": usd(spent.spent_total)}
    return shown


def account_json(account: Account) -> Json:
    """An account without any secret of its."""
    recharge, alerts = account.billing.recharge, account.alerts
    return {
        "id": account.id,
        "object": "account",
        "kind": account.kind.value,
        "trust": account.trust,
        "email": account.email,
        **_terms(account),
        "suspended_at": account.suspended_at,
        "created_at": account.created_at,
        **_routing(account),
        "card_on_file": account.billing.card is not None,
        "recharge": None
        if recharge is None
        else {
            "threshold_cents": recharge.threshold_cents,
            "amount_cents": recharge.amount_cents,
            "month_cap_cents": recharge.month_cap_cents,
        },
        "alerts": None if alerts is None else {"url": alerts.url, "low_balance_cents": alerts.low_balance_cents},
    }


def credits_json(account: Account, credit: CreditAccount) -> Json:
    """What an account has, what live requests hold of it, and what a request may still reserve."""
    return {
        "object": "credits",
        **_terms(account),
        "balance": amount(credit.balance),
        "held": amount(credit.held),
        "available": amount(max(credit.headroom, 0)),
        "spent": amount(credit.owed),
    }


def entry_json(entry: Entry) -> Json:
    """One line of a statement."""
    return {
        "object": "transaction",
        "seq": entry.seq,
        "time": to_rfc3339(entry.at_ms),
        "kind": entry.kind,
        "amount": amount(entry.amount),
        "balance": amount(entry.balance),
        "reference": entry.reference,
    }


def request_json(row: RequestRow) -> Json:
    """One request, with whatever was noted of how it went; that never overwrites what the ledger knows itself."""
    noted: Mapping[str, Any] = orjson.loads(row.document)
    return {
        **noted,
        "id": row.id,
        "object": "request",
        "time": to_rfc3339(row.at_ms),
        "key": row.api_key or None,
        "model": row.model,
        "provider": row.provider or None,
        "usage": _tokens(row),
        "cost": amount(row.cost),
    }


def sums_json(sums: Sums, groups: list[Group]) -> Json:
    """Usage of one group."""
    names = {group.value: group_name(group, name) for group, name in zip(groups, sums.names, strict=True)}
    return {"object": "usage", **names, "requests": sums.requests, "usage": _tokens(sums), "cost": amount(sums.cost)}


def group_name(group: Group, name: str | int) -> str:
    """What a group is called; a day by its date in UTC."""
    return to_rfc3339(UnixMillis(int(name) * _DAY_MS))[:10] if group is Group.DAY else str(name)


def task_json(task: Task) -> Json:
    """A task of the outbox, for operators; what only its receiver may know is left out."""
    document = orjson.loads(task.document)
    if isinstance(document, dict):
        document = {name: value for name, value in document.items() if "secret" not in name}
    return {
        "id": task.id,
        "object": "task",
        "kind": task.kind,
        "account": task.account,
        "state": task.state.value,
        "due_ms": task.due_ms,
        "created_ms": task.created_ms,
        "version": task.version,
        "document": document,
    }


def _tokens(row: RequestRow | Sums) -> Json:
    return {
        "prompt_tokens": row.prompt,
        "cached_tokens": row.cached,
        "completion_tokens": row.completion,
        "reasoning_tokens": row.reasoning,
    }


def _terms(account: Account) -> Json:
    terms = account.terms
    limit = amount(terms.trust_limit) if isinstance(terms, Postpaid) else None
    return {"terms": "prepaid" if limit is None else "postpaid", "trust_limit": limit}


def _routing(of: Routing) -> Json:
    ceiling = of.ceiling
    return {
        "model_pool": of.model_pool,
        "optimize_mode": of.optimize,
        "routing_strategy": of.strategy,
        "allow_external": of.allow_external,
        "max_input_price_per_million": None if ceiling is None else ceiling.input_cents,
        "max_output_price_per_million": None if ceiling is None else ceiling.output_cents,
    }


def _caps(caps: SpendCaps) -> Json:
    given = {"day": caps.day, "month": caps.month, "total": caps.total}
    return {name: None if cap is None else cap // PICO_PER_CENT for name, cap in given.items()}


def _status(key: ApiKey, now: UnixSeconds) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.grace_until is not None:
        return "rotated" if now >= key.grace_until else "rotating"
    return "expired" if key.expires_at is not None and now >= key.expires_at else "live"
