"""What an OpenTelemetry receiver is told of requests: everything an operator asks, nothing secret, at nobody's cost."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from channels.units import Pico
from mppnode.cli.devnet import Devnet, DevnetOptions
from mppnode.config.schema import Config, ModelConfig, ProviderConfig
from mppnode.config.secrets import Secret
from mppnode.config.traces import TracesConfig
from mppnode.gateways import otel
from mppnode.gateways.otel import OtelTraces
from mppnode.kernel.listing import ProviderKind
from mppnode.observe.traces import Role, Span
from tests.support.customers import new_customer
from tests.support.http_client import UNIT, LogLines, World, chat, new_world

SERVER, CLIENT, INTERNAL = 2, 3, 1
FAILED = 2
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TOKEN = "Bearer collector-token-4711-secret"


class Receiver:
    """An OTLP receiver that keeps what it gets; it may also refuse, or say nothing until it is released."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        self.asked = 0
        self.silent: asyncio.Event | None = None

    async def post(self, request: web.Request) -> web.Response:
        self.asked += 1
        body = await request.read()
        if self.silent is not None:
            await self.silent.wait()
        if self.status == 200:
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
        return web.Response(status=self.status, body=b"upstream says: secret")

    @property
    def spans(self) -> list[Any]:
        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found += list(scope.spans)
        return found

    @property
    def resource(self) -> dict[str, str]:
        (of,) = ExportTraceServiceRequest.FromString(self.bodies[0]).resource_spans
        return {each.key: each.value.string_value for each in of.resource.attributes}


def told(span: Any) -> dict[str, Any]:
    """The attributes of a span."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    app = web.Application()
    app.router.add_post("/v1/traces", made.post)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    if made.silent is not None:
        made.silent.set()
    await runner.cleanup()


@contextlib.asynccontextmanager
async def traced(receiver: Receiver, **more: Any) -> AsyncIterator[World]:
    config = TracesConfig(receiver.url, headers=(("authorization", Secret(TOKEN)),), **more)
    async with new_world(DevnetOptions(tokens_per_second=0.0, traces=config)) as world:
        yield world
        assert world.log.bugs == []


def way(world: World) -> OtelTraces:
    """How spans leave a node."""
    engine = world.net.node._engine
    assert engine is not None
    assert engine.reporter._tracer is not None
    found = engine.reporter._tracer.take.__self__  # type: ignore[attr-defined]
    assert isinstance(found, OtelTraces)
    return found


async def sent(world: World, receiver: Receiver) -> tuple[Any, dict[str, Any]]:
    """The request's own span and the others by name, once everything has arrived."""
    await asyncio.to_thread(way(world).flush)
    (whole,) = [span for span in receiver.spans if span.kind == SERVER]
    return whole, {span.name: span for span in receiver.spans if span.kind != SERVER}


def configured(monkeypatch: pytest.MonkeyPatch, change: Callable[[Config], Config]) -> None:
    made = Devnet.config
    monkeypatch.setattr(Devnet, "config", lambda self, port=0: change(made(self, port)))


async def test_a_paid_stream_is_a_span_with_its_parts(receiver: Receiver) -> None:
    """Names, kinds, attributes and times of a stream's spans; every child is inside its request's span."""
    async with traced(receiver) as world:
        channel, body = await world.opened(), chat("dev/story", max_tokens=5)
        credential = await world.pay(world.payer.voucher(channel, 6 * UNIT), body)
        gate = world.gate()
        async with world.stream(body, credential) as stream:
            await stream.tokens(1)
            world.clock.advance(2)
            await gate.release(100)
            await stream.rest()
            name = stream.response.headers["X-Request-Id"]
        await world.settled()
        whole, parts = await sent(world, receiver)
        account = await world.account(channel)
    assert whole.name == "chat dev/story"
    assert told(whole) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "dev/story",
        "gen_ai.response.model": "dev/story",
        "gen_ai.provider.name": "dev",
        "gen_ai.usage.input_tokens": stream.usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 5,
        "mppnode.request_id": name,
        "mppnode.rail": "session",
        "mppnode.ending": "complete",
        "mppnode.cost_pico": account.owed_pico,
        "mppnode.attempts": 1,
        "mppnode.strategy": "balanced",
    }
    assert {name: span.kind for name, span in parts.items()} == {
        "reservation": INTERNAL,
        "attempt dev": CLIENT,
        "streaming": INTERNAL,
        "settling": INTERNAL,
    }
    assert {(span.trace_id, span.parent_span_id) for span in parts.values()} == {(whole.trace_id, whole.span_id)}
    assert len({span.span_id for span in receiver.spans}) == 5
    assert (len(whole.trace_id), whole.parent_span_id) == (16, b"")
    streaming, (first,) = parts["streaming"], whole.events
    assert streaming.end_time_unix_nano - streaming.start_time_unix_nano == 2_000_000_000
    assert (first.name, first.time_unix_nano) == ("first_token", streaming.start_time_unix_nano)
    assert whole.end_time_unix_nano == world.clock.now_millis() * 1_000_000
    for span in parts.values():
        assert whole.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= whole.end_time_unix_nano
    assert receiver.headers[0]["authorization"] == TOKEN
    assert receiver.resource["service.name"] == "mppnode"
    assert receiver.resource["service.instance.id"] == "node"


