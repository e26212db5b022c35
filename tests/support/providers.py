"""Scripted providers on loopback, each good or bad in one way, and a node that sells one model over all of them.

A script is a coroutine that answers one request over a plain socket; what it does not send, nobody sends. Every
provider remembers what it was asked and whether its caller hung up, so that tests wait for events and not for time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from channels.units import Pico
from mppnode.cli.devnet import Devnet, DevnetOptions
from mppnode.config.schema import Config, ModelConfig, PricingConfig, ProviderConfig, QuirksConfig, RoutingConfig
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import ManualClock, SystemClock
from mppnode.kernel.listing import ProviderKind
from tests.support.http_client import LogLines, World

MODEL = "maker/model"
KEY = "sk-the-nodes-own-key"
SECRET_TEXT = f"secret upstream text about {KEY}"
INPUT, OUTPUT = 500_000, 10_000_000
"""Pico-dollars per token of whoever does not say otherwise."""
_EVENT = "data: {}\n\n"
_REASONS = {200: "OK"}


# -------------------------------------------------------------------------------------------------------- one request


@dataclass
class Exchange:
    """One request as a provider sees it, and the means to answer it."""

    body: dict[str, Any]
    headers: dict[str, str]
    writer: asyncio.StreamWriter = field(repr=False)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether the caller has closed the connection."""
    finished: bool = False
    """Whether the script has answered everything it meant to."""

    @property
    def streamed(self) -> bool:
        return self.body.get("stream") is True

    @property
    def prompt(self) -> int:
        """Tokens of the prompt: one for every word."""
        return sum(len(str(message.get("content")).split()) for message in self.body["messages"])

    def head(self, status: int = 200, kind: str = "text/event-stream", **headers: str) -> None:
        """Send the status line and headers; the body ends with the connection."""
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Whatever')}", f"Content-Type: {kind}", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())

    def send(self, data: bytes | str) -> None:
        self.writer.write(data.encode() if isinstance(data, str) else data)

    def event(self, **members: Any) -> None:
        """One event of a stream."""
        document = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "theirs", **members}
        self.send(_EVENT.format(json.dumps(document)))

    def words(self, first: int, last: int) -> None:
        """The numbered words of the answer, one token and one event each."""
        for number in range(first, last + 1):
            self.event(choices=[{"index": 0, "delta": {"content": f"w{number} "}, "finish_reason": None}])

    def close(self, completion: int, *, factor: int = 1) -> None:
        """The finish, the report (multiplied by what the provider lies) and the end marker."""
        self.event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
        self.event(choices=[], usage=usage(self.prompt * factor, completion * factor))
        self.send("data: [DONE]\n\n")

    def whole(self, completion: int) -> None:
        """A buffered answer."""
        text = "".join(f"w{number} " for number in range(1, completion + 1))
        message = {"role": "assistant", "content": text}
        document = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": "theirs",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": usage(self.prompt, completion),
        }
        self.head(kind="application/json")
        self.send(json.dumps(document))


def usage(prompt: int, completion: int) -> dict[str, int]:
    """A report in OpenAI's shape."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


Script = Callable[[Exchange], Awaitable[None]]


# ------------------------------------------------------------------------------------------------------------ scripts


def serves(words: int = 5) -> Script:
    """Answers with so many words."""

    async def script(exchange: Exchange) -> None:
        if not exchange.streamed:
            exchange.whole(words)
            return
        exchange.head()
        exchange.words(1, words)
        exchange.close(words)

    return script


def lies(words: int = 5, factor: int = 3) -> Script:
    """Answers, and reports so many times what it sent."""

    async def script(exchange: Exchange) -> None:
        exchange.head()
        exchange.words(1, words)
        exchange.close(words, factor=factor)

    return script


def drips(words: int = 5, pause_s: float = 0.02) -> Script:
    """Answers a few bytes at a time, so that every event arrives in pieces."""

    async def script(exchange: Exchange) -> None:
        whole = bytearray()
        await serves(words)(replace(exchange, writer=_Catcher(whole)))  # type: ignore[arg-type]
        for start in range(0, len(whole), 100):
            exchange.send(bytes(whole[start : start + 100]))
            await asyncio.sleep(pause_s)

    return script


class _Catcher:
    """Takes a script's bytes instead of a socket."""

    def __init__(self, held: bytearray) -> None:
        self._held = held

    def write(self, data: bytes) -> None:
        self._held += data


def answers(status: int, text: str = SECRET_TEXT, **headers: str) -> Script:
    """Refuses with a status, in words that must not go further."""

    async def script(exchange: Exchange) -> None:
        exchange.head(status, "application/json", **headers)
        exchange.send(json.dumps({"error": {"message": text}}))

    return script


async def garbage(exchange: Exchange) -> None:
    """A web page with status 200."""
    exchange.head(200, "text/html")
    exchange.send(f"<!doctype html><title>Log in</title><p>{SECRET_TEXT}</p>")


async def error_in_200(exchange: Exchange) -> None:
    """Says 200 and then that it failed."""
    exchange.head(200, "text/event-stream" if exchange.streamed else "application/json")
    document = json.dumps({"error": {"message": SECRET_TEXT}})
    exchange.send(_EVENT.format(document) if exchange.streamed else document)


