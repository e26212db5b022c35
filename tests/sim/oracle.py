"""Knows from the streams alone what was consumed, and judges with it everything the chain pays out.

It never reads a balance of the books: ``used up for good`` is what ended streams say of themselves. Amounts are units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from channels import escrow as v2
from channels.account import check
from channels.ids import ChannelId, Hash32
from channels.intent import IntentKind, IntentState
from channels.model import Phase
from channels.tempo_tx import SignedTx
from channels.units import PICO_PER_UNIT
from mppnode.chain.rpc import CLOCK_APART_S, EXPIRY_MARGIN_S, VALIDITY_S
from mppnode.treasury.reconcile import Reconciler
from tests.support.virtual_loop import START

CHANCE_S = 30.0
"""An undisturbed stretch of the grace period as long as this is enough to capture everything."""


class Violation(AssertionError):
    """A promise was broken."""


@dataclass
class Tally:
    """What one seed cost and brought."""

    settled: int = 0
    closed: int = 0
    reverted: int = 0
    """Fees wasted on transactions that could not have an effect; freezes do not count."""
    withdrawn: int = 0
    lost: int = 0
    forgiven: int = 0
    """Losses without a chance."""
    flaps: int = 0
    alarms: int = 0
    kills: int = 0


class Oracle:
    """Hears every included transaction; raises at the first one that should not be."""

    def __init__(self, world: Any) -> None:
        self._world = world
        self.tally = Tally()
        self.violations: list[str] = []
        self._paid: dict[ChannelId, int] = {}
        self._closes: dict[ChannelId, set[Hash32]] = {}
        self.flappers: set[ChannelId] = set()
        self.requested: dict[ChannelId, float] = {}

    # ---------------------------------------------------------------------------------------------- what was consumed

    def for_good(self, channel: ChannelId, *, most: bool) -> int:
        """Consumed by streams that have ended: at most, for what may be captured, or surely, for what must be."""
        account = self._world.ledger._accounts[channel]
        total = 0
        for bill in self._world.bills.values():
            if bill.channel != channel:
                continue
            if bill.final is not None:
                total += bill.final
            elif bill.hold not in account.holds:
                total += bill.asked if most else bill.recorded
        return int(total // PICO_PER_UNIT)

    # --------------------------------------------------------------------------------------------- what the chain does

    def hear(self, signed: SignedTx, receipt: dict[str, Any]) -> None:
        """Judge one included transaction."""
        world, ours = self._world, signed.sender == self._world.payee
        for event in v2.decode_events(world.escrow, world.logs_of(receipt)):
            channel = event.channel_id
            if isinstance(event, v2.Settled):
                self._captured(channel, event.settled)
                self.tally.settled += 1
            elif isinstance(event, v2.ChannelClosed):
                self._over(channel, event, int(receipt["blockNumber"], 16), ours=ours)
            elif isinstance(event, v2.CloseRequested):
                self.requested[channel] = world.now
        if ours:
            world.story(f"chain: ours {receipt['status']} in {int(receipt['blockNumber'], 16)}")
            intent = next((i for i in world.ledger.desk.values() if i.tx_hash == signed.tx_hash), None)
            self._require(intent is not None, "a transaction was sent that no intent remembers")
            if intent is not None:
                if intent.kind is IntentKind.CLOSE:
                    self._closes.setdefault(intent.channel, set()).add(signed.tx_hash)
                self._require(intent.state is not IntentState.DEAD, "a transaction that was given up has been mined")
                # Nobody can foresee that the token's policy blocks a payer between our trial and the block.
                payer = world.ledger._accounts[intent.channel].descriptor.payer
                foreseen = payer not in world.dev.model.tokens.blocked
                self.tally.reverted += receipt["status"] == "0x0" and foreseen
        world.stirred.set()

    def _captured(self, channel: ChannelId, amount: int) -> None:
        most = self.for_good(channel, most=True)
        self._require(amount <= most, f"captured {amount} of {channel.hex()[:8]}, but only {most} was used up for good")

    def _over(self, channel: ChannelId, event: v2.ChannelClosed, block: int, *, ours: bool) -> None:
        world = self._world
        deposit = world.dev.model.reserve.slots.at(channel, block - 1).deposit
        self._require(event.settled + event.refunded == deposit, "capture and refund are not the deposit")
        self._captured(channel, event.settled)
        lost = self.for_good(channel, most=False) - event.settled
        world.story(f"chain: {channel.hex()[:8]} over, ours={ours}, paid {event.settled}, lost {lost}")
        if ours:
            self.tally.closed += 1
            self._paid[channel] = event.settled
            self._require(lost <= 0, f"our own close of {channel.hex()[:8]} left {lost} behind")
            return
        self.tally.withdrawn += 1
        self.tally.lost += max(lost, 0)
        if lost > world.fee:
            chance = self._chance(channel)
            self.tally.forgiven += not chance
            self._require(not chance, f"{lost} of {channel.hex()[:8]} was lost, with a chance to save it: {chance}")

    def _chance(self, channel: ChannelId) -> str:
        """An undisturbed stretch in which the channel could have been captured; empty if there was none.

        The exact promise: nothing worth more than a fee is lost if, after the close request and after the last thing
        was consumed, and before the withdrawal, there were CHANCE_S seconds in a row in which a process ran, the ledger
        and an honest, current RPC answered, blocks were made, nothing was reorganised and the token let the payer pay.
        If a transaction of ours was on its way into nowhere when that stretch began, the seconds are counted from its
        provable death: nothing else may be signed before that.
        """
        world = self._world
        begin = max(self.requested[channel], world.consumed_at.get(channel, 0.0))
        for start, end in world.calm():
            alive = max(start, begin)
            for intent in world.ledger.desk.values():
                begun, ended = world.ledger.lived[intent.id]
                unknown = begun <= alive < ended and intent.state is not IntentState.FINAL
                if intent.channel == channel and unknown and intent.valid_before is not None:
                    alive = max(alive, intent.valid_before - START + EXPIRY_MARGIN_S + world.dev.finality_lag + 1)
            if min(end, world.now) - alive >= CHANCE_S:
                return f"{alive:.1f} to {min(end, world.now):.1f}"
        return ""

    # ------------------------------------------------------------------------------------------------------ at the end

    def look(self) -> None:
        """The laws of every account, and the chain's word against what was charged; at any moment."""
        for account in self._world.ledger._accounts.values():
            try:
                check(account)
            except AssertionError as broken:
                self._require(False, f"law: {broken}")
            if account.phase is not Phase.SUSPECT:
                self._require(account.chain.settled <= account.spent, "settled beyond spent")

    async def end(self) -> None:
        """What must be true once faults have stopped and time has passed."""
        world = self._world
        self.look()
        for intent in world.ledger.desk.values():
            self._require(not intent.active, f"an intent is still {intent.state}: {intent.kind} {intent.channel.hex()[:8]}")
            if intent.valid_before is not None:
                long = intent.valid_before - START - world.ledger.signed_at[intent.id]
                self._require(long <= VALIDITY_S + CLOCK_APART_S, f"a transaction may be mined for {long:.0f} seconds")
            receipt = None if intent.tx_hash is None else world.dev._receipts.get(intent.tx_hash)
            status = None if receipt is None else receipt["status"]
            expected = {IntentState.FINAL: "0x1", IntentState.REVERTED: "0x0", IntentState.DEAD: None}
            self._require(expected.get(intent.state, status) == status, f"a {intent.state} intent has status {status}")
        for account in world.ledger._accounts.values():
            stuck = account.phase in (Phase.CLOSING, Phase.CAPTURED, Phase.SUSPECT)
            self._require(not stuck, f"{account.id.hex()[:8]} is still {account.phase}")
            self._require(not account.holds, "a hold outlived its stream")
        async for difference in Reconciler(world.plain_ledger, world.plain_chain()).run():
            self._require(False, f"reconcile: {difference}")
        for channel, paid in self._paid.items():
            used = self.for_good(channel, most=False)
            self._require(used <= paid, f"{used - paid} of {channel.hex()[:8]} was served after its end")
        for channel in self.flappers:
            closes = [tx for tx in self._closes.get(channel, ()) if tx in world.dev._receipts]  # not those a fork forgot
            self._require(len(closes) <= 1, f"a flapping payer cost {len(closes)} closes")

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            self.violations.append(f"at {self._world.now:.1f}: {what}")
