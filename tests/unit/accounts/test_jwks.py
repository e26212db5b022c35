"""An issuer's keys: asked for rarely, believed for a while, and an outage is never the caller's fault."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from mppnode.gateways import jwks
from mppnode.gateways.jwks import IssuerKeys, JwksPolicy, KeysUnavailable, jwks_fetcher, jwks_session
from mppnode.kernel.clock import ManualClock
from mppnode.kernel.tasks import TaskOwner


class Issuer:
    """Publishes names as keys, fails when told, and counts who asks."""

    def __init__(self, *kids: str) -> None:
        self.kids = list(kids)
        self.fault: Exception | None = None
        self.asked = 0
        self.gate: asyncio.Event | None = None
        self.clock = ManualClock()
        self.bugs: list[BaseException] = []
        self.tasks = TaskOwner(lambda _, error: self.bugs.append(error))
        self.keys = IssuerKeys(self.fetch, self.parse, self.clock, self.tasks)

    async def fetch(self) -> bytes:
        self.asked += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return " ".join(self.kids).encode()

    def parse(self, body: bytes) -> Mapping[str, str]:
        if body == b"malformed":
            raise ValueError("what the issuer said")
        return {kid: kid.upper() for kid in body.decode().split()}


async def test_a_known_key_is_fetched_once() -> None:
    """A set that is fresh answers without asking, however many come at once."""
    issuer = Issuer("a")
    assert await asyncio.gather(*(issuer.keys.key("a") for _ in range(50))) == ["A"] * 50
    assert issuer.asked == 1


async def test_invented_ids_ask_at_most_once_an_interval() -> None:
    """A stranger's unknown ids cost the issuer one request a minute; a rotated key is found at the next."""
    issuer = Issuer("a")
    for number in range(100):
        assert await issuer.keys.key(f"x{number}") is None
    assert issuer.asked == 1
    issuer.kids.append("b")
    issuer.clock.advance(59)
    assert await issuer.keys.key("b") is None
    issuer.clock.advance(1)
    assert await issuer.keys.key("b") == "B"
    assert issuer.asked == 2


@pytest.mark.parametrize("fault", [KeysUnavailable("down"), ValueError("what the issuer said"), RuntimeError("bug")])
async def test_an_outage_is_no_refusal(fault: Exception) -> None:
    """When the issuer cannot be asked, unknown ids are 503 and known keys go on, until they are too old."""
    issuer = Issuer("a")
    issuer.fault = fault
    for _ in range(3):
        with pytest.raises(KeysUnavailable) as caught:
            await issuer.keys.key("a")
        assert "what the issuer said" not in str(caught.value)
    assert issuer.asked == 1
    issuer.fault = None
    issuer.clock.advance(60)
    assert await issuer.keys.key("a") == "A"
    issuer.fault = fault
    issuer.clock.advance(3600)
    assert await issuer.keys.key("a") == "A"
    assert issuer.asked == 3
    with pytest.raises(KeysUnavailable):
        await issuer.keys.key("b")
    issuer.clock.advance(86_400 - 3600)
    with pytest.raises(KeysUnavailable):
        await issuer.keys.key("a")


async def test_a_withdrawn_key_ends_with_its_set() -> None:
    """A key the issuer no longer publishes is gone when the set is fetched again, within the hour."""
    issuer = Issuer("a", "b")
    assert await issuer.keys.key("a") == "A"
    issuer.kids.remove("a")
    issuer.clock.advance(3599)
    assert await issuer.keys.key("a") == "A"
    issuer.clock.advance(1)
    assert await issuer.keys.key("a") is None


async def test_who_hangs_up_does_not_spend_the_attempt() -> None:
    """The fetch goes on without the request that began it, and the others get its result."""
    issuer = Issuer("a")
    issuer.gate = asyncio.Event()
    first = asyncio.ensure_future(issuer.keys.key("x"))
    second = asyncio.ensure_future(issuer.keys.key("a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    issuer.gate.set()
    assert await second == "A"
    assert issuer.asked == 1


async def test_a_slow_issuer_holds_up_one_request_and_not_all() -> None:
    """While an old set is fetched again, everybody else uses it as it is."""
    issuer = Issuer("a")
    await issuer.keys.key("a")
    issuer.clock.advance(3600)
    issuer.gate = asyncio.Event()
    first = asyncio.ensure_future(issuer.keys.key("a"))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):  # fails instead of hanging
        assert await issuer.keys.key("a") == "A"
    assert not first.done()
    issuer.gate.set()
    assert await first == "A"


@pytest.mark.parametrize("times", [(0, 1, 1), (60, 59, 86_400), (60, 3600, 3599)])
def test_times_out_of_order_are_refused(times: tuple[int, int, int]) -> None:
    """A policy in which a set is stale before it may be fetched again does not start."""
    with pytest.raises(ValueError):
        JwksPolicy(*times)


@pytest.mark.parametrize("url", ["http://id.example/keys", "ftp://id.example/keys", "https://u:p@id.example/keys", ""])
def test_keys_come_over_https(url: str) -> None:
    """Whoever could change the keys on their way could sign as anybody; no such address is taken."""
    with pytest.raises(ValueError):
        jwks_fetcher(None, url)  # type: ignore[arg-type]


class Site:
    """A real HTTP server that answers one path as told."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {"body": b"{}"}
        self.paths: list[str] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path)
        if self.answer.get("hang"):
            assert request.transport is not None
            request.transport.close()
        return web.Response(**{name: value for name, value in self.answer.items() if name != "hang"})


async def fetched(answer: dict[str, Any]) -> tuple[bytes | str, list[str]]:
    site = Site()
    site.answer = answer
    runner = web.ServerRunner(web.Server(site.handle))
    await runner.setup()
    server = web.TCPSite(runner, "127.0.0.1", 0)
    await server.start()
    port = runner.addresses[0][1]
    try:
        async with jwks_session() as session:
            try:
                return await jwks_fetcher(session, f"http://127.0.0.1:{port}/keys")(), site.paths
            except KeysUnavailable as fault:
                return str(fault), site.paths
    finally:
        await runner.cleanup()


async def test_a_key_set_is_fetched_from_a_server() -> None:
    """One GET brings the bytes as they are."""
    assert await fetched({"body": b'{"keys":[]}'}) == (b'{"keys":[]}', ["/keys"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"status": 302, "headers": {"Location": "/evil"}}, "status 302"),
        ({"status": 500, "body": b"a secret"}, "status 500"),
        ({"body": b"x" * (jwks.BODY_BYTES_MAX + 1)}, "more than"),
        ({"body": b"x", "headers": {"Content-Encoding": "gzip"}}, "compressed"),
        ({"hang": True}, "could not be reached"),
    ],
)
async def test_what_is_no_key_set_is_refused(answer: dict[str, Any], words: str) -> None:
    """No redirect is followed, nothing is read beyond its limit, and nothing the server says is repeated."""
    text, paths = await fetched(answer)
    assert isinstance(text, str)
    assert words in text
    assert "secret" not in text
    assert set(paths) == {"/keys"}  # aiohttp asks again where a connection breaks


async def test_a_slow_server_is_given_up() -> None:
    """The session has a time limit of its own, and running into it is an outage of the issuer."""

    class Slow:
        def get(self, *_: object, **__: object) -> Any:
            raise TimeoutError

    with pytest.raises(KeysUnavailable, match="in time"):
        await jwks_fetcher(Slow(), "https://id.example/keys")()  # type: ignore[arg-type]
    async with jwks_session() as session:
        assert session.timeout == aiohttp.ClientTimeout(total=jwks.TOTAL_S, connect=jwks.CONNECT_S)
