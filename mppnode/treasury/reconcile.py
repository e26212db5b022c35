"""Proves that the journal, the accounts, our transactions and the chain tell the same story, channel by channel.

It only reads. What it reads may move meanwhile, so a difference counts only when it is still there at a second look.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final

from channels.account import check, fold
from channels.chain import Chain
from channels.descriptor import ChainSnapshot
from channels.escrow import ChannelClosed
from channels.faults import ChannelFault
from channels.ids import ChannelId
from channels.instants import UnixSeconds
from channels.intent import Intent, IntentKind, IntentState
from channels.model import Account, NodeId, Phase
from channels.units import PICO_PER_UNIT
from channels.verify import closed_in, settled_in
from mppnode.kernel.clock import Clock
from mppnode.ledger.base import Ledger, Which
from mppnode.observe.logs import Level, Log
from mppnode.observe.metrics import Metrics
from mppnode.treasury.search import find_end
from mppnode.treasury.treasurer import JOB

DAY_S: Final = 86_400.0
FIRST_S: Final = 3_600.0
_LOGGED_MAX: Final = 100  # lines of one run: what is wrong with the hundred-first is wrong with the first


@dataclass(frozen=True, slots=True)
class Difference:
    """Two places that disagree about one channel."""

    channel: ChannelId
    what: str
    """Which two, e.g. ``journal/account``."""
    detail: str
    units: int = 0
    """By how much, where it is an amount they disagree about."""

    def __str__(self) -> str:
        return f"0x{self.channel.hex()} {self.what}: {self.detail}"


@dataclass(slots=True)
class Totals:
    """What was compared. Units."""

    channels: int = 0
    spent: int = 0
    settled: int = 0
    lost: int = 0
    """Charged and never captured, because the payer got out first."""
    differences: int = 0
    drift: int = 0
    """Sum of the amounts that differ."""


class Reconciler:
    """Compares every channel, or those of a page, with its journal, its transactions and the chain."""

    def __init__(self, ledger: Ledger, chain: Chain, *, since: UnixSeconds | None = None) -> None:
        """``since`` leaves out what the chain says of closed channels and transactions that have not moved since then:
        what was proved once stays proved, and their number grows for ever.
        """
        self._ledger = ledger
        self._chain = chain
        self._since = since
        self.totals = Totals()

    async def run(self, which: Which = Which.ALL) -> AsyncIterator[Difference]:
        """Every difference found. Raises ``CHAIN_UNAVAILABLE`` or ``STORE_UNAVAILABLE``: nothing is proved then."""
        after = None
        while page := await self._ledger.page(which, after=after):
            after = page[-1].id
            states = await self._states([account for account in page if account.phase is not Phase.CLOSED])
            for account in page:
                self.totals.channels += 1
                found, paid = await self._compare(account, states.get(account.id))
                if found and (again := await self._ledger.load(account.id)) is not None:
                    now = (await self._states([again])) if again.phase is not Phase.CLOSED else {}
                    found, paid = await self._compare(again, now.get(again.id))
                self._count(account, paid)
                for difference in found:
                    self.totals.differences += 1
                    self.totals.drift += difference.units
                    yield difference

    def _count(self, account: Account, paid: int | None) -> None:
        totals = self.totals
        totals.spent += account.spent
        if account.phase is not Phase.CLOSED:
            totals.settled += account.chain.settled
        elif paid is not None:
            totals.settled += paid
            totals.lost += max(min(account.spent, account.owed_pico // PICO_PER_UNIT) - paid, 0)

    async def _states(self, accounts: Sequence[Account]) -> dict[ChannelId, ChainSnapshot]:
        found: dict[ChannelId, ChainSnapshot] = {}
        block = (await self._chain.finalised()).number
        for escrow in {account.escrow for account in accounts}:
            ids = [account.id for account in accounts if account.escrow == escrow]
            found |= zip(ids, await self._chain.channel_states(escrow, ids, at_block=block), strict=True)
        return found

    async def _compare(self, account: Account, state: ChainSnapshot | None) -> tuple[list[Difference], int | None]:
        """The differences, and what the chain paid for a closed channel in all, if it was asked."""
        found = await self._against_journal(account)
        intents = await self._ledger.intents(active=False, channel=account.id)
        recent = [intent for intent in intents if self._since is None or intent.updated_at >= self._since]
        for intent in recent:
            if intent.state is IntentState.FINAL:
                found += await self._against_receipt(account, intent)
        if state is not None:
            return found + _against_chain(account, state, intents), None
        if self._since is not None and account.active_at < self._since and not recent:
            return found, None
        closed = await self._end_of(account)
        return found + _against_close(account, closed), None if closed is None else closed.settled

    async def _against_journal(self, account: Account) -> list[Difference]:
        # The journal is read after the account, so it has at least the entries the account is made of.
        events = (await self._ledger.journal(account.id))[: account.version]
        found: list[Difference] = []
        try:
            check(account)
        except AssertionError as broken:
            found.append(Difference(account.id, "account/law", str(broken)))
        if len(events) != account.version:
            detail = f"{len(events)} entries for version {account.version}"
            found.append(Difference(account.id, "journal/account", detail))
        elif reduce(fold, events, None) != account:
            found.append(Difference(account.id, "journal/account", "folding the journal gives another account"))
        return found

    async def _against_receipt(self, account: Account, intent: Intent) -> list[Difference]:
        assert intent.tx_hash is not None
        receipt = await self._chain.receipt(intent.tx_hash)
        name = f"{intent.kind}/receipt"
        if receipt is None or not receipt.succeeded:
            return [Difference(account.id, name, f"0x{intent.tx_hash.hex()} is not on the chain")]
        event = (closed_in if intent.kind is IntentKind.CLOSE else settled_in)(account.id, account.escrow, receipt.logs)
        if event is None or event.settled != intent.amount or event.payee != account.descriptor.payee:
            paid = "nothing" if event is None else str(event.settled)
            short = 0 if event is None else abs(event.settled - intent.amount)
            return [Difference(account.id, name, f"meant to pay {intent.amount}, paid {paid}", short or intent.amount)]
        return []

    async def _end_of(self, account: Account) -> ChannelClosed | None:
        """How the chain says a channel ended: ours by its transaction, a payer's by looking where we saw it."""
        record = account.close
        if record is not None and record.tx_hash is not None:
            receipt = await self._chain.receipt(record.tx_hash)
            return None if receipt is None else closed_in(account.id, account.escrow, receipt.logs)
        found = await find_end(self._chain, account, until=account.chain.block)
        return None if found is None else found[0]


