"""What a node sells and from whom it has it: catalog, router and providers, built from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final
from urllib.parse import urlsplit

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
from mppnode.routing.health import Health
from mppnode.routing.plan import Defaults
from mppnode.routing.policy import RoutingPolicy
from mppnode.routing.router import Router

_CHAIN_MAX: Final = 16
"""Providers one request may try. Refusals are quick, but each is a connection: more would make a storm of an outage."""


@dataclass(frozen=True, slots=True)
class Sales:
    """The market, the prices behind it, and the tokenizers of models that have one."""

    market: Market
    shelf: Shelf
    counters: Mapping[tuple[str, str], Counter]


def build_sales(config: Config, *, clock: Clock, entropy: Callable[[int], bytes], log: Log) -> Sales:
    """Put together what is sold.

    Raises:
        CatalogError: the catalog file is there and cannot be used.
        TokenizerError: a tokenizer's file cannot.
    """

    def below(limit: int) -> int:
        return int.from_bytes(entropy(8)) % limit

    def refused(provider: str, status: int | None) -> None:
        # Their answer to our key is for the operator; a caller who saw it would take it for an answer to theirs.
        log("provider.refused_us", level=Level.ERROR, provider=provider, status=status)

    def swapped(catalog: Catalog) -> None:
        log("prices.changed", listings=len(catalog))

    def unreadable(problem: str) -> None:
        log("prices.unreadable", level=Level.ERROR, problem=problem)

    able = {each.name: PRESETS[each.preset].abilities for each in config.providers if each.preset is not None}
    shelf = Shelf(config, able=able, on_swap=swapped, on_error=unreadable)

    def listings(model: str) -> tuple[Listing, ...]:
        return shelf.current.listings(model)

    for provider, model in shelf.current.unpriced:
        log("model.unpriced", level=Level.WARNING, provider=provider, model=model)
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
        listings, health=Health(below=below, alarm=refused), below=below, policy=policy
    )
    defaults = (Defaults(routing.strategy, routing.allow_external, routing.ceiling),)
    chooser = AutoChooser(
        lambda: shelf.current,
        health=router.health,
        clock=clock,
        defaults=defaults,
        pool=routing.model_pool,
        optimize=Optimize(routing.optimize),
    )
    market = Market(
        router=router,
        endpoints={provider.name: _endpoint(provider, clock) for provider in config.providers},
        catalog=lambda: shelf.current,
        clock=clock,
        defaults=defaults,
        chooser=chooser,
    )
    counters = {
        (model.provider, model.id): TokenizerFile(model.tokenizer)
        for model in config.models
        if model.tokenizer is not None
    }
    return Sales(market, shelf, counters)


def public_hosts(config: Config) -> frozenset[str]:
    """The hosts of providers on the open internet, which must not turn out to be in a private network.

    Own machines may have any address, and an address that is written down has been judged with the configuration.
    """
    hosts = set()
    for provider in config.providers:
        host = urlsplit(provider.base_url).hostname or ""
        named = host != "localhost" and not host.replace(".", "").isdigit() and ":" not in host
        if provider.kind is not ProviderKind.NATIVE and not provider.insecure and named:
            hosts.add(host)
    return frozenset(hosts)


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
