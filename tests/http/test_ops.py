"""Probes, the drain and the reload, on a real application with a manual clock."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import make_mocked_request

from channels.faults import ChannelFault, Reason
from channels.units import Pico
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.ops import MetricsConfig
from mppnode.config.schema import Config, LimitsConfig, ProviderConfig
from mppnode.config.secrets import Secret
from mppnode.http.ops import LATE_S, SCRAPES_MAX, SILENT_S, OpsSurface, Phase, Vitals
from mppnode.kernel.clock import ManualClock
from mppnode.kernel.tasks import TaskOwner
from mppnode.reload import taken_up
from mppnode.routing.breaker import Standing
from tests.support.http_client import UNIT, Stream, World, chat, cost, new_world

OPTIONS = DevnetOptions(tokens_per_second=0.0, metrics=MetricsConfig(port=0))


class Body:
    """A process whose every organ a test can stop."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.lease = self.chain = self.providers = True
        self.asked = 0
        self.away = False
        self.silence: asyncio.Event | None = None
        self.failed: list[str] = []
        self.owner = TaskOwner(lambda name, error: self.failed.append(f"{name}: {error!r}"))
        self.vitals = Vitals(
            ping=self._ping,
            lease=lambda: self.lease,
            chain=lambda: self.chain,
            providers=lambda: self.providers,
            owner=self.owner,
            clock=self.clock,
        )

    async def _ping(self) -> None:
        self.asked += 1
        if self.silence is not None:
            await self.silence.wait()
        if self.away:
            raise ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger is away")


@pytest.fixture
async def body() -> Body:
    made = Body()
    await made.vitals.look()
    made.vitals.phase = Phase.OK
    return made


def why(body: Body) -> tuple[str, dict[str, str]]:
    """The status, and the checks that are not well."""
    status, checks = body.vitals.ready()
    return status, {name: str(check) for name, check in checks.items() if check != "ok"}


async def test_ready_means_started_and_able(body: Body) -> None:
    """A process asks for work only between its start and its drain, with its ledger and its lease; and says what lacks."""
    assert why(body) == ("ready", {})
    body.vitals.phase = Phase.STARTING
    assert why(body) == ("unready", {"node": "starting"})
    body.vitals.phase = Phase.DRAINING
    assert why(body) == ("unready", {"node": "draining"})
    body.vitals.phase = Phase.OK
    body.lease = False
    assert why(body) == ("unready", {"lease": "lost"})


async def test_what_is_away_for_everybody_degrades_and_no_more(body: Body) -> None:
    """Without chain or providers other nodes would do no better, so balancers keep sending."""
    body.chain = body.providers = False
    assert why(body) == ("degraded", {"chain": "unavailable", "providers": "unavailable"})


async def test_a_ledger_that_fails_or_hangs_takes_the_node_out(body: Body) -> None:
    """A refusal counts at once, silence after three seconds; the first answer brings the node back."""
    body.away = True
    await body.vitals.look()
    assert why(body) == ("unready", {"ledger": "unavailable"})
    body.away = False
    await body.vitals.look()
    assert why(body) == ("ready", {})
    body.clock.advance(1.0)
    assert body.vitals.ledger_age_ms == 1_000
    body.vitals._turned_at = body.clock.monotonic() + SILENT_S  # the loop turns all the time
    body.clock.advance(SILENT_S)
    assert why(body) == ("unready", {"ledger": "silent"})


async def test_a_stuck_loop_or_a_lost_lease_is_not_worth_keeping(body: Body) -> None:
    """Both make ``/healthz`` fail; an unreachable ledger does not, as a restart would not bring it back."""
    body.away = True
    await body.vitals.look()
    assert body.vitals.alive()[0]
    body.lease = False
    assert body.vitals.alive() == (False, {"loop": "ok", "lease": "lost"})
    body.lease = True
    body.clock.advance(1.0 + LATE_S + 0.1)  # since the last turn
    assert body.vitals.alive() == (False, {"loop": "late", "lease": "ok"})


