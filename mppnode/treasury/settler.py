"""Brings one transaction of ours from the wish to the proof; every step is durable before the next one is taken.

The order is the law: an intent is persisted before it is signed, its bytes before they are sent. After a crash the same
bytes go out again, so at most one transaction per intent ever exists. While it may still be included no other one is
signed for the channel; nothing is believed from a block that may be replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final
from weakref import WeakValueDictionary

from channels import escrow as escrow_v2
from channels import escrow_v1
from channels import intent as steps
from channels.chain import Chain, Fate, Receipt
from channels.descriptor import ChainSnapshot, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.intent import Intent, IntentKind, IntentState
from channels.model import Account, NodeId
from channels.signature import address_of
from channels.tempo_tx import Call, TempoTx
from channels.units import PICO_PER_UNIT, Units
from channels.verify import closed_in, settled_in
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import Clock
from mppnode.kernel.probe import Probe, unwatched
from mppnode.ledger.base import IntentExists, Ledger
from mppnode.observe.logs import Level, Log, quiet
from mppnode.observe.metrics import Metrics
from mppnode.treasury.search import find_end

_FEE_STEP: Final = (3, 2)
"""What a later attempt offers against the one before it: half as much again."""
_FEE_STEPS_MAX: Final = 6  # 11 times the first offer; beyond that the chain has another problem than our fee


@dataclass(frozen=True, slots=True)
class SettlerLimits:
    """Seconds of patience."""

    wait_s: float = 12.0
    """For an outcome, before the caller is told that it is unknown; the intent lives on."""
    poll_s: float = 0.25
    resend_s: float = 3.0
    """Between two sendings of the same bytes while nobody has seen them in a block."""


@dataclass(frozen=True, slots=True)
class Landed:
    """A transaction that is final, and what the escrow says from its block on."""

    tx_hash: Hash32
    chain: ChainSnapshot


class Settler:
    """Signs and sends settlements and closes. One at a time per channel."""

    def __init__(
        self,
        chain: Chain,
        ledger: Ledger,
        *,
        key: Secret[bytes],
        fee_token: Address,
        clock: Clock,
        entropy: Callable[[int], bytes],
        node: Callable[[], NodeId],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        probe: Probe = unwatched,
        limits: SettlerLimits | None = None,
        metrics: Metrics | None = None,
        log: Log = quiet,
    ) -> None:
        self._log = log
        self._metrics = metrics if metrics is not None else Metrics.unseen(clock)
        self._chain = chain
        self._ledger = ledger
        self._key = key
        self._payee = address_of(key.reveal())
        self._fee_token = fee_token
        self._clock = clock
        self._entropy = entropy
        self._node = node
        self._sleep = sleep
        self._probe = probe
        self._limits = limits or SettlerLimits()
        self.on_no_effect: Callable[[Intent], None] = lambda _: None
        """Hears of a transaction the chain calls a success and that did not pay what it was for."""
        self._locks: WeakValueDictionary[ChannelId, asyncio.Lock] = WeakValueDictionary()

    def busy(self, channel: ChannelId) -> bool:
        """Whether this process is driving a transaction for a channel right now."""
        lock = self._locks.get(channel)
        return lock is not None and lock.locked()

    async def bring(
        self, account: Account, kind: IntentKind, amount: Units, *, deadline: UnixSeconds | None = None
    ) -> Landed:
        """Bring the chain's total of a channel to ``amount`` units, by settling or closing; safe to repeat.

        Raises:
            ChannelFault: ``CHAIN_REJECTED`` when it surely did not and will not happen, ``CHAIN_UNAVAILABLE`` when it
                was not sent, ``CHAIN_OUTCOME_UNKNOWN`` when it may yet happen, ``CHANNEL_FINALIZED`` when the payer
                has withdrawn.
        """
        lock = self._locks.get(account.id) or self._locks.setdefault(account.id, asyncio.Lock())
        async with lock:
            for intent in await self._ledger.intents(active=True, channel=account.id):
                # Whatever it is, it must end first: while it may still land nothing else is signed.
                await self._drive(intent, account)
            tried = [
                intent
                for intent in await self._ledger.intents(active=False, channel=account.id)
                if (intent.kind, intent.amount) == (kind, amount)
            ]
            state = await self._final_state(account)
            for intent in tried:
                if intent.state is IntentState.FINAL and intent.tx_hash is not None:
                    return Landed(intent.tx_hash, state)
            if state.deposit == 0:
                return await self._found_closed(account, amount, state)
            if kind is IntentKind.SETTLE and state.settled >= amount:
                raise ChannelFault(Reason.CHAIN_REJECTED, detail="the chain has paid that out already")
            if tried and not tried[-1].raw:
                # The last one would have reverted. Whoever asks again every few seconds for days (a payer frozen by the
                # token's policy) must not fill the ledger with wishes.
                await self._prepare(tried[-1], account)
            # Only what was signed counts as tried: a fee that nobody was offered was not too low.
            attempt = 1 + sum(1 for intent in tried if intent.raw)
            known = [at for at in (deadline, *(intent.deadline for intent in tried)) if at is not None]
            intent = await self._plan(account, kind, amount, attempt, min(known, default=None))
            intent = await self._drive(intent, account)
            if intent.state is IntentState.FINAL:
                return await self._landed(intent, account)
            # It also fails when somebody else's transaction was mined just before it.
            state = await self._final_state(account)
            if state.deposit == 0:
                return await self._found_closed(account, amount, state)
            raise ChannelFault(Reason.CHAIN_REJECTED, field=kind.value, detail=f"transaction is {intent.state}")

    async def resume(self, intent: Intent, account: Account) -> Landed | None:
        """Go on with an intent a crash or a slow chain left behind; None when it ended without effect.

        Raises:
            ChannelFault: ``CHAIN_UNAVAILABLE`` or ``CHAIN_OUTCOME_UNKNOWN``: not known yet.
        """
        lock = self._locks.get(intent.channel) or self._locks.setdefault(intent.channel, asyncio.Lock())
        async with lock:
            current = await self._ledger.intents(active=True, channel=intent.channel)
            if not current:
                return None
            ended = await self._drive(current[0], account)
            return await self._landed(ended, account) if ended.state is IntentState.FINAL else None

    # --------------------------------------------------------------------------------------------------- the steps

    async def _plan(
        self, account: Account, kind: IntentKind, amount: Units, attempt: int, deadline: UnixSeconds | None
    ) -> Intent:
        intent = steps.planned(
            self._entropy(16).hex(),
            account.id,
            kind,
            amount,
            owner=self._node(),
            now=self._clock.now(),
            attempt=attempt,
            deadline=deadline,
        )
        self._probe("plan.before")
        try:
            await self._ledger.add_intent(intent)
        except IntentExists:
            raise ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN, detail="another node is settling this channel") from None
        self._probe("plan.after")
        return intent

    async def _drive(self, intent: Intent, account: Account) -> Intent:
        """Bring an intent to its end, whichever that is. Raises as :meth:`bring` when that is not possible now."""
        if intent.owner != self._node():
            if intent.owner in await self._ledger.living():
                raise ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN, detail="another node is settling this channel")
            intent = await self._move(intent, steps.adopted(intent, self._node(), now=self._clock.now()))
        if intent.state is IntentState.SENT:
            await self._send_again(intent)  # the bytes may never have left before the crash or the timeout
        if intent.state is IntentState.PLANNED:
            intent = await self._sign(intent, account)
        if intent.state is IntentState.SIGNED:
            intent = await self._send(intent)
        return await self._await_end(intent, account) if intent.active else intent

    async def _prepare(self, intent: Intent, account: Account) -> TempoTx:
        call = Call(account.escrow.address, _calldata(account, intent))
        return await self._chain.prepare(self._payee, (call,), fee_token=self._fee_token, entropy=self._entropy(8))

    async def _sign(self, intent: Intent, account: Account) -> Intent:
        try:
            tx = await self._prepare(intent, account)
        except ChannelFault as fault:
            if fault.reason is not Reason.CHAIN_REJECTED:
                raise
            # It would revert: nothing was signed, so this is surely the end.
            return await self._move(intent, steps.ended(intent, IntentState.DEAD, now=self._clock.now()))
        for _ in range(min(intent.attempt - 1, _FEE_STEPS_MAX)):
            up, down = _FEE_STEP
            tx = replace(
                tx,
                max_fee_per_gas=tx.max_fee_per_gas * up // down,
                max_priority_fee_per_gas=tx.max_priority_fee_per_gas * up // down,
            )
        signed = tx.sign(self._key.reveal())
        assert signed.tx.valid_before is not None
        now = self._clock.now()
        return await self._move(
            intent, steps.signed(intent, signed.raw, signed.tx_hash, signed.tx.valid_before, now=now)
        )

    async def _send(self, intent: Intent) -> Intent:
        # Durable before the bytes leave: read the other way round, a crash would leave a transaction nobody looks for.
        intent = await self._move(intent, steps.sent(intent, now=self._clock.now()))
        self._probe("broadcast.before")
        try:
            await self._chain.send(intent.raw)
        except ChannelFault as fault:
            # A refusal is believed only of bytes that have never left before this moment.
            if fault.reason is Reason.CHAIN_REJECTED:
                dead = await self._move(intent, steps.ended(intent, IntentState.DEAD, now=self._clock.now()))
                self._metrics.transaction_failed(intent.kind.value, "dead")
                return dead
        self._probe("broadcast.after")
        return intent

    async def _await_end(self, intent: Intent, account: Account) -> Intent:
        start = self._clock.monotonic()
        resent = start
        while True:
            try:
                intent = await self._look(intent, account)
            except ChannelFault as fault:
                if fault.reason is not Reason.CHAIN_UNAVAILABLE:
                    raise
            if not intent.active:
                return intent
            now = self._clock.monotonic()
            if now - start >= self._limits.wait_s:
                raise ChannelFault(
                    Reason.CHAIN_OUTCOME_UNKNOWN, field=intent.kind.value, detail="was sent and is not final yet"
                )
            if intent.state is IntentState.SENT and now - resent >= self._limits.resend_s:
                resent = now
                await self._send_again(intent)
            await self._sleep(self._limits.poll_s)

    async def _send_again(self, intent: Intent) -> None:
        try:
            await self._chain.send(intent.raw)
        except ChannelFault:
            return  # "already known" and "expired" look alike here; the outcome tells them apart

    async def _look(self, intent: Intent, account: Account) -> Intent:
        """One look at what became of the transaction; the intent after it, durable."""
        assert intent.tx_hash is not None
        assert intent.valid_before is not None
        outcome = await self._chain.outcome(intent.tx_hash, valid_before=intent.valid_before)
        now = self._clock.now()
        if outcome is Fate.EXPIRED:
            moved = await self._move(intent, steps.ended(_unmined(intent, now), IntentState.DEAD, now=now), via=intent)
            self._metrics.transaction_failed(intent.kind.value, "dead")
            self._tell(moved, 0)
            return moved
        if not isinstance(outcome, Receipt):
            if intent.state is IntentState.MINED:  # a reorganisation took its block away
                return await self._move(intent, steps.sent(intent, now=now))
            return intent
        final = (await self._chain.finalised()).number >= outcome.block
        if not outcome.succeeded:
            if not final:
                return intent
            reverted = steps.ended(_unmined(intent, now), IntentState.REVERTED, now=now)
            moved = await self._move(intent, reverted, via=intent)
            self._metrics.transaction_failed(intent.kind.value, "reverted", self._gas(outcome))
            self._tell(moved, self._gas(outcome))
            return moved
        if intent.state is IntentState.SENT:
            intent = await self._move(intent, steps.mined(intent, outcome.block, now=now))
        if not final:
            return intent
        if _paid(intent, account, outcome) != intent.amount:
            # Nobody's success: it stays open, nothing else is signed for the channel, and people must look at it.
            self.on_no_effect(intent)
            raise ChannelFault(
                Reason.CHAIN_OUTCOME_UNKNOWN, detail="the transaction paid another amount than was fixed"
            )
        moved = await self._move(intent, steps.ended(intent, IntentState.FINAL, now=now))
        paid = _newly_paid(intent, account, outcome) * PICO_PER_UNIT
        self._metrics.settled_on_chain(intent.kind.value, paid, self._gas(outcome))
        self._tell(moved, self._gas(outcome))
        return moved

    def _tell(self, intent: Intent, fee_pico: int) -> None:
        self._log(
            "intent.ended",
            level=Level.INFO if intent.state is IntentState.FINAL else Level.WARNING,
            intent=intent.id,
            kind=intent.kind.value,
            state=intent.state.value,
            channel="0x" + intent.channel.hex(),
            amount=intent.amount,
            fee_pico=fee_pico,
            tx=None if intent.tx_hash is None else "0x" + intent.tx_hash.hex(),
        )

    def _gas(self, receipt: Receipt) -> int:
        """What a transaction has cost us, in pico-dollars: fees are paid in dollar tokens of the same decimals."""
        return receipt.fee_paid(self._payee, self._fee_token) * PICO_PER_UNIT

    async def _move(self, before: Intent, after: Intent, *, via: Intent | None = None) -> Intent:
        """Persist a step. Two drivers of one intent never both go on: the second finds it moved."""
        self._probe(f"{after.state}.before")
        if not await self._ledger.move_intent(via or before, after):
            raise ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN, detail="another node goes on with this transaction")
        self._probe(f"{after.state}.after")
        return after

    # --------------------------------------------------------------------------------------------------- the ends

    async def _final_state(self, account: Account) -> ChainSnapshot:
        block = (await self._chain.finalised()).number
        return await self._chain.channel_state(account.escrow, account.id, at_block=block)

    async def _landed(self, intent: Intent, account: Account) -> Landed:
        assert intent.tx_hash is not None
        state = await self._chain.channel_state(account.escrow, account.id, at_block=intent.block)
        return Landed(intent.tx_hash, state)

    async def _found_closed(self, account: Account, amount: Units, state: ChainSnapshot) -> Landed:
        """The transaction that closed a channel we find closed, if it paid what we fixed.

        Raises:
            ChannelFault: ``CHANNEL_FINALIZED`` when the payer withdrew instead: nothing was captured then.
        """
        found = await find_end(self._chain, account, until=state.block)
        if found is None:
            raise ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN, detail="the channel is gone and its close was not found")
        closed, tx_hash = found
        if closed.settled != amount:
            raise ChannelFault(Reason.CHANNEL_FINALIZED, detail="the channel was closed by somebody else")
        return Landed(tx_hash, state)


def _unmined(intent: Intent, now: UnixSeconds) -> Intent:
    """A mined intent whose block is gone ends through SENT; both steps are one write."""
    return steps.sent(intent, now=now) if intent.state is IntentState.MINED else intent


def _paid(intent: Intent, account: Account, receipt: Receipt) -> Units | None:
    """What a receipt says the chain's total for the channel is now; None when it says nothing of our channel."""
    if intent.kind is IntentKind.CLOSE:
        closed = closed_in(account.id, account.escrow, receipt.logs)
        return None if closed is None else closed.settled
    settled = settled_in(account.id, account.escrow, receipt.logs)
    return None if settled is None or settled.payee != account.descriptor.payee else settled.settled


def _newly_paid(intent: Intent, account: Account, receipt: Receipt) -> int:
    """What this transaction itself brought. The books may have seen its effect, when it is taken up after a restart."""
    settled = settled_in(account.id, account.escrow, receipt.logs) if intent.kind is IntentKind.SETTLE else None
    return max(intent.amount - account.chain.settled, 0) if settled is None else settled.paid


def _calldata(account: Account, intent: Intent) -> bytes:
    """Calldata that brings the chain's total to the intent's amount and not a unit more."""
    v2 = account.escrow.protocol is SessionProtocol.V2
    if v2 and intent.kind is IntentKind.CLOSE:
        highest = account.ladder[-1]
        return escrow_v2.encode_close(account.descriptor, highest.cumulative, intent.amount, highest.signature)
    rung = next((rung for rung in account.ladder if rung.cumulative == intent.amount), None)
    signature = b"" if rung is None else rung.signature
    if v2:
        return escrow_v2.encode_settle(account.descriptor, intent.amount, signature)
    encode = escrow_v1.encode_close if intent.kind is IntentKind.CLOSE else escrow_v1.encode_settle
    return encode(account.id, intent.amount, signature)