async def test_a_keys_request_tells_neither_key_nor_account_nor_texts(receiver: Receiver) -> None:
    """A customer's buffered request on the rail of credit; nothing of who asked, or of what was said, leaves."""
    async with traced(receiver) as world:
        customer = await new_customer(world)
        reply = await customer.send(chat("dev/echo", "the prompt nobody may read", stream=False))
        assert reply.status == 200
        whole, parts = await sent(world, receiver)
    assert told(whole)["mppnode.rail"] == "credit"
    assert told(whole)["gen_ai.usage.input_tokens"] == reply.json["usage"]["prompt_tokens"]
    assert set(parts) == {"reservation", "attempt dev", "settling"}
    out = b"".join(receiver.bodies)
    said = reply.json["choices"][0]["message"]["content"].encode()
    for secret in (b"the prompt", said, customer.bearer[7:].encode(), customer.key.encode(), customer.account.encode()):
        assert secret
        assert secret not in out


async def test_a_channels_request_tells_no_channel_and_no_voucher(receiver: Receiver) -> None:
    """Neither the channel's id, nor its payer, nor a signature is in what is sent, as bytes or as hex."""
    async with traced(receiver) as world:
        channel, body = await world.opened(), chat("dev/echo", "the prompt nobody may read", max_tokens=5)
        voucher = world.payer.voucher(channel, 6 * UNIT)
        credential = await world.pay(voucher, body)
        async with world.stream(body, credential, headers={"traceparent": PARENT}) as stream:
            await stream.rest()
        await world.settled()
        whole, _ = await sent(world, receiver)
    assert whole.parent_span_id.hex() == PARENT[36:52]
    out = b"".join(receiver.bodies)
    for secret in (channel.id, world.payer.address, voucher.signature, world.payer.key):
        assert bytes(secret) not in out
        assert bytes(secret).hex().encode() not in out
    assert b"the prompt" not in out