async def test_a_turn_that_was_late_is_remembered_until_the_next_one() -> None:
    """A probe that is answered only because the loop has come unstuck still hears about it."""
    body, turns = Body(), list[str]()

    async def sleep(seconds: float) -> None:
        turns.append("late" if body.vitals.alive()[0] is False else "ok")
        if len(turns) == 4:
            raise asyncio.CancelledError
        body.clock.advance(seconds + (LATE_S + 1 if len(turns) == 2 else 0))

    with pytest.raises(asyncio.CancelledError):
        await body.vitals.keep(sleep)
    await body.owner.drain(deadline_s=1)
    assert turns == ["ok", "ok", "late", "ok"]


async def test_a_hanging_ledger_collects_no_questions() -> None:
    """One look at a time, however many seconds pass and however many probes come."""
    body, turns = Body(), 0
    body.silence = asyncio.Event()

    async def sleep(_: float) -> None:
        nonlocal turns
        turns += 1
        for _ in range(50):
            body.vitals.ready()
        await asyncio.sleep(0)
        if turns == 5:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await body.vitals.keep(sleep)
    assert body.asked == 1
    body.silence.set()
    await body.owner.drain(deadline_s=1)


# ----------------------------------------------------------------------------------------------------------- the ports


async def test_both_ports_answer_probes() -> None:
    """GET and HEAD, never cached, with nothing but words of ours; ``/metrics`` is for the operators' port alone."""
    async with new_world(OPTIONS) as world:
        node = world.net.node
        assert node.ops_url.startswith("http://127.0.0.1:")
        for base in (node.url, node.ops_url):
            for path, status in (("/healthz", "alive"), ("/readyz", "ready")):
                async with world.http.get(base + path) as answer:
                    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
                    told = await answer.json()
                    assert told["status"] == status
                    assert set(told["checks"].values()) == {"ok"}
                async with world.http.head(base + path) as answer:
                    assert (answer.status, await answer.read()) == (200, b"")
                async with world.http.post(base + path) as answer:
                    assert answer.status == 405
        async with world.http.get(node.url + "/metrics") as answer:
            assert answer.status == 404
        async with world.http.get(node.ops_url + "/metrics") as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert b"mppnode_requests_total" in await answer.read()
        async with world.http.get(node.ops_url + "/v1/models") as answer:
            assert answer.status == 404


