"""Every number the router goes by, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mppnode.kernel.strategy import PriceCeiling, Strategy

_SHARE_MAX: Final = 1000  # per mille of all requests, or per cent: a provider at eleven times the price is no equal


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """What the operator decides; it is also the last of the defaults a request is merged with."""

    strategy: Strategy | None = Strategy.BALANCED
    allow_external: bool | None = None
    """None leaves it to the strategy."""
    ceiling: PriceCeiling | None = None
    band_pct: int = 20
    """How much dearer than the cheapest is as good as the cheapest; 0 is strict."""
    near_pct: int = 10
    """How much slower than the fastest is as good as the fastest: measurements are no better than that."""
    attempts_max: int = 3
    """A fourth provider rarely helps, and each may have used up its share of the caller's patience."""
    stale_s: int = 7 * 24 * 3600
    """How old a synchronised price may be and still be sold at."""
    ahead_s: int = 24 * 3600
    """No clock is a day wrong: a price from further ahead would otherwise never go stale."""
    seed_compat: bool = False
    """Whether ``balanced`` draws evenly from its band instead of by price."""
    by_request: bool = False
    """Whether prices are compared by what this request may cost instead of by input plus output price.

    A long prompt with a short answer is not cheapest where a token of each costs least."""
    explore_per_mille: int = 50
    """How often ``fastest`` tries a provider nobody has measured: unmeasured is otherwise unmeasured for ever."""
    answer_tokens: int = 300
    """Of a usual answer: what a provider's speed is compared over, unless the caller asks for less."""

    def __post_init__(self) -> None:
        if not all(0 <= share <= _SHARE_MAX for share in (self.band_pct, self.near_pct, self.explore_per_mille)):
            raise ValueError("a band or the share of exploration is out of range")
        if self.attempts_max < 1 or self.answer_tokens < 1:
            raise ValueError("somebody must be tried, for some answer")


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """When a provider is avoided, and for how long. Times in seconds."""

    failures_max: int = 5
    """In a row. Fewer would take a provider away for one bad minute of the network."""
    error_per_mille: int = 500
    """Of recent requests: one that fails every second time is never failing five times in a row."""
    error_samples: int = 20
    """Before the share of errors means anything."""
    cool_down_s: float = 5.0
    """After the first opening; it doubles with every failed probe."""
    cool_down_max_s: float = 300.0
    """So that a provider which was down for a day is back five minutes after it recovers."""
    jitter_per_mille: int = 250
    """Added at random, so that many nodes do not probe a recovering provider in the same moment."""
    probe_lease_s: float = 60.0
    """After which a probe that never reported is taken for lost: longer than a first token takes."""
    outage_s: float = 30.0
    """How long one failure pushes a provider behind its rivals."""
    throttle_s: float = 5.0
    """After a 429 that does not say for how long."""
    throttle_max_s: float = 600.0
    """A longer Retry-After is a mistake, or a way to take a provider away from us."""
    speed_samples: int = 5
    """Before a measured speed is compared with another."""
    speed_window_s: float = 600.0
    """After which a measurement is forgotten: nobody is slow for ever because of one bad hour."""
    tracks_max: int = 50_000
    """Pairs of provider and model that are remembered: ten times the largest catalogue."""
