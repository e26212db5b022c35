"""What the router says: whom to try, in which order, by which rule, and why not the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum, unique
from functools import reduce
from typing import Final

from channels.units import format_decimal
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Listing
from mppnode.kernel.rates import Rates
from mppnode.kernel.strategy import Strategy

_RETRY_AFTER_MAX_S: Final = 120  # what both OpenAI SDKs are willing to wait


@unique
class Exclusion(StrEnum):
    """Why a provider is not tried: the first reason in this order (market rule R3)."""

    RAIL = "rail"
    ALLOWED_PROVIDERS = "allowed_providers"
    HEALTH = "health"
    THROTTLED = "throttled"
    REQUIRE_PARAMETERS = "require_parameters"
    CONTEXT_LENGTH = "context_length"
    EXTERNAL = "external"
    PRICE_STALE = "price_stale"
    MAX_PRICE = "max_price"
    QUOTE = "quote"


@dataclass(frozen=True, slots=True)
class Decision:
    """Whom to try, in order; at least one. ``lowest`` is what only a ceiling kept out, in pico-dollars per token."""

    chain: tuple[Listing, ...]
    strategy: Strategy
    rule: str
    """The rule that chose, in one short sentence."""
    candidates: int
    """How many could have been chosen."""
    rejected: tuple[tuple[Listing, Exclusion], ...]
    lowest: tuple[int, int] | None

    @property
    def excluded(self) -> Mapping[str, int]:
        """How many were not considered, by reason."""
        return count(self.rejected)


def count(rejected: Iterable[tuple[Listing, Exclusion]]) -> dict[str, int]:
    """Rejections by reason, in the order in which the reasons are checked."""
    found = Counter(reason for _, reason in rejected)
    return {reason.value: found[reason] for reason in Exclusion if found[reason]}


def bound_of(listings: Iterable[Listing]) -> Rates:
    """The least rates that none of ``listings`` exceeds on any axis: what a quote for all of them has to say.

    Raises:
        ValueError: without listings there is no price.
    """
    rates = [listing.rates for listing in listings]
    if not rates:
        raise ValueError("a quote for nobody has no price")
    return reduce(Rates.dearest, rates)


def lowest_of(listings: Iterable[Listing]) -> tuple[int, int] | None:
    """Input and output price of the cheapest, by both together."""
    best = min(listings, key=lambda listing: listing.combined, default=None)
    return None if best is None else (best.rates.input_max, best.rates.output_max)


def nobody(rejected: Iterable[tuple[Listing, Exclusion]], lowest: tuple[int, int] | None) -> NodeFault:
    """The refusal when no provider qualifies: how many were kept out by what, and the price that would do."""
    excluded = count(rejected)
    detail = "no provider of this model qualifies"
    if excluded:
        detail += ": " + ", ".join(f"{number} by {reason}" for reason, number in excluded.items())
    if lowest is not None:
        cheapest = " and ".join(format_decimal(price) for price in lowest)
        detail += f"; the lowest price, in and out, is {cheapest} USD per million tokens"
    return NodeFault(NodeReason.NO_PROVIDER, detail=detail, excluded=excluded, lowest=lowest)


def busy(rejected: Iterable[tuple[Listing, Exclusion]], wait_s: float) -> NodeFault:
    """The refusal when everybody who qualifies has asked us to wait."""
    return NodeFault(
        NodeReason.PROVIDERS_BUSY,
        detail="every provider asks us to wait",
        retry_after_s=max(1, min(math.ceil(wait_s), _RETRY_AFTER_MAX_S)),
        excluded=count(rejected),
    )
