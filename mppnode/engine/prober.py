"""Asks providers that failed whether they are back, so that no caller has to find out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import orjson

from mppnode.engine.attempts import Answer, Failover
from mppnode.engine.market import Market
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault
from mppnode.kernel.listing import Listing
from mppnode.kernel.requests import ChatLimits, parse_chat
from mppnode.observe.logs import Log
from mppnode.providers.base import Call, Transport

EVERY_S: Final = 5.0
"""About the shortest cool-down of a breaker."""
_PATIENCE_S: Final = 20.0  # for a first token: a server that is only just back may still be loading its model
_TOKENS: Final = 16  # the least every API accepts
_AT_ONCE: Final = 4  # a node with a hundred dead providers should not greet them all in one second


class Prober:
    """Sends the shortest request there is to whoever is due; what it costs is the node's."""

    def __init__(self, market: Market, transport: Transport, *, clock: Clock, log: Log) -> None:
        self._market = market
        self._transport = transport
        self._clock = clock
        self._log = log
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def keep(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Probe for ever."""
        while True:
            await sleep(EVERY_S)
            await self.run()

    async def run(self) -> None:
        """Probe everybody who is due, once."""
        due = self._market.router.health.due_probes(self._clock.monotonic())
        await asyncio.gather(*(self._probe(provider, model) for provider, model in due))

    async def _probe(self, provider: str, model: str) -> None:
        async with self._room:
            listing = self._listing(provider, model)
            if listing is None:  # no longer on sale
                return
            endpoint = self._market.endpoints[provider]
            watch = self._market.watch(listing, streamed=True)
            if watch is None:
                return
            body = {"model": model, "messages": [{"role": "user", "content": "ping"}], "max_tokens": _TOKENS}
            chat = parse_chat(orjson.dumps(body), limits=ChatLimits())
            call = Call(chat, listing.upstream_model, endpoint.base_url, endpoint.api_key(), _TOKENS)
            failover = Failover(
                transport=self._transport, clock=self._clock, timeout_s=_PATIENCE_S, accepted=lambda *_: None
            )
            outcome = await failover.attempt(listing, endpoint, call, watch, left=1)
            if isinstance(outcome, Answer):
                outcome.response.cancel()
                watch.ended(tokens=0, seconds=0.0)
                self._log("provider.recovered", provider=provider, model=model)

    def _listing(self, provider: str, model: str) -> Listing | None:
        try:
            listings = self._market.catalog().listings(model)
        except NodeFault:
            return None
        return next((listing for listing in listings if listing.provider == provider), None)
