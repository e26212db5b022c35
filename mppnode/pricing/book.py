"""What a model costs: exact integer rates, and the unit a challenge quotes them in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from channels.units import Pico, Units, format_decimal, units_ceil
from mppnode.config.rates import parse_rate
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.rates import Rates, price
from mppnode.kernel.usage import Usage

__all__ = ["Model", "PriceBook", "QuotedUnit", "Rates", "choose_unit", "describe", "parse_rate", "price"]

_NEAR_MAX: Final = 3
_USUAL_PROMPT_TOKENS: Final = 512
_FIRST_WINDOW_TOKENS: Final = 64
_LEAST: Final = Rates(Pico(1), Pico(1), Pico(1))


@dataclass(frozen=True, slots=True)
class Model:
    """One model at one provider, and what the node charges for it. ``context`` and ``max_output`` are tokens."""

    id: str
    provider: str
    upstream_model: str
    rates: Rates
    context: int
    max_output: int


class PriceBook:
    """Every model the node sells. A model that is not in it cannot be priced, so it is not served."""

    def __init__(self, models: Iterable[Model]) -> None:
        self._offers: dict[str, tuple[Model, ...]] = {}
        for model in models:
            known = self._offers.get(model.id, ())
            if any(offer.provider == model.provider for offer in known):
                raise ValueError("one provider offers the same model twice")
            self._offers[model.id] = (*known, model)

    def __iter__(self) -> Iterator[Model]:
        return (offer for offers in self._offers.values() for offer in offers)

    def offers(self, model_id: str) -> tuple[Model, ...]:
        """Every provider's offer of a model, in the order of the configuration.

        Raises:
            NodeFault: ``UNKNOWN_MODEL`` with up to three near names; they are ours, so they may be shown.
        """
        found = self._offers.get(model_id)
        if found is None:
            near = get_close_matches(model_id, self._offers, n=_NEAR_MAX)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise NodeFault(NodeReason.UNKNOWN_MODEL, field="model", detail=f"is not sold here{hint}")
        return found

    def lookup(self, model_id: str) -> Model:
        """The first offer of a model. Raises as :meth:`offers` does."""
        return self.offers(model_id)[0]


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
