"""What every answer tells about how it came to be: who served it, by which rule, at what price (market rule R14)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from channels.units import Pico
from mppnode.engine.paid import PaidChat
from mppnode.kernel.faults import NodeFault
from mppnode.kernel.rates import Rates
from mppnode.rails.base import Offer

HEADERS: Final = (
    "X-Request-Id",
    "X-Model",
    "X-Provider",
    "X-Route-Strategy",
    "X-Route-Attempts",
    "X-Price-Input-Cents-Per-M",
    "X-Price-Output-Cents-Per-M",
)
_PICO_PER_CENT: Final = 10_000  # a cent per million tokens, in pico-dollars per token


def of_answer(run: PaidChat) -> dict[str, str]:
    """Of a request that is being served: the provider's own prices."""
    assert run.answer is not None
    listing = run.answer.listing
    return {
        "X-Model": listing.model,
        "X-Provider": listing.provider,
        "X-Route-Strategy": run.strategy.value,
        "X-Route-Attempts": str(run.attempts),
        **_prices(listing.rates),
    }


def of_offer(offer: Offer | None) -> dict[str, str]:
    """Of a request that was not served: the most it would have cost."""
    return {} if offer is None else _prices(offer.rates)


def of_fault(fault: NodeFault) -> Mapping[str, str]:
    """Of a request nobody could serve: how many were tried."""
    return {"X-Route-Attempts": str(len(fault.attempts))} if fault.attempts else {}


def _prices(rates: Rates) -> dict[str, str]:
    return {
        "X-Price-Input-Cents-Per-M": cents(rates.input),
        "X-Price-Output-Cents-Per-M": cents(rates.output),
    }


def cents(rate: Pico) -> str:
    """``55_000 -> "5.5"``: pico-dollars per token as cents per million tokens, exactly."""
    whole, rest = divmod(rate, _PICO_PER_CENT)
    return f"{whole}.{rest:04d}".rstrip("0").rstrip(".")