class DailyReconcile:
    """Runs the comparison once a day on the node that leads the treasury, and logs what differs."""

    def __init__(
        self,
        ledger: Ledger,
        chain: Chain,
        *,
        node: Callable[[], NodeId],
        clock: Clock,
        log: Log,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics if metrics is not None else Metrics.unseen(clock)
        self._ledger = ledger
        self._chain = chain
        self._node = node
        self._clock = clock
        self._log = log

    async def keep(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Work until cancelled; the first time after an hour, when a restart's own work is done."""
        pause = FIRST_S
        while True:
            await sleep(pause)
            pause = DAY_S
            try:
                # Not a job of its own: every node has its own hour, and each would find that one free.
                if await self._ledger.lead(JOB, self._node()):
                    await self.run()
            except ChannelFault as fault:
                self._log("reconcile.late", level=Level.WARNING, reason=fault.reason.value)
                pause = FIRST_S

    async def run(self) -> Totals:
        """Compare once what may have changed since the last time. Raises as :meth:`Reconciler.run`."""
        since = UnixSeconds(self._clock.now() - 2 * int(DAY_S))
        reconciler = Reconciler(self._ledger, self._chain, since=since)
        async for difference in reconciler.run():
            if reconciler.totals.differences <= _LOGGED_MAX:
                channel = "0x" + difference.channel.hex()
                self._log("reconcile.difference", level=Level.ERROR, channel=channel, what=difference.what)
        totals = reconciler.totals
        self._metrics.reconciled(self._clock.now(), totals.differences, totals.drift * PICO_PER_UNIT)
        self._log("reconcile.done", channels=totals.channels, differences=totals.differences, lost=totals.lost)
        return totals


def _against_close(account: Account, closed: ChannelClosed | None) -> list[Difference]:
    """A closed channel and what its end paid out according to the chain's own log."""
    if closed is None:
        return [Difference(account.id, "close/chain", "the chain has no end of this channel")]
    if closed.settled > account.spent:
        detail = f"spent {account.spent}, but {closed.settled} was captured"
        return [Difference(account.id, "spent/chain", detail, closed.settled - account.spent)]
    record = account.close
    if record is not None and record.tx_hash is not None and record.capture != closed.settled:
        detail = f"fixed {record.capture}, captured {closed.settled}"
        apart = abs((record.capture or 0) - closed.settled)
        return [Difference(account.id, "close/chain", detail, apart)]
    return []


def _against_chain(account: Account, state: ChainSnapshot, intents: Sequence[Intent]) -> list[Difference]:
    """A channel the books call live."""
    if any(intent.active for intent in intents) or account.phase is Phase.CAPTURED:
        return []  # in flight: what the chain says now is not what it will say
    if state.block < account.chain.block:
        return []  # the books have heard of a newer block: this one can no longer contradict them
    found: list[Difference] = []
    facts = (
        ("deposit/chain", account.chain.deposit, state.deposit),
        ("settled/chain", account.chain.settled, state.settled),
    )
    for what, ours, theirs in facts:
        if ours != theirs:
            difference = abs(ours - theirs)
            found.append(Difference(account.id, what, f"books say {ours}, the chain says {theirs}", difference))
    if state.settled > account.spent:
        detail = f"spent {account.spent}, but {state.settled} was captured"
        found.append(Difference(account.id, "spent/chain", detail, state.settled - account.spent))
    if state.deposit and state.deposit < account.accepted:
        found.append(
            Difference(account.id, "accepted/chain", f"accepted {account.accepted}, deposit {state.deposit}")
        )
    return found
