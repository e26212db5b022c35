"""How much a key may spend: caps by UTC day, by month and for good, held before work and charged exactly after.

Every function takes a state and gives the next one with a verdict, so that the ledger can run it inside its
transaction. A hold counts against every window while it is open, and what is charged counts in the windows of the
moment it is charged in. That makes one invariant enough: in each window, spent and held together never exceed the cap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from channels.instants import UnixSeconds
from channels.units import Pico
from mppnode.accounts.limits import Bound, Wait
from mppnode.accounts.model import SpendCaps
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.rates import Rates

MAX_TOKENS_DEFAULT: Final = 4096  # market rule P-43
_DAY_S: Final = 86_400
_NO_HOLDS: Final[Mapping[str, Pico]] = MappingProxyType({})


class Window(StrEnum):
    """What a cap is counted over."""

    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


@dataclass(frozen=True, slots=True)
class Budget:
    """What one key has spent in its windows, and what its running requests may still spend, in pico-dollars."""

    day: int = 0
    """Days since 1970-01-01 in UTC: the one ``spent_day`` is of."""
    month: int = 0
    """Months since year 0: the one ``spent_month`` is of."""
    spent_day: Pico = Pico(0)
    spent_month: Pico = Pico(0)
    spent_total: Pico = Pico(0)
    holds: Mapping[str, Pico] = field(default_factory=lambda: _NO_HOLDS)
    """By request. The number of them is how many run at once."""

    @property
    def held(self) -> Pico:
        """The sum of all holds."""
        return Pico(sum(self.holds.values()))


@dataclass(frozen=True, slots=True)
class Reserved:
    """Granted: this much may be charged to the request."""

    amount: Pico


@dataclass(frozen=True, slots=True)
class CapReached:
    """Not within this cap. ``left`` is what is; ``for_s`` when the window ends, None when it never does."""

    window: Window
    left: Pico
    for_s: int | None


@dataclass(frozen=True, slots=True)
class Charged:
    """What was charged, and what could not be because the hold was smaller: the node's loss, and a fault to report."""

    amount: Pico
    beyond: Pico


@dataclass(frozen=True, slots=True)
class NoHold:
    """There is no such hold: it was released, or never made. Nothing changes, so releasing twice is harmless."""


@dataclass(frozen=True, slots=True)
class AlreadyHeld:
    """A request has one hold; a second one under its name would hide the first."""


