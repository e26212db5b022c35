"""What follows from a change of an account beside the money: alerts for its owner, and an order to recharge it.

Pure: the tasks are written in the transaction that made the change. Each has an id that says what it tells, so one that
was told already is dropped when it is written again, and a transaction that is begun again writes the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import orjson

from channels.credit import AccountId, CreditAccount, Spending, Window
from channels.instants import UnixMillis, UnixSeconds
from channels.payment import PICO_PER_CENT
from mppnode.accounts.model import Account, ApiKey, Prepaid
from mppnode.ledger.credit_rows import Task

ALERT: Final = "alert"
RECHARGE: Final = "recharge"
SUSPENSION: Final = "suspension"
"""A task of this kind stands, due and never worked on, while billing keeps an account suspended."""
STEPS: Final = (50, 80, 100)
"""Percent of a spend cap at which its owner is told: half, while there is time, and when requests are refused."""
_DAY_MS: Final = 86_400_000
_ID_CHARS: Final = 40  # of a SHA-256 in hex: 160 bits, and a receiver takes 64 characters


def notices(
    before: CreditAccount, after: CreditAccount, *, account: Account, key: ApiKey | None, now: UnixMillis
) -> tuple[Task, ...]:
    """The tasks that follow from ``after`` having come of ``before`` at ``now`` (Unix milliseconds).

    A step of a cap is told once per window and cap. A low balance and a recharge follow the moment the balance falls
    below their bound, once per day for what was paid in until then: a balance that trembles tells nothing new.
    """
    made: list[Task] = []
    if account.alerts is not None:
        if key is not None:
            made += _spending(before, after, key, now)
        low = account.alerts.low_balance_cents
        if _fell(before, after, low):
            data = {"balance_cents": after.balance // PICO_PER_CENT, "low_balance_cents": low}
            made.append(alert(account.id, "balance.low", (low, after.funds, now // _DAY_MS), data, now))
    recharge = account.billing.recharge
    if recharge is not None and _fell(before, after, recharge.threshold_cents):
        made += recharge_order(after, account, now)
    return tuple(made)


def recharge_order(credit: CreditAccount, account: Account, now: UnixMillis) -> tuple[Task, ...]:
    """The order to recharge an account whose balance is below its threshold; nothing when it is not, or cannot be.

    What would be charged is read again when it is: here only whether somebody should look.
    """
    recharge, billing = account.billing.recharge, account.billing
    if recharge is None or billing.card is None or billing.customer is None or not isinstance(account.terms, Prepaid):
        return ()
    if credit.balance >= recharge.threshold_cents * PICO_PER_CENT:
        return ()
    # Other settings, or another card after a declined one, are another order.
    wish = (recharge.threshold_cents, recharge.amount_cents, billing.card, credit.funds, now // _DAY_MS)
    return (Task(_id(RECHARGE, account.id, *wish), RECHARGE, account.id, now, "{}", created_ms=now),)


def alert(
    account: AccountId, kind: str, once_per: tuple[object, ...], data: Mapping[str, Any], now: UnixMillis
) -> Task:
    """A task to tell the owner of an account something; a second one of the same kind and ``once_per`` is dropped.

    Where to, and the secret that signs it, are read when it is sent: they are in no document of ours.
    """
    document = orjson.dumps({"type": kind, "data": {"account": account, **data}}).decode()
    return Task(_id(ALERT, account, kind, *once_per), ALERT, account, now, document, created_ms=now)


def _spending(before: CreditAccount, after: CreditAccount, key: ApiKey, now: UnixMillis) -> Iterator[Task]:
    at = UnixSeconds(now // 1000)
    was, then = (one.spending.get(key.id, Spending()).at(at) for one in (before, after))
    for window, cap, opened, spent_before, spent in (
        (Window.DAY, key.caps.day, then.day, was.spent_day, then.spent_day),
        (Window.MONTH, key.caps.month, then.month, was.spent_month, then.spent_month),
        (Window.TOTAL, key.caps.total, 0, was.spent_total, then.spent_total),
    ):
        for step in STEPS if cap else ():
            assert cap is not None
            if spent_before * 100 < cap * step <= spent * 100:
                data = {
                    "key": key.id,
                    "window": window.value,
                    "percent": step,
                    "cap_cents": cap // PICO_PER_CENT,
                    "spent_cents": spent // PICO_PER_CENT,
                }
                yield alert(after.id, "cap.reached", (key.id, window.value, opened, cap, step), data, now)


def _fell(before: CreditAccount, after: CreditAccount, cents: int) -> bool:
    """Whether the balance fell below ``cents`` by this change."""
    return after.balance < cents * PICO_PER_CENT <= before.balance


def _id(kind: str, *parts: object) -> str:
    # A separator no part holds: two different notices must not run together.
    digest = hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()
    return f"{kind}_{digest[:_ID_CHARS]}"
