"""How a caller wants a provider chosen, and the most they will pay."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Strategy(StrEnum):
    """How a provider is chosen among those that qualify."""

    CHEAPEST = "cheapest"
    FASTEST = "fastest"
    BALANCED = "balanced"


@dataclass(frozen=True, slots=True)
class PriceCeiling:
    """The most the caller will pay, in whole cents per million tokens."""

    input_cents: int
    output_cents: int
