"""A balancer as small as they come: it asks ``/readyz``, and gives each new connection to the next node that is ready."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

POLL_S = 0.03


class Balancer:
    """Relays bytes and understands none; a connection it cannot place is closed before anything was answered."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http
        self._nodes: dict[str, str] = {}
        self._ready: set[str] = set()
        self._turn = itertools.count()
        self._news = asyncio.Event()
        self._pipes: set[asyncio.Task[None]] = set()
        self.url = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0, backlog=1_000)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._polling = asyncio.ensure_future(self._poll())

    async def stop(self) -> None:
        self._polling.cancel()
        await asyncio.gather(self._polling, return_exceptions=True)
        self._server.close()
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)
        await self._server.wait_closed()

    def place(self, name: str, url: str) -> None:
        """Where a node is; it gets nothing before it says that it is ready."""
        self._nodes[name] = url
        self._ready.discard(name)

    async def until_ready(self, name: str) -> None:
        while name not in self._ready:
            self._news.clear()
            await self._news.wait()

    async def _poll(self) -> None:
        while True:
            await asyncio.gather(*(self._ask(name, url) for name, url in self._nodes.items()))
            await asyncio.sleep(POLL_S)

    async def _ask(self, name: str, url: str) -> None:
        try:
            async with self._http.get(f"{url}/readyz", timeout=aiohttp.ClientTimeout(total=2)) as answer:
                ready = answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            ready = False
        if self._nodes.get(name) != url:
            return
        (self._ready.add if ready else self._ready.discard)(name)
        self._news.set()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        task.add_done_callback(self._pipes.discard)
        ours: asyncio.StreamWriter | None = None
        try:
            node = await self._connect()
            if node is None:
                writer.transport.abort()
                return
            theirs, ours = node
            await asyncio.gather(_pipe(reader, ours), _pipe(theirs, writer))
        finally:
            for end in (writer, ours):
                if end is not None:
                    end.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        names, first = sorted(self._ready), next(self._turn)
        for index in range(len(names)):
            name = names[(first + index) % len(names)]
            host, _, port = self._nodes[name].removeprefix("http://").partition(":")
            with contextlib.suppress(OSError):
                return await asyncio.open_connection(host, int(port))
            self._ready.discard(name)
        return None


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()  # whichever side ends the connection, the other learns it at once
    except (ConnectionError, OSError):
        writer.transport.abort()


@asynccontextmanager
async def balancer() -> AsyncIterator[Balancer]:
    """A balancer for the length of a test."""
    async with aiohttp.ClientSession() as http:
        made = Balancer(http)
        await made.start()
        try:
            yield made
        finally:
            await made.stop()
