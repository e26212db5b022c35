"""The node's handle on credit accounts and everything beside them: the machine, the till and the clock together.

The counterpart of :mod:`mppnode.ledger.books`, and like it the only way a balance changes. The talks themselves are in
``credit_talk``, ``credit_lists`` and ``idempotency``; this adds the time and the transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Final, TypeVar

from channels.credit import (
    AccountId,
    CreditAccount,
    CreditCommand,
    CreditEvent,
    CreditHold,
    CreditOutcome,
    CreditPlan,
    FundsKind,
    FundsMoved,
    KeyId,
    Released,
    Settle,
    plan,
)
from channels.faults import ChannelFault
from channels.instants import UnixMillis, UnixSeconds
from channels.model import HoldId, NodeId
from channels.payment import PaymentRecord
from mppnode.kernel.clock import Clock
from mppnode.kernel.probe import Probe, unwatched
from mppnode.ledger import credit_lists, credit_talk
from mppnode.ledger.base import Ledger
from mppnode.ledger.credit_rows import AccountRow, KeyRow, RequestRow, Task
from mppnode.ledger.credit_talk import Booked, Reaction, Step
from mppnode.ledger.life import Life, keep_sweeping
from mppnode.ledger.talk import Talk, Till
from mppnode.observe.logs import Log, quiet
from mppnode.observe.metrics import Metrics

R = TypeVar("R")

_PAGE: Final = 200
CRASHED: Final = '{"ending":"crashed"}'
"""The document of a request whose node died: what it had recorded was charged, and nothing else is known."""


class Credits:
    """Applies commands to credit accounts, and keeps accounts, keys, payments and tasks.

    Every method raises ``ChannelFault`` with ``STORE_UNAVAILABLE`` when the ledger cannot be asked.
    """

    def __init__(
        self,
        till: Till,
        *,
        clock: Clock,
        probe: Probe = unwatched,
        metrics: Metrics | None = None,
        log: Log = quiet,
    ) -> None:
        self._log = log
        self.metrics = metrics if metrics is not None else Metrics.unseen(clock)
        self._till = till
        self.clock = clock
        self._probe = probe

    async def apply(self, account: AccountId, command: CreditCommand) -> CreditPlan:
        """Decide and commit one command; when this returns, its effect is durable.

        Raises:
            CreditFault: the refusal; nothing changed.
        """
        now = self.clock.now()
        return await self.transact(account, lambda found: (plan(found, command, now=now), ()))

    async def transact(self, account: AccountId, step: Step) -> CreditPlan:
        """Decide and commit a step and the rows that belong to it. Raises what ``step`` does."""
        at = self.clock.now_millis()
        self._probe("credit.before")
        made = await self._till.write(lambda: credit_talk.transact(account, step, at), of=account)
        self._probe("credit.after")
        for event in made.events:
            if isinstance(event, FundsMoved):
                self.moved(account, event.kind, event.amount, event.reference)
        return made

    def moved(
        self, account: AccountId, kind: FundsKind, pico: int, reference: str, *, event: str | None = None
    ) -> None:
        """Tell of money that came to an account, or was taken back; once its booking is durable.

        ``reference`` is the payment's or the gift's, ``event`` what announced it.
        """
        if not pico:
            return  # heard again, or of nothing
        self._log(
            "credit.moved", account=account, kind=kind.value, amount_pico=pico, reference=reference, event_id=event
        )
        if pico >= 0:
            self.metrics.credited(kind.value, pico)
        else:
            self.metrics.taken_back(kind.value, -pico)

    def suspended(self, account: AccountId, why: str, *, lifted: bool) -> None:
        """Tell that an account was suspended, or that this was ``lifted``; once it is durable."""
        self._log("account.resumed" if lifted else "account.suspended", account=account, why=why)

    async def load(self, account: AccountId) -> CreditAccount | None:
        """The last committed state."""
        return await self._till.read(lambda: credit_talk.load_credit(account))

    async def book(
        self, account: AccountId, heard: PaymentRecord, *, event: str | None, react: Reaction
    ) -> Booked | None:
        """Take in what was heard of a payment, once per ``event``. See :func:`credit_talk.book_payment`.

        Raises:
            CreditFault, OtherAccounts: nothing changed.
        """
        at = self.clock.now_millis()
        self._probe("book.before")
        booked = await self._till.write(
            lambda: credit_talk.book_payment(account, heard, event, react, at), of=account
        )
        self._probe("book.after")
        if booked is not None:
            self.moved(account, booked.payment.kind, booked.moved, booked.payment.id, event=event)
        return booked

    # ---------------------------------------------------------------------------------------------- accounts and keys

    async def create_account(self, row: AccountRow, *, overdraft: int = 0) -> CreditAccount:
        """Add an account. Raises ``Exists``."""
        return await self._till.write(lambda: credit_talk.create_account(row, overdraft), of=row.id)

    async def change_account(
        self, account: AccountId, change: Callable[[AccountRow], AccountRow], *, overdraft: int | None = None
    ) -> AccountRow | None:
        """Replace an account's row by ``change`` of it, a pure function; None when there is none. Raises ``Exists``."""
        at = self.clock.now_millis()
        return await self._till.write(
            lambda: credit_talk.change_account(account, change, at, overdraft), of=account
        )

    async def create_key(self, row: KeyRow, *, limit: int) -> bool:
        """Add a key; False when the account has ``limit`` live ones."""
        return await self._till.write(lambda: credit_talk.create_key(row, limit), of=row.account)

    async def change_key(
        self, account: AccountId, key: KeyId, change: Callable[[KeyRow], KeyRow]
    ) -> KeyRow | None:
        """Replace a key's row by ``change`` of it, a pure function; None when the account has no such key."""
        at = self.clock.now_millis()
        return await self._till.write(lambda: credit_talk.change_key(account, key, change, at), of=account)

    # ---------------------------------------------------------------------------------------------------------- others

    async def read(self, talk: Callable[[], Talk[R]]) -> R:
        """Run one of :mod:`credit_lists`' talks."""
        return await self._till.read(talk)

    async def write(self, talk: Callable[[], Talk[R]], *, of: str) -> R:
        """Run another writing talk in a transaction of its own."""
        return await self._till.write(talk, of=of)

    async def note_event(self, event: str) -> bool:
        """Note an announcement that moves no money; False when it was noted before."""
        at = self.clock.now_millis()
        return await self._till.write(lambda: credit_talk.note_event(event, at), of=event)

    async def add_task(self, task: Task) -> bool:
        """Put a task into the outbox; False when it is there already."""
        return await self._till.write(lambda: credit_talk.add_task(task), of=task.account)

    async def move_task(self, before: Task, after: Task) -> bool:
        """Replace a task; False when somebody else has moved it since."""
        return await self._till.write(lambda: credit_lists.move_task(before, after), of=before.account)

    async def due(self, kind: str, *, limit: int = _PAGE) -> Sequence[Task]:
        """Tasks of a kind whose time has come."""
        now = self.clock.now_millis()
        return await self._till.read(lambda: credit_lists.due_tasks(kind, now, limit))


