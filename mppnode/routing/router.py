"""The router: from a wish and the state of the world to the providers to try, as a pure decision."""

from __future__ import annotations

from typing import NoReturn

from mppnode.kernel.listing import Listing
from mppnode.routing.affinity import Affinity
from mppnode.routing.breaker import Below
from mppnode.routing.decision import Decision, Exclusion, busy, lowest_of, nobody
from mppnode.routing.health import Health
from mppnode.routing.plan import Moment, Wish
from mppnode.routing.policy import RoutingPolicy
from mppnode.routing.sellers import Book, Seller, Shelf
from mppnode.routing.sift import Sieve, Sifted
from mppnode.routing.strategies import Ranking


class Router:
    """Decides who serves. It tries nobody and waits for nothing; equal inputs and random numbers decide equally.

    Whoever acts on a decision asks ``health.admit`` before each provider of the chain, and skips it without leave:
    the world may have changed since.
    """

    def __init__(
        self,
        book: Book,
        *,
        health: Health,
        below: Below,
        policy: RoutingPolicy | None = None,
        affinity: Affinity | None = None,
    ) -> None:
        """``below(n)`` is the random source: an integer from 0 up to, not including, ``n``, each equally likely."""
        self.health = health
        self._policy = policy or RoutingPolicy()
        self._below = below
        self._shelf = Shelf(book)
        self._affinity = affinity or Affinity()

    def decide(self, wish: Wish, *, now: Moment) -> Decision:
        """Choose whom to try, in order.

        Raises:
            NodeFault: ``UNKNOWN_MODEL`` from the book; ``PROVIDERS_BUSY`` with the least wait when everybody who
                qualifies asked us to wait; ``NO_PROVIDER`` with the counts by reason and the lowest price seen.

        Source: market rules R3 to R9, design D10.
        """
        sieve = Sieve.of(wish, self._policy)
        shelves = [self._shelf.sellers(model) for model in wish.models]
        rejected: list[tuple[Listing, Exclusion]] = []
        orders: list[list[Seller]] = []
        candidates, rule = 0, ""
        for model, sellers in zip(wish.models, shelves, strict=True):
            sifted = sieve.sift(sellers, self.health, now)
            rejected += sifted.rejected
            if sifted.qualified:
                candidates += sifted.qualified
                order, why = self._ranking(wish, model, now).arrange(sifted)
                orders.append(order)
                rule = rule or why
        if not orders:
            self._refuse(sieve, shelves, rejected, now)
        return Decision(
            chain=self._chain(orders, 1 if not wish.allow_fallbacks else self._policy.attempts_max),
            strategy=wish.strategy,
            rule=rule,
            candidates=candidates,
            rejected=tuple(rejected),
            lowest=_too_dear(rejected),
        )

    def eligible(self, wish: Wish, now: Moment) -> tuple[Listing, ...]:
        """Everybody who may ever be tried for this wish, whatever their health: what a quote has to cover.

        Raises:
            NodeFault: ``UNKNOWN_MODEL`` or ``NO_PROVIDER``, as :meth:`decide`.
        """
        sieve = Sieve.of(wish, self._policy)
        rejected: list[tuple[Listing, Exclusion]] = []
        found: list[Listing] = []
        for model in wish.models:
            sifted = sieve.ever(self._shelf.sellers(model), now, quoted=False)
            rejected += sifted.rejected
            found += (seller.listing for seller in sifted.steady)
        if not found:
            raise nobody(rejected, _too_dear(rejected))
        return tuple(found)

    def served(self, wish: Wish, listing: Listing, now: Moment) -> None:
        """Remember who answered this conversation: its prompt is in their cache now (market rule R9)."""
        if wish.affinity is not None:
            self._affinity.served(wish.affinity, listing.model, listing.provider, now.monotonic)

    def _ranking(self, wish: Wish, model: str, now: Moment) -> Ranking:
        health, monotonic, sticky = self.health, now.monotonic, None
        if wish.affinity is not None:
            sticky = self._affinity.provider(wish.affinity, model, monotonic)
        return Ranking(wish, self._policy, self._below, lambda seller: health.speed(seller.key, monotonic), sticky)

    @staticmethod
    def _chain(orders: list[list[Seller]], places: int) -> tuple[Listing, ...]:
        """Model by model, but each later model keeps one place: a model that is down everywhere must not fill all."""
        chain: list[Listing] = []
        for index, order in enumerate(orders):
            left, waiting = places - len(chain), len(orders) - index - 1
            if left <= 0:
                break
            chain += (seller.listing for seller in order[: max(1, left - waiting)])
        return tuple(chain)

    def _refuse(
        self,
        sieve: Sieve,
        shelves: list[tuple[Seller, ...]],
        rejected: list[tuple[Listing, Exclusion]],
        now: Moment,
    ) -> NoReturn:
        """Say why nobody is there: waiting helps only if those who would qualify are throttled, all of them."""
        throttled = {id(listing) for listing, reason in rejected if reason is Exclusion.THROTTLED}
        sifted = Sifted()
        for sellers in shelves:
            ever = sieve.ever(sellers, now, quoted=True)
            sifted.steady += ever.steady
            sifted.rejected += ever.rejected
        if sifted.steady and all(id(seller.listing) in throttled for seller in sifted.steady):
            raise busy(rejected, min(self.health.wait(seller.key, now.monotonic) for seller in sifted.steady))
        raise nobody(rejected, _too_dear(rejected))


def _too_dear(rejected: list[tuple[Listing, Exclusion]]) -> tuple[int, int] | None:
    return lowest_of(listing for listing, reason in rejected if reason is Exclusion.MAX_PRICE)
