"""``POST /v1/quote``: what a request would cost at most, who would serve it and why; free, and nothing is reserved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import orjson
from aiohttp import web

from channels.units import PICO_PER_UNIT, format_decimal, units_ceil
from mppnode.accounts.directory import Directory
from mppnode.engine.chat import ChatEngine
from mppnode.engine.market import STRANGER, Quote
from mppnode.http.answers import body_of, streams
from mppnode.http.disclosure import cents
from mppnode.http.keyed import TRUST, bearer_of, caller_of
from mppnode.kernel.listing import Listing
from mppnode.kernel.rates import Rates
from mppnode.kernel.requests import ChatLimits, parse_chat

PATH: Final = "/v1/quote"


class QuoteSurface:
    """Quotes for chat requests: the same body as ``/v1/chat/completions``, judged by the same rules."""

    def __init__(self, *, engine: ChatEngine, directory: Directory, limits: ChatLimits, **_: object) -> None:
        self._engine = engine
        self._directory = directory
        self._limits = limits

    def routes(self) -> Sequence[web.RouteDef]:
        """The routes of this surface."""
        return [web.post(PATH, self.post)]

    async def post(self, request: web.Request) -> web.Response:
        """Quote one request, for a bearer by the rules of its key. Refusals are those the request itself would meet."""
        caller, bearer = STRANGER, bearer_of(request.headers.getall("Authorization", []))
        if bearer is not None:
            caller = caller_of(await self._directory.admit(bearer, request.headers.getall(TRUST, [])))
        chat = parse_chat(await body_of(request), limits=self._limits, stream=streams(request))
        quote = self._engine.quote(chat, caller)
        return web.Response(
            body=orjson.dumps(quote_json(quote)),
            content_type="application/json",
            headers={"Cache-Control": "no-store", "Access-Control-Allow-Origin": "*"},
        )


def quote_json(quote: Quote) -> dict[str, object]:
    """A quote for people and programs; prices in cents per million tokens, amounts in base units and dollars."""
    route, units = quote.route, units_ceil(quote.cost_max)
    return {
        "object": "quote",
        "model": route.chain[0].model,
        "provider": route.chain[0].provider,
        "strategy": route.strategy.value,
        "rule": route.rule,
        "max_cost": {"base_units": str(units), "usd": format_decimal(units), "pico_usd": str(int(quote.cost_max))},
        "max_price": _rates_json(route.bound),
        "candidates": [_candidate(listing) for listing in route.chain],
        "base_units_per_usd": PICO_PER_UNIT,
    }


def _candidate(listing: Listing) -> dict[str, object]:
    return {
        "model": listing.model,
        "provider": listing.provider,
        "kind": listing.kind.value,
        "price": _rates_json(listing.rates),
    }


def _rates_json(rates: Rates) -> dict[str, object]:
    return {
        "input_cents_per_million": cents(rates.input),
        "cached_input_cents_per_million": cents(rates.cached_input),
        "cache_write_cents_per_million": cents(rates.cache_write),
        "output_cents_per_million": cents(rates.output),
        "reasoning_cents_per_million": cents(rates.reasoning),
        "version": rates.version,
    }
