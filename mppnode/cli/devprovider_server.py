"""Serves the development provider over HTTP, paced, or released token by token by a test.

DEVELOPMENT ONLY.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import orjson
from aiohttp import web

from mppnode.providers.dev import DevPlan, plan_for

_BODY_MAX = 4 * 1024 * 1024
_MODELS = ("dev/story", "dev/echo")


class Gate:
    """Lets a test decide how many tokens have been sent, instead of a clock."""

    def __init__(self, lent: int = 0) -> None:
        """``lent`` tokens pass before anything is released, on account of the first release: a node answers its
        caller only when the provider has begun to speak.
        """
        self._changed = asyncio.Condition()
        self._lent = lent
        self.released = lent

    async def release(self, tokens: int) -> None:
        """Allow that many more tokens."""
        async with self._changed:
            self.released += tokens - self._lent
            self._lent = 0
            self._changed.notify_all()

    async def passed(self, token: int) -> None:
        """Wait until ``token`` (counted from 1) is allowed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.released >= token)


class DevProviderServer:
    """A running development provider and what it has seen."""

    def __init__(self, tokens_per_second: float) -> None:
        self.url = ""
        self.requests = 0
        self.cancelled = 0
        """Streams whose client left before their end."""
        self.live = 0
        self.last_request: dict[str, object] = {}
        self.last_headers: dict[str, str] = {}
        self.gate: Gate | None = None
        """Set one to hold streams until it releases their tokens."""
        self._rate = tokens_per_second
        self._runner: web.AppRunner | None = None
        self._streams: set[asyncio.Task[object]] = set()
        self._stopping = False

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 picks one."""
        app = web.Application(client_max_size=_BODY_MAX)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        self.url = f"http://{host}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Close the port and every stream."""
        self._stopping = True
        for stream in self._streams:
            stream.cancel()  # the runner alone would first wait for them to end by themselves, and some never do
        if self._runner is not None:
            await self._runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in _MODELS]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        try:
            body = orjson.loads(await request.read())
        except orjson.JSONDecodeError:
            return web.json_response({"error": {"message": "not JSON"}}, status=400)
        self.last_request, self.last_headers = body, dict(request.headers)
        plan = plan_for(body)
        if plan.pieces is None:
            headers = dict(plan.headers) | {"Content-Type": plan.content_type}
            return web.Response(status=plan.status, body=plan.body, headers=headers)
        response = web.StreamResponse(headers={"Content-Type": plan.content_type})
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        self.live += 1
        try:
            await self._send(request, response, plan, plan.pieces)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += not self._stopping
            raise
        finally:
            self.live -= 1
            self._streams.discard(task)
        return response

    async def _send(
        self, request: web.Request, response: web.StreamResponse, plan: DevPlan, pieces: Iterator[tuple[int, bytes]]
    ) -> None:
        loop = asyncio.get_running_loop()
        start, rate = loop.time(), self._rate * plan.pace
        for number, data in pieces:
            if self.gate is not None:
                await self.gate.passed(number)
            elif rate and (wait := start + number / rate - loop.time()) > 0:
                await asyncio.sleep(wait)  # against the start, not the last token: a late wake-up does not add up
            await response.write(data)
        if plan.hangs:
            await asyncio.get_running_loop().create_future()
        if plan.dies and request.transport is not None:
            request.transport.close()
        with contextlib.suppress(ConnectionError):
            await response.write_eof()


async def start_devprovider(
    host: str = "127.0.0.1", port: int = 0, *, tokens_per_second: float = 100.0
) -> DevProviderServer:
    """Start a development provider."""
    server = DevProviderServer(tokens_per_second)
    await server.start(host, port)
    return server
