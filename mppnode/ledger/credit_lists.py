"""What customers and operators list: statements, requests, usage by group, keys, accounts. Reads and nothing else.

Pages go from the newest to the oldest and continue after a row, never at a number of rows: rows that are written in
between neither repeat nor hide others. Whose rows they are is part of every statement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from channels.credit import AccountId, CreditAccount, CreditEvent, KeyId
from channels.instants import UnixMillis
from channels.payment import PaymentRecord
from mppnode.ledger.credit_rows import (
    AccountRow,
    Entry,
    KeyRow,
    RequestRow,
    Task,
    TaskState,
    read_credit,
    read_credit_event,
    read_payment,
)
from mppnode.ledger.credit_talk import (
    ACCOUNT_COLUMNS,
    ENTRY_COLUMNS,
    KEY_COLUMNS,
    REQUEST_COLUMNS,
    SELECT_CREDIT,
    TASK_COLUMNS,
    account_of,
    key_of,
)
from mppnode.ledger.rows import BrokenRow
from mppnode.ledger.talk import Talk

_DAY_MS: Final = 86_400_000
_ALWAYS: Final = UnixMillis(0)
_NEVER: Final = UnixMillis(2**53)


class Group(StrEnum):
    """What usage is added up by."""

    KEY = "key"
    MODEL = "model"
    PROVIDER = "provider"
    DAY = "day"


_GROUPED: Final = {
    Group.KEY: "api_key",
    Group.MODEL: "model",
    Group.PROVIDER: "provider",
    Group.DAY: f"at_ms / {_DAY_MS}",
}


@dataclass(frozen=True, slots=True)
class Between:
    """Which requests: from the first millisecond to before the second, and only a key's or a model's."""

    since: UnixMillis = _ALWAYS
    until: UnixMillis = _NEVER
    api_key: KeyId | None = None
    model: str | None = None
    provider: str | None = None


@dataclass(frozen=True, slots=True)
class Sums:
    """Usage of one group, pico-dollars and tokens; ``names`` in the order of the groups asked for."""

    names: tuple[str | int, ...]
    requests: int
    cost: int
    prompt: int
    cached: int
    completion: int
    reasoning: int


def _only(account: AccountId, what: Between) -> tuple[str, list[Any]]:
    condition, values = "account = ? AND at_ms >= ? AND at_ms < ?", [account, what.since, what.until]
    for column, value in (("api_key", what.api_key), ("model", what.model), ("provider", what.provider)):
        if value is not None:
            condition += f" AND {column} = ?"
            values.append(value)
    return condition, values


def usage(account: AccountId, what: Between, groups: Sequence[Group], limit: int) -> Talk[list[Sums]]:
    """Sums by group, in the order of the groups' names; without groups one sum, also when there is nothing."""
    condition, values = _only(account, what)
    names = ", ".join(_GROUPED[group] for group in groups)
    sums = ", ".join(
        f"CAST(COALESCE(SUM({name}), 0) AS BIGINT)" for name in ("cost", "prompt", "cached", "completion", "reasoning")
    )
    columns = f"{names}, COUNT(*), {sums}" if groups else f"COUNT(*), {sums}"
    grouped = f" GROUP BY {names} ORDER BY {names}" if groups else ""
    rows = yield f"SELECT {columns} FROM request WHERE {condition}{grouped} LIMIT ?", (*values, limit)  # noqa: S608
    count = len(groups)
    return [Sums(tuple(row[:count]), *row[count:]) for row in rows]


def requests(
    account: AccountId, what: Between, after: tuple[UnixMillis, str] | None, limit: int
) -> Talk[list[RequestRow]]:
    """A page of requests, the newest first, older than ``after``."""
    condition, values = _only(account, what)
    if after is not None:
        condition += " AND (at_ms < ? OR (at_ms = ? AND id < ?))"
        values += [after[0], after[0], after[1]]
    statement = f"SELECT {REQUEST_COLUMNS} FROM request WHERE {condition} ORDER BY at_ms DESC, id DESC LIMIT ?"  # noqa: S608
    rows = yield statement, (*values, limit)
    return [_request(row) for row in rows]


def request(account: AccountId, request_id: str) -> Talk[RequestRow | None]:
    """One request of an account; another's is not found."""
    statement = f"SELECT {REQUEST_COLUMNS} FROM request WHERE id = ? AND account = ?"  # noqa: S608
    rows = yield statement, (request_id, account)
    return _request(rows[0]) if rows else None


