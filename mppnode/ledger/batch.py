"""Steps that arrived together and are committed together: what both stores do between reading rows and writing them.

A *firm* batch is committed so that it survives a power cut; one that holds relaxed steps alone need not be. What a
relaxed commit left in a row is *soft*: it may be acted on, but nobody may be shown it. So a firm step that is answered
from a soft row makes the row firm first, even when the step itself changes nothing or is refused: refusals quote
numbers too.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from channels.account import check
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.model import Account, Event, Plan
from mppnode.ledger.rows import BrokenRow

BATCH_MAX: Final = 512  # steps per commit: 2 ms at the measured 548k row updates/s leaves nobody waiting long
_KEPT_MAX: Final = 20_000  # about 2 KiB an account: 40 MiB


@dataclass(slots=True)
class Op:
    """One queued step, and where its answer goes. Without a step it is a load."""

    channel: ChannelId
    step: Callable[[Account | None], Plan[Any]] | None
    future: asyncio.Future[Any]
    relaxed: bool = False


@dataclass(slots=True)
class Change:
    """What a batch does to one channel: one write of the row, however many steps it took."""

    before: Account | None
    account: Account
    events: list[Event] = field(default_factory=list)


class Batch:
    """Decides the steps of one transaction in order; each sees what the one before it on its channel did."""

    def __init__(self, *, firm: bool, soft: Container[ChannelId]) -> None:
        self.firm = firm
        self.changes: dict[ChannelId, Change] = {}
        self.committed: list[Account] = []
        """Every account the batch makes, in order; theirs to hear who subscribed, once they are firm."""
        self._soft = soft
        self._quoted: set[ChannelId] = set()
        self._answers: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []

    def decide(self, op: Op, found: Account | None) -> None:
        """Run one step on ``found``, or on what an earlier step of this batch made of it."""
        change = self.changes.get(op.channel)
        before = found if change is None else change.account
        if not op.relaxed and op.channel in self._soft:
            self._quoted.add(op.channel)
        if op.step is None:
            self.answer(op.future, before)
            return
        try:
            plan = op.step(before)
            if plan.events:
                check(plan.account)
        except Exception as error:  # noqa: BLE001 - a refusal, a broken law or a bug: its asker's, not the store's
            self.fail(op.future, error)
            return
        if plan.events:
            if change is None:
                change = self.changes[op.channel] = Change(before, plan.account)
            change.account = plan.account
            change.events.extend(plan.events)
            self.committed.append(plan.account)
        self.answer(op.future, plan)

    @property
    def harden(self) -> list[ChannelId]:
        """Soft rows that answered a firm step and are not written anyway."""
        return sorted(self._quoted - self.changes.keys())

    def answer(self, future: asyncio.Future[Any], value: Any) -> None:
        """Keep an answer until the batch is committed."""
        self._answers.append((future, value, None))

    def fail(self, future: asyncio.Future[Any], error: BaseException) -> None:
        """Keep an error until the batch is committed: what it quotes must be true by then."""
        self._answers.append((future, None, error))

    def deliver(self) -> None:
        """Hand out every answer; on the event loop. A cancelled asker loses its answer, not what was committed."""
        for future, value, error in self._answers:
            if future.done():
                continue
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)


class Rows:
    """What a writer knows of the rows it has read or written, between its transactions."""

    def __init__(self) -> None:
        self._accounts: OrderedDict[ChannelId, Account] = OrderedDict()
        self.soft: dict[ChannelId, Account] = {}
        """Rows a power cut may take back, and with them news nobody has been told yet."""

    def get(self, channel: ChannelId) -> Account | None:
        """The account as it was last seen; only versions tell whether it still is."""
        account = self._accounts.get(channel)
        if account is not None:
            self._accounts.move_to_end(channel)
        return account

    def read(self, account: Account, *, soft: bool) -> Account:
        """Remember an account that was read. Strangers' ids must not get here: they would push real channels out."""
        self.soft.pop(account.id, None)
        if soft:
            self.soft[account.id] = account
        return self._remember(account)

    def committed(self, batch: Batch, *, wrote: bool) -> list[Account]:
        """Take over what a batch has committed; returns what is firm now and may be told."""
        for change in batch.changes.values():
            self._remember(change.account)
        if not batch.firm:
            self.soft |= {channel: change.account for channel, change in batch.changes.items()}
            return []
        if not wrote:  # then nothing was synced either
            return []
        # One log for all: whatever was soft up to here is on disk with this commit.
        firm = [account for channel, account in self.soft.items() if channel not in batch.changes]
        self.soft.clear()
        return firm + batch.committed

    def forget(self) -> None:
        """Nothing is certain any more: read everything again, also which rows are soft."""
        self._accounts.clear()
        self.soft.clear()

    def _remember(self, account: Account) -> Account:
        self._accounts[account.id] = account
        self._accounts.move_to_end(account.id)
        while len(self._accounts) > _KEPT_MAX:
            self._accounts.popitem(last=False)
        return account


Found = tuple[Account | BrokenRow, bool]
"""What a row holds, and whether it is soft."""


def lawful(found: Iterable[Found], *, report: bool) -> list[tuple[Account, bool]]:
    """The accounts among rows of a list. A broken one must not hide the others; those who ask for it get its error."""
    accounts = []
    for account, soft in found:
        if isinstance(account, Account):
            accounts.append((account, soft))
        elif report:
            context = {"message": "a row of the ledger is broken", "exception": account}
            asyncio.get_running_loop().call_exception_handler(context)
    return accounts


async def all_firm(
    found: Iterable[tuple[Account, bool]], load: Callable[[ChannelId], Awaitable[Account | None]]
) -> list[Account]:
    """These accounts; one whose row is soft is loaded, which makes it firm."""
    found = list(found)
    firm = await asyncio.gather(*(load(account.id) for account, soft in found if soft))
    loaded = {account.id: account for account in firm if account is not None}
    return [loaded.get(account.id, account) for account, _ in found]


def unavailable() -> ChannelFault:
    """The refusal of a store that cannot do its work."""
    return ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger is not available")


def refuse(futures: Iterable[asyncio.Future[Any]]) -> None:
    """Answer everybody that the ledger is not available."""
    for future in futures:
        if not future.done():
            future.set_exception(unavailable())

