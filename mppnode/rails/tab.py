"""One request's running bill on a payment channel.

The tab owns a durable hold. ``cover`` is the hot path: two comparisons and no I/O while a total fits the hold. Before
the hold runs out it is renewed in the background (fold what was delivered, reserve the next window); before the
payer's voucher runs out the payer is asked for the next one. Only when both fail does the stream stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from channels.descriptor import SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.instants import UnixMillis
from channels.model import Account, Finish, HoldId, Outcome, Phase, Plan, Renew
from channels.units import MAX_UINT96, PICO_PER_UNIT, Pico, Units, units_ceil
from channels.wire import sse
from channels.wire.receipt import SessionReceipt
from mppnode.kernel.clock import Clock
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger.books import Books
from mppnode.rails.base import Facts, NeedVoucher

_WINDOW_S: Final = 0.75  # consumption one hold covers; what the node can lose in a crash (reliability: section 4.3)
_ASK_S: Final = 1.0  # a payer's round trip until one has been measured
_TOP_UP_S: Final = 3.0  # a top-up is a transaction: block time and two round trips
_LOOKAHEAD_S: Final = 3.0  # consumption one voucher covers; the round trips per minute are 60 / 3
_RATE_SPAN_S: Final = 0.1  # shorter spans measure bursts, not rates
_RATE_WEIGHT: Final = 0.4


@dataclass(frozen=True, slots=True)
class TabPolicy:
    """Limits of a tab, in base units."""

    window_units_max: int = 2_000
    """Most one hold may cover beyond what was delivered: 0.002 USD, the node's loss per stream in a crash."""
    preauthorise_units_max: int = 50_000
    """Most a payer is asked to sign beyond what was consumed: 0.05 USD, the payer's exposure to a broken node."""


