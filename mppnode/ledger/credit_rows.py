"""Credit accounts and their events as rows and back, and the records that are kept beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, assert_never

import orjson

from channels.credit import (
    AccessChanged,
    AccountId,
    AccountOpened,
    Charged,
    CreditAccount,
    CreditEvent,
    CreditHold,
    FundsKind,
    FundsMoved,
    Held,
    KeyId,
    OverdraftSet,
    Released,
    Spending,
    UsageReported,
    check,
)
from channels.instants import UnixMillis, UnixSeconds
from channels.model import HoldId, NodeId
from channels.payment import DisputeState, PaymentRecord, RefundState
from channels.units import Pico
from mppnode.ledger.rows import BrokenRow

Json = Any


@dataclass(frozen=True, slots=True)
class AccountRow:
    """Who pays; ``document`` is JSON that the ledger does not read."""

    id: AccountId
    trust: str
    customer: str | None
    document: str = field(repr=False)  # holds what alerts are signed with
    created_ms: UnixMillis


@dataclass(frozen=True, slots=True)
class KeyRow:
    """An API key: ``digest`` is the SHA-256 of its text in hex."""

    id: KeyId
    account: AccountId
    digest: str
    ended: bool
    document: str
    created_ms: UnixMillis


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request an account has paid for. ``cost`` in pico-dollars; ``reasoning`` is part of ``completion`` and
    ``cached`` of ``prompt``, in tokens.
    """

    id: str
    account: AccountId
    api_key: KeyId
    at_ms: UnixMillis
    model: str
    provider: str
    cost: int
    prompt: int
    cached: int
    completion: int
    reasoning: int
    document: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of an account's statement, pico-dollars; ``amount`` is negative when money went."""

    account: AccountId
    seq: int
    at_ms: UnixMillis
    kind: str
    amount: int
    reference: str
    balance: int


class TaskState(StrEnum):
    """What has become of a task of the outbox."""

    DUE = "due"
    DONE = "done"
    PARKED = "parked"
    """Given up until somebody looks at it."""


@dataclass(frozen=True, slots=True)
class Task:
    """Something to be done outside, at least once; ``version`` rises with every change."""

    id: str
    kind: str
    account: AccountId
    due_ms: int
    document: str
    state: TaskState = TaskState.DUE
    version: int = 1
    created_ms: int = 0


SideRow = RequestRow | Task

# ---------------------------------------------------------------------------------------------------------- credit

CREDIT_COLUMNS: Final = (
    "version",
    "access",
    "prepaid",
    "invoiced",
    "overdraft",
    "owed",
    "held",
    "reported_micro",
    "charged_at",
    "holds",
    "spending",
    "paces",
    "live",
)
"""Columns of ``credit`` after its id."""


def credit_values(account: CreditAccount) -> tuple[int | str, ...]:
    """The row of an account, in the order of :data:`CREDIT_COLUMNS`."""
    return (
        account.version,
        account.access,
        account.prepaid,
        account.invoiced,
        account.overdraft,
        account.owed,
        account.held,
        account.reported_micro,
        account.charged_at,
        _dumps({name: _hold_row(hold) for name, hold in account.holds.items()}),
        _dumps({key: _spending(spent) for key, spent in account.spending.items()}),
        _dumps({key: _pace_row(pace) for key, pace in account.paces.items()}),
        int(bool(account.holds)),
    )


def read_credit(row: tuple[Any, ...]) -> CreditAccount:
    """The inverse, of a row with its id first. Raises ``BrokenRow`` when it breaks the law."""
    account_id, version, access, prepaid, invoiced, overdraft, owed, held, reported, charged_at, *texts, _ = row
    try:
        holds, spending, paces = (orjson.loads(text) for text in texts)
        account = CreditAccount(
            id=AccountId(account_id),
            version=version,
            access=access,
            prepaid=prepaid,
            invoiced=invoiced,
            overdraft=overdraft,
            owed=owed,
            reported_micro=reported,
            charged_at=UnixSeconds(charged_at),
            holds=MappingProxyType({HoldId(name): _hold(*hold) for name, hold in holds.items()}),
            spending=MappingProxyType({KeyId(key): Spending(*spent) for key, spent in spending.items()}),
            paces=MappingProxyType({KeyId(key): tuple(map(int, pace)) for key, pace in paces.items()}),
        )
        check(account)
        assert account.held == held, "the sum of the holds is not what is held"
    except (AssertionError, TypeError, ValueError) as error:
        raise BrokenRow(f"credit account {account_id}: {error}") from error
    return account