def _request(row: Sequence[Any]) -> RequestRow:
    return RequestRow(row[0], AccountId(row[1]), KeyId(row[2]), UnixMillis(row[3]), *row[4:])


def entries(account: AccountId, before: int | None, limit: int) -> Talk[list[Entry]]:
    """A page of the statement, the newest first, older than line ``before``."""
    statement = f"SELECT {ENTRY_COLUMNS} FROM entry WHERE account = ? AND seq < ? ORDER BY seq DESC LIMIT ?"  # noqa: S608
    rows = yield statement, (account, 2**62 if before is None else before, limit)
    return [Entry(AccountId(row[0]), row[1], UnixMillis(row[2]), *row[3:]) for row in rows]


def credit_accounts(after: AccountId | None, limit: int, *, live: bool = False) -> Talk[list[CreditAccount]]:
    """A page of credit accounts in the order of their ids; only those with holds if ``live``."""
    condition = "live = 1 AND id > ?" if live else "id > ?"
    rows = yield f"{SELECT_CREDIT} WHERE {condition} ORDER BY id LIMIT ?", (after or "", limit)
    return [read_credit(tuple(row)) for row in rows]


def held_accounts(
    after: AccountId | None, limit: int
) -> Talk[list[tuple[AccountId, CreditAccount | BrokenRow]]]:
    """A page of accounts with holds in the order of their ids; a broken row is one of them and hides no other."""
    rows = yield f"{SELECT_CREDIT} WHERE live = 1 AND id > ? ORDER BY id LIMIT ?", (after or "", limit)
    return [(AccountId(row[0]), _read_or_broken(row)) for row in rows]


def _read_or_broken(row: Sequence[Any]) -> CreditAccount | BrokenRow:
    try:
        return read_credit(tuple(row))
    except BrokenRow as error:
        return error


def credit_journal(account: AccountId) -> Talk[list[CreditEvent]]:
    """The events of an account, in order."""
    rows = yield "SELECT kind, body FROM credit_journal WHERE account = ? ORDER BY entry", (account,)
    return [read_credit_event(kind, body) for kind, body in rows]


# -------------------------------------------------------------------------------------------------- accounts and keys


class By(StrEnum):
    """A column that finds one account."""

    ID = "id"
    TRUST = "trust"
    CUSTOMER = "customer"


def find_account(by: By, value: str) -> Talk[AccountRow | None]:
    """The account with this id, name or customer."""
    rows = yield f"SELECT {ACCOUNT_COLUMNS} FROM account WHERE {by.value} = ?", (value,)  # noqa: S608
    return account_of(rows[0]) if rows else None


def accounts(after: AccountId | None, limit: int) -> Talk[list[AccountRow]]:
    """A page of accounts in the order of their ids."""
    rows = yield f"SELECT {ACCOUNT_COLUMNS} FROM account WHERE id > ? ORDER BY id LIMIT ?", (after or "", limit)  # noqa: S608
    return [account_of(row) for row in rows]


def find_key(digest: str) -> Talk[tuple[KeyRow, AccountRow, int] | None]:
    """The key with this digest, its account, and the account's count of changes, from one moment."""
    rows = yield f"SELECT {KEY_COLUMNS} FROM api_key WHERE digest = ?", (digest,)  # noqa: S608
    if not rows:
        return None
    key = key_of(rows[0])
    found = yield from account_with_access(By.ID, key.account)
    return None if found is None else (key, *found)


def account_with_access(by: By, value: str) -> Talk[tuple[AccountRow, int] | None]:
    """An account and its count of changes.

    The count is read first. The other way round a change in between would be remembered as known and never seen.
    """
    row = yield from find_account(by, value)
    if row is None:
        return None
    counted = yield "SELECT access FROM credit WHERE id = ?", (row.id,)
    account = yield from find_account(By.ID, row.id)
    return None if account is None or not counted else (account, counted[0][0])


def keys(account: AccountId, after: KeyId | None, limit: int) -> Talk[list[KeyRow]]:
    """A page of an account's keys in the order of their ids, dead ones too."""
    statement = f"SELECT {KEY_COLUMNS} FROM api_key WHERE account = ? AND id > ? ORDER BY id LIMIT ?"  # noqa: S608
    rows = yield statement, (account, after or "", limit)
    return [key_of(row) for row in rows]


