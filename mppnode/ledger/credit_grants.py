"""What an operator does by hand: give or take credit, once per reference, and look at one task of the outbox.

A reference is kept as a task that is done already, in the transaction that books the money: so a repeat finds it
whatever died in between, and what was booked under it can be compared with what is asked now.
"""

from __future__ import annotations

from typing import Final

from channels.credit import AccountId, CreditAccount, CreditFault, CreditReason, FundsKind, MoveFunds, plan
from channels.instants import UnixMillis, UnixSeconds
from mppnode.ledger.credit_lists import task_of
from mppnode.ledger.credit_rows import Task, TaskState
from mppnode.ledger.credit_talk import TASK_COLUMNS, add_task, load_credit, write_credit
from mppnode.ledger.talk import Talk

GRANT: Final = "grant"
"""The kind of the tasks that remember references."""


class OtherAmount(Exception):
    """The reference was used for another amount."""


def grant(account: AccountId, reference: str, amount: int, at: UnixMillis) -> Talk[tuple[CreditAccount, bool]]:
    """Book ``amount`` pico-dollars of the operator's once per reference; says whether this was the time.

    Raises:
        CreditFault: ``NOT_FOUND`` or ``FUNDS_LIMIT``.
        OtherAmount: nothing is booked.
    """
    before = yield from load_credit(account, lock=True)
    if before is None:
        raise CreditFault(CreditReason.NOT_FOUND)
    # The account is part of the name: an operator's numbering may well begin anew with every customer.
    note = Task(f"grant:{account}:{reference}", GRANT, account, at, str(amount), TaskState.DONE, created_ms=at)
    new = yield from add_task(note)
    if not new:
        known = yield from task(note.id)
        assert known is not None, "it was there a moment ago, and the account is locked"
        if known.document != note.document:
            raise OtherAmount
        return before, False
    made = plan(before, MoveFunds(FundsKind.GRANT, reference, amount), now=UnixSeconds(at // 1000))
    yield from write_credit(before, made, at)
    return made.account, True


def task(task_id: str) -> Talk[Task | None]:
    """One task of the outbox."""
    rows = yield f"SELECT {TASK_COLUMNS} FROM outbox WHERE id = ?", (task_id,)  # noqa: S608
    return task_of(rows[0]) if rows else None
