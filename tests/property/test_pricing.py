"""Prices that hold for every number, not only for the ones somebody thought of."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from channels.units import PICO_PER_UNIT, Pico, units_floor
from mppnode.config.catalog import MARKUP_BPS_MAX
from mppnode.config.rates import RATE_MAX, format_each, format_rate, parse_each, parse_rate
from mppnode.kernel.rates import Rates, price
from mppnode.kernel.usage import Usage
from mppnode.pricing.catalog import sell_rates
from mppnode.pricing.entries import Dated, Held, format_entries, parse_entries
from mppnode.pricing.exact import pico_up
from mppnode.pricing.guard import JUMP_MAX, suspicion
from tests.unit.pricing.lists import NOW, entry

PICO = st.integers(0, RATE_MAX).map(Pico)
COSTS = st.builds(Rates, *[PICO] * 8)
PRICED = COSTS.filter(lambda cost: bool(cost.input or cost.output))
MARKUPS = st.integers(0, MARKUP_BPS_MAX)
COUNTS = st.integers(0, 10**6)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    cached, written, fresh, reasoning, answer = (draw(COUNTS) for _ in range(5))
    return Usage(cached + written + fresh, cached, reasoning + answer, reasoning, written, draw(COUNTS), draw(COUNTS))


@given(cost=COSTS, markup=MARKUPS)
def test_the_sell_price_is_the_exact_markup_and_less_than_a_pico_more(cost: Rates, markup: int) -> None:
    """On every axis: cost times one plus the markup, rounded up to a whole pico-dollar."""
    for paid, asked in zip(cost.axes, sell_rates(cost, markup).axes, strict=True):
        exact = paid * (1 + Fraction(markup, 10_000))
        assert exact <= asked < exact + 1


@given(cost=COSTS, markup=MARKUPS, usage=usages())
def test_no_usage_is_sold_below_its_cost(cost: Rates, markup: int, usage: Usage) -> None:
    """Whatever a request took, its price covers what it cost with the markup."""
    assert price(usage, sell_rates(cost, markup)) >= price(usage, cost) * (1 + Fraction(markup, 10_000))


@given(cost=COSTS, steps=st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_charging_in_pieces_charges_the_same(cost: Rates, steps: list[int]) -> None:
    """Charged by the cumulative price at every chunk, a stream costs what it costs at once: rounding does not add up."""
    rates, charged, tokens = sell_rates(cost, 1_234), 0, 0
    for step in steps:
        tokens += step
        due = units_floor(price(Usage(completion=tokens), rates)) - charged
        assert due >= 0
        charged += due
    whole = price(Usage(completion=sum(steps)), rates)
    assert charged == units_floor(whole)
    assert whole - charged * PICO_PER_UNIT < PICO_PER_UNIT


@given(first=COSTS, second=COSTS, markup=MARKUPS)
def test_the_markup_keeps_the_order_of_prices(first: Rates, second: Rates, markup: int) -> None:
    """Who is cheaper before the markup is not dearer after it."""
    if first.within(second):
        assert sell_rates(first, markup).within(sell_rates(second, markup))


@given(value=PICO)
def test_prices_are_written_as_they_are_read(value: Pico) -> None:
    """Integer to text and back is the same integer, for both kinds of price."""
    assert parse_rate(format_rate(value)) == value
    assert parse_each(format_each(value)) == value


@given(digits=st.integers(0, 10**12), exponent=st.integers(-30, 0), places=st.sampled_from([6, 12]))
def test_a_decimal_is_read_exactly_or_rounded_up(digits: int, exponent: int, places: int) -> None:
    """Never below the text, less than one above it, and exact if and only if it says so."""
    value, exact = pico_up(f"{digits}e{exponent}", places)
    true = Fraction(digits) * Fraction(10) ** (exponent + places)
    assert true <= value < true + 1
    assert exact == (value == true)


@given(costs=st.lists(PRICED, min_size=2, max_size=4))
def test_every_price_survives_the_catalog_file(costs: list[Rates]) -> None:
    """Written to the file and read back, cost, held price and history are the same integers."""
    first, held, *rest = costs
    made = entry(
        cost=first, held=Held(NOW, "why", held), history=tuple(Dated(NOW, "https://x", cost) for cost in rest)
    )
    assert parse_entries(format_entries([made])) == (made,)


@given(old=COSTS, new=COSTS)
def test_a_believed_price_is_within_ten_times_on_every_axis(old: Rates, new: Rates) -> None:
    """Nothing passes the guard that is more than ten times away in either direction, or nothing for something."""
    if not suspicion(old, new):
        for before, after in zip(old.axes, new.axes, strict=True):
            assert before <= after * JUMP_MAX
            assert after <= before * JUMP_MAX
            assert bool(before) == bool(after)
