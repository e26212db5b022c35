"""What a challenge quotes: a unit of output and its price, and the exact rates in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from channels.units import Pico, Units, format_decimal, units_ceil
from mppnode.kernel.rates import Rates, price
from mppnode.kernel.usage import Usage

_USUAL_PROMPT_TOKENS: Final = 512
_FIRST_WINDOW_TOKENS: Final = 64
_LEAST: Final = Rates(Pico(1), Pico(1), Pico(1))


@dataclass(frozen=True, slots=True)
class QuotedUnit:
    """The unit a session challenge quotes: ``amount`` base units buy ``tokens`` output tokens, rounded up."""

    tokens: int
    unit_type: str
    amount: Units


def choose_unit(rates: Rates, *, usual_prompt_tokens: int, first_window_tokens: int) -> QuotedUnit:
    """The smallest power-of-ten unit whose amount pays for a usual prompt and the first window of output.

    A payer's first voucher is for one unit. If it covers what the first bytes need, the stream starts without another
    round trip; quoting per token would always cost one. Only the quote is rounded (up); charges stay exact.

    Raises:
        ValueError: when the model is free, because a free model has nothing to quote.

    Source: draft-tempo-session, ``amount`` and ``unitType`` of the challenge request.
    """
    each = rates.output or rates.input
    if not each:
        raise ValueError("a free model has no quoted unit")
    need = price(Usage(prompt=usual_prompt_tokens, completion=first_window_tokens), rates)
    tokens = 1
    while tokens * each < max(need, 1):
        tokens *= 10
    return QuotedUnit(
        tokens=tokens,
        unit_type="token" if tokens == 1 else f"{tokens}-tokens",
        amount=units_ceil(tokens * each),
    )


def usual_unit(rates: Rates) -> QuotedUnit:
    """The unit every challenge of this node quotes at ``rates``; a free model is quoted at one base unit."""
    # An amount of zero is no quote, and what is charged is exact whatever was quoted.
    paid = rates if rates.output or rates.input else _LEAST
    return choose_unit(paid, usual_prompt_tokens=_USUAL_PROMPT_TOKENS, first_window_tokens=_FIRST_WINDOW_TOKENS)


def describe(rates: Rates) -> str:
    """The quoted rates as one ASCII sentence, for the description of a challenge."""
    return (
        f"At most, in USD per million tokens: input {_dollars(rates.input)}, cached input "
        f"{_dollars(rates.cached_input)}, output {_dollars(rates.output)}; charged exactly, at the rates of who "
        f"serves, price version {rates.version}."
    )


def _dollars(rate: Pico) -> str:
    """``500000 -> "0.50"``: six places, without the zeros that say nothing."""
    whole, _, fraction = format_decimal(rate).partition(".")
    return f"{whole}.{fraction.rstrip('0').ljust(2, '0')}"
