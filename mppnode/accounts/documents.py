"""Accounts and keys as the ledger's rows, and back. Rows are our own writing: what does not fit is a bug, not input."""

from __future__ import annotations

from typing import Any

import orjson

from channels.credit import SpendCaps
from channels.instants import UnixMillis, UnixSeconds
from channels.units import Pico
from mppnode.accounts.model import (
    Account,
    AccountKind,
    Alerts,
    ApiKey,
    BillingProfile,
    Postpaid,
    Prepaid,
    RateLimits,
    Recharge,
    Routing,
)
from mppnode.kernel.keys import KeyDigest
from mppnode.kernel.strategy import PriceCeiling, Strategy
from mppnode.kernel.wishes import Optimize
from mppnode.ledger.credit_rows import AccountRow, KeyRow

Json = dict[str, Any]


def account_row(account: Account) -> AccountRow:
    """The row of an account."""
    billing, alerts = account.billing, account.alerts
    recharge = billing.recharge
    document = {
        **_routing(account),
        "kind": account.kind.value,
        "trust_limit": account.terms.trust_limit if isinstance(account.terms, Postpaid) else None,
        "suspended_at": account.suspended_at,
        "email": account.email,
        "card": billing.card,
        "subscription": billing.subscription,
        "recharge": recharge and [recharge.threshold_cents, recharge.amount_cents, recharge.month_cap_cents],
        "alerts": alerts and [alerts.url, alerts.secret, alerts.low_balance_cents],
    }
    created = UnixMillis(account.created_at * 1000)
    return AccountRow(account.id, account.trust, billing.customer, _dumps(document), created)


def read_account(row: AccountRow) -> Account:
    """The inverse."""
    body: Json = orjson.loads(row.document)
    limit, recharge, alerts = body["trust_limit"], body["recharge"], body["alerts"]
    return Account(
        **_read_routing(body),
        id=row.id,
        kind=AccountKind(body["kind"]),
        trust=row.trust,
        terms=Prepaid() if limit is None else Postpaid(Pico(limit)),
        suspended_at=_maybe_instant(body["suspended_at"]),
        email=body["email"],
        billing=BillingProfile(
            row.customer, body["card"], body["subscription"], None if recharge is None else Recharge(*recharge)
        ),
        alerts=None if alerts is None else Alerts(*alerts),
        created_at=UnixSeconds(row.created_ms // 1000),
    )


def key_row(key: ApiKey) -> KeyRow:
    """The row of a key."""
    document = {
        **_routing(key),
        "name": key.name,
        "prefix": key.prefix,
        "caps": [key.caps.day, key.caps.month, key.caps.total],
        "rates": [key.rates.rpm, key.rates.tpm, key.rates.concurrency],
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "rotated_to": key.rotated_to,
        "grace_until": key.grace_until,
    }
    created = UnixMillis(key.created_at * 1000)
    digest = key.digest.stored().hex()
    return KeyRow(key.id, key.account, digest, key.revoked_at is not None, _dumps(document), created)


def read_key(row: KeyRow) -> ApiKey:
    """The inverse."""
    body: Json = orjson.loads(row.document)
    return ApiKey(
        **_read_routing(body),
        id=row.id,
        account=row.account,
        name=body["name"],
        digest=KeyDigest(bytes.fromhex(row.digest)),
        prefix=body["prefix"],
        caps=SpendCaps(*body["caps"]),
        rates=RateLimits(*body["rates"]),
        expires_at=_maybe_instant(body["expires_at"]),
        revoked_at=_maybe_instant(body["revoked_at"]),
        rotated_to=body["rotated_to"],
        grace_until=_maybe_instant(body["grace_until"]),
        created_at=UnixSeconds(row.created_ms // 1000),
    )


def _routing(of: Routing) -> Json:
    ceiling = of.ceiling
    return {
        "strategy": of.strategy,
        "allow_external": of.allow_external,
        "ceiling": ceiling and [ceiling.input_cents, ceiling.output_cents],
        "model_pool": of.model_pool,
        "optimize": of.optimize,
    }


def _read_routing(body: Json) -> Json:
    strategy, ceiling, pool, optimize = (body[name] for name in ("strategy", "ceiling", "model_pool", "optimize"))
    return {
        "strategy": None if strategy is None else Strategy(strategy),
        "allow_external": body["allow_external"],
        "ceiling": None if ceiling is None else PriceCeiling(*ceiling),
        "model_pool": None if pool is None else tuple(pool),
        "optimize": None if optimize is None else Optimize(optimize),
    }


def _maybe_instant(value: int | None) -> UnixSeconds | None:
    return None if value is None else UnixSeconds(value)


def _dumps(document: Json) -> str:
    return orjson.dumps(document).decode()
