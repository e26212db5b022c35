"""How a node leaves: it is seen to go, takes nothing new, lets what runs end, and ends the rest exactly.

aiohttp's own shutdown would wait for running handlers and then cancel them, which is a client's disconnect to the
engine: a bill without a receipt, on a connection that is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Middleware

from mppnode.engine.chat import ChatEngine

FAREWELL_S: Final = 1.0
"""For last frames to be written after bills are settled, and for a client that does not read to be given up."""

BODIES_S: Final = 2.0
"""For requests that are being sent while the drain begins; whoever is slower is told that the body did not arrive."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Drain:
    """Knows what runs on a port, and empties it."""

    def __init__(self) -> None:
        self.begun = False
        """Whether the node was told to stop: from then on every answer closes its connection."""
        self._active: dict[int, web.Request] = {}  # by id(): a request is a mapping, and those have no hash
        self._quiet: asyncio.Future[None] | None = None
        self._hurrying = False
        self._hurried: asyncio.Future[None] | None = None

    def watch(self, app: web.Application) -> None:
        """Count the requests of an application, and close their connections once the drain has begun."""
        app.middlewares.append(self._middleware())
        app.on_response_prepare.append(self._part)

    def hurry(self) -> None:
        """Wait for nobody any more: what still runs is ended at once, with its exact bill."""
        self._hurrying = True
        if self._hurried is not None and not self._hurried.done():
            self._hurried.set_result(None)

    async def run(self, runner: web.AppRunner, engine: ChatEngine, *, delay_s: float, drain_s: float) -> None:
        """Go on serving for ``delay_s``; then refuse, wait ``drain_s`` for what runs, end the rest, and close."""
        self.begun = True
        self._hurried = asyncio.get_running_loop().create_future()
        if self._hurrying:
            self._hurried.set_result(None)
        await asyncio.wait({self._hurried}, timeout=delay_s)
        engine.stop()
        for site in tuple(runner.sites):
            await site.stop()
        await asyncio.sleep(0)  # what has just arrived begins to be handled before idle connections are closed
        await self._bodies()
        if runner.server is not None:
            runner.server.pre_shutdown()
        if self._active:
            self._quiet = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._quiet, self._hurried}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        await _patiently(engine.end_everything())
        await runner.cleanup()
        await _patiently(engine.end_everything())  # whose clients did not read: their connections are gone by now

    async def _bodies(self) -> None:
        """Wait for bodies that are on their way: once idle connections are closed, aiohttp drops what still arrives."""
        assert self._hurried is not None
        loop, whole = asyncio.get_running_loop(), list[asyncio.Future[None]]()
        for request in self._active.values():
            arrived: asyncio.Future[None] = loop.create_future()
            request.content.on_eof(partial(_note, arrived))
            whole.append(arrived)
        due = loop.time() + BODIES_S
        for arrived in whole:
            if not self._hurried.done():
                left = max(due - loop.time(), 0)
                await asyncio.wait({arrived, self._hurried}, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    def _middleware(self) -> Middleware:
        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._active[id(request)] = request
            try:
                return await handler(request)
            finally:
                self._active.pop(id(request), None)
                if not self._active and self._quiet is not None and not self._quiet.done():
                    self._quiet.set_result(None)

        return count

    async def _part(self, _: web.Request, response: web.StreamResponse) -> None:
        if self.begun:
            response.force_close()
            response.headers["Connection"] = "close"


def _note(arrived: asyncio.Future[None]) -> None:
    if not arrived.done():
        arrived.set_result(None)


async def _patiently(ending: Awaitable[None]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FAREWELL_S):
            await ending
