"""In which order those who qualify are tried: the strategies, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from mppnode.kernel.strategy import Strategy
from mppnode.kernel.wishes import Sort
from mppnode.routing.breaker import Below, Speed
from mppnode.routing.plan import Wish
from mppnode.routing.policy import RoutingPolicy
from mppnode.routing.sellers import Seller
from mppnode.routing.sift import Sifted

_WEIGHT_BITS: Final = 20  # a weight is exact to a millionth of the largest, which no count of requests can notice
_NEVER: Final = float("inf")
_PER_MILLE: Final = 1000

Measured = Callable[[Seller], Speed | None]


@dataclass(frozen=True, slots=True)
class Ranking:
    """One wish's way to order sellers; ``sticky`` is who served the conversation last."""

    wish: Wish
    policy: RoutingPolicy
    below: Below
    measured: Measured
    sticky: str | None

    def arrange(self, sifted: Sifted) -> tuple[list[Seller], str]:
        """Whom to try, in order and at least ``attempts_max`` if so many qualify, and the rule that chose the first."""
        if self.policy.by_request:
            for sellers in (sifted.steady, sifted.second, sifted.probing):
                sellers.sort(key=self._cost)
        if self.wish.order:
            return self._ordered(sifted)
        return self._arranged(sifted)

    def _ordered(self, sifted: Sifted) -> tuple[list[Seller], str]:
        """The named ones as named, a failure a moment ago or not; then the others by the strategy."""
        place = {provider: index for index, provider in enumerate(self.wish.order)}
        named = [seller for seller in (*sifted.steady, *sifted.second) if seller.provider in place]
        if not named:
            return self._arranged(sifted)
        named.sort(key=lambda seller: place[seller.provider])
        others = Sifted(
            steady=[seller for seller in sifted.steady if seller.provider not in place],
            second=[seller for seller in sifted.second if seller.provider not in place],
            probing=sifted.probing,
        )
        rest = self._arranged(others)[0] if others.qualified else []
        return named + rest, "the first of the order the caller gave"

    def _arranged(self, sifted: Sifted) -> tuple[list[Seller], str]:
        if self.wish.sort is not None:
            return self._sorted(sifted, self.wish.sort)
        tiers = [tier for tier in (sifted.steady, sifted.second, sifted.probing) if tier]
        best, later = tiers[0], tiers[1:]
        match self.wish.strategy:
            case Strategy.CHEAPEST:
                chain, rule = self._cheapest(best)
                return chain + [seller for tier in later for seller in tier], rule
            case Strategy.FASTEST:
                chain, rule = self._fastest(best)
                return chain + [seller for tier in later for seller in self._by_speed(tier)], rule
            case Strategy.BALANCED:
                chain, rule = self._balanced(best, sifted.second)
                first = chain[0]  # may come from the second tier: the conversation's provider
                return chain + [seller for tier in later for seller in _by_kind(tier) if seller is not first], rule

    def _sorted(self, sifted: Sifted, sort: Sort) -> tuple[list[Seller], str]:
        working = self._strictly([*sifted.steady, *sifted.second], sort)
        # Half-open providers come last even here: one caller gets in, and everybody else would wait for the next.
        return working + self._strictly(sifted.probing, sort), f"strictly by {sort.value}"

    def _strictly(self, sellers: list[Seller], sort: Sort) -> list[Seller]:
        match sort:
            case Sort.PRICE:
                return sorted(sellers, key=self._cost)
            case Sort.THROUGHPUT:
                return sorted(sellers, key=lambda seller: (-self._rate(seller), seller.rank))
            case Sort.LATENCY:
                return sorted(sellers, key=lambda seller: (self._first_s(seller), seller.rank))

    # ------------------------------------------------------------------------------------------------- strategies

    def _cheapest(self, sellers: Sequence[Seller]) -> tuple[list[Seller], str]:
        band = self._band(sellers)
        pick = band[self.below(len(band))]
        return _led(pick, sellers), f"at random within {self.policy.band_pct} % of the lowest price"

    def _fastest(self, sellers: Sequence[Seller]) -> tuple[list[Seller], str]:
        nearest = min(seller.rank for seller in sellers)
        kin = [seller for seller in sellers if seller.rank == nearest]
        kind = kin[0].listing.kind.value
        scored = sorted(((self._score(seller), index) for index, seller in enumerate(kin)))
        known = [(score, kin[index]) for score, index in scored if score != _NEVER]
        cold = [kin[index] for score, index in scored if score == _NEVER]
        ranked = [seller for _, seller in known] + cold
        if len(kin) < self.policy.attempts_max:  # else nobody of another kind would be reached
            ranked += self._by_speed(seller for seller in sellers if seller.rank != nearest)
        if not known:
            return _led(cold[self.below(len(cold))], ranked), f"at random among {kind} providers, none measured yet"
        if cold and self.below(_PER_MILLE) < self.policy.explore_per_mille:
            return _led(cold[self.below(len(cold))], ranked), f"trying an unmeasured {kind} provider"
        most = known[0][0] * (1 + self.policy.near_pct / 100)
        near = [seller for score, seller in known if score <= most]
        pick = near[self.below(len(near))]
        return _led(pick, ranked), f"at random within {self.policy.near_pct} % of the fastest {kind} provider"

    def _balanced(self, sellers: Sequence[Seller], second: Sequence[Seller]) -> tuple[list[Seller], str]:
        nearest = min(seller.rank for seller in sellers)
        kin = [seller for seller in sellers if seller.rank == nearest]
        band = self._band(kin)
        kind, ranked = kin[0].listing.kind.value, _by_kind(sellers)
        kept = self._kept(band, nearest, second) if self.sticky is not None else None
        if kept is not None:
            return _led(kept, ranked), f"the {kind} provider that has this conversation in its cache"
        where = f"{kind} providers within {self.policy.band_pct} % of the lowest price"
        if self.policy.seed_compat:
            return _led(band[self.below(len(band))], ranked), f"at random among {where}"
        return _led(self._weighed(band), ranked), f"at random, the cheaper the likelier, among {where}"

    # ---------------------------------------------------------------------------------------------------- helpers

    def _kept(self, band: Sequence[Seller], rank: int, second: Sequence[Seller]) -> Seller | None:
        """The conversation's provider, if its kind and price are still good enough; one failure does not break it."""
        most = self._cost(band[0]) * (100 + self.policy.band_pct)
        for seller in (*band, *second):
            if seller.provider == self.sticky and seller.rank == rank and self._cost(seller) * 100 <= most:
                return seller
        return None

    def _band(self, sellers: Sequence[Seller]) -> list[Seller]:
        """Those within the band of the cheapest; ``sellers`` come cheapest first. Exact: no price is divided."""
        most = self._cost(sellers[0]) * (100 + self.policy.band_pct)
        return [seller for seller in sellers if self._cost(seller) * 100 <= most]

    def _weighed(self, band: Sequence[Seller]) -> Seller:
        """One of the band, with a chance inversely proportional to the square of its price."""
        least = self._cost(band[0])
        if not least:
            return band[self.below(len(band))]  # all of the band is free
        weights = [max(1, (least * least << _WEIGHT_BITS) // self._cost(seller) ** 2) for seller in band]
        drawn = self.below(sum(weights))
        for seller, weight in zip(band, weights, strict=True):
            drawn -= weight
            if drawn < 0:
                return seller
        raise AssertionError("drawn from beyond the weights")

    def _cost(self, seller: Seller) -> int:
        if not self.policy.by_request:
            return seller.combined
        rates = seller.listing.rates
        return rates.input * self.wish.prompt_tokens + rates.output * self.wish.max_tokens + rates.request

    def _score(self, seller: Seller) -> float:
        """Seconds until a usual answer is complete."""
        speed = self.measured(seller)
        if speed is None:
            return _NEVER
        return speed.first_s + min(self.policy.answer_tokens, self.wish.max_tokens) / speed.tokens_per_s

    def _by_speed(self, sellers: Iterable[Seller]) -> list[Seller]:
        return sorted(sellers, key=lambda seller: (seller.rank, self._score(seller)))

    def _rate(self, seller: Seller) -> float:
        speed = self.measured(seller)
        return 0.0 if speed is None else speed.tokens_per_s

    def _first_s(self, seller: Seller) -> float:
        speed = self.measured(seller)
        return _NEVER if speed is None else speed.first_s


def _by_kind(sellers: Iterable[Seller]) -> list[Seller]:
    return sorted(sellers, key=lambda seller: seller.rank)  # stable: cheapest first within a kind


def _led(pick: Seller, ranked: Iterable[Seller]) -> list[Seller]:
    return [pick, *(seller for seller in ranked if seller is not pick)]
