"""What is on sale: every provider's listing of every model at the price a caller pays, and the holder that swaps it."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Final

from channels.instants import UnixSeconds
from channels.units import Pico
from mppnode.config.catalog import EVERY_MODEL
from mppnode.config.schema import Config, ModelConfig, ProviderConfig
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Ability, Listing
from mppnode.kernel.rates import Rates
from mppnode.pricing.entries import CatalogError, Entry, read_entries

_NEAR_MAX: Final = 3
_BPS: Final = 10_000
_AHEAD_S: Final = 24 * 3600  # no clock is a day wrong: a price from further ahead would otherwise never go stale
_WORD = re.compile(r"[a-z]+|[0-9]+", re.ASCII)
_WORDS_MAX: Final = 16
_SHARED_MAX: Final = 64
_CLOSE_MAX: Final = 32  # compared letter by letter, some 20 us each: a guesser of names must not stop the event loop


def sell_rates(cost: Rates, markup_bps: int) -> Rates:
    """What a caller pays for what costs us ``cost``: ``markup_bps`` hundredths of a percent more, rounded up per axis.

    In pico-dollars, so that rounding adds less than a millionth of a cent to a million tokens.
    """
    return Rates(*(Pico(-(-axis * (_BPS + markup_bps) // _BPS)) for axis in cost.axes))


class Catalog:
    """The listings in force at one moment; it never changes. ``stale_s`` is the age at which a price expires.

    ``unpriced`` are the (provider, model) pairs the configuration names and nobody has a price for: they are not sold.
    ``held`` counts by provider the prices in the file that wait for the operator's word.
    """

    def __init__(
        self,
        listings: Iterable[Listing],
        *,
        stale_s: int,
        unpriced: Iterable[tuple[str, str]] = (),
        held: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._by_model: dict[str, tuple[Listing, ...]] = {}
        self._stale_s = stale_s
        self.unpriced = tuple(unpriced)
        self.held = held
        for listing in listings:
            known = self._by_model.get(listing.model, ())
            if any(other.provider == listing.provider for other in known):
                raise ValueError("one provider lists the same model twice")
            self._by_model[listing.model] = (*known, listing)
        self._words: dict[str, list[str]] = {}
        for model in self._by_model:
            for word in set(_WORD.findall(model.lower())):
                self._words.setdefault(word, []).append(model)

    def __iter__(self) -> Iterator[Listing]:
        return (listing for listings in self._by_model.values() for listing in listings)

    def __len__(self) -> int:
        return sum(map(len, self._by_model.values()))

    def models(self) -> tuple[str, ...]:
        """Every model somebody lists, in the order of the configuration and then of the catalog file."""
        return tuple(self._by_model)

    def listings(self, model: str) -> tuple[Listing, ...]:
        """Every provider's listing of a model, stale ones too: why one is not used is for the router to say.

        Raises:
            NodeFault: ``UNKNOWN_MODEL`` with up to three near names, which are ours, so they may be shown;
                ``NO_PROVIDER`` for one that is configured and has no price.
        """
        found = self._by_model.get(model)
        if found is None:
            waiting = sum(name == model for _, name in self.unpriced)
            if waiting:
                detail = "has no price yet"  # it is ours, and may be sold as soon as somebody has written its price
                raise NodeFault(
                    NodeReason.NO_PROVIDER, field="model", detail=detail, excluded={"price_unknown": waiting}
                )
            near = self._near(model)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise NodeFault(NodeReason.UNKNOWN_MODEL, field="model", detail=f"is not sold here{hint}")
        return found

    def stale(self, listing: Listing, now: UnixSeconds) -> bool:
        """Whether a price was read too long ago to be sold at; what the operator wrote down never is."""
        if listing.priced_at is None:
            return False
        return not -_AHEAD_S <= now - listing.priced_at <= self._stale_s

    def _near(self, model: str) -> list[str]:
        # Comparing with every name costs half a second for 10,000 of them; few share a rare word with the one asked.
        words = sorted(set(_WORD.findall(model.lower()[:256])) & self._words.keys(), key=lambda w: len(self._words[w]))
        shared = Counter(name for word in words[:_WORDS_MAX] for name in self._words[word][:_SHARED_MAX])
        names = {name.lower(): name for name, _ in shared.most_common(_CLOSE_MAX)}
        return [names[close] for close in get_close_matches(model.lower()[:256], names, n=_NEAR_MAX)]


def build_catalog(
    config: Config, entries: Iterable[Entry] = (), *, able: Mapping[str, Ability] = MappingProxyType({})
) -> Catalog:
    """Join the models of the configuration with the catalog file's entries for the providers that sell from it.

    ``able`` is the most each provider's API can express, by its name: a list may promise more than can be asked there.

    What the configuration prices goes before the file's price of the same model at the same provider. A model without
    a price gets no listing, so nothing is ever sold for nothing because a table did not know it.
    """
    providers = {provider.name: provider for provider in config.providers}
    listings = [_written(model, providers[model.provider]) for model in config.models]
    taken = {(listing.provider, listing.model) for listing in listings}
    by_provider: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        by_provider.setdefault(entry.provider, {})[entry.model] = entry
    unpriced: list[tuple[str, str]] = []
    for provider in config.providers:
        known = by_provider.get(provider.name, {})
        for name in known if EVERY_MODEL in provider.models else provider.models:
            if (provider.name, name) in taken:
                continue
            if name in known:
                listings.append(_listed(known[name], provider, _markup(provider, config)))
            else:
                unpriced.append((provider.name, name))
    listings = [
        replace(listing, abilities=listing.abilities & able[listing.provider]) if listing.provider in able else listing
        for listing in listings
    ]
    held = Counter(name for name, known in by_provider.items() for entry in known.values() if entry.held is not None)
    return Catalog(listings, stale_s=config.pricing.stale_s, unpriced=unpriced, held=held)


def _markup(provider: ProviderConfig, config: Config) -> int:
    return config.pricing.markup_bps if provider.markup_bps is None else provider.markup_bps


def _written(model: ModelConfig, provider: ProviderConfig) -> Listing:
    rates = Rates(
        model.input,
        model.cached_input,
        model.output,
        model.input if model.cache_write is None else model.cache_write,
        model.output if model.reasoning is None else model.reasoning,
        model.request,
        model.image,
        model.audio_second,
    )
    return Listing(
        model=model.id,
        provider=model.provider,
        kind=provider.kind,
        upstream_model=model.upstream_model,
        rates=rates,
        context=model.context,
        max_output=model.max_output,
        abilities=model.abilities,
        quality=model.quality,
    )


def _listed(entry: Entry, provider: ProviderConfig, markup_bps: int) -> Listing:
    return Listing(
        model=entry.model,
        provider=entry.provider,
        kind=entry.kind or provider.kind,
        upstream_model=entry.upstream_model,
        rates=sell_rates(entry.cost, markup_bps),
        context=entry.context,
        max_output=entry.max_output,
        abilities=entry.abilities,
        markup_bps=markup_bps,
        priced_at=None if entry.vouched else entry.time,
        source=entry.source,
        quality=entry.quality,
    )


_Stamp = tuple[int, int, int]


class Shelf:
    """Holds the catalog in force and swaps it when the catalog file changes; whoever holds an old one keeps it whole.

    A file that becomes unreadable changes nothing but the log: the prices in force stay, and go stale by themselves.
    """

    def __init__(
        self,
        config: Config,
        *,
        able: Mapping[str, Ability] = MappingProxyType({}),
        on_swap: Callable[[Catalog], None] = lambda _: None,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Build the first catalog. Raises ``CatalogError`` when the file is there and cannot be used."""
        self._config = config
        self._able = able
        self._path = config.pricing.catalog
        self._on_swap = on_swap
        self._on_error = on_error
        self._stamp = _stamp(self._path)
        self.current = build_catalog(config, () if self._path is None else read_entries(self._path), able=able)

    def _build(self, path: Path) -> Catalog:
        return build_catalog(self._config, read_entries(path, required=True), able=self._able)

    async def refresh(self) -> bool:
        """Take up a changed file; whether the catalog was swapped. Read in a thread: a large file takes a while."""
        stamp = _stamp(self._path)
        if stamp == self._stamp or self._path is None:
            return False
        # Taken before reading: a file that changes meanwhile has another stamp next time.
        self._stamp = stamp
        if stamp is None:
            self._on_error("file: is gone; the prices read before stay in force")
            return False
        try:
            catalog = await asyncio.to_thread(self._build, self._path)
        except CatalogError as error:
            self._on_error(str(error))
            return False
        self.current = catalog
        self._on_swap(catalog)
        return True

    async def keep(self, sleep: Callable[[float], Awaitable[None]], every_s: int = 10) -> None:
        """Look for a change every few seconds, for ever."""
        while True:
            await sleep(every_s)
            await self.refresh()


def _stamp(path: Path | None) -> _Stamp | None:
    try:
        found = None if path is None else path.stat()
    except OSError:
        return None
    # The inode too: an atomic replacement within one tick of the clock may keep time and size.
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)