async def test_a_failover_shows_both_attempts(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider that did not answer is a failed span of its own, before the one that did."""

    def two(config: Config) -> Config:
        dead = ModelConfig("dev/echo", "dead", "dev/echo", Pico(1), Pico(1), Pico(1), 128_000, 100_000)
        nobody = ProviderConfig("dead", "http://127.0.0.1:1/v1")
        return replace(config, providers=(*config.providers, nobody), models=(*config.models, dead))

    configured(monkeypatch, two)
    async with traced(receiver) as world:
        customer = await new_customer(world)
        assert (await customer.send(chat(stream=False))).status == 200
        whole, parts = await sent(world, receiver)
    assert told(whole)["mppnode.attempts"] == 2
    assert whole.status.code == 0
    assert told(parts["attempt dead"]) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "dead",
        "mppnode.result": "connect",
        "error.type": "connect",
    }
    assert parts["attempt dead"].status.code == FAILED
    assert told(parts["attempt dev"])["mppnode.result"] == "ok"


async def test_nobody_answering_is_an_error_with_its_kind(receiver: Receiver) -> None:
    """A request no provider served is an error, and its attempt says with which status."""
    async with traced(receiver) as world:
        customer = await new_customer(world)
        assert (await customer.send(chat("dev/error-500", stream=False))).status == 502
        await world.settled()
        whole, parts = await sent(world, receiver)
    assert (whole.status.code, told(whole)["error.type"], told(whole)["mppnode.cost_pico"]) == (FAILED, "failed", 0)
    assert "gen_ai.response.model" not in told(whole)
    assert told(parts["attempt dev"])["http.response.status_code"] == 500
    assert told(parts["attempt dev"])["error.type"] == "status"
    assert "streaming" not in parts


async def test_a_provider_that_breaks_off_is_named_in_its_attempt(receiver: Receiver) -> None:
    """A stream that dies in the middle is an error of the request, and its attempt has the kind."""
    async with traced(receiver) as world:
        customer, body = await new_customer(world), chat("dev/dies-after-3")
        async with customer.stream(body) as stream:
            await stream.rest()
        await world.settled()
        whole, parts = await sent(world, receiver)
    assert told(whole)["error.type"] == "upstream_failed"
    assert told(parts["attempt dev"])["error.type"] == "closed"
    assert told(parts["streaming"])["mppnode.delivered_tokens"] == 3


async def test_a_client_that_leaves_is_no_error(receiver: Receiver) -> None:
    """Disconnected while it waits for a provider: the attempt is cancelled, and nobody has failed."""
    async with traced(receiver) as world:
        channel, body = await world.opened(), chat("dev/story", max_tokens=5)
        credential = await world.pay(world.payer.voucher(channel, 6 * UNIT), body)
        world.gate(lent=0)
        asking = asyncio.ensure_future(world.send(body, credential))
        await world.eventually(lambda: world.net.provider.live == 1)
        asking.cancel()
        await asyncio.wait({asking})
        await world.settled()
        whole, parts = await sent(world, receiver)
    assert told(whole)["mppnode.ending"] == "disconnected"
    assert whole.status.code == parts["attempt dev"].status.code == 0
    assert told(parts["attempt dev"])["mppnode.result"] == "cancelled"
    assert not whole.events


async def test_a_callers_trace_goes_on_to_our_own_providers(receiver: Receiver) -> None:
    """The caller's span is the parent, and the provider is told its attempt's span."""
    async with traced(receiver) as world:
        customer = await new_customer(world)
        assert (await customer.send(chat(stream=False), headers={"traceparent": PARENT})).status == 200
        whole, parts = await sent(world, receiver)
        header = world.net.provider.last_headers["traceparent"]
    assert whole.trace_id.hex() == PARENT[3:35]
    assert whole.parent_span_id.hex() == PARENT[36:52]
    assert header == f"00-{PARENT[3:35]}-{parts['attempt dev'].span_id.hex()}-01"


async def test_other_peoples_providers_learn_no_trace(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only native providers get a header; a caller's own is never passed on."""

    def quota(config: Config) -> Config:
        (provider,) = config.providers
        return replace(config, providers=(replace(provider, kind=ProviderKind.QUOTA),))

    configured(monkeypatch, quota)
    async with traced(receiver) as world:
        customer = await new_customer(world)
        assert (await customer.send(chat(stream=False), headers={"traceparent": PARENT})).status == 200
        whole, _ = await sent(world, receiver)
        assert not [name for name in world.net.provider.last_headers if name.lower().startswith("trace")]
    assert whole.trace_id.hex() == PARENT[3:35]


@pytest.mark.parametrize(("flags", "permille"), [("00", 1000), ("01", 0)])
async def test_what_is_not_sampled_is_not_sent(receiver: Receiver, flags: str, permille: int) -> None:
    """A caller may keep a request out, the operator too; our providers are told so and nothing is kept of it."""
    async with traced(receiver, sample_permille=permille) as world:
        customer, gate = await new_customer(world), world.gate()
        async with customer.stream(chat("dev/story", max_tokens=5), headers={"traceparent": f"{PARENT[:-2]}{flags}"}) as stream:
            await stream.tokens(1)
            assert world.net.node._engine is not None
            assert [run.trace for run in world.net.node._engine._runs] == [None]
            await gate.release(100)
            await stream.rest()
        await world.settled()
        await asyncio.to_thread(way(world).flush)
        assert world.net.provider.last_headers["traceparent"].endswith("-00")
    assert receiver.asked == 0


async def test_a_malformed_traceparent_is_as_good_as_none(receiver: Receiver) -> None:
    """The request is served, in a trace of the node's own."""
    async with traced(receiver) as world:
        customer = await new_customer(world)
        headers = {"traceparent": PARENT.upper()}
        assert (await customer.send(chat(stream=False), headers=headers)).status == 200
        whole, _ = await sent(world, receiver)
    assert whole.parent_span_id == b""
    assert whole.trace_id.hex() != PARENT[3:35]


# ------------------------------------------------------------------------------------------------- receivers in trouble


def lost(log: LogLines) -> list[tuple[Any, Any]]:
    return [(line["why"], line["status"]) for line in log.lines if line["event"] == "traces.lost"]


async def test_an_outage_is_told_once_and_costs_no_request(receiver: Receiver) -> None:
    """While the receiver refuses, requests are served as ever; its return is told with what was lost."""
    receiver.status = 500
    async with traced(receiver) as world:
        customer = await new_customer(world)
        for _ in range(3):
            assert (await customer.send(chat(stream=False))).status == 200
            await asyncio.to_thread(way(world).flush)
        await world.eventually(lambda: way(world)._lost == 12)
        assert lost(world.log) == [("status", 500)]
        receiver.status = 200
        assert (await customer.send(chat(stream=False))).status == 200
        await asyncio.to_thread(way(world).flush)
        await world.eventually(lambda: any(line["event"] == "traces.resumed" for line in world.log.lines))
        (line,) = [line for line in world.log.lines if line["event"] == "traces.resumed"]
        assert line["lost"] == 12
    assert "upstream says" not in str(world.log.lines)


async def test_a_receiver_that_is_not_there_costs_no_request(receiver: Receiver) -> None:
    """Nobody listens: requests are served, and the operator hears of it once."""
    receiver.url = "http://127.0.0.1:1"
    async with traced(receiver) as world:
        customer = await new_customer(world)
        for _ in range(2):
            assert (await customer.send(chat(stream=False))).status == 200
            await asyncio.to_thread(way(world).flush)
        await world.eventually(lambda: lost(world.log) == [("unreachable", None)])


async def test_a_silent_receiver_holds_nobody_up_and_fills_nothing(receiver: Receiver) -> None:
    """While it says nothing, requests end; what waits is bounded, the rest is dropped, and stopping has a deadline."""
    receiver.silent = asyncio.Event()
    log = LogLines()
    traces = OtelTraces(TracesConfig(receiver.url), node="n", log=log, close_s=0.01)
    spans = [Span("x", Role.SERVER, 1, 2, 0, 1, 2, {})] * 8
    for _ in range(otel.QUEUE_MAX // 4):
        traces.take(spans)
    assert traces.waiting == otel.QUEUE_MAX
    assert lost(log) == [("queue", None)]
    async with asyncio.timeout(3):
        while not receiver.asked:
            await asyncio.sleep(0.001)
    async with asyncio.timeout(3):
        await traces.close()
    assert not receiver.bodies
    assert traces.waiting > 0
    receiver.silent.set()


async def test_a_silent_receiver_is_not_waited_for_by_requests(receiver: Receiver) -> None:
    """A customer is answered while a batch of spans hangs."""
    receiver.silent = asyncio.Event()
    async with traced(receiver) as world:
        customer = await new_customer(world)
        assert (await customer.send(chat(stream=False))).status == 200
        flushing = asyncio.ensure_future(asyncio.to_thread(way(world).flush))
        await world.eventually(lambda: receiver.asked == 1)
        assert (await customer.send(chat(stream=False))).status == 200
        assert not receiver.bodies
        receiver.silent.set()
        await flushing
    assert len([span for span in receiver.spans if span.kind == SERVER]) == 2


async def test_a_node_that_stops_sends_what_waits(receiver: Receiver) -> None:
    """The spans of the last requests arrive before the node is gone."""
    async with traced(receiver) as world:
        customer = await new_customer(world)
        assert (await customer.send(chat(stream=False))).status == 200
        assert receiver.asked == 0
    assert [span.name for span in receiver.spans if span.kind == SERVER] == ["chat dev/echo"]
    assert lost(world.log) == []


async def test_a_mistake_in_telling_costs_no_receipt(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that cannot be built are lost, and their request ends as ever."""

    def broken(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("mppnode.engine.report.spans_of", broken)
    async with traced(receiver) as world:
        customer = await new_customer(world)
        assert (await customer.send(chat(stream=False))).status == 200
        assert lost(world.log) == [("mistake", None)]


# ------------------------------------------------------------------------------------------------------ configuration


async def test_the_environment_decides_nothing(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables the SDK and HTTP clients read neither switch traces off, nor redirect them, nor add to them."""
    for name, value in {
        "OTEL_SDK_DISABLED": "true",
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-stray=1",
        "OTEL_RESOURCE_ATTRIBUTES": "stray=1",
        "OTEL_SERVICE_NAME": "stray",
        "OTEL_BSP_MAX_QUEUE_SIZE": "1",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "http_proxy": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, value)
    async with traced(receiver) as world:
        customer = await new_customer(world)
        assert (await customer.send(chat(stream=False))).status == 200
        await sent(world, receiver)
    assert receiver.resource["service.name"] == "mppnode"
    assert "stray" not in receiver.resource
    assert "x-stray" not in receiver.headers[0]


async def test_without_the_extra_the_node_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces that are configured and cannot be sent are a mistake to be told, with what to install."""
    monkeypatch.delitem(sys.modules, "mppnode.gateways.otel")
    monkeypatch.delattr("mppnode.gateways.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    options = DevnetOptions(traces=TracesConfig("http://127.0.0.1:4318"))
    with pytest.raises(ValueError, match=r"pip install 'mppnode\[otel\]'"):
        async with new_world(options):
            pass


def test_nothing_of_opentelemetry_is_imported_unless_it_is_wanted() -> None:
    """A node without traces neither needs the extra nor pays for loading it."""
    code = "import sys, mppnode.app; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
