"""How a credit account is read, decided about and written, with whatever belongs to the same moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from channels.credit import (
    AccountId,
    ChangeAccess,
    Charged,
    CreditAccount,
    CreditEvent,
    CreditFault,
    CreditOutcome,
    CreditPlan,
    CreditReason,
    FundsMoved,
    KeyId,
    MoveFunds,
    OpenAccount,
    Released,
    SetOverdraft,
    plan,
)
from channels.instants import UnixMillis, UnixSeconds
from channels.payment import PaymentRecord, joined
from mppnode.ledger.credit_rows import (
    CREDIT_COLUMNS,
    AccountRow,
    Entry,
    KeyRow,
    RequestRow,
    SideRow,
    Task,
    credit_values,
    read_credit,
    read_payment,
    write_credit_event,
    write_payment,
)
from mppnode.ledger.talk import Talk

Step = Callable[[CreditAccount | None], tuple[CreditPlan, Sequence[SideRow]]]
"""Decides what happens to an account, and what is written with it. It may run more than once, so it must be pure."""


class Exists(Exception):
    """Somebody else already has this name; ``field`` says which one."""

    def __init__(self, field: str) -> None:
        self.field = field
        super().__init__(f"{field} is taken")


class OtherAccounts(Exception):
    """The payment is known, and it is another account's."""


def _insert(table: str, columns: str) -> str:
    """An insert that does nothing, and says so by returning no row, where the row is there already."""
    marks = ", ".join("?" * len(columns.split(",")))
    return f"INSERT INTO {table} ({columns}) VALUES ({marks}) ON CONFLICT DO NOTHING RETURNING 1"  # noqa: S608


_COLUMNS: Final = ", ".join(CREDIT_COLUMNS)
ACCOUNT_COLUMNS: Final = "id, trust, customer, document, created_ms"
KEY_COLUMNS: Final = "id, account, digest, ended, document, created_ms"
REQUEST_COLUMNS: Final = (
    "id, account, api_key, at_ms, model, provider, cost, prompt, cached, completion, reasoning, document"
)
ENTRY_COLUMNS: Final = "account, seq, at_ms, kind, amount, reference, balance"
TASK_COLUMNS: Final = "id, kind, account, due_ms, document, state, version, created_ms"
_INSERT_ACCOUNT: Final = _insert("account", ACCOUNT_COLUMNS)
_INSERT_KEY: Final = _insert("api_key", KEY_COLUMNS)
_INSERT_REQUEST: Final = _insert("request", REQUEST_COLUMNS)
_INSERT_TASK: Final = _insert("outbox", TASK_COLUMNS)
_INSERT_HEARD: Final = _insert("heard", "id, at_ms")
_INSERT_PAYMENT: Final = _insert("payment", "id, account, document, at_ms")
_UPDATE_PAYMENT: Final = "UPDATE payment SET document = ? WHERE id = ?"
SELECT_CREDIT: Final = f"SELECT id, {_COLUMNS} FROM credit"  # noqa: S608 - our own names, as below
_FOR_UPDATE: Final = f"{SELECT_CREDIT} WHERE id = ? FOR UPDATE"
_INSERT: Final = _insert("credit", f"id, {_COLUMNS}")
_UPDATE: Final = (
    f"UPDATE credit SET {', '.join(f'{name} = ?' for name in CREDIT_COLUMNS)} WHERE id = ? AND version = ?"  # noqa: S608
    " RETURNING 1"
)


def load_credit(account: AccountId, *, lock: bool = False) -> Talk[CreditAccount | None]:
    """The last committed state of an account; ``lock`` keeps it until the end of the transaction."""
    rows = yield (_FOR_UPDATE if lock else f"{SELECT_CREDIT} WHERE id = ?"), (account,)
    return read_credit(tuple(rows[0])) if rows else None


def transact(account: AccountId, step: Step, at: UnixMillis) -> Talk[CreditPlan]:
    """Run a step on an account and write what it planned."""
    before = yield from load_credit(account, lock=True)
    made, beside = step(before)
    _check_rows(before, made, beside)
    yield from write_credit(before, made, at)
    for row in beside:
        yield from write_beside(row)
    return made


def _check_rows(before: CreditAccount | None, made: CreditPlan, beside: Sequence[SideRow]) -> None:
    """What the requests of an account cost is what it was charged: a row says what its hold was released at."""
    if not any(isinstance(row, RequestRow) for row in beside):
        return
    released = {line.reference: -line.amount for line in _lines(before, list(enumerate(made.events)), UnixMillis(0))}
    for row in beside:
        if isinstance(row, RequestRow):
            assert row.account == made.account.id, "a request of another account"
            assert row.cost == released.get(row.id, 0), "a request does not cost what was charged"