async def empty(exchange: Exchange) -> None:
    """An answer without a word, a finish or a report."""
    if exchange.streamed:
        exchange.head()
        exchange.event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        exchange.send("data: [DONE]\n\n")
    else:
        exchange.head(kind="application/json")
        message = {"role": "assistant", "content": ""}
        exchange.send(json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": None}]}))


async def finishes_in_error(exchange: Exchange) -> None:
    """Ends its answer with the finish reason "error" and nothing else."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "error"}
    if exchange.streamed:
        exchange.head()
        exchange.event(choices=[choice | {"delta": {}}])
        exchange.event(choices=[], usage=usage(exchange.prompt, 0))
        exchange.send("data: [DONE]\n\n")
    else:
        exchange.head(kind="application/json")
        exchange.send(json.dumps({"choices": [choice | {"message": {"role": "assistant", "content": ""}}]}))


async def hangs_up(_: Exchange) -> None:
    """Closes without a byte."""


async def stalls(exchange: Exchange) -> None:
    """Takes the request and says nothing, not even headers."""
    await exchange.gone.wait()


def stalls_after(words: int) -> Script:
    """Falls silent after so many words (with 0 after the headers)."""

    async def script(exchange: Exchange) -> None:
        exchange.head()
        exchange.words(1, words)
        await exchange.gone.wait()

    return script


# ---------------------------------------------------------------------------------------------------------- providers


class Provider:
    """One running provider: a script, and everything it has been asked."""

    def __init__(self, script: Script | None) -> None:
        self.script = script
        self.url = ""
        self.exchanges: list[Exchange] = []
        self.hung_up: list[bytes] = []
        """First bytes of connections that ended before they were a request."""
        self.greeted = 0
        """Connections that began with something else than a request: TLS, where nobody speaks it."""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Listen; without a script only long enough to have a port that nobody listens on."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        if self.script is None:
            await self.stop()

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the caller's way of leaving, or the end of the test
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = bytearray()
        while b"\r\n\r\n" not in seen:
            data = await reader.read(65536)
            if not data:
                self.hung_up.append(bytes(seen))
                return
            seen += data
            self.greeted += not seen.startswith(b"P")  # say nothing and wait for the end
        head, _, body = bytes(seen).partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")[1:]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        while len(body) < int(headers["content-length"]):
            body += await reader.read(65536)
        exchange = Exchange(json.loads(body), headers, writer)
        self.exchanges.append(exchange)
        await self._answer(exchange, reader, writer)

    async def _answer(self, exchange: Exchange, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def watch() -> None:
            with contextlib.suppress(ConnectionError):
                await reader.read()
            exchange.gone.set()

        watching = asyncio.ensure_future(watch())
        assert self.script is not None
        try:
            await self.script(exchange)
            await writer.drain()
            exchange.finished = True
        finally:
            watching.cancel()


@dataclass
class Sold:
    """One provider of the model: how it behaves and what it asks. Prices in pico-dollars per token."""

    name: str
    script: Script | None = field(default_factory=serves)
    """None: nobody listens on its port."""
    input: int = INPUT
    output: int = OUTPUT
    context: int = 128_000
    kind: ProviderKind = ProviderKind.NATIVE
    preset: str | None = None
    tls: bool = False
    url: str = ""
    """Where it is when it is not one of ours."""
    cached_input: int | None = None
    listed: bool = False
    """Whether it sells at the catalog file's prices and not at these."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Other members of its model's configuration."""


class Market(Devnet):
    """A development network whose node sells one model over scripted providers, besides the network's own."""

    sold: Sequence[Sold] = ()
    routing = RoutingConfig()
    pricing = PricingConfig()

    async def _start(self) -> None:
        self.providers = {each.name: Provider(each.script) for each in self.sold if not each.url}
        for provider in self.providers.values():
            await provider.start()
            self._exit.push_async_callback(provider.stop)
        await super()._start()

    def config(self, port: int = 0) -> Config:
        """The network's configuration with our providers and models."""
        config = super().config(port)
        providers = [
            ProviderConfig(
                each.name,
                self._url(each),
                kind=each.kind,
                api_key=Secret(KEY),
                preset=each.preset,
                quirks=QuirksConfig(),
                models=(MODEL,) if each.listed else (),
            )
            for each in self.sold
        ]
        models = [
            ModelConfig(
                MODEL,
                each.name,
                "theirs",
                Pico(each.input),
                Pico(each.input if each.cached_input is None else each.cached_input),
                Pico(each.output),
                each.context,
                100_000,
                **each.more,
            )
            for each in self.sold
            if not each.listed
        ]
        return replace(
            config,
            providers=(*config.providers, *providers),
            models=(*models, *config.models),
            routing=self.routing,
            pricing=self.pricing,
        )

    def _url(self, each: Sold) -> str:
        url = each.url or self.providers[each.name].url
        return url.replace("http:", "https:") if each.tls else url


class Shop(World):
    """A world with scripted providers."""

    net: Market

    def provider(self, name: str) -> Provider:
        return self.net.providers[name]

    def asked(self) -> dict[str, int]:
        """How many requests every provider has had."""
        return {name: len(provider.exchanges) for name, provider in self.net.providers.items()}

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log.lines if line["event"] == event]


@contextlib.asynccontextmanager
async def new_shop(
    *sold: Sold,
    options: DevnetOptions | None = None,
    routing: RoutingConfig | None = None,
    catalog: Path | None = None,
    pricing: PricingConfig | None = None,
    real_time: bool = False,
) -> AsyncIterator[Shop]:
    """A node that sells over these providers; it must not have made a mistake by the end."""
    clock, log = SystemClock() if real_time else ManualClock(), LogLines()
    net = Market(options or DevnetOptions(tokens_per_second=0.0), log=log, clock=clock)
    net.sold, net.routing = sold, routing or RoutingConfig()
    net.pricing = pricing or PricingConfig(catalog=catalog)
    async with net, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        shop = Shop(net, http, clock, log)  # type: ignore[arg-type]  # a payer only asks for the time
        try:
            yield shop
        except BaseException as error:
            for bug in log.bugs:  # a 500 says nothing by itself
                error.add_note(str(bug))
            raise
        await shop.settled()
        assert log.bugs == []
        assert net.fatal is None
