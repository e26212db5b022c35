"""What models cost, in integer pico-dollars per token, and the unit a challenge quotes.

One US dollar per million tokens is exactly 1,000,000 pico-dollars per token, so every public price list is exact here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from channels.units import Pico, Units, units_ceil
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.models import Model, Rates
from mppnode.kernel.usage import Usage

USUAL_PROMPT_TOKENS: Final = 512
FIRST_WINDOW_TOKENS: Final = 64
_UNIT_TOKENS: Final = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
_NEAR_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class QuotedUnit:
    """What a challenge's integer ``amount`` buys: ``tokens`` output tokens for ``amount`` base units."""

    tokens: int
    unit_type: str
    amount: Units


def price(usage: Usage, rates: Rates) -> Pico:
    """The exact price of a usage, in pico-dollars; nothing is rounded here."""
    fresh = usage.prompt - usage.cached_prompt
    return Pico(fresh * rates.input + usage.cached_prompt * rates.cached_input + usage.completion * rates.output)


def quote_unit(rates: Rates) -> QuotedUnit:
    """The smallest power-of-ten unit of output tokens that covers a usual prompt and the first window.

    A voucher for one unit then starts a request without another round trip; a larger unit would make small requests
    authorise more than they need. Rounded up because the wire wants an integer; what is charged is exact.
    """
    usual = USUAL_PROMPT_TOKENS * rates.input + FIRST_WINDOW_TOKENS * rates.output
    for tokens in _UNIT_TOKENS:
        if tokens * rates.output >= usual or tokens == _UNIT_TOKENS[-1]:
            amount = max(units_ceil(tokens * rates.output), Units(1))
            return QuotedUnit(tokens, "token" if tokens == 1 else f"{tokens} tokens", amount)
    raise AssertionError("the last unit always matches")


class PriceBook:
    """The models this node sells. An unknown model has no price and is not served."""

    def __init__(self, models: Iterable[Model]) -> None:
        self._models = {model.id: model for model in models}

    @property
    def models(self) -> tuple[Model, ...]:
        """Every model, in configuration order."""
        return tuple(self._models.values())

    def find(self, model: str) -> Model:
        """The model of that id.

        Raises:
            NodeFault: ``UNKNOWN_MODEL``, naming up to three similar ids that exist.
        """
        found = self._models.get(model)
        if found is None:
            near = difflib.get_close_matches(model, self._models, n=_NEAR_MAX)
            hint = f"; similar: {', '.join(near)}" if near else ""
            raise NodeFault(NodeReason.UNKNOWN_MODEL, field="model", detail=f"is not served here{hint}")
        return found