def write_credit(before: CreditAccount | None, made: CreditPlan, at: UnixMillis) -> Talk[None]:
    """Write an account, its journal and the lines its customer sees; nothing when nothing happened."""
    if not made.events:
        return
    account = made.account
    if before is None:
        done = yield _INSERT, (account.id, *credit_values(account))
        if not done:
            raise Exists("id")
    else:
        done = yield _UPDATE, (*credit_values(account), account.id, before.version)
        assert done, "the row is not the one that was read"
    first = account.version - len(made.events) + 1
    numbered = list(enumerate(made.events, first))
    entries = [(account.id, seq, at, *write_credit_event(event)) for seq, event in numbered]
    yield _many("INSERT INTO credit_journal (account, entry, at_ms, kind, body)", entries)
    lines = _lines(before, numbered, at)
    if lines:
        yield _many(f"INSERT INTO entry ({ENTRY_COLUMNS})", [_entry_values(line) for line in lines])


def _lines(before: CreditAccount | None, numbered: Sequence[tuple[int, CreditEvent]], at: UnixMillis) -> list[Entry]:
    """The lines of a statement, each the sum of all before it: funds, less what requests that have ended were charged.

    A request is on it once, when its hold is released, however often it was folded.
    """
    if before is None:
        return []
    lines, balance = list[Entry](), before.funds - before.final
    consumed = {event.hold: event.consumed for _, event in numbered if isinstance(event, Charged)}
    for seq, event in numbered:
        if isinstance(event, FundsMoved):
            kind = event.kind.value if event.amount > 0 else f"{event.kind.value}_reversed"
            amount, reference = event.amount, event.reference
        elif isinstance(event, Released):
            held = before.holds.get(event.hold)
            kind, reference = "usage", str(event.hold)
            amount = -consumed.get(event.hold, 0 if held is None else held.consumed)
        else:
            continue
        if amount:
            balance += amount
            lines.append(Entry(before.id, seq, at, kind, amount, reference, balance))
    return lines


def write_beside(row: SideRow) -> Talk[None]:
    """Write a row that belongs to a change of an account. A repeat of it is dropped."""
    if isinstance(row, Task):
        yield from add_task(row)
    else:
        yield _INSERT_REQUEST, _request_values(row)


def _request_values(row: RequestRow) -> tuple[Any, ...]:
    counts = (row.cost, row.prompt, row.cached, row.completion, row.reasoning)
    return (row.id, row.account, row.api_key, row.at_ms, row.model, row.provider, *counts, row.document)


def _entry_values(entry: Entry) -> tuple[Any, ...]:
    return (entry.account, entry.seq, entry.at_ms, entry.kind, entry.amount, entry.reference, entry.balance)


def add_task(task: Task) -> Talk[bool]:
    """Put a task into the outbox; False when it is there already."""
    values = (task.id, task.kind, task.account, task.due_ms, task.document, task.state.value, task.version)
    done = yield _INSERT_TASK, (*values, task.created_ms)
    return bool(done)


def _many(insert: str, values: Sequence[Sequence[Any]]) -> tuple[str, tuple[Any, ...]]:
    """One statement for several rows: each is a round trip less."""
    marks = f"({', '.join('?' * len(values[0]))})"
    return f"{insert} VALUES {', '.join([marks] * len(values))}", tuple(chain.from_iterable(values))


# -------------------------------------------------------------------------------------------------- accounts and keys


