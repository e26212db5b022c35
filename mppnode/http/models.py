"""``GET /v1/models``: what is on sale, from whom, at what price, and whether it works just now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import orjson
from aiohttp import web

from mppnode.engine.chat import ChatEngine
from mppnode.engine.market import Market, Readiness
from mppnode.http.disclosure import cents
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Ability, Listing
from mppnode.pricing.catalog import Catalog

PATH: Final = "/v1/models"
_HEADERS: Final = {"Cache-Control": "no-store", "Access-Control-Allow-Origin": "*"}


class ModelsSurface:
    """The list, one model, and its health; free and open."""

    def __init__(self, *, engine: ChatEngine, **_: object) -> None:
        self._market: Market = engine.market
        self._list = b""
        self._made: tuple[Catalog | None, int] = (None, 0)

    def routes(self) -> Sequence[web.RouteDef]:
        """The routes of this surface; names of models have slashes, encoded or not."""
        return [
            web.get(PATH, self.every),
            web.get(PATH + "/{model:.+}/health", self.health),
            web.get(PATH + "/{model:.+}", self.one),
        ]

    async def every(self, _: web.Request) -> web.Response:
        """Every model somebody sells."""
        catalog = self._market.catalog()
        # Made once a second at most: a large catalog takes milliseconds, and anybody may ask.
        moment = (catalog, int(self._market.clock.monotonic()))
        if self._made != moment:
            models = [self._model(name) for name in catalog.models()]
            self._list = orjson.dumps({"object": "list", "data": [model for model in models if model is not None]})
            self._made = moment
        return _answer(self._list)

    async def one(self, request: web.Request) -> web.Response:
        """One model. Raises ``UNKNOWN_MODEL``."""
        name = request.match_info["model"]
        model = self._model(name)
        if model is None:
            raise NodeFault(NodeReason.UNKNOWN_MODEL, field="model", detail="has no price that may be sold at")
        return _json(model)

    async def health(self, request: web.Request) -> web.Response:
        """Whether a model could be served now, with the words of the model readiness APIs: ready or unavailable."""
        name = request.match_info["model"]
        states = [self._market.readiness(listing) for listing in self._market.catalog().listings(name)]
        best = min(states, default=Readiness.UNAVAILABLE)
        return _json({"model": name, "status": best.name.lower()})

    def _model(self, name: str) -> dict[str, object] | None:
        """A model as OpenAI clients read it, and what only this node can say; None when nobody may sell it."""
        sold = [listing for listing in self._market.catalog().listings(name) if self._market.sellable(listing)]
        if not sold:
            return None
        best = min(sold, key=lambda listing: listing.combined)
        return {
            "id": name,
            "object": "model",
            "created": max((listing.priced_at or 0) for listing in sold),
            "owned_by": best.provider,
            "context_length": max(listing.context for listing in sold),
            "max_output_tokens": max(listing.max_output for listing in sold),
            "pricing": _pricing(best),
            "providers": [self._provider(listing) for listing in sorted(sold, key=lambda each: each.combined)],
        }

    def _provider(self, listing: Listing) -> dict[str, object]:
        return {
            "name": listing.provider,
            "kind": listing.kind.value,
            "status": self._market.readiness(listing).name.lower(),
            "context_length": listing.context,
            "max_output_tokens": listing.max_output,
            "abilities": [ability.name.lower() for ability in Ability if ability in listing.abilities and ability.name],
            "pricing": _pricing(listing),
            "priced_at": listing.priced_at,
            "price_source": listing.source,
        }


def _pricing(listing: Listing) -> dict[str, str]:
    """Cents per million tokens, as the ceilings of a request are given."""
    rates = listing.rates
    return {
        "input_cents_per_million": cents(rates.input),
        "cached_input_cents_per_million": cents(rates.cached_input),
        "cache_write_cents_per_million": cents(rates.cache_write),
        "output_cents_per_million": cents(rates.output),
        "reasoning_cents_per_million": cents(rates.reasoning),
        "version": rates.version,
    }


def _json(document: dict[str, object]) -> web.Response:
    return _answer(orjson.dumps(document))


def _answer(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json", headers=_HEADERS)
