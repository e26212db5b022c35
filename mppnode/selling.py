"""What a node sells and from whom it has it: catalog, router and providers, built from a configuration."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final
from urllib.parse import urlsplit

from mppnode.config.difference import same
from mppnode.config.schema import Config, ProviderConfig
from mppnode.engine.attempts import Endpoint
from mppnode.engine.chat import Counter
from mppnode.engine.chooser import AutoChooser
from mppnode.engine.market import Market
from mppnode.kernel.clock import Clock
from mppnode.kernel.listing import Listing, ProviderKind
from mppnode.kernel.wishes import Optimize
from mppnode.metering.tokenizer import TokenizerFile
from mppnode.observe.logs import Level, Log
from mppnode.pricing.catalog import Catalog, Shelf
from mppnode.providers.presets import PRESETS, adapter_for
from mppnode.providers.quirks import Quirks
from mppnode.routing.affinity import Affinity
from mppnode.routing.breaker import Standing
from mppnode.routing.health import Health
from mppnode.routing.plan import Defaults
from mppnode.routing.policy import RoutingPolicy
from mppnode.routing.router import Router

_CHAIN_MAX: Final = 16
"""Providers one request may try. Refusals are quick, but each is a connection: more would make a storm of an outage."""


_EVERY_S: Final = 10
"""Between two looks at the catalog file."""


@dataclass(frozen=True, slots=True)
class Stock:
    """Everything a configuration says about what is sold, built and not yet in force."""

    config: Config
    shelf: Shelf
    router: Router
    endpoints: Mapping[str, Endpoint]
    defaults: tuple[Defaults, ...]
    chooser: AutoChooser
    counters: Mapping[tuple[str, str], Counter]


class Sales:
    """The market, the prices behind it, and the tokenizers of models that have one; :meth:`adopt` exchanges them.

    What was learnt stays: which providers work, and who has a conversation in its cache.
    """

    def __init__(self, config: Config, *, clock: Clock, entropy: Callable[[int], bytes], log: Log) -> None:
        """Raises as :meth:`prepare`."""
        self._clock = clock
        self._entropy = entropy
        self._log = log
        self._health = Health(below=self._below, alarm=self._refused)
        self._affinity = Affinity()
        self._stock = stock = self.prepare(config)
        self.market = Market(
            router=stock.router,
            endpoints=stock.endpoints,
            catalog=lambda: self.shelf.current,
            clock=clock,
            defaults=stock.defaults,
            chooser=stock.chooser,
        )

    @property
    def shelf(self) -> Shelf:
        """Where the prices in force are kept."""
        return self._stock.shelf

    @property
    def counters(self) -> Mapping[tuple[str, str], Counter]:
        """The tokenizers, by provider and model."""
        return self._stock.counters

    def prepare(self, config: Config) -> Stock:
        """Build what a configuration sells, with nothing in force yet; reads files, so a running node uses a thread.

        Raises:
            CatalogError: the catalog file is there and cannot be used.
            TokenizerError: a tokenizer's file cannot.
        """
        able = {each.name: PRESETS[each.preset].abilities for each in config.providers if each.preset is not None}
        shelf = Shelf(config, able=able, on_swap=self._swapped, on_error=self._unreadable)

        def listings(model: str) -> tuple[Listing, ...]:
            return shelf.current.listings(model)  # each time anew: the shelf exchanges its catalog by itself

        routing = config.routing
        policy = RoutingPolicy(
            strategy=routing.strategy,
            allow_external=routing.allow_external,
            ceiling=routing.ceiling,
            band_pct=config.pricing.band_pct,
            attempts_max=_CHAIN_MAX,  # [routing] attempts_max counts those a request waits for in vain; see Failover
            stale_s=config.pricing.stale_s,
            seed_compat=routing.seed_compat,
        )
        router = Router(
            listings,
            health=self._health,
            below=self._below,
            policy=policy,
            affinity=self._affinity,
        )
        defaults = (Defaults(routing.strategy, routing.allow_external, routing.ceiling),)
        chooser = AutoChooser(
            lambda: shelf.current,
            health=self._health,
            clock=self._clock,
            defaults=defaults,
            pool=routing.model_pool,
            optimize=Optimize(routing.optimize),
        )
        counters = {
            (model.provider, model.id): TokenizerFile(model.tokenizer)
            for model in config.models
            if model.tokenizer is not None
        }
        for provider, model in shelf.current.unpriced:
            self._log("model.unpriced", level=Level.WARNING, provider=provider, model=model)
        endpoints = {provider.name: _endpoint(provider, self._clock) for provider in config.providers}
        return Stock(config, shelf, router, endpoints, defaults, chooser, counters)

    def adopt(self, stock: Stock) -> None:
        """Sell this from now on. Requests under way keep the route they have, and so their provider, key and price."""
        before = {provider.name: provider for provider in self._stock.config.providers}
        after = {provider.name: provider for provider in stock.config.providers}
        for name, provider in before.items():
            if name not in after or not same(_reached(provider), _reached(after[name])):
                self._health.forget(name)
        self._stock = stock
        market = self.market
        market.router, market.endpoints = stock.router, stock.endpoints
        market.defaults, market.chooser = stock.defaults, stock.chooser

    def sells(self) -> bool:
        """Whether at least one provider may be tried now."""
        now = self._clock.monotonic()
        return any(self._health.standing((name, ""), now) < Standing.THROTTLED for name in self._stock.endpoints)

    async def keep(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Take up a changed catalog file within seconds, for ever."""
        while True:
            await sleep(_EVERY_S)
            await self.shelf.refresh()

    def _below(self, limit: int) -> int:
        return int.from_bytes(self._entropy(8)) % limit

    def _refused(self, provider: str, status: int | None) -> None:
        # Their answer to our key is for the operator; a caller who saw it would take it for an answer to theirs.
        self._log("provider.refused_us", level=Level.ERROR, provider=provider, status=status)

    def _swapped(self, catalog: Catalog) -> None:
        self._log("prices.changed", listings=len(catalog))

    def _unreadable(self, problem: str) -> None:
        self._log("prices.unreadable", level=Level.ERROR, problem=problem)


