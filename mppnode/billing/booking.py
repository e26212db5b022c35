"""What was heard of payments, taken into the ledger together with all that follows from it, in one transaction.

What follows is computed from totals and from the state of things, never added per announcement: a post-paid customer's
trust limit from all that was ever paid, and a suspension from the balance as it is. So the order of announcements does
not matter, nor how often each comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Final

import orjson

from channels.credit import AccountId, CreditAccount, SetOverdraft
from channels.instants import UnixMillis, UnixSeconds
from channels.payment import PICO_PER_CENT, PaymentRecord
from mppnode.accounts.documents import account_row, read_account
from mppnode.accounts.model import Account, Postpaid
from mppnode.accounts.notices import SUSPENSION, recharge_order
from mppnode.config.accounts import TrustLimits
from mppnode.kernel.probe import Probe, unwatched
from mppnode.ledger import credit_lists, credit_talk
from mppnode.ledger.credit_lists import By
from mppnode.ledger.credit_rows import AccountRow, SideRow, Task, TaskState
from mppnode.ledger.credit_talk import ACCOUNT_COLUMNS, Booked
from mppnode.ledger.credits import Credits
from mppnode.ledger.talk import Talk

_NEVER_MS: Final = 2**53
_PAGE: Final = 500
_STANDING_MAX: Final = 100  # suspensions of one account at once: one per unpaid invoice, and months pass in between
_BPS: Final = 10_000


class Why(StrEnum):
    """Why billing has suspended an account."""

    UNPAID = "unpaid"
    TAKEN_BACK = "taken_back"
    """A bank or a refund took back what was already spent."""


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt to collect a post-paid customer's debt failed; ``about`` is the invoice or the payment."""

    about: str


@dataclass(frozen=True, slots=True)
class Paid:
    """Something was paid; ``settles`` names what is no longer owed, whatever it was paid with."""

    settles: str | None = None


Also = Callable[[CreditAccount, Account], Talk[None]]
"""More for the same transaction, told the account as the booking left it."""


class Bookkeeper:
    """Books payments. Every method raises ``ChannelFault`` with ``STORE_UNAVAILABLE``."""

    def __init__(self, books: Credits, trust: TrustLimits, *, probe: Probe = unwatched) -> None:
        self.books = books
        self._trust = trust
        self._probe = probe

    async def take_in(
        self,
        account: AccountId,
        heard: Sequence[PaymentRecord] = (),
        *,
        event: str | None,
        news: Failed | Paid | None = None,
        also: Also | None = None,
    ) -> bool:
        """Join what was heard of payments, and all that follows; False when this ``event`` was taken in before.

        Raises:
            CreditFault, OtherAccounts: nothing changed.
        """
        at, made, turned = self.books.clock.now_millis(), list[Booked](), list[bool]()
        self._probe("book.before")
        done = await self.books.write(
            partial(self._talk, account, tuple(heard), at, made, turned, event=event, news=news, also=also), of=account
        )
        self._probe("book.after")
        for booked in made:
            self.books.moved(account, booked.payment.kind, booked.moved, booked.payment.id, event=event)
        for suspended in turned:
            self.books.suspended(account, "billing", lifted=not suspended)
        return done

    async def change(
        self,
        account: AccountId,
        event: str | None,
        change: Callable[[Account], Account],
        *,
        overdraft: int | None = None,
    ) -> bool:
        """Change an account, and with it what it may owe, as an ``event`` says; False when it was taken in before."""

        def talk(at: UnixMillis) -> Talk[bool]:
            yield from credit_talk.load_credit(account, lock=True)
            if event is not None and not (yield from credit_talk.note_event(event, at)):
                return False
            row = yield from credit_lists.find_account(By.ID, account)
            if row is not None and account_row(change(read_account(row))) != row:
                yield from credit_talk.change_account(account, partial(changed, change), at, overdraft)
            return True

        at = self.books.clock.now_millis()
        return await self.books.write(partial(talk, at), of=account)

    async def is_known(self, event: str) -> bool:
        """Whether an event was taken in: a second copy then costs one look and no question to Stripe."""
        return await self.books.read(partial(_is_known, event))

    def trust_limit(self, account: Account, paid_cents: int) -> int:
        """What a post-paid customer who has paid so much may owe, pico-dollars; never below what was agreed."""
        if not isinstance(account.terms, Postpaid):
            return 0
        grown = self._trust.start_cents + max(paid_cents, 0) * self._trust.growth_bps // _BPS
        return max(account.terms.trust_limit, min(grown, self._trust.max_cents) * PICO_PER_CENT)

    async def renew_limit(self, account: AccountId) -> None:
        """Let a billed account owe what its terms and all it has paid allow; a repeat changes nothing."""
        at = self.books.clock.now_millis()

        def talk() -> Talk[None]:
            credit = yield from credit_talk.load_credit(account, lock=True)
            row = yield from credit_lists.find_account(By.ID, account)
            owner = None if row is None else read_account(row)
            if credit is None or owner is None or owner.billing.subscription is None:
                return
            limit = self.trust_limit(owner, (yield from _paid_cents(account, frozenset())))
            if limit != credit.overdraft:
                yield from credit_talk.change_account(account, lambda found: found, at, limit)

        await self.books.write(talk, of=account)

    async def paid_cents(self, account: AccountId) -> int:
        """Whole cents an account has paid and not got back."""
        return await self.books.read(lambda: _paid_cents(account, frozenset()))

    def _talk(
        self,
        account: AccountId,
        heard: tuple[PaymentRecord, ...],
        at: UnixMillis,
        made: list[Booked],
        turned: list[bool],
        *,
        event: str | None,
        news: Failed | Paid | None,
        also: Also | None,
    ) -> Talk[bool]:
        turned.clear()
        made.clear()  # the transaction may be begun more than once
        credit = yield from credit_talk.load_credit(account, lock=True)
        row = yield from credit_lists.find_account(By.ID, account)
        assert row is not None, "an account has a row from its first moment"
        assert credit is not None, "and its money too"
        if event is not None and not (yield from credit_talk.note_event(event, at)):
            return False
        owner = read_account(row)
        others = yield from _paid_cents(account, frozenset(record.id for record in heard))
        for record in heard:
            # The limit follows each record, of which all but the last are behind it already when it is reached.
            booked = yield from credit_talk.book_payment(account, record, None, self._react(owner, others), at)
            assert booked is not None
            made.append(booked)
            others += booked.payment.worth
            credit = booked.account
        was = owner.suspended_at
        owner = yield from _suspend_or_not(credit, owner, news, at)
        if (was is None) != (owner.suspended_at is None):
            turned.append(was is None)
        if also is not None:
            yield from also(credit, owner)
        return True

    def _react(self, owner: Account, others_cents: int) -> credit_talk.Reaction:
        def react(_: CreditAccount, booked: Booked) -> tuple[Sequence[SetOverdraft], Sequence[SideRow]]:
            if not isinstance(owner.terms, Postpaid) or owner.billing.subscription is None:
                return (), ()
            return (SetOverdraft(self.trust_limit(owner, others_cents + booked.payment.worth)),), ()

        return react


