"""Moves earned money to the chain in time: settles when it is worth it, closes when a payer leaves or falls asleep.

One process at a time does this (a lease, to avoid double work); two at once would only waste a fee, since the chain's
totals never fall and every intent is moved by compare and set. The money at risk is what is unsettled when a payer's
exit ends; from the request to the exit there are 900 seconds of block time, and everything here is repeated every few.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from channels.chain import Chain
from channels.descriptor import CLOSE_GRACE_S
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId
from channels.instants import UnixSeconds
from channels.intent import IntentKind
from channels.model import Account, NodeId, ObserveChain, Phase
from channels.units import PICO_PER_UNIT, Units
from mppnode.kernel.clock import Clock
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger.base import Ledger, Which
from mppnode.ledger.books import Books
from mppnode.observe.logs import Level, Log
from mppnode.observe.metrics import Metrics
from mppnode.treasury.closer import Closer
from mppnode.treasury.settler import Settler
from mppnode.treasury.watcher import Watcher

JOB: Final = "treasury"
_LATE: Final = frozenset({Reason.CHAIN_UNAVAILABLE, Reason.CHAIN_OUTCOME_UNKNOWN, Reason.STORE_UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class TreasuryPolicy:
    """When money moves. Units and seconds."""

    settle_fees: int = 20
    """Settle when the unsettled amount is worth this many fees: settling then costs at most 5 %."""
    settle_age_s: int = 6 * 3600
    """Settle anyway when something has been unsettled for so long; counted from this process's first look."""
    exposure_max: Units = Units(5_000_000)
    """Settle all channels of a payer who owes more than this over all of them: 5 USD."""
    idle_close_s: int = 30 * 24 * 3600
    """Close a channel nobody has used for so long: the payer's money should not lie there for ever."""
    settle_gas: int = 250_000
    """What a settlement is taken to use when its fee is weighed against its value."""
    margin_s: int = 120
    """A close must be included this long before the payer may withdraw (reliability: 4.8)."""
    glance_s: float = 2.0
    sweep_s: float = 10.0
    alarm_s: float = 60.0
    """Without a successful sweep for so long, people should look."""
    at_once: int = 8
    """Transactions in flight, and as many closes of payers who leave; more would only queue at the RPC."""


@dataclass(slots=True)
class Survey:
    """Sums over the channels that are not closed, in units."""

    phases: Counter[str] = field(default_factory=Counter)
    claimable: int = 0
    earned: int = 0
    headroom: int = 0
    unsigned: int = 0

    def add(self, account: Account) -> None:
        """Count one channel."""
        self.phases[account.phase.value] += 1
        self.claimable += max(account.accepted - account.chain.settled, 0)
        self.earned += max(account.spent - account.chain.settled, 0)
        self.headroom += account.accepted - account.spent
        self.unsigned += max(account.chain.deposit - account.accepted, 0)