def build_sales(config: Config, *, clock: Clock, entropy: Callable[[int], bytes], log: Log) -> Sales:
    """Put together what is sold. Raises as :meth:`Sales.prepare`."""
    return Sales(config, clock=clock, entropy=entropy, log=log)


def _reached(provider: ProviderConfig) -> tuple[object, ...]:
    """What decides whether a provider works: where it is, with which key, and how it is spoken to."""
    return provider.base_url, provider.api_key, provider.preset, provider.quirks


def public_hosts(config: Config) -> frozenset[str]:
    """The hosts of providers on the open internet, which must not turn out to be in a private network.

    Own machines may have any address, and an address that is written down has been judged with the configuration.
    """
    found = set()
    for provider in config.providers:
        host = _host(provider)
        named = host != "localhost" and not host.replace(".", "").isdigit() and ":" not in host
        if provider.kind is not ProviderKind.NATIVE and not provider.insecure and named:
            found.add(host)
    return frozenset(found)


def hosts(config: Config) -> frozenset[str]:
    """The hosts of all providers."""
    return frozenset(map(_host, config.providers))


def _host(provider: ProviderConfig) -> str:
    return urlsplit(provider.base_url).hostname or ""


def _endpoint(provider: ProviderConfig, clock: Clock) -> Endpoint:
    preset = None if provider.preset is None else PRESETS[provider.preset]
    said = {name: value for name, value in asdict(provider.quirks).items() if value is not None}
    quirks = replace(Quirks() if preset is None else preset.quirks, **said)
    key = provider.api_key
    return Endpoint(
        provider.base_url,
        lambda: None if key is None else key.reveal(),
        adapter_for("openai" if preset is None else preset.api, quirks, clock=clock),
    )