async def test_probes_do_not_ask_the_ledger(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers may probe as often as they like: the node's own look is what they are told."""
    ledger = world.net.node.ledger
    assert ledger is not None
    assert world.net.node.vitals is not None
    asked = 0

    async def counting() -> frozenset[Any]:
        nonlocal asked
        asked += 1
        return frozenset()

    monkeypatch.setattr(world.net.node.vitals, "_ping", counting)
    replies = [await world.send(method="GET", path="/readyz") for _ in range(100)]
    assert {reply.status for reply in replies} == {200}
    assert asked <= 1, "the node's own look, if its second was over"


async def test_scrapers_that_hang_up_cost_one_page_at_a_time() -> None:
    """Whoever comes and goes, one page is drawn at once, and only so many wait: the threads are for others too."""
    drawing, most, drawn, held = 0, 0, 0, threading.Event()
    count = threading.Lock()

    def page(_: str) -> tuple[bytes, str]:
        nonlocal drawing, most, drawn
        with count:
            drawing, drawn = drawing + 1, drawn + 1
            most = max(most, drawing)
        held.wait(10)
        with count:
            drawing -= 1
        return b"x 1\n", "text/plain"

    surface = OpsSurface(Body().vitals, page)
    scrapes = [asyncio.ensure_future(surface.metrics(make_mocked_request("GET", "/metrics"))) for _ in range(20)]
    while not drawing:
        await asyncio.sleep(0)
    refused = [scrape for scrape in scrapes if scrape.done()]
    assert [scrape.result().status for scrape in refused] == [503] * (20 - 1 - SCRAPES_MAX)
    for scrape in scrapes:
        scrape.cancel()
    await asyncio.gather(*scrapes, return_exceptions=True)
    last = asyncio.ensure_future(surface.metrics(make_mocked_request("GET", "/metrics")))
    for _ in range(20):
        await asyncio.sleep(0)
    assert (most, drawn) == (1, 1)
    held.set()
    assert (await last).status == 200
    assert (most, drawn) == (1, 2)


async def test_a_page_that_cannot_be_drawn_does_not_stop_the_next() -> None:
    """A scrape fails alone, also one that nobody waits for any more."""
    pages = [RuntimeError("no"), (b"x 1\n", "text/plain")]

    def page(_: str) -> tuple[bytes, str]:
        found = pages.pop(0)
        if isinstance(found, RuntimeError):
            raise found
        return found  # type: ignore[return-value]

    surface = OpsSurface(Body().vitals, page)
    with pytest.raises(RuntimeError):
        await surface.metrics(make_mocked_request("GET", "/metrics"))
    assert (await surface.metrics(make_mocked_request("GET", "/metrics"))).status == 200


# ----------------------------------------------------------------------------------------------------------- the drain


@asynccontextmanager
async def streaming(world: World, tokens: int, max_tokens: int = 100) -> AsyncIterator[Stream]:
    """A stream that has got some tokens and waits for its provider; the gate stays with the caller."""
    gate = world.gate()
    channel, body = await world.opened(), chat("dev/story", max_tokens=max_tokens)
    async with world.stream(body, await world.pay(world.payer.voucher(channel, UNIT), body)) as speaking:
        await gate.release(tokens)
        await speaking.tokens(tokens)
        yield speaking


async def probe(world: World, base: str) -> int:
    async with world.http.get(base + "/readyz") as answer:
        return answer.status


async def unready(world: World) -> None:
    async with asyncio.timeout(3):
        while await probe(world, world.net.node.ops_url) != 503:
            await asyncio.sleep(0.001)


async def restarted(world: World) -> None:
    world.net.node = world.net.new_node()
    await world.net.node.start()
    world.net.node.hurry()  # whenever it stops


async def test_a_leaving_node_serves_until_balancers_have_seen_it() -> None:
    """Unready at once, yet it serves for the delay, closing each connection; then it refuses without a charge."""
    options = replace(OPTIONS, limits=LimitsConfig(drain_delay_s=300, drain_s=600))
    async with new_world(options) as world:
        channel = await world.opened()
        stopping = asyncio.ensure_future(world.net.node.stop())
        await unready(world)
        assert await probe(world, world.net.node.url) == 503
        served = await world.buy(chat(max_tokens=5), world.payer.voucher(channel, UNIT))
        assert (served.status, served.headers["Connection"]) == (200, "close")
        world.net.node.hurry()
        await stopping
        with pytest.raises(aiohttp.ClientError):
            await world.send(chat())
        await restarted(world)
        assert (await world.account(channel)).holds == {}


async def test_a_drain_lets_streams_finish_and_refuses_what_is_new() -> None:
    """The running stream ends whole with its receipt; a request that comes on an open connection is 503 and free."""
    async with new_world(replace(OPTIONS, limits=LimitsConfig(drain_s=600))) as world:
        other = await world.opened()
        late = chat(max_tokens=5)
        credential = await world.pay(world.payer.voucher(other, UNIT), late)
        data = json.dumps(late).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Authorization: {credential}\r\nContent-Length: {len(data)}\r\n\r\n"
        ).encode()
        async with streaming(world, 10, max_tokens=20) as speaking:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(world.net.node.url.rpartition(":")[2]))
            writer.write(head)
            await world.eventually(lambda: len(world.net.node._drain._active) == 2)
            stopping = asyncio.ensure_future(world.net.node.stop())
            await unready(world)
            writer.write(data)
            answer = (await reader.read()).lower()
            writer.close()
            assert answer.startswith(b"http/1.1 503")
            assert b"retry-after: " in answer
            assert b"connection: close" in answer
            assert b"shutting_down" in answer
            assert world.net.provider.gate is not None
            await world.net.provider.gate.release(10)
            await speaking.rest()
            await stopping
        assert speaking.text_chunks == 20
        assert speaking.final.spent > 0
        await restarted(world)
        account = await world.account(other)
        assert (account.owed_pico, account.holds) == (0, {})


