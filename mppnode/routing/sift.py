"""Who qualifies: market rule R3's questions in its order, and the first one a provider fails."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import gt
from typing import Final

from mppnode.kernel.listing import Ability, Listing
from mppnode.routing.breaker import Standing
from mppnode.routing.decision import Exclusion
from mppnode.routing.health import Health
from mppnode.routing.plan import Moment, Wish
from mppnode.routing.policy import RoutingPolicy
from mppnode.routing.sellers import Seller

_SOFT: Final = int(Ability.LOGPROBS | Ability.REASONING)
"""Without these an answer is poorer but still an answer: who has them is preferred, unless the caller insists."""
_SHORT: Final = 16  # tokens: less is no answer
_PROBE: Final = Standing.PROBE  # looked up once: the loop below asks a hundred times per decision
_THROTTLED: Final = Standing.THROTTLED


@dataclass(slots=True)
class Sifted:
    """The sellers of one model, each in one place, cheapest first in each."""

    steady: list[Seller] = field(default_factory=list)
    second: list[Seller] = field(default_factory=list)
    """Failed a moment ago, or lack something the caller would like."""
    probing: list[Seller] = field(default_factory=list)
    """Their cool-down is over, and one request may find out. Last, whatever the order: the others would wait for it."""
    rejected: list[tuple[Listing, Exclusion]] = field(default_factory=list)

    @property
    def qualified(self) -> int:
        """How many may be tried."""
        return len(self.steady) + len(self.second) + len(self.probing)


@dataclass(frozen=True, slots=True)
class Sieve:
    """One wish's questions as plain numbers, asked of every seller."""

    wish: Wish
    policy: RoutingPolicy
    needs: int
    likes: int
    only: frozenset[str] | None
    shut: frozenset[str]

    @staticmethod
    def of(wish: Wish, policy: RoutingPolicy) -> Sieve:
        """Prepare the questions."""
        needs = int(wish.needs)
        only = wish.only
        if wish.order and not wish.allow_fallbacks:
            named = frozenset(wish.order)  # "these, and nobody else"
            only = named if only is None else only & named
        return Sieve(
            wish=wish,
            policy=policy,
            needs=needs if wish.require_parameters else needs & ~_SOFT,
            likes=0 if wish.require_parameters else needs & _SOFT,
            only=only,
            shut=wish.ignore,
        )

    def sift(self, sellers: Iterable[Seller], health: Health, now: Moment) -> Sifted:
        """Ask everything, health included."""
        found = Sifted()
        barred, only, shut, likes = self.wish.barred, self.only, self.shut, self.likes
        lacks, standing, steady = self._lacks, health.standing, found.steady.append
        monotonic, earliest = now.monotonic, now.wall - self.policy.stale_s
        latest = now.wall + self.policy.ahead_s
        for seller in sellers:
            provider = seller.provider
            reason: Exclusion | None
            if provider in barred:
                reason = Exclusion.RAIL
            elif provider in shut or (only is not None and provider not in only):
                reason = Exclusion.ALLOWED_PROVIDERS
            else:
                state = standing(seller.key, monotonic)
                if state >= _THROTTLED:
                    reason = Exclusion.HEALTH if state is Standing.OPEN else Exclusion.THROTTLED
                else:
                    reason = lacks(seller, earliest, latest)
                    if reason is None:
                        if state is _PROBE:
                            found.probing.append(seller)
                        elif state or likes & ~seller.abilities:
                            found.second.append(seller)
                        else:
                            steady(seller)
                        continue
            found.rejected.append((seller.listing, reason))
        return found

    def ever(self, sellers: Iterable[Seller], now: Moment, *, quoted: bool) -> Sifted:
        """Ask everything but health, and with ``quoted`` what the quote allows: who may be tried at some time."""
        found = Sifted()
        earliest, latest = now.wall - self.policy.stale_s, now.wall + self.policy.ahead_s
        for seller in sellers:
            if seller.provider in self.wish.barred:
                found.rejected.append((seller.listing, Exclusion.RAIL))
            elif seller.provider in self.shut or (self.only is not None and seller.provider not in self.only):
                found.rejected.append((seller.listing, Exclusion.ALLOWED_PROVIDERS))
            elif (reason := self._lacks(seller, earliest, latest)) and (quoted or reason is not Exclusion.QUOTE):
                found.rejected.append((seller.listing, reason))
            else:
                found.steady.append(seller)
        return found

    def _lacks(self, seller: Seller, earliest: int, latest: int) -> Exclusion | None:
        """What disqualifies a seller who works, in the order of the rule."""
        wish = self.wish
        if self.needs & ~seller.abilities:
            return Exclusion.REQUIRE_PARAMETERS
        # The node asks no provider for more than it gives, so a short answer's provider may serve a long wish.
        answer = min(wish.max_tokens, seller.max_output)
        room = seller.context - wish.prompt_tokens
        if room < (_SHORT if wish.elastic else answer) or (wish.require_parameters and answer < wish.max_tokens):
            return Exclusion.CONTEXT_LENGTH
        if seller.external and not wish.allow_external:
            return Exclusion.EXTERNAL
        if seller.priced_at is not None and not earliest <= seller.priced_at <= latest:
            return Exclusion.PRICE_STALE
        most_in, most_out = wish.max_prompt_price, wish.max_completion_price
        if (most_in is not None and seller.input_max > most_in) or (
            most_out is not None and seller.output_max > most_out
        ):
            return Exclusion.MAX_PRICE
        # Nothing for input and nothing for output means free: a fee per request or image is not.
        if most_in == 0 and most_out == 0 and not seller.free:
            return Exclusion.MAX_PRICE
        # any(map(gt)) and not Rates.within(): this is asked of every listing on every paid request.
        if wish.bound is not None and any(map(gt, seller.axes, wish.bound.axes)):
            return Exclusion.QUOTE
        return None