class SessionTab:
    """The bill of one content request; :meth:`finish` must run exactly once, whatever happened."""

    def __init__(
        self,
        account: Account,
        hold: HoldId,
        granted: Pico,
        *,
        challenge_id: str,
        token_pico: int,
        reserve_pico: int,
        unit_pico: int,
        cap_pico: int,
        books: Books,
        owner: TaskOwner,
        clock: Clock,
        policy: TabPolicy,
    ) -> None:
        self.account = account
        self.challenge_id = challenge_id
        self.granted: int = granted
        self.starved = False
        self.hold = hold
        self._token = token_pico
        self._reserve = reserve_pico
        self._unit = unit_pico
        self.cap_pico = cap_pico
        self._books = books
        self._owner = owner
        self._clock = clock
        self._policy = policy
        self._consumed = 0
        self._recorded = 0
        self._ask_from = 0
        self._window = max(granted - reserve_pico, token_pico)
        self._wanted = 0
        self._renewal: asyncio.Task[None] | None = None
        self._asked_at: Units | None = None
        self._ended: ChannelFault | None = None
        self._closing = False
        self._rate = 0.0  # pico per second; a measurement, never an amount
        self._mark = (clock.monotonic(), 0)
        self.on_change: Callable[[], None] = _nothing
        self.delivered: Callable[[], int] = lambda: self._consumed

    @property
    def windowed(self) -> bool:
        """See :meth:`Tab.windowed`: a channel's stream goes on as long as its payer signs."""
        return True

    @property
    def window_pico_max(self) -> int:
        """Most that may be written and not yet delivered: what the node can lose of a stream, in pico."""
        return self._policy.window_units_max * PICO_PER_UNIT

    @property
    def ended(self) -> ChannelFault | None:
        """Why this tab can never cover more, or None: a newer request took the channel, it is closing, and so on."""
        return self._ended

    @property
    def recorded(self) -> Pico:
        """See :meth:`Tab.recorded`."""
        return Pico(self._recorded)

    @property
    def unrecorded(self) -> int:
        """Pico that have left this process and are not in the ledger yet."""
        return max(self.delivered() - self._recorded, 0)

    def narrow(self, *, token_pico: int, reserve_pico: int, cap_pico: int) -> None:
        """Go on with the prices of the provider that serves: what was reserved is for the dearest that might have.

        Called before the first :meth:`cover`; every figure is at most what the tab was opened with.
        """
        assert self._consumed == 0
        self._token = min(self._token, token_pico)
        self._reserve = min(self._reserve, reserve_pico)
        self.cap_pico = min(self.cap_pico, cap_pico)
        self._window = max(self.granted - self._reserve, self._token)

    # -------------------------------------------------------------------------------------------------- hot path

    def cover(self, total: int) -> bool:
        """Charge up to ``total`` pico for this request if the durable hold allows it; no I/O, no lock.

        When it does not, a renewal is under way or the payer must sign: ``on_change`` is called when that may have
        changed the answer.
        """
        if total + self._reserve > self.granted:
            self._wanted = total
            self._renew_soon()
            return False
        self._consumed = total
        if self.granted - total - self._reserve < self._window >> 1 or total - self._recorded > self._window:
            # The second half is for the prompt, charged with the first token: it should not wait for half a window.
            self._renew_soon()
        return True

    def ask(self) -> NeedVoucher | None:
        """The voucher to ask for now, at most one per accepted voucher; None while there is enough or one is awaited.

        Asked one round trip before the money runs out, not when it has: an honest payer's stream then never pauses.
        """
        if self._consumed < self._ask_from and not self.starved:
            return None
        self._measure()
        account = self.account
        if self._ended is not None or self._asked_at == account.accepted or account.phase is not Phase.OPEN:
            return None
        hold = account.holds.get(self.hold)
        if hold is None:
            return None
        # What this request may consume in total under the accepted voucher, and what others have used before it.
        limit = hold.granted + account.headroom_pico
        base = account.accepted * PICO_PER_UNIT - limit
        need = max(self._consumed, self._wanted) + self._reserve
        rate = max(self._rate, self._window / _WINDOW_S)
        if limit >= self.cap_pico:
            return None  # the most this request can cost is authorised already
        ahead = self._ahead(rate)
        required, deposit = self._required(base, need, ahead), account.chain.deposit
        patience = _ASK_S if required <= deposit else _TOP_UP_S
        # Half of what a voucher brings is the most a threshold may be: above it every token would ask again.
        slack = limit - need - min(int(rate * patience), ahead >> 1)
        if slack >= 0 and not self.starved:
            self._ask_from = self._consumed + (slack >> 1)  # half, because the rate may rise meanwhile
            return None
        if required > deposit > account.accepted and (deposit * PICO_PER_UNIT - base - need) > 0:
            required = deposit  # use up the deposit before asking for a transaction
        if required <= account.accepted or (required > deposit and account.escrow.protocol is SessionProtocol.V1):
            return None  # v1 payers cannot top up mid-stream: the stream ends with its deposit
        self._asked_at = account.accepted
        return NeedVoucher(account.id, required, account.accepted, deposit)

    def _ahead(self, rate: float) -> int:
        """Pico one voucher should bring: some seconds of consumption, at least a quoted unit, within the policy.

        On v1 a voucher is also the payout, and only one that is not above consumption may be cashed: what the next rung
        is ahead by is what the node forgoes at the close, so there the rungs are a unit apart.
        """
        seconds = 0 if self.account.escrow.protocol is SessionProtocol.V1 else int(rate * _LOOKAHEAD_S)
        return min(max(seconds, self._unit), self._policy.preauthorise_units_max * PICO_PER_UNIT)

    def _required(self, base: int, need: int, ahead: int) -> Units:
        """The next voucher: never more than the request can still cost."""
        return Units(min(units_ceil(base + min(need + ahead, self.cap_pico)), MAX_UINT96))

    def _measure(self) -> None:
        now = self._clock.monotonic()
        then, consumed = self._mark
        if now - then < _RATE_SPAN_S:
            return
        if not self.starved:
            rate = (self._consumed - consumed) / (now - then)
            self._rate = rate if self._rate == 0 else self._rate + _RATE_WEIGHT * (rate - self._rate)
        self._mark = (now, self._consumed)

    # --------------------------------------------------------------------------------------------------- renewal

    def _renew_soon(self) -> None:
        if self._renewal is None and not self._closing and self._ended is None and not self.starved:
            self._renewal = self._owner.start(self._renew(), name="renew hold")

    async def _renew(self) -> None:
        try:
            plan = await self._books.apply(self.account.id, self._next_window())
        except ChannelFault as fault:
            self._ended = fault
        else:
            self._renewed(plan)
        finally:
            self._renewal = None
        if not self._closing:
            self.on_change()

    def _next_window(self) -> Renew:
        # Slow start: doubling from the first window up to what the stream consumes in _WINDOW_S, never beyond the cap.
        steady = int(self._rate * _WINDOW_S) if self._rate else 2 * self._window
        ceiling = self._policy.window_units_max * PICO_PER_UNIT
        self._window = max(min(2 * self._window, steady, ceiling), self._token)
        delivered = max(min(self.delivered(), self._consumed), self._recorded)
        target = max(delivered + max(self._window, self._token), self._wanted) + self._reserve
        return Renew(self.hold, Pico(delivered), Pico(target))

    def _renewed(self, plan: Plan[Outcome]) -> None:
        grew = plan.result.granted > self.granted
        self.granted = plan.result.granted
        hold = plan.account.holds.get(self.hold)
        self._recorded = hold.consumed if hold is not None else self._recorded
        self._adopt(plan.account)
        # Judged on the newest state, not on the plan's: a voucher may have been committed in between, and its
        # ``observe`` has already run. Waiting on the older picture would wait for ever.
        self.starved = not grew and self.account.headroom_pico == 0
        if self.starved and self._exhausted():
            self._ended = ChannelFault(Reason.VOUCHER_EXCEEDS_DEPOSIT, detail="the deposit of this channel is used up")
        if self.account.phase is not Phase.OPEN and not grew:
            self._ended = ChannelFault(Reason.CHANNEL_FINALIZED, detail=f"the channel is {self.account.phase}")

    def _exhausted(self) -> bool:
        """Whether no voucher can help: a v1 payer cannot top up beside a stream."""
        v1 = self.account.escrow.protocol is SessionProtocol.V1
        return v1 and self.account.accepted >= self.account.chain.deposit

    def observe(self, account: Account) -> None:
        """Learn of a newly committed state of this channel: more money, a newer request, a close."""
        self._adopt(account)
        if self._closing:
            return
        if self.hold not in account.holds:
            self._ended = ChannelFault(Reason.HOLD_FENCED, detail="a newer request took over this channel")
            self.on_change()
        elif self.starved and (account.headroom_pico > 0 or account.phase is not Phase.OPEN):
            self.starved = False
            self._renew_soon()

    def must_end(self, account: Account) -> bool:
        """Whether somebody waits for the end of this request: a newer stream elsewhere, or the close of the channel."""
        hold = account.holds.get(self.hold)
        return not self._closing and hold is not None and (hold.ending or account.phase is Phase.CLOSING)

    def _adopt(self, account: Account) -> None:
        if account.version > self.account.version:
            self.account = account
            self._ask_from = 0

    # ------------------------------------------------------------------------------------------------------- end

    async def finish(self, total: Pico) -> None:
        """Charge exactly ``total`` pico for the whole request and release the hold.

        Raises:
            ChannelFault: ``STORE_UNAVAILABLE`` when nothing could be recorded; the hold is then released at restart.
        """
        self._closing = True
        if self._renewal is not None:
            await asyncio.wait({self._renewal})
        try:
            plan = await self._books.apply(self.account.id, Finish(self.hold, total))
        except ChannelFault as fault:
            # Fenced: a newer request or a close released the hold and charged what was recorded. That is the bill.
            if fault.reason not in (Reason.HOLD_FENCED, Reason.CHANNEL_FINALIZED):
                raise
        else:
            self._recorded = total
            self._adopt(plan.account)

    async def settle(self, total: Pico, facts: Facts) -> None:  # noqa: ARG002 - a channel keeps receipts, not requests
        """See :meth:`Tab.settle`."""
        await self.finish(total)

    def receipt_frame(self, now: UnixMillis, tokens: int) -> bytes:
        """See :meth:`Tab.receipt_frame`."""
        return sse.receipt_frame(self.receipt(now, tokens=tokens))

    def logged(self) -> dict[str, int | str]:
        """See :meth:`Tab.logged`."""
        account = self.account
        return {
            "channel": "0x" + account.id.hex(),
            "spent": account.spent,
            "accepted": account.accepted,
            "version": account.version,
        }

    def receipt(self, now: UnixMillis, *, tokens: int | None = None) -> SessionReceipt:
        """The receipt as of the last committed state; ``tokens`` is this request's count."""
        return SessionReceipt(
            timestamp_ms=now,
            challenge_id=self.challenge_id,
            channel_id=self.account.id,
            accepted=self.account.accepted,
            spent=self.account.spent,
            units=tokens,
        )


def _nothing() -> None:
    """Stand in for a listener that is not there yet."""