def key(account: AccountId, key_id: KeyId) -> Talk[KeyRow | None]:
    """One key of an account; another's is not found."""
    statement = f"SELECT {KEY_COLUMNS} FROM api_key WHERE id = ? AND account = ?"  # noqa: S608
    rows = yield statement, (key_id, account)
    return key_of(rows[0]) if rows else None


# ----------------------------------------------------------------------------------------------- payments and outbox


def payment_of(payment: str) -> Talk[tuple[AccountId, PaymentRecord] | None]:
    """A payment and whose it is."""
    rows = yield "SELECT account, document FROM payment WHERE id = ?", (payment,)
    return (AccountId(rows[0][0]), read_payment(payment, rows[0][1])) if rows else None


def payments(account: AccountId | None, after: str, limit: int) -> Talk[list[tuple[AccountId, PaymentRecord]]]:
    """A page of payments in the order of their ids, of one account or of all."""
    condition, values = ("id > ?", [after]) if account is None else ("account = ? AND id > ?", [account, after])
    statement = f"SELECT id, account, document FROM payment WHERE {condition} ORDER BY id LIMIT ?"  # noqa: S608
    rows = yield statement, (*values, limit)
    return [(AccountId(row[1]), read_payment(row[0], row[2])) for row in rows]


def due_tasks(kind: str, now: UnixMillis, limit: int) -> Talk[list[Task]]:
    """Tasks of a kind whose time has come, the longest due first."""
    statement = (
        f"SELECT {TASK_COLUMNS} FROM outbox WHERE state = 'due' AND kind = ? AND due_ms <= ?"  # noqa: S608
        " ORDER BY due_ms, id LIMIT ?"
    )
    rows = yield statement, (kind, now, limit)
    return [task_of(row) for row in rows]


@dataclass(frozen=True, slots=True)
class Waiting:
    """The tasks of a kind that are not done: how many are due and parked, and the earliest times of those due."""

    due: int = 0
    parked: int = 0
    due_ms: int | None = None
    created_ms: int | None = None


def waiting_tasks() -> Talk[dict[str, Waiting]]:
    """What is in the outbox, by kind."""
    select = "SELECT kind, COUNT(*), MIN(due_ms), MIN(created_ms) FROM outbox WHERE state = '{}' GROUP BY kind"
    due = yield select.format("due"), ()
    parked = yield select.format("parked"), ()
    stuck = {kind: number for kind, number, _, _ in parked}
    found = {kind: Waiting(number, stuck.pop(kind, 0), at, created) for kind, number, at, created in due}
    return found | {kind: Waiting(parked=number) for kind, number in stuck.items()}


def usable_keys() -> Talk[int]:
    """How many keys have not been revoked."""
    ((number,),) = yield "SELECT COUNT(*) FROM api_key WHERE ended = 0", ()
    return int(number)


def unbilled_micro() -> Talk[int]:
    """Millionths of a dollar of post-paid usage that is not in any report yet, running requests included."""
    select = (
        "SELECT CAST(COALESCE(SUM((owed - prepaid) / 1000000 - reported_micro), 0) AS BIGINT) FROM credit"
        " WHERE overdraft > 0 AND (owed - prepaid) / 1000000 > reported_micro"
    )
    ((total,),) = yield select, ()
    return int(total)


def tasks(account: AccountId | None, kind: str, state: TaskState | None, limit: int) -> Talk[list[Task]]:
    """The newest tasks of a kind."""
    condition, values = "kind = ?", [kind]
    if account is not None:
        condition, values = "account = ? AND kind = ?", [account, kind]
    if state is not None:
        condition, values = f"{condition} AND state = ?", [*values, state.value]
    statement = f"SELECT {TASK_COLUMNS} FROM outbox WHERE {condition} ORDER BY created_ms DESC, id DESC LIMIT ?"  # noqa: S608
    rows = yield statement, (*values, limit)
    return [task_of(row) for row in rows]


def task_of(row: Sequence[Any]) -> Task:
    """A row of ``outbox``."""
    return Task(row[0], row[1], AccountId(row[2]), row[3], row[4], TaskState(row[5]), row[6], row[7])


def move_task(before: Task, after: Task) -> Talk[bool]:
    """Replace a task; False when somebody else has moved it since."""
    done = yield (
        "UPDATE outbox SET state = ?, due_ms = ?, document = ?, version = ? WHERE id = ? AND version = ? RETURNING 1",
        (after.state.value, after.due_ms, after.document, before.version + 1, before.id, before.version),
    )
    return bool(done)
