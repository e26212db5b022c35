"""Providers and prices: who can be reached, whose key is taken, and what is on sale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import orjson

from mppnode.config.schema import Config, ProviderConfig
from mppnode.doctor.findings import Case, Check, Finding, fail, ok, skip, warn
from mppnode.doctor.machine import aside
from mppnode.pricing.catalog import Catalog, build_catalog
from mppnode.pricing.entries import CatalogError, Entry, read_entries
from mppnode.providers.base import UpstreamFault, UpstreamRequest
from mppnode.providers.presets import PRESETS

_BODY_BYTES_MAX: Final = 8 * 1024 * 1024  # the longest list of models in use is under 2 MiB
_LISTED_MAX: Final = 20_000
_SHOWN: Final = 3
_SLOW_MS: Final = 3_000
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"))
_OK: Final = 200
_REFUSED: Final = frozenset({401, 403})
_NO_LIST: Final = frozenset({404, 405, 501})
_BUSY: Final = 429

# Asking for the list of models costs nothing anywhere. Source: each provider's API reference, "list models"; OpenRouter
# shows its list to everybody, so there the key itself is asked for ("get current API key").
_LISTS: Final = {
    "openai": "/models",
    "dev": "/models",
    "openrouter": "/key",
    "anthropic": "/models?limit=1000",
    "gemini": "/models?pageSize=1000",
}


def models_request(provider: ProviderConfig, *, with_key: bool = True) -> UpstreamRequest:
    """The request for a provider's list of models, or whatever else shows for nothing whether its key is taken."""
    preset = None if provider.preset is None else PRESETS[provider.preset]
    api = "openai" if preset is None else preset.api
    headers = [("Accept", "application/json"), ("User-Agent", "mppnode")]
    if api == "anthropic":
        headers.append(("anthropic-version", "2023-06-01"))
    if provider.api_key is not None and with_key:
        key = provider.api_key.reveal()
        bearer = preset is None or preset.quirks.auth == "bearer"
        match api:
            case "anthropic":
                headers.append(("x-api-key", key))
            case "gemini":
                headers.append(("x-goog-api-key", key))
            case _:
                headers.append(("Authorization", f"Bearer {key}") if bearer else ("api-key", key))
    return UpstreamRequest("GET", provider.base_url + _LISTS[api], tuple(headers), b"")


async def _provider(case: Case, name: str) -> Finding:
    provider = next(each for each in case.config.providers if each.name == name)
    before = case.clock.monotonic()
    try:
        status, body = await _ask(case, models_request(provider))
        took_ms = round((case.clock.monotonic() - before) * 1000)
        public = provider.api_key is not None and status == _OK and await _is_public(case, provider)
    except UpstreamFault as fault:
        # Its words are ours: a provider's own never reach them.
        return fail(fault.message, f"correct base_url of provider {name}, or start it")
    if status in _REFUSED:
        if provider.api_key is None:
            return fail(f"wants a key (status {status})", f"set api_key of provider {name}")
        return fail(f"refuses the key (status {status})", f"replace the key that api_key of provider {name} names")
    if status in _NO_LIST:
        return warn(f"has no list of models (status {status}): key not proved", f"look at base_url of provider {name}")
    if status != _OK:
        why = "limits us" if status == _BUSY else "does not work"
        return (warn if status == _BUSY else fail)(f"{why} (status {status})", f"ask provider {name} for the reason")
    text = f"answers in {took_ms} ms" + _about_key(provider, public=public)
    missing = _missing(await _catalog(case), provider, body)
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (" and more" if len(missing) > _SHOWN else "")
        return warn(f"{text}; does not list {shown}", "correct upstream_model, or take these models out of sale")
    if took_ms > _SLOW_MS:
        return warn(text, f"see what lies between here and provider {name}")
    return ok(text)


def _about_key(provider: ProviderConfig, *, public: bool) -> str:
    if provider.api_key is None:
        return ", without a key"
    return ", shows its list to everybody, so the key is not proved" if public else ", takes the key"


async def _is_public(case: Case, provider: ProviderConfig) -> bool:
    """Whether the answer would be the same without a key, which then proves nothing about it."""
    try:
        status, _ = await _ask(case, models_request(provider, with_key=False))
    except UpstreamFault:
        return False
    return status == _OK


