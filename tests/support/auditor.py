"""A second, dumber set of books for one channel: lists and sums, written from the rules, sharing no code with the product.

Every method first decides what must happen (a reason, or an answer) and then, if it is allowed, writes it down. Amounts
are plain integers: units, and pico where a name says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from channels.faults import Reason

PICO = 10**6


@dataclass(frozen=True)
class Verdict:
    """What must happen: a refusal, a repeat, or a change; pico where the answer carries an amount."""

    reason: Reason | None = None
    replayed: bool = False
    granted_pico: int = 0
    unpaid_pico: int = 0


REPEAT = Verdict(replayed=True)
DONE = Verdict()


@dataclass
class Limits:
    deposit_min: int = 0
    delta_min: int = 0
    holds_max: int = 8
    tickets_max: int = 256
    unsettled_max: int = 2**96


@dataclass
class Facts:
    deposit: int
    settled: int
    asked_at: int | None
    block: int


@dataclass
class Request:
    """One live request: what it may use in total, what it has been charged so far, whose it is and of which kind."""

    granted_pico: int
    charged_pico: int = 0
    owner: str = ""
    stream: bool = True
    asked: bool = False

    @property
    def rest_pico(self) -> int:
        return self.granted_pico - self.charged_pico


@dataclass
class Auditor:
    """The books of one channel that may not exist yet."""

    limits: Limits
    pays_whole_vouchers: bool
    phase: str = "none"
    chain: Facts = field(default_factory=lambda: Facts(0, 0, None, 0))
    vouchers: list[int] = field(default_factory=list)
    bills_pico: list[int] = field(default_factory=list)
    """What every request that has ended was charged in the end, and first what the chain had paid before."""
    live: dict[str, Request] = field(default_factory=dict)
    shown: int = 0
    """The highest number of spent units anybody was ever shown."""
    tickets: dict[str, int] = field(default_factory=dict)
    top_ups: list[bytes] = field(default_factory=list)
    closing: tuple[str, int] | None = None
    capture: int | None = None
    closed_by: bytes | None = None
    used_at: int = 0

    # --- sums

    @property
    def accepted(self) -> int:
        return max(self.vouchers)

    @property
    def owed_pico(self) -> int:
        return sum(self.bills_pico) + sum(request.charged_pico for request in self.live.values())

    @property
    def free_pico(self) -> int:
        return self.accepted * PICO - self.owed_pico - sum(request.rest_pico for request in self.live.values())

    @property
    def certain(self) -> int:
        """Units nobody can take back: the bills of requests that have ended."""
        return sum(self.bills_pico) // PICO

    @property
    def cashable(self) -> int:
        """The most a settlement may bring the chain to: a whole voucher that is used up for certain."""
        return max([self.chain.settled, *(amount for amount in self.vouchers if amount <= self.certain)])

    def _show(self) -> None:
        self.shown = max(self.shown, self.owed_pico // PICO)

    def _end(self, name: str) -> None:
        self.bills_pico.append(self.live.pop(name).charged_pico)

    def _end_all(self) -> None:
        for name in list(self.live):
            self._end(name)

    def _streams(self) -> list[str]:
        return [name for name, request in self.live.items() if request.stream]

    def _heard_in(self, *phases: str) -> Verdict | None:
        if self.phase == "none":
            return Verdict(Reason.CHANNEL_NOT_FOUND)
        return None if self.phase in phases else Verdict(Reason.CHANNEL_FINALIZED)

    # --- the channel

    def open(self, cumulative: int, facts: Facts) -> Verdict:
        if self.phase != "none":
            return REPEAT if self.phase == "open" else Verdict(Reason.CHANNEL_FINALIZED)
        if facts.deposit < self.limits.deposit_min:
            return Verdict(Reason.DEPOSIT_TOO_SMALL)
        if cumulative > facts.deposit:
            return Verdict(Reason.VOUCHER_EXCEEDS_DEPOSIT)
        if facts.asked_at is not None:
            return Verdict(Reason.CHANNEL_FINALIZED)
        if cumulative < facts.settled:
            return Verdict(Reason.VOUCHER_TOO_LOW)
        self.phase, self.chain, self.vouchers = "open", facts, [cumulative]
        self.bills_pico = [facts.settled * PICO]
        self._show()
        return DONE

    def voucher(self, cumulative: int) -> Verdict:
        if (refused := self._heard_in("open")) is not None:
            return refused
        if cumulative == self.accepted:
            return REPEAT
        if cumulative > self.chain.deposit:
            return Verdict(Reason.VOUCHER_EXCEEDS_DEPOSIT)
        if cumulative < self.accepted:
            return Verdict(Reason.VOUCHER_TOO_LOW)
        if cumulative < self.accepted + self.limits.delta_min:
            return Verdict(Reason.VOUCHER_DELTA_TOO_SMALL)
        self.vouchers.append(cumulative)
        return DONE

    def top_up(self, credential: bytes, facts: Facts) -> Verdict:
        if credential in self.top_ups:
            return REPEAT
        if (refused := self._heard_in("open", "contested")) is not None:
            return refused
        self.top_ups.append(credential)
        self._look(facts)
        return DONE

    def observe(self, facts: Facts) -> Verdict:
        if (refused := self._heard_in("open", "contested", "closing", "captured", "suspect")) is not None:
            return refused
        return DONE if self._look(facts) else REPEAT

    def _look(self, facts: Facts) -> bool:
        if facts.block < self.chain.block or facts == self.chain:
            return False
        self.chain = facts
        if facts.deposit == 0:
            self.phase = "closed"
            self._end_all()
        elif facts.deposit < self.accepted or facts.settled > self.shown:
            self.phase = "suspect"
        elif self.capture is not None:
            self.phase = "captured"
        elif self.closing is not None:
            self.phase = "closing"
        else:
            self.phase = "open" if facts.asked_at is None else "contested"
        return True

    # --- requests

    def reserve(
        self,
        name: str,
        ticket: str,
        expires: int,
        floor_pico: int,
        want_pico: int,
        *,
        preempt: bool,
        now: int,
        owner: str,
        stream: bool,
    ) -> Verdict:
        if (refused := self._heard_in("open")) is not None:
            return refused
        if name in self.live:
            return Verdict(replayed=True, granted_pico=self.live[name].granted_pico)
        if ticket in self.tickets:
            return Verdict(Reason.CREDENTIAL_USED)
        if len([at for at in self.tickets.values() if at > now]) >= self.limits.tickets_max:
            return Verdict(Reason.RATE_LIMITED)
        others = {other: request for other, request in self.live.items() if not (preempt and request.stream)}
        if stream and any(request.stream for request in others.values()):
            return Verdict(Reason.CHANNEL_BUSY)
        if len(others) >= self.limits.holds_max:
            return Verdict(Reason.CHANNEL_BUSY)
        if self.shown - self.chain.settled >= self.limits.unsettled_max:
            return Verdict(Reason.EXPOSURE_LIMIT)
        free = self.accepted * PICO - self.owed_pico - sum(request.rest_pico for request in others.values())
        if free < floor_pico:
            return Verdict(Reason.INSUFFICIENT_BALANCE)
        for other in [other for other in self.live if other not in others]:
            self._end(other)
        self.tickets = {known: at for known, at in self.tickets.items() if at > now} | {ticket: expires}
        granted = min(want_pico, free)
        self.live[name] = Request(granted, owner=owner, stream=stream)
        self.used_at = max(self.used_at, now)
        return Verdict(granted_pico=granted)

    def renew(self, name: str, charged_pico: int, want_pico: int) -> Verdict:
        if (refused := self._heard_in("open", "contested", "closing", "suspect")) is not None:
            return refused
        if name not in self.live:
            return Verdict(Reason.HOLD_FENCED)
        request = self.live[name]
        grown = max(0, want_pico - request.granted_pico) if self.phase == "open" and not request.asked else 0
        grown = min(grown, self.free_pico)
        repeat = grown == 0 and charged_pico == request.charged_pico
        request.granted_pico += grown
        request.charged_pico = charged_pico
        self._show()
        return Verdict(replayed=repeat, granted_pico=request.granted_pico)

    def finish(self, name: str, total_pico: int) -> Verdict:
        if (refused := self._heard_in("open", "contested", "closing", "suspect")) is not None:
            return refused
        if name not in self.live:
            return Verdict(Reason.HOLD_FENCED)
        request = self.live[name]
        paid = min(total_pico, request.granted_pico + self.free_pico)
        request.charged_pico = paid
        self._show()
        self._end(name)
        return Verdict(unpaid_pico=total_pico - paid)

    def ask_streams(self) -> Verdict:
        if (refused := self._heard_in("open")) is not None:
            return refused
        waiting = [name for name in self._streams() if not self.live[name].asked]
        for name in waiting:
            self.live[name].asked = True
        return DONE if waiting else REPEAT

    def orphans(self, owner: str | None = None) -> Verdict:
        if (refused := self._heard_in("open", "contested", "closing", "suspect")) is not None:
            return refused
        gone = [name for name, request in self.live.items() if owner in (None, request.owner)]
        for name in gone:
            self._end(name)
        return DONE if gone else REPEAT

    # --- the end

    def begin_close(self, challenge: str, cumulative: int | None) -> Verdict:
        if (refused := self._heard_in("open", "contested", "closing", "captured")) is not None:
            return refused
        if self.closing is not None:
            return REPEAT if self.closing[0] == challenge else Verdict(Reason.CHANNEL_FINALIZED)
        amount = self.accepted if cumulative is None else cumulative
        if cumulative is not None:
            if amount < max(self.shown, self.chain.settled):
                return Verdict(Reason.CLOSE_BELOW_SPENT)
            if amount > self.chain.deposit:
                return Verdict(Reason.VOUCHER_EXCEEDS_DEPOSIT)
            self.vouchers.append(amount)
        self.phase, self.closing = "closing", (challenge, amount)
        return DONE

    def fix_capture(self) -> Verdict:
        if (refused := self._heard_in("closing", "captured")) is not None:
            return refused
        if self.phase == "captured":
            return REPEAT
        if self.live:
            return Verdict(Reason.CHANNEL_BUSY)
        self.phase, self.capture = "captured", self.due
        return DONE

    @property
    def due(self) -> int:
        """What the node may take in total: what was consumed, or what the chain has paid already."""
        consumed = self.owed_pico // PICO
        if self.pays_whole_vouchers:
            consumed = max((amount for amount in self.vouchers if amount <= consumed), default=0)
        return max(consumed, self.chain.settled)

    def abort_close(self) -> Verdict:
        if (refused := self._heard_in("closing", "captured")) is not None:
            return refused
        self.phase = "open" if self.chain.asked_at is None else "contested"
        self.closing = self.capture = None
        return DONE

    def confirm_closed(self, tx_hash: bytes, facts: Facts) -> Verdict:
        if (refused := self._heard_in("captured", "closed")) is not None:
            return refused
        if self.closed_by is not None:
            return REPEAT if self.closed_by == tx_hash else Verdict(Reason.CHANNEL_FINALIZED)
        if self.capture is None:  # somebody else ended it before we had fixed anything
            return Verdict(Reason.CHANNEL_FINALIZED)
        self.phase, self.chain, self.closed_by = "closed", facts, tx_hash
        return DONE

    def restore(self, facts: Facts, vouchers: list[int]) -> Verdict:
        if (refused := self._heard_in("open", "contested", "closing", "captured", "suspect")) is not None:
            return refused
        if facts.block < self.chain.block:
            return Verdict(Reason.CHAIN_UNAVAILABLE)
        if facts.deposit == 0:
            return DONE if self._look(facts) else REPEAT
        covered = [amount for amount in [*self.vouchers, *vouchers] if amount <= facts.deposit]
        paid_pico = facts.settled * PICO
        if max(covered, default=-1) * PICO < max(self.owed_pico, paid_pico, self.shown * PICO):
            return Verdict(Reason.VOUCHER_TOO_LOW)
        self._end_all()
        self.bills_pico.append(max(paid_pico - self.owed_pico, 0))
        self.vouchers, self.chain = covered, facts
        if self.capture is not None and self.capture < facts.settled:
            self.closing = self.capture = None
        self._show()
        if self.closing is None:
            self.phase = "open" if facts.asked_at is None else "contested"
        else:
            self.phase = "closing" if self.capture is None else "captured"
        return DONE