def at_moment(budget: Budget, now: UnixSeconds) -> Budget:
    """The budget in the windows of ``now``. A clock that steps back starts no older window: that would empty it."""
    day = max(now // _DAY_S, budget.day)
    date = datetime.fromtimestamp(day * _DAY_S, tz=UTC)
    month = date.year * 12 + date.month - 1
    return replace(
        budget,
        day=day,
        month=month,
        spent_day=budget.spent_day if day == budget.day else Pico(0),
        spent_month=budget.spent_month if month == budget.month else Pico(0),
    )


def headroom(budget: Budget, caps: SpendCaps, now: UnixSeconds) -> CapReached | None:
    """The cap that leaves least, with what it leaves (never below zero); None when nothing is capped."""
    current = at_moment(budget, now)
    held, least = current.held, None
    for window, cap, spent in (
        (Window.DAY, caps.day, current.spent_day),
        (Window.MONTH, caps.month, current.spent_month),
        (Window.TOTAL, caps.total, current.spent_total),
    ):
        if cap is not None:
            left = Pico(max(cap - spent - held, 0))
            # Of equals the last, which opens latest: to say tomorrow when it is next month is a wrong promise.
            if least is None or left <= least.left:
                least = CapReached(window, left, _ends_in(window, now))
    return least


def reserve(
    budget: Budget, caps: SpendCaps, request: str, amount: Pico, now: UnixSeconds, *, concurrency: int
) -> tuple[Budget, Reserved | CapReached | Wait | AlreadyHeld]:
    """Hold ``amount`` for a request before any work is done for it."""
    assert amount >= 0
    current = at_moment(budget, now)
    if request in current.holds:
        return current, AlreadyHeld()
    if len(current.holds) >= concurrency:
        return current, Wait(Bound.CONCURRENCY, 0)
    cap = headroom(current, caps, now)
    if cap is not None and amount > cap.left:
        return current, cap
    return replace(current, holds=MappingProxyType({**current.holds, request: amount})), Reserved(amount)


def charge(budget: Budget, request: str, amount: Pico, now: UnixSeconds) -> tuple[Budget, Charged | NoHold]:
    """Move what a request has cost out of its hold; the rest stays held until :func:`release`.

    Never more than was held: the cap is a promise to whoever set it, the price of our own error is ours.
    """
    assert amount >= 0
    current = at_moment(budget, now)
    hold = current.holds.get(request)
    if hold is None:
        return current, NoHold()
    paid = Pico(min(amount, hold))
    after = replace(
        current,
        spent_day=Pico(current.spent_day + paid),
        spent_month=Pico(current.spent_month + paid),
        spent_total=Pico(current.spent_total + paid),
        holds=MappingProxyType({**current.holds, request: Pico(hold - paid)}),
    )
    return after, Charged(paid, Pico(amount - paid))


def release(budget: Budget, request: str, now: UnixSeconds) -> tuple[Budget, Reserved | NoHold]:
    """End a request: what is left of its hold, the verdict's amount, is free again."""
    current = at_moment(budget, now)
    hold = current.holds.get(request)
    if hold is None:
        return current, NoHold()
    left = {name: held for name, held in current.holds.items() if name != request}
    return replace(current, holds=MappingProxyType(left)), Reserved(hold)


def refusal(cap: CapReached) -> NodeFault:
    """The refusal of a request that a cap does not cover."""
    until = "" if cap.window is Window.TOTAL else f" of this {cap.window.value} (UTC)"
    return NodeFault(NodeReason.CAP_REACHED, detail=f"the key's spend cap{until} does not cover the request")


# ------------------------------------------------------------------------------------------------- what to hold


def worst_case(rates: Rates, prompt_tokens: int, max_tokens: int, *, choices: int = 1, apart: int = 0) -> Pico:
    """The most a request can cost, pico-dollars; ``apart`` is what is not priced by token, such as its images."""
    assert min(prompt_tokens, max_tokens, apart) >= 0 < choices
    return Pico(rates.request + apart + prompt_tokens * rates.input_max + max_tokens * choices * rates.output_max)


def affordable_max_tokens(
    balance: Pico, rates: Rates, prompt_tokens: int, *, choices: int = 1, apart: int = 0
) -> int | None:
    """The largest ``max_tokens`` whose worst case ``balance`` covers, for the 402's body and for the reservation.

    Zero when not even one token is affordable; None when output is free and the prompt is paid for: any number is.
    """
    left = balance - worst_case(rates, prompt_tokens, 0, choices=choices, apart=apart)
    token = choices * rates.output_max
    if left < 0:
        return 0
    return None if token == 0 else left // token


@dataclass(frozen=True, slots=True)
class Bid:
    """What to hold for a request, and how long its answer may be for that."""

    max_tokens: int
    amount: Pico


def bid(
    balance: Pico,
    rates: Rates,
    prompt_tokens: int,
    max_tokens: int = MAX_TOKENS_DEFAULT,
    *,
    choices: int = 1,
    apart: int = 0,
) -> Bid | None:
    """The prompt and min(``max_tokens``, affordable) tokens of answer, or None when not one token is affordable.

    Source: market rule P-43. ``max_tokens`` is what the request says, bounded by the model's context by the caller.
    """
    assert max_tokens > 0
    most = affordable_max_tokens(balance, rates, prompt_tokens, choices=choices, apart=apart)
    tokens = max_tokens if most is None else min(max_tokens, most)
    if tokens == 0:
        return None
    return Bid(tokens, worst_case(rates, prompt_tokens, tokens, choices=choices, apart=apart))


def _ends_in(window: Window, now: UnixSeconds) -> int | None:
    """Seconds until the window ends."""
    if window is Window.TOTAL:
        return None
    if window is Window.DAY:
        return _DAY_S - now % _DAY_S
    date = datetime.fromtimestamp(now, tz=UTC)
    year, month = divmod(date.year * 12 + date.month, 12)
    return int(datetime(year, month + 1, 1, tzinfo=UTC).timestamp()) - now