class CreditSweeper:
    """Releases the holds of lives that have ended, and our own that no request of this process knows.

    The counterpart of :class:`mppnode.ledger.life.Sweeper`. What was recorded is charged, and the statement shows it as
    a request that crashed: its owner can say no more about it.
    """

    def __init__(self, accounts: Credits, ledger: Ledger, life: Life, *, ours: Callable[[HoldId], bool]) -> None:
        self._credits = accounts
        self._ledger = ledger
        self._life = life
        self._ours = ours
        self._doubtful: set[HoldId] = set()

    async def keep(self, sleep: Callable[[float], Awaitable[None]], on_error: Callable[[ChannelFault], None]) -> None:
        """Sweep until cancelled; a ledger that is away for a moment is tried again."""
        await keep_sweeping(self.sweep, sleep, on_error)

    async def sweep(self) -> int:
        """Release what is orphaned; returns how many holds. Raises ``STORE_UNAVAILABLE``.

        The accounts are read before the list of lives, as there: a newcomer is never mistaken for a dead one.
        """
        released, doubtful = 0, set[HoldId]()
        after: AccountId | None = None
        while page := await self._credits.read(partial(credit_lists.held_accounts, after, _PAGE)):
            after = page[-1][0]
            living = await self._ledger.living()
            for _, account in page:
                if isinstance(account, CreditAccount):
                    released += await self._release(account, living, doubtful)
                else:  # its account stops, and the holds of no other stay behind it
                    context = {"message": "a row of the ledger is broken", "exception": account}
                    asyncio.get_running_loop().call_exception_handler(context)
        # Found twice, because a bill may be settled between our reading and our asking.
        self._doubtful = doubtful
        return released

    async def _release(self, account: CreditAccount, living: frozenset[NodeId], doubtful: set[HoldId]) -> int:
        gone = {hold.owner for hold in account.holds.values()} - living
        mine = {name for name, hold in account.holds.items() if hold.owner == self._life.id and not self._ours(name)}
        doubtful |= mine - self._doubtful
        lost = mine & self._doubtful
        if not gone and not lost:
            return 0
        made = await self._credits.transact(account.id, lambda found: self._drop(found, gone, lost))
        return sum(isinstance(event, Released) for event in made.events)

    def _drop(
        self, found: CreditAccount | None, gone: AbstractSet[NodeId], lost: AbstractSet[HoldId]
    ) -> tuple[CreditPlan, list[RequestRow]]:
        assert found is not None
        at = self._credits.clock.now_millis()
        now, account, events, rows = UnixSeconds(at // 1000), found, list[CreditEvent](), list[RequestRow]()
        for name, hold in found.holds.items():
            if hold.owner in gone or name in lost:
                made = plan(account, Settle(name, hold.consumed), now=now)
                account, events = made.account, [*events, *made.events]
                rows.append(_crashed(found.id, name, hold, at))
        return CreditPlan(account, tuple(events), CreditOutcome(replayed=not events)), rows


def _crashed(account: AccountId, name: HoldId, hold: CreditHold, at: UnixMillis) -> RequestRow:
    return RequestRow(name, account, hold.key, at, hold.about, "", hold.consumed, 0, 0, 0, 0, CRASHED)