def _pace_row(pace: tuple[int, ...] | None) -> list[int | str] | None:
    # A limiter adds up all it ever gave back, and JSON's integers end at 64 bits (orjson).
    return None if pace is None else [part if abs(part) < 2**63 else str(part) for part in pace]


def _hold_row(hold: CreditHold) -> tuple[Json, ...]:
    return (hold.granted, hold.consumed, hold.key, hold.owner, hold.about)


def _hold(granted: int, consumed: int, key: str, owner: str, about: str) -> CreditHold:
    return CreditHold(Pico(granted), Pico(consumed), KeyId(key), NodeId(owner), about)


def _spending(spent: Spending) -> tuple[int, ...]:
    return (spent.day, spent.month, spent.spent_day, spent.spent_month, spent.spent_total)


# ----------------------------------------------------------------------------------------------------------- events


def write_credit_event(event: CreditEvent) -> tuple[str, str]:
    """Kind and body of a journal entry."""
    match event:
        case AccountOpened():
            body: list[Json] = [event.id, event.overdraft]
        case FundsMoved():
            body = [event.kind.value, event.reference, event.amount]
        case OverdraftSet():
            body = [event.overdraft]
        case AccessChanged():
            body = [event.forgot]
        case Held():
            body = [event.hold, event.granted, event.key, event.owner, event.about, _pace_row(event.pace)]
        case Charged():
            body = [event.hold, event.consumed, event.at]
        case Released():
            body = [event.hold, _pace_row(event.pace)]
        case UsageReported():
            body = [event.total_micro]
        case _:
            assert_never(event)
    return type(event).__name__, _dumps(body)


def read_credit_event(kind: str, text: str) -> CreditEvent:
    """The inverse."""
    body = orjson.loads(text)
    match kind:
        case "AccountOpened":
            return AccountOpened(AccountId(body[0]), body[1])
        case "FundsMoved":
            return FundsMoved(FundsKind(body[0]), body[1], body[2])
        case "OverdraftSet":
            return OverdraftSet(body[0])
        case "AccessChanged":
            return AccessChanged(None if body[0] is None else KeyId(body[0]))
        case "Held":
            hold, granted, key, owner, about, pace = body
            return Held(HoldId(hold), Pico(granted), KeyId(key), NodeId(owner), about, _pace(pace))
        case "Charged":
            return Charged(HoldId(body[0]), Pico(body[1]), UnixSeconds(body[2]))
        case "Released":
            return Released(HoldId(body[0]), _pace(body[1]))
        case "UsageReported":
            return UsageReported(body[0])
        case _:
            raise BrokenRow(f"unknown event {kind}")


def _pace(pace: list[int | str] | None) -> tuple[int, ...] | None:
    return None if pace is None else tuple(map(int, pace))


# --------------------------------------------------------------------------------------------------------- payments


def write_payment(payment: PaymentRecord) -> str:
    """A payment's document."""
    return _dumps(
        {
            "kind": payment.kind.value,
            "paid": payment.paid,
            "refunds": {name: (cents, int(state)) for name, (cents, state) in payment.refunds.items()},
            "disputes": {name: (cents, int(state)) for name, (cents, state) in payment.disputes.items()},
        }
    )


def read_payment(payment_id: str, document: str) -> PaymentRecord:
    """The inverse."""
    body: Mapping[str, Json] = orjson.loads(document)
    return PaymentRecord(
        payment_id,
        FundsKind(body["kind"]),
        body["paid"],
        MappingProxyType({name: (cents, RefundState(state)) for name, (cents, state) in body["refunds"].items()}),
        MappingProxyType({name: (cents, DisputeState(state)) for name, (cents, state) in body["disputes"].items()}),
    )


def _dumps(value: Json) -> str:
    return orjson.dumps(value).decode()
