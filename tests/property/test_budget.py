"""Limits that hold over every interleaving, against oracles that recount everything from the beginning."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from channels.instants import UnixSeconds
from channels.units import Pico
from mppnode.accounts.budget import (
    AlreadyHeld,
    Bid,
    Budget,
    CapReached,
    Charged,
    NoHold,
    Reserved,
    Window,
    affordable_max_tokens,
    at_moment,
    bid,
    charge,
    headroom,
    refusal,
    release,
    reserve,
    worst_case,
)
from mppnode.accounts.limits import MINUTE_US, Bound, Bucket, Taken, UnixMicros, Wait, correct, leaked, take
from mppnode.accounts.model import SpendCaps
from mppnode.http.problem import STATUS
from mppnode.kernel.rates import Rates, price
from mppnode.kernel.usage import Usage

DAY = 86_400
START = int(datetime(2030, 1, 31, 22, tzinfo=UTC).timestamp())
CAPS = SpendCaps(Pico(100), Pico(150), Pico(400))
SLOTS = 3
AMOUNTS = st.integers(0, 60)


class Spending(RuleBasedStateMachine):
    """Requests reserve, charge in pieces and end in any order, over midnights and ends of months."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.budget = Budget()
        self.paid: list[tuple[int, int]] = []  # the oracle: when, how much
        self.open: dict[str, int] = {}
        self.made = 0

    def spent(self, window: Window) -> int:
        shape = {Window.DAY: "%Y-%m-%d", Window.MONTH: "%Y-%m", Window.TOTAL: ""}[window]

        def name(when: int) -> str:
            return datetime.fromtimestamp(when, tz=UTC).strftime(shape)

        return sum(amount for when, amount in self.paid if name(when) == name(self.now))

    def left(self) -> int:
        caps = {Window.DAY: CAPS.day, Window.MONTH: CAPS.month, Window.TOTAL: CAPS.total}
        return min((cap or 0) - self.spent(window) - sum(self.open.values()) for window, cap in caps.items())

    @rule(seconds=st.sampled_from([0, 1, 3600, 2 * 3600, DAY, 20 * DAY]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(target=holds, amount=AMOUNTS)
    def begin(self, amount: int) -> str:
        self.made += 1
        name = f"r{self.made}"
        self.budget, verdict = reserve(self.budget, CAPS, name, Pico(amount), UnixSeconds(self.now), concurrency=SLOTS)
        if len(self.open) >= SLOTS:
            assert verdict == Wait(Bound.CONCURRENCY, 0)
        elif amount > self.left():
            assert isinstance(verdict, CapReached)
            assert verdict.left == self.left()
        else:
            assert verdict == Reserved(Pico(amount))
            self.open[name] = amount
        return name

    @rule(name=holds, amount=AMOUNTS)
    def spend(self, name: str, amount: int) -> None:
        self.budget, verdict = charge(self.budget, name, Pico(amount), UnixSeconds(self.now))
        if name not in self.open:
            assert verdict == NoHold()
            return
        paid = min(amount, self.open[name])
        assert verdict == Charged(Pico(paid), Pico(amount - paid))
        self.open[name] -= paid
        self.paid.append((self.now, paid))

    @rule(name=consumes(holds), twice=st.booleans())
    def end(self, name: str, twice: bool) -> None:
        self.budget, verdict = release(self.budget, name, UnixSeconds(self.now))
        left = self.open.pop(name, None)
        assert verdict == (NoHold() if left is None else Reserved(Pico(left)))
        if twice:
            assert release(self.budget, name, UnixSeconds(self.now)) == (self.budget, NoHold())

    @rule(name=holds)
    def begin_again(self, name: str) -> None:
        if name in self.open:
            after, verdict = reserve(self.budget, CAPS, name, Pico(0), UnixSeconds(self.now), concurrency=SLOTS)
            assert verdict == AlreadyHeld()
            assert after.holds == self.budget.holds

    @invariant()
    def agrees_and_holds(self) -> None:
        current = at_moment(self.budget, UnixSeconds(self.now))
        assert dict(current.holds) == self.open
        spent = (current.spent_day, current.spent_month, current.spent_total)
        assert spent == tuple(map(self.spent, Window))
        for amount, cap in zip(spent, (CAPS.day, CAPS.month, CAPS.total), strict=True):
            assert cap is not None
            assert amount + current.held <= cap
        least = headroom(current, CAPS, UnixSeconds(self.now))
        assert least is not None
        assert least.left == self.left() >= 0


Spending.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestSpending: Any = Spending.TestCase


@pytest.mark.parametrize("requests", [50, 500])
def test_k3_p41_parallel_requests_never_overspend(requests: int) -> None:
    """K3, P-41: many that reserve before any is charged spend exactly what the cap has room for."""
    budget, caps, granted = Budget(), SpendCaps(total=Pico(103)), []
    for number in range(requests):
        budget, verdict = reserve(budget, caps, str(number), Pico(10), UnixSeconds(START), concurrency=requests)
        granted += [str(number)] if isinstance(verdict, Reserved) else []
    for name in granted:
        budget, _ = charge(budget, name, Pico(10), UnixSeconds(START))
        budget, _ = release(budget, name, UnixSeconds(START))
    assert (len(granted), budget.spent_total, budget.held) == (10, 100, 0)


@pytest.mark.parametrize(
    ("caps", "window", "seconds"),
    [
        (SpendCaps(day=Pico(5)), Window.DAY, 7200),
        (SpendCaps(month=Pico(5)), Window.MONTH, 7200),
        (SpendCaps(total=Pico(5)), Window.TOTAL, None),
        (SpendCaps(day=Pico(5), month=Pico(5), total=Pico(5)), Window.TOTAL, None),
        (SpendCaps(day=Pico(5), month=Pico(6)), Window.DAY, 7200),
    ],
)
def test_a_reached_cap_says_which_and_until_when(caps: SpendCaps, window: Window, seconds: int | None) -> None:
    """The cap that binds, the room it leaves, and when it opens; of equal ones the one that opens last."""
    _, verdict = reserve(Budget(), caps, "r", Pico(7), UnixSeconds(START), concurrency=1)
    assert verdict == CapReached(window, Pico(5), seconds)
    assert isinstance(verdict, CapReached)
    assert STATUS[refusal(verdict).reason] == 403


def test_december_ends_with_the_year() -> None:
    """The month after December is January."""
    last = UnixSeconds(int(datetime(2031, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()))
    _, verdict = reserve(Budget(), SpendCaps(month=Pico(0)), "r", Pico(1), last, concurrency=1)
    assert verdict == CapReached(Window.MONTH, Pico(0), 1)


def test_a_clock_that_steps_back_empties_no_window() -> None:
    """A node whose clock is behind does not give a spent day again, neither then nor after."""
    budget, _ = reserve(Budget(), CAPS, "r", Pico(60), UnixSeconds(START + DAY), concurrency=1)
    budget, _ = charge(budget, "r", Pico(60), UnixSeconds(START + DAY))
    behind = at_moment(budget, UnixSeconds(START))
    assert (behind.spent_day, behind.spent_month) == (60, 60)
    assert at_moment(behind, UnixSeconds(START + DAY)).spent_day == 60


# ------------------------------------------------------------------------------------------------- what to hold

PICO = st.integers(0, 10**6).map(Pico)
RATES = st.builds(Rates, *[PICO] * 8)


@given(rates=RATES, prompt=st.integers(0, 10**5), balance=st.integers(-(10**6), 10**12), choices=st.integers(1, 4))
def test_p43_the_affordable_answer_is_the_longest(rates: Rates, prompt: int, balance: int, choices: int) -> None:
    """P-43: the balance covers so many tokens in the worst case, and not one more."""
    most = affordable_max_tokens(Pico(balance), rates, prompt, choices=choices)
    if most is None:
        assert worst_case(rates, prompt, 10**9, choices=choices) <= balance
        return
    assert most == 0 or worst_case(rates, prompt, most, choices=choices) <= balance
    assert worst_case(rates, prompt, most + 1, choices=choices) > balance


@given(rates=RATES, prompt=st.integers(0, 10**5), asked=st.integers(1, 10**5), balance=st.integers(0, 10**12))
def test_p43_a_bid_is_within_the_balance_and_covers_any_usage(
    rates: Rates, prompt: int, asked: int, balance: int
) -> None:
    """P-43: min(max_tokens, affordable) is held, and whatever the tokens turn out to be, they cost no more."""
    made = bid(Pico(balance), rates, prompt, asked)
    if made is None:
        assert worst_case(rates, prompt, 1) > balance
        return
    assert 1 <= made.max_tokens <= asked
    assert made.amount <= balance
    for usage in (
        Usage(prompt, 0, made.max_tokens),
        Usage(prompt, prompt, made.max_tokens, made.max_tokens),
        Usage(prompt, 0, made.max_tokens, 0, prompt),
    ):
        assert price(usage, rates) <= made.amount


def test_free_output_needs_only_the_prompt() -> None:
    """Where output costs nothing, every length is affordable once the prompt is, and none before."""
    rates = Rates(Pico(2), Pico(1), Pico(0))
    assert affordable_max_tokens(Pico(20), rates, 10) is None
    assert affordable_max_tokens(Pico(19), rates, 10) == 0
    assert bid(Pico(20), rates, 10) == Bid(4096, Pico(20))
    assert bid(Pico(20), rates, 10, apart=1) is None


# --------------------------------------------------------------------------------------------------------- rates

STEPS = st.lists(
    st.tuples(st.integers(0, 40_000_000), st.booleans(), st.integers(0, 60), st.integers(0, 70), st.integers(0, 9)),
    max_size=40,
)


@given(steps=STEPS, limit=st.sampled_from([1, 7, 60]))
def test_estimates_let_through_no_more_than_exact_counts_would(steps: list[Any], limit: int) -> None:
    """Taken by estimate and corrected later, the bucket is never emptier than one that knew the truth at once."""
    bucket, exact, now = Bucket(), Bucket(), 0
    running: list[tuple[Taken, int]] = []
    for pause, ends, amount, actual, which in steps:
        now += pause
        if ends and running:
            taken, used = running.pop(which % len(running))
            bucket = correct(bucket, taken, used, limit, UnixMicros(now))
            continue
        bucket, verdict = take(bucket, amount, limit, UnixMicros(now), Bound.TOKENS)
        if isinstance(verdict, Taken):
            used = min(actual, amount)
            running.append((verdict, used))
            exact = leaked(exact, limit, UnixMicros(now))
            exact = Bucket(exact.level + used * MINUTE_US, exact.at)
        assert bucket.level >= leaked(exact, limit, UnixMicros(now)).level
    for taken, used in running:
        bucket = correct(bucket, taken, used, limit, UnixMicros(now))
    assert bucket.level >= leaked(exact, limit, UnixMicros(now)).level


@given(
    steps=st.lists(st.tuples(st.integers(0, 40_000_000), st.integers(0, 9)), max_size=60),
    limit=st.sampled_from([1, 7, 60]),
)
def test_no_span_admits_more_than_its_share(steps: list[tuple[int, int]], limit: int) -> None:
    """Over any span, what was admitted is at most one full limit plus the limit's share of the span."""
    bucket, now, admitted = Bucket(), 0, list[tuple[int, int]]()
    for pause, amount in steps:
        now += pause
        bucket, verdict = take(bucket, amount, limit, UnixMicros(now), Bound.REQUESTS)
        if isinstance(verdict, Taken):
            admitted.append((now, amount))
        elif verdict.for_us is not None:
            later = UnixMicros(now + verdict.for_us)
            assert isinstance(take(bucket, amount, limit, later, Bound.REQUESTS)[1], Taken)
            sooner = UnixMicros(later - 1)
            assert isinstance(take(bucket, amount, limit, sooner, Bound.REQUESTS)[1], Wait)
    for first in range(len(admitted)):
        total = 0
        for when, amount in admitted[first:]:
            total += amount
            assert total * MINUTE_US <= limit * MINUTE_US + limit * (when - admitted[first][0])
