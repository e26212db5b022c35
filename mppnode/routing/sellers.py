"""Listings as the router reads them: the numbers a decision compares, worked out once per catalogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from mppnode.kernel.listing import Listing, ProviderKind

Book = Callable[[str], tuple[Listing, ...]]
"""Every listing of a model. Raises ``NodeFault`` ``UNKNOWN_MODEL`` for a name nobody lists."""

RANK: Final[Mapping[ProviderKind, int]] = MappingProxyType({kind: rank for rank, kind in enumerate(ProviderKind)})
_MODELS_MAX: Final = 10_000  # more than every catalogue; only so that names of old catalogues do not pile up


class Seller:
    """One listing and its numbers. Prices in pico-dollars per token."""

    __slots__ = (
        "abilities",
        "axes",
        "combined",
        "context",
        "external",
        "free",
        "input_max",
        "key",
        "listing",
        "max_output",
        "output_max",
        "priced_at",
        "provider",
        "rank",
    )

    def __init__(self, listing: Listing) -> None:
        rates = listing.rates
        self.listing = listing
        self.provider = listing.provider
        self.key = (listing.provider, listing.model)
        self.rank = RANK[listing.kind]
        self.external = listing.kind is ProviderKind.EXTERNAL
        self.abilities = int(listing.abilities)  # a flag's & builds an object, ten times as slow
        self.context = listing.context
        self.max_output = listing.max_output
        self.priced_at = listing.priced_at
        self.axes = rates.axes
        self.input_max = int(rates.input_max)
        self.output_max = int(rates.output_max)
        self.combined = listing.combined
        self.free = not any(rates.axes)


class Shelf:
    """The sellers of each model, cheapest first, for as long as the book gives the same listings.

    The book is asked every time and its answer compared by identity: a tuple of frozen listings cannot change, so what
    is kept for it cannot be stale.
    """

    def __init__(self, book: Book) -> None:
        self._book = book
        self._made: dict[str, tuple[tuple[Listing, ...], tuple[Seller, ...]]] = {}

    def sellers(self, model: str) -> tuple[Seller, ...]:
        """Every seller of a model. Raises as the book does."""
        listings = self._book(model)
        made = self._made.get(model)
        if made is not None and made[0] is listings:
            return made[1]
        # Sorting is stable: among equal prices the order of the catalogue decides, the same on every node.
        sellers = tuple(sorted(map(Seller, listings), key=lambda seller: seller.combined))
        if len(self._made) >= _MODELS_MAX:
            self._made.clear()
        self._made[model] = (listings, sellers)
        return sellers