def create_account(row: AccountRow, overdraft: int) -> Talk[CreditAccount]:
    """Raises ``Exists`` naming what is taken."""
    done = yield _INSERT_ACCOUNT, (row.id, row.trust, row.customer, row.document, row.created_ms)
    if not done:
        raise Exists((yield from _taken(row)))
    made = plan(None, OpenAccount(row.id, overdraft), now=UnixSeconds(row.created_ms // 1000))
    yield from write_credit(None, made, row.created_ms)
    return made.account


def _taken(row: AccountRow) -> Talk[str]:
    for field, value in (("trust", row.trust), ("customer", row.customer)):
        found = yield f"SELECT 1 FROM account WHERE {field} = ?", (value,)  # noqa: S608
        if found:
            return field
    return "id"


def change_account(
    account: AccountId, change: Callable[[AccountRow], AccountRow], at: UnixMillis, overdraft: int | None = None
) -> Talk[AccountRow | None]:
    """Replace an account's row, and let every node forget what it knows of it. Raises ``Exists``."""
    before = yield from load_credit(account, lock=True)
    rows = yield f"SELECT {ACCOUNT_COLUMNS} FROM account WHERE id = ?", (account,)  # noqa: S608
    if before is None or not rows:
        return None
    found = account_of(rows[0])
    row = change(found)
    if row.customer != found.customer:
        # Not an UPDATE after a look: who takes the same customer at the same moment would break a law of the database,
        # and an error like that ends a node.
        yield "DELETE FROM account WHERE id = ?", (account,)
        done = yield _INSERT_ACCOUNT, (account, found.trust, row.customer, row.document, found.created_ms)
        if not done:
            raise Exists("customer")
    else:
        yield "UPDATE account SET document = ? WHERE id = ?", (row.document, account)
    yield from _commanded(before, (ChangeAccess(), *(() if overdraft is None else (SetOverdraft(overdraft),))), at)
    return row


def create_key(row: KeyRow, limit: int) -> Talk[bool]:
    """Add a key; False when the account has ``limit`` live ones already.

    Raises:
        CreditFault: ``NOT_FOUND``: there is no such account.
        Exists: the id or the digest is taken.
    """
    if (yield from load_credit(row.account, lock=True)) is None:
        raise CreditFault(CreditReason.NOT_FOUND)
    ((live,),) = yield "SELECT COUNT(*) FROM api_key WHERE account = ? AND ended = 0", (row.account,)
    if live >= limit:
        return False
    values = (row.id, row.account, row.digest, int(row.ended), row.document, row.created_ms)
    done = yield _INSERT_KEY, values
    if not done:
        raise Exists("key")
    return True


def change_key(
    account: AccountId, key: KeyId, change: Callable[[KeyRow], KeyRow], at: UnixMillis
) -> Talk[KeyRow | None]:
    """Replace a key's row, and let every node forget what it knows of it."""
    before = yield from load_credit(account, lock=True)
    rows = yield f"SELECT {KEY_COLUMNS} FROM api_key WHERE id = ? AND account = ?", (key, account)  # noqa: S608
    if before is None or not rows:
        return None
    found = key_of(rows[0])
    row = change(found)
    yield "UPDATE api_key SET ended = ?, document = ? WHERE id = ?", (int(row.ended), row.document, key)
    forget = key if row.ended and not found.ended else None
    yield from _commanded(before, (ChangeAccess(forget),), at)
    return row


def _commanded(
    before: CreditAccount, commands: Sequence[ChangeAccess | SetOverdraft | MoveFunds], at: UnixMillis
) -> Talk[CreditAccount]:
    now = UnixSeconds(at // 1000)
    account, events = before, list[CreditEvent]()
    for command in commands:
        made = plan(account, command, now=now)
        account = made.account
        events += made.events
    yield from write_credit(before, CreditPlan(account, tuple(events), CreditOutcome()), at)
    return account


def account_of(row: Sequence[Any]) -> AccountRow:
    """A row of ``account``."""
    return AccountRow(AccountId(row[0]), row[1], row[2], row[3], UnixMillis(row[4]))


def key_of(row: Sequence[Any]) -> KeyRow:
    """A row of ``api_key``."""
    return KeyRow(KeyId(row[0]), AccountId(row[1]), row[2], bool(row[3]), row[4], UnixMillis(row[5]))


# ---------------------------------------------------------------------------------------------------------- payments


@dataclass(frozen=True, slots=True)
class Booked:
    """What an announcement did: the account after it, by how much it moved (pico), and what the payment is now."""

    account: CreditAccount
    moved: int
    payment: PaymentRecord
    before: PaymentRecord | None


Reaction = Callable[[CreditAccount, Booked], tuple[Sequence[SetOverdraft], Sequence[SideRow]]]
"""What else follows from a booking, in the same transaction."""


def book_payment(
    account: AccountId, heard: PaymentRecord, event: str | None, react: Reaction, at: UnixMillis
) -> Talk[Booked | None]:
    """Join what was heard of a payment and book the difference; None when this ``event`` was taken in before.

    Raises:
        CreditFault: ``NOT_FOUND``, or ``FUNDS_LIMIT``.
        OtherAccounts: the payment is another account's.
    """
    now = UnixSeconds(at // 1000)
    before = yield from load_credit(account, lock=True)
    if event is not None:
        new = yield _INSERT_HEARD, (event, at)
        if not new:
            return None
    rows = yield "SELECT account, document FROM payment WHERE id = ? FOR UPDATE", (heard.id,)
    known = None
    if rows:
        if rows[0][0] != account:
            raise OtherAccounts
        known = read_payment(heard.id, rows[0][1])
    after = joined(known, heard)
    commands = _differences(known, after)
    if before is None:
        plan(before, MoveFunds(after.kind, after.id, 0), now=now)  # refuses
    assert before is not None
    if known is None:
        # Our account is locked, so who was faster since we looked is another account.
        done = yield _INSERT_PAYMENT, (heard.id, account, write_payment(after), at)
        if not done:
            raise OtherAccounts
    elif after != known:
        yield _UPDATE_PAYMENT, (write_payment(after), heard.id)
    middle = yield from _commanded(before, commands, at)
    booked = Booked(middle, middle.funds - before.funds, after, known)
    more, beside = react(middle, booked)
    final = yield from _commanded(middle, more, at)
    for row in beside:
        yield from write_beside(row)
    return Booked(final, booked.moved, after, known)


def _differences(known: PaymentRecord | None, after: PaymentRecord) -> list[MoveFunds]:
    if known is None or known.kind is after.kind:
        amount = after.worth_pico - (0 if known is None else known.worth_pico)
        return [MoveFunds(after.kind, after.id, amount)] if amount else []
    moves = (MoveFunds(known.kind, after.id, -known.worth_pico), MoveFunds(after.kind, after.id, after.worth_pico))
    return [move for move in moves if move.amount]


def note_event(event: str, at: UnixMillis) -> Talk[bool]:
    """Note an announcement that concerns no account; False when it was noted before."""
    done = yield _INSERT_HEARD, (event, at)
    return bool(done)