def customers(after: AccountId | None, limit: int) -> Talk[list[Account]]:
    """A page of the accounts that are customers at Stripe, in the order of their ids."""
    rows = yield (
        f"SELECT {ACCOUNT_COLUMNS} FROM account WHERE customer IS NOT NULL AND id > ? ORDER BY id LIMIT ?",  # noqa: S608
        (after or "", limit),
    )
    return [read_account(credit_talk.account_of(row)) for row in rows]


def still_low(credit: CreditAccount, owner: Account, at: UnixMillis) -> Talk[None]:
    """Order another recharge where one was not enough."""
    for task in recharge_order(credit, owner, at):
        yield from credit_talk.add_task(task)


def _is_known(event: str) -> Talk[bool]:
    rows = yield "SELECT 1 FROM heard WHERE id = ?", (event,)
    return bool(rows)


def _paid_cents(account: AccountId, without: frozenset[str]) -> Talk[int]:
    total, after = 0, ""
    while True:
        page = yield from credit_lists.payments(account, after, _PAGE)
        if not page:
            return total
        total += sum(record.worth for _, record in page if record.id not in without)
        after = page[-1][1].id


def changed(change: Callable[[Account], Account], row: AccountRow) -> AccountRow:
    """An account's row after a change of the account."""
    return account_row(change(read_account(row)))


def _suspend_or_not(
    credit: CreditAccount, owner: Account, news: Failed | Paid | None, at: UnixMillis
) -> Talk[Account]:
    """Suspend an account that owes what it was not given, and let one go that billing had suspended.

    An account that somebody else has suspended has no task of ours that stands, and stays as it is.
    """
    standing = yield from credit_lists.tasks(owner.id, SUSPENSION, TaskState.DUE, _STANDING_MAX)
    wanted = {_why(task): task for task in standing}
    over = credit.balance + credit.overdraft < 0
    if over and (Why.TAKEN_BACK, "") not in wanted:
        yield from _stand(owner, Why.TAKEN_BACK, "", wanted, at)
    if not over and (Why.TAKEN_BACK, "") in wanted:
        yield from _lift(wanted.pop((Why.TAKEN_BACK, "")), at)
    if isinstance(news, Failed) and isinstance(owner.terms, Postpaid) and (Why.UNPAID, news.about) not in wanted:
        yield from _stand(owner, Why.UNPAID, news.about, wanted, at)
    if isinstance(news, Paid):
        for (why, about), task in list(wanted.items()):
            if why is Why.UNPAID and news.settles in (None, about):
                yield from _lift(task, at)
                del wanted[why, about]
    if wanted and owner.suspended_at is None:
        return (yield from _set_suspended(owner, UnixSeconds(at // 1000), at))
    if standing and not wanted and owner.suspended_at is not None:
        return (yield from _set_suspended(owner, None, at))
    return owner


def _stand(
    owner: Account, why: Why, about: str, wanted: dict[tuple[Why, str], Task], at: UnixMillis
) -> Talk[None]:
    if owner.suspended_at is not None and not wanted:
        return  # somebody else's, who alone may end it
    number = len((yield from credit_lists.tasks(owner.id, SUSPENSION, None, _PAGE)))
    document = orjson.dumps({"why": why.value, "about": about}).decode()
    task = Task(f"{SUSPENSION}-{owner.id}-{at}-{number}", SUSPENSION, owner.id, _NEVER_MS, document, created_ms=at)
    yield from credit_talk.add_task(task)
    wanted[why, about] = task


def _lift(task: Task, at: UnixMillis) -> Talk[None]:
    yield from credit_lists.move_task(task, replace(task, state=TaskState.DONE, due_ms=at))


def _why(task: Task) -> tuple[Why, str]:
    body = orjson.loads(task.document)
    return Why(body["why"]), body["about"]


def _set_suspended(owner: Account, when: UnixSeconds | None, at: UnixMillis) -> Talk[Account]:
    row = yield from credit_talk.change_account(
        owner.id, partial(changed, lambda found: replace(found, suspended_at=when)), at
    )
    assert row is not None
    return read_account(row)