@pytest.mark.parametrize("how", ["no time", "second signal"])
async def test_what_outlasts_the_drain_is_ended_exactly(how: str) -> None:
    """Out of time or hurried, a stream ends with the reason, its exact bill and a receipt; who waits gets 503, free."""
    patience = 0 if how == "no time" else 600
    async with new_world(replace(OPTIONS, limits=LimitsConfig(drain_s=patience))) as world:
        mute = chat("dev/stalls-first", max_tokens=9)
        waiting = await world.opened()
        credential = await world.pay(world.payer.voucher(waiting, UNIT), mute)
        async with streaming(world, 10) as speaking:
            asked = world.net.provider.requests
            unanswered = asyncio.ensure_future(world.send(mute, credential))
            await world.eventually(lambda: world.net.provider.requests == asked + 1)
            stopping = asyncio.ensure_future(world.net.node.stop())
            if how == "second signal":
                await unready(world)
                world.net.node.hurry()
            await speaking.rest()
            await stopping
        assert speaking.chunks[-1]["mppnode"] == {"ended": "node_stopped"}
        assert speaking.events[-1].data == "[DONE]"
        refused = await unanswered
        assert (refused.status, refused.code) == (503, "shutting_down")
        assert int(refused.headers["Retry-After"]) > 0
        assert world.log.endings().count("node_stopped") == 2
        await restarted(world)
        books = world.net.node.books
        assert books is not None
        accounts = {account.id: account for account in await books.accounts()}
        assert not any(account.holds for account in accounts.values())
        assert accounts.pop(waiting.id).owed_pico == 0
        (charged,) = accounts.values()
        assert charged.owed_pico == cost(10, 1)
        assert speaking.final.spent == charged.spent
        assert world.log.bugs == []


# ---------------------------------------------------------------------------------------------------------- the reload


def dearer(config: Config, factor: int = 2) -> Config:
    return replace(config, models=tuple(replace(model, output=Pico(model.output * factor)) for model in config.models))


async def test_running_requests_keep_what_they_began_with() -> None:
    """A stream ends at its old price although its provider has another key, or is gone, and prices have doubled."""
    async with new_world(OPTIONS) as world:
        config = world.net.config()
        async with streaming(world, 10, max_tokens=20) as speaking:
            elsewhere = ProviderConfig("other", "http://127.0.0.1:9/v1", api_key=Secret("new-key"))
            models = tuple(replace(model, provider="other") for model in config.models[:1])
            await world.net.node.reload(dearer(replace(config, providers=(elsewhere,), models=models)))
            assert world.net.provider.gate is not None
            await world.net.provider.gate.release(10)
            await speaking.rest()
        assert speaking.text_chunks == 20
        assert Pico(round(float(speaking.usage["cost"]) * 10**12)) == cost(20, 2)
        assert (await world.send(chat("dev/echo"))).code == "unknown_model"
        await world.net.node.reload(config)
        assert (await world.send(chat("dev/echo"))).status == 402
        assert world.log.bugs == []


async def test_health_of_unchanged_providers_is_kept() -> None:
    """What failed stays avoided over a reload of prices; behind another key or address everything starts afresh."""
    async with new_world(OPTIONS) as world:
        config, sales = world.net.config(), world.net.node.sales
        assert sales is not None
        health, now = sales.market.router.health, world.clock.monotonic()
        (listing,) = sales.shelf.current.listings("dev/story")
        permit = health.admit(listing, now)
        assert permit is not None
        from mppnode.routing.health import outcome_of

        permit.release(outcome_of("status", status=401), now)
        key = ("dev", "dev/story")
        assert health.standing(key, now) is Standing.OPEN
        await world.net.node.reload(dearer(config))
        assert sales.market.router.health.standing(key, now) is Standing.OPEN
        assert world.net.node.vitals is not None
        assert world.net.node.vitals.ready()[0] == "degraded", "its only provider is avoided"
        keyed = tuple(replace(provider, api_key=Secret("fresh")) for provider in config.providers)
        await world.net.node.reload(replace(config, providers=keyed))
        assert sales.market.router.health.standing(key, now) is Standing.STEADY


async def test_a_reload_takes_only_what_may_change(world: World) -> None:
    """Of a configuration that differs everywhere, ports, chain and limits stay; prices and secrets are taken."""
    old = world.net.config()
    new = replace(
        dearer(old),
        node=replace(old.node, port=1, realm="other", challenge_secrets=(Secret(b"x" * 40),)),
        limits=replace(old.limits, drain_s=99),
        metrics=MetricsConfig(port=9),
    )
    taken = taken_up(old, new)
    assert (taken.node.port, taken.node.realm, taken.limits, taken.metrics) == (old.node.port, old.node.realm, old.limits, None)
    assert taken.models == new.models
    assert taken.node.challenge_secrets == new.node.challenge_secrets
    assert taken.admin is None
