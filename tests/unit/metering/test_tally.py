"""What a response is said to have used, and what of it is believed."""

from __future__ import annotations

import pytest

from channels.units import Pico
from mppnode.kernel.rates import Rates
from mppnode.kernel.usage import Usage
from mppnode.metering.tally import Tally

RATES = Rates(Pico(2), Pico(1), Pico(10))


def tally(tokens: int, report: Usage | None = None) -> Tally:
    made = Tally(RATES, prompt_bytes=60, completion_max=100)
    made.tokens, made.report = tokens, report
    return made


@pytest.mark.parametrize(
    ("report", "believed"),
    [
        (Usage(prompt=15, completion=10), True),
        (Usage(prompt=15, completion=100), True),
        (Usage(prompt=15, completion=101), False),  # more than was asked for
        (Usage(prompt=15, completion=9_000_000, reasoning=9_000_000), False),  # hidden in reasoning
        (Usage(prompt=15, completion=10, reasoning=11), False),
        (Usage(prompt=60 + 4_097, completion=10), False),  # more tokens than the prompt has bytes
    ],
)
def test_a_report_is_believed_only_where_it_can_be_true(report: Usage, believed: bool) -> None:
    """A provider cannot bill beyond what was asked for, whatever it calls the tokens."""
    made = tally(10, report)
    assert made.believes(report) is believed
    assert (made.usage() == report) is believed
    own = 10 * 2 + 10 * 10  # sixty bytes count as ten tokens
    assert made.total() == (own if not believed else report.prompt * 2 + report.completion * 10)


def test_nothing_delivered_costs_nothing() -> None:
    """Not even the prompt, and not even when a report names it."""
    assert tally(0).total() == tally(0, Usage(prompt=15)).total() == tally(0).price_at(0) == 0
    assert tally(0).price_at(1) == 10 * 2 + 10