async def _ask(case: Case, request: UpstreamRequest) -> tuple[int, bytes]:
    response = await case.transport.open(request)
    if response.status != _OK:
        response.cancel()
        return response.status, b""
    return response.status, await response.read(_BODY_BYTES_MAX)


def _missing(catalog: Catalog | None, provider: ProviderConfig, body: bytes) -> list[str]:
    """Names we sell under that the provider does not list; empty when its answer is no list we can read."""
    listed = _listed(body)
    if catalog is None or not listed:
        return []
    ours = [listing.upstream_model for listing in catalog if listing.provider == provider.name]
    return [name for name in ours if name not in listed]


def _listed(body: bytes) -> frozenset[str]:
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return frozenset()
    items = answer.get("data", answer.get("models")) if isinstance(answer, dict) else None
    if not isinstance(items, list):
        return frozenset()
    names = [
        item.get("id", item.get("name")) for item in items[:_LISTED_MAX] if isinstance(item, dict)
    ]  # the second is Gemini's, with "models/" before it
    return frozenset(name.removeprefix("models/") for name in names if isinstance(name, str))


# ------------------------------------------------------------------------------------------------------------- prices


async def _entries(case: Case) -> Sequence[Entry]:
    path = case.config.pricing.catalog
    return () if path is None else await aside(lambda: read_entries(path))


async def _catalog(case: Case) -> Catalog | None:
    try:
        return build_catalog(case.config, await _entries(case))
    except CatalogError:
        return None


async def _prices(case: Case, _: str) -> Finding:
    try:
        catalog = build_catalog(case.config, await _entries(case))
    except CatalogError as error:
        return fail(f"the catalog file cannot be used: {error}", "correct it, or write it anew: mppnode prices sync")
    now, stale_s = case.clock.now(), case.config.pricing.stale_s
    dated = [listing for listing in catalog if listing.priced_at is not None]
    stale = [listing for listing in dated if catalog.stale(listing, now)]
    if not len(catalog):
        return fail("nothing is on sale", "write [[models]], or give providers models and run: mppnode prices sync")
    if not dated:
        return ok(f"{len(catalog)} written down, none synchronised")
    oldest = max(now - listing.priced_at for listing in dated if listing.priced_at is not None)
    text = f"{len(dated)} synchronised, the oldest {_age(oldest)} old, {len(stale)} beyond {_age(stale_s)}"
    if len(stale) == len(catalog):
        return fail(text + ": nothing is sold", "run: mppnode prices sync")
    if stale:
        return warn(text, "run mppnode prices sync, and let a timer do it")
    return ok(text)


async def _models(case: Case, _: str) -> Finding:
    catalog = await _catalog(case)
    if catalog is None:
        return skip("the catalog file cannot be used: see prices")
    now = case.clock.now()
    names = set(catalog.models())
    unsold = sorted(
        name for name in names if all(catalog.stale(listing, now) for listing in catalog.listings(name))
    )
    wanted = sorted(set(case.config.routing.model_pool) - names)
    if wanted:
        return fail(
            f"routing.model_pool has {_some(wanted)}, which nobody serves", "take them out, or give them a provider"
        )
    if catalog.unpriced:
        pairs = [f"{provider}/{model}" for provider, model in catalog.unpriced]
        return warn(f"{len(pairs)} without a price: {_some(pairs)}", "run mppnode prices sync, or import their prices")
    if unsold:
        return warn(f"{len(unsold)} at stale prices only: {_some(unsold)}", "run: mppnode prices sync")
    idle = sorted({each.name for each in case.config.providers} - {listing.provider for listing in catalog})
    if idle:
        return warn(f"{_some(idle)} sells nothing", "give that provider models, or take it out")
    return ok(f"{len(names)} on sale")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" and more" if len(names) > _SHOWN else "")


def _age(seconds: int) -> str:
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{max(seconds, 0)} s"


def _names(config: Config) -> tuple[str, ...]:
    return tuple(provider.name for provider in config.providers)


CHECKS: Final = (
    Check(
        "provider",
        "each can be reached within 3 s, where it may be (no private address behind a public name), takes the key, and"
        " lists the models we sell; asked for its list of models, which nobody bills",
        _provider,
        _names,
    ),
    Check("prices", "the catalog file can be used, and no price is older than `pricing.stale_s`", _prices),
    Check("models", "every model has a price, and `routing.model_pool` has only models that are on sale", _models),
)
"""In the order of the report."""