class Treasurer:
    """The loop that watches, settles and closes. Also runs alone, as the watchtower."""

    def __init__(
        self,
        *,
        chain: Chain,
        ledger: Ledger,
        books: Books,
        watcher: Watcher,
        settler: Settler,
        closer: Closer,
        node: Callable[[], NodeId],
        owner: TaskOwner,
        clock: Clock,
        log: Log,
        policy: TreasuryPolicy,
        chores: Sequence[Callable[[], Awaitable[object]]] = (),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics if metrics is not None else Metrics.unseen(clock)
        self._chain = chain
        self._ledger = ledger
        self._books = books
        self._watcher = watcher
        self._settler = settler
        self._closer = closer
        self._node = node
        self._owner = owner
        self._clock = clock
        self._log = log
        self._policy = policy
        self._chores = chores
        self._sleep = sleep
        # Each its own: a close that races the payer's exit must not queue behind settlements that could wait for weeks.
        self._slots = asyncio.Semaphore(policy.at_once)
        self._urgent_slots = asyncio.Semaphore(policy.at_once)
        self._since: dict[ChannelId, float] = {}
        self._running: set[ChannelId] = set()
        self._fee = Units(0)
        self._owed: Mapping[Address, int] = {}
        """By payer, over all channels, as the last complete review found it."""
        self._swept_at: float | None = None
        self._adopted_at: float | None = None
        self._relieved_at = clock.monotonic()
        """When another process last led: then it looks at the chain, and it raises the alarm."""
        self._blind = False

    async def keep(self) -> None:
        """Work until cancelled; whatever fails is tried again at the next turn."""
        while True:
            try:
                if await self._ledger.lead(JOB, self._node()):
                    await self.turn()
                else:
                    self._relieved_at = self._clock.monotonic()
                    self._metrics.relieved()
                await self._adopt()
            except ChannelFault as fault:
                self._log("treasury.late", level=Level.WARNING, reason=fault.reason.value)
            self._look_for_blindness()
            await self._sleep(self._policy.glance_s)

    async def turn(self) -> None:
        """One look at the chain, and what follows from it. Raises ``CHAIN_UNAVAILABLE`` or ``STORE_UNAVAILABLE``."""
        now = self._clock.monotonic()
        for account in (await self._watcher.glance()).changed:
            self._react(account)
        if self._swept_at is None or now - self._swept_at >= self._policy.sweep_s:
            await self._watcher.sweep()
            await self._review()
            self._swept_at = now
            for chore in self._chores:
                await chore()

    @property
    def blind(self) -> bool:
        """Whether this process leads and has not seen the chain for too long."""
        return self._blind

    def _look_for_blindness(self) -> None:
        seen_at = max(self._watcher.checked_at, self._relieved_at)
        blind = self._clock.monotonic() - seen_at > self._policy.alarm_s
        if blind and not self._blind:
            self._log("treasury.blind", level=Level.ERROR, seconds=int(self._policy.alarm_s))
        self._blind = blind

    # ---------------------------------------------------------------------------------------------------- decisions

    def _react(self, account: Account) -> None:
        """A payer has asked to leave: what they owe and is worth a fee is captured now, before they may withdraw.

        One close per channel at most, so a payer who asks and takes it back again and again costs one fee, not many.
        """
        if account.phase is not Phase.CONTESTED or (account.unsettled <= self._fee and not account.holds):
            return
        requested = account.chain.close_requested_at
        assert requested is not None
        deadline = UnixSeconds(requested + CLOSE_GRACE_S - self._policy.margin_s)
        self._start(account, self._closing(account, "payer-leaves", deadline), urgent=True)

    async def _review(self) -> None:
        """Weigh every channel that is not closed."""
        self._fee = await self._chain.fee_units(self._policy.settle_gas)
        owed: defaultdict[Address, int] = defaultdict(int)
        leaving: list[Account] = []
        survey = Survey()
        after, seen = None, set[ChannelId]()
        while page := await self._ledger.page(Which.NOT_CLOSED, after=after):
            after = page[-1].id
            for account in page:
                seen.add(account.id)
                survey.add(account)
                payer = account.descriptor.payer
                owed[payer] += account.unsettled
                if account.phase is Phase.CONTESTED:
                    leaving.append(account)
                else:
                    # The last review's sum: this one's is not complete before the last page.
                    self._weigh(account, max(self._owed.get(payer, 0), owed[payer]))
        for account in sorted(leaving, key=lambda account: account.chain.close_requested_at or 0):
            self._react(account)
        self._since = {channel: at for channel, at in self._since.items() if channel in seen}
        self._owed = owed
        self._report(survey, leaving)

    def _report(self, survey: Survey, leaving: Sequence[Account]) -> None:
        """Show operators what this review saw."""
        self._metrics.channels(survey.phases)
        self._metrics.channel_money(
            claimable_pico=survey.claimable * PICO_PER_UNIT,
            earned_pico=survey.earned * PICO_PER_UNIT,
            headroom_pico=survey.headroom * PICO_PER_UNIT,
            unsigned_pico=survey.unsigned * PICO_PER_UNIT,
        )
        now = self._clock.monotonic()
        self._metrics.unsettled_age(now - min(self._since.values(), default=now))
        # A payer who leaves and owes nothing worth a fee needs no answer.
        waiting = [account for account in leaving if account.unsettled > self._fee or account.holds]
        asked = min((account.chain.close_requested_at or 0 for account in waiting), default=self._clock.now())
        self._metrics.close_requests(len(waiting), max(self._clock.now() - asked, 0))

    def _weigh(self, account: Account, owed_by_payer: int) -> None:
        policy, fee, now = self._policy, self._fee, self._clock.monotonic()
        if account.phase in (Phase.CLOSING, Phase.CAPTURED):
            # Somebody's close that nobody may be driving any more; a second driver only waits for the first one.
            if self._since.setdefault(account.id, now) < now and not self._closer.busy(account.id):
                self._closer.later(account.id, at_once=True)
        elif account.phase is Phase.OPEN:
            due = account.settleable - account.chain.settled
            if due <= 0:
                self._since.pop(account.id, None)
            old = due > fee and now - self._since.setdefault(account.id, now) >= policy.settle_age_s
            exposed = due > fee and owed_by_payer >= policy.exposure_max
            if due > 0 and (due >= policy.settle_fees * max(fee, 1) or old or exposed):
                self._start(account, self._settling(account))
            elif self._idle(account):
                self._start(account, self._closing(account, "idle", None))

    def _idle(self, account: Account) -> bool:
        if account.holds or not account.active_at:
            return False
        return self._clock.now() - account.active_at >= self._policy.idle_close_s

    async def _adopt(self) -> None:
        """Go on with transactions nobody drives: those of dead processes, and our own whose wait was over.

        Every process does this, not the leader alone. The leader leaves alone what a living process owns, so an owner
        that no longer leads is the only one who can bring its transaction to an end.
        """
        now = self._clock.monotonic()
        if self._adopted_at is not None and now - self._adopted_at < self._policy.sweep_s:
            return
        self._adopted_at = now
        living = await self._ledger.living()
        for intent in await self._ledger.intents(active=True):
            ours = intent.owner == self._node()
            if intent.owner in living and not ours:
                continue
            account = await self._books.load(intent.channel)
            if account is not None and not self._settler.busy(intent.channel):
                self._start(account, self._resuming(account, intent.id))

    # --------------------------------------------------------------------------------------------------------- work

    def _start(self, account: Account, work: Callable[[], Awaitable[object]], *, urgent: bool = False) -> None:
        if account.id not in self._running and not self._closer.busy(account.id):
            self._running.add(account.id)
            slots = self._urgent_slots if urgent else self._slots
            self._owner.spawn(self._run(account, work, slots), name="move money")

    async def _run(self, account: Account, work: Callable[[], Awaitable[object]], slots: asyncio.Semaphore) -> None:
        try:
            async with slots:
                await work()
        except ChannelFault as fault:
            late = fault.reason in _LATE
            self._log(
                "treasury.not_yet" if late else "treasury.refused",
                level=Level.INFO if late else Level.WARNING,
                channel="0x" + account.id.hex(),
                reason=fault.reason.value,
            )
        finally:
            self._running.discard(account.id)

    def _closing(self, account: Account, why: str, deadline: UnixSeconds | None) -> Callable[[], Awaitable[object]]:
        async def work() -> None:
            await self._closer.close(account, why, deadline=deadline)

        return work

    def _settling(self, account: Account) -> Callable[[], Awaitable[object]]:
        return lambda: self.settle(account.id)

    def _resuming(self, account: Account, intent_id: str) -> Callable[[], Awaitable[object]]:
        async def work() -> None:
            active = await self._ledger.intents(active=True, channel=account.id)
            for intent in active:
                if intent.id != intent_id:
                    continue
                landed = await self._settler.resume(intent, account)
                if landed is not None and intent.kind is IntentKind.SETTLE:
                    await self._books.apply(account.id, ObserveChain(landed.chain))

        return work

    async def settle(self, channel: ChannelId) -> Account:
        """Bring the chain's total of an open channel to what is surely earned.

        Raises:
            ChannelFault: as :meth:`Settler.bring`; ``CHANNEL_FINALIZED`` when the channel is not open.
        """
        account = await self._books.load(channel)
        if account is None:
            raise ChannelFault(Reason.CHANNEL_NOT_FOUND, detail="no such channel")
        block = (await self._chain.finalised()).number
        seen = await self._chain.channel_state(account.escrow, channel, at_block=block)
        account = (await self._books.apply(channel, ObserveChain(seen))).account
        if account.phase is not Phase.OPEN:
            raise ChannelFault(Reason.CHANNEL_FINALIZED, detail=f"the channel is {account.phase}")
        if account.settleable <= account.chain.settled:
            return account
        landed = await self._settler.bring(account, IntentKind.SETTLE, account.settleable)
        account = (await self._books.apply(channel, ObserveChain(landed.chain))).account
        self._since.pop(channel, None)
        self._log("channel.settled", channel="0x" + channel.hex(), settled=account.chain.settled)
        return account
