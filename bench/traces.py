"""What a recorded request costs: on the event loop, in the thread that sends, and of a whole request.

    python bench/traces.py [--calls 20000] [--requests 400]

First the parts, in microseconds per request (best of five rounds): its trace with a caller's parent and a provider's
header, its spans (a stream with one provider) built and queued, and the same encoded. Then CPU time of a whole process
(node, provider, customer and receiver in one) per buffered request without traces, with all of them recorded, and with
none of them; the three are asked in turn and the best of five rounds counts. Compare figures from one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import aiohttp
from aiohttp import web
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource

from channels.units import Pico
from mppnode.cli.devnet import Devnet, DevnetOptions
from mppnode.config.traces import TracesConfig
from mppnode.engine.stream import Ending
from mppnode.engine.traced import spans_of
from mppnode.gateways.otel import OtelTraces, _readable
from mppnode.kernel.clock import SystemClock
from mppnode.kernel.strategy import Strategy
from mppnode.kernel.usage import Usage
from mppnode.observe.logs import quiet
from mppnode.observe.traces import Trace, Tracer

PARENT = ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"]
ROUNDS = 5
CLOCK = SystemClock()


def microseconds(work: Callable[[], object], calls: int) -> float:
    """Best of several rounds, per call."""
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter_ns()
        for _ in range(calls):
            work()
        best = min(best, (time.perf_counter_ns() - begun) / calls / 1000)
    return best


def finished() -> Any:
    """What a stream that has ended looks like to whoever tells of it."""
    now = CLOCK.monotonic()
    listing = SimpleNamespace(model="maker/model", provider="provider")
    return SimpleNamespace(
        chat=SimpleNamespace(model="maker/model", stream=True),
        request_id="req_0123456789abcdef01234567",
        purchase=SimpleNamespace(rail="session"),
        strategy=Strategy.BALANCED,
        attempts=1,
        begun=now - 3,
        first_at=now - 2,
        answer=SimpleNamespace(listing=listing),
        tally=SimpleNamespace(usage=lambda: Usage(prompt=100, completion=200)),
        broke=None,
        delivered=200,
        starved_s=0.5,
        stalled_s=0.0,
    )


def parts(calls: int) -> None:
    """Print what the pieces cost."""
    tracer = Tracer(lambda _: None, sample_permille=1000, entropy=os.urandom)
    run, resource = finished(), Resource({"service.name": "mppnode"})
    trace = tracer.begin(PARENT, run.begun)

    def spans() -> list[Any]:
        told = spans_of(
            run, trace, total=Pico(5), ending=Ending.COMPLETE, word="complete", settling=run.first_at + 1, clock=CLOCK
        )
        return [_readable(span, resource) for span in told]

    def beginning() -> str:
        made: Trace = tracer.begin(PARENT, 1.0)
        return made.header()

    def encoded() -> bytes:
        made: bytes = encode_spans(ready).SerializeToString()
        return made

    ready = spans()
    print(f"begin, and a provider's header   {microseconds(beginning, calls):8.2f} us")
    print(f"spans of a stream                {microseconds(spans, calls):8.2f} us")
    print(f"encode, in the other thread      {microseconds(encoded, calls):8.2f} us")


async def listening(exits: AsyncExitStack) -> str:
    """A receiver that takes everything."""

    async def take(request: web.Request) -> web.Response:
        await request.read()
        return web.Response()

    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    exits.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


def flush(net: Devnet) -> None:
    """Send what waits, so that it is paid for in the round it belongs to."""
    engine = net.node._engine  # noqa: SLF001 - nobody else flushes
    tracer = None if engine is None else engine.reporter._tracer  # noqa: SLF001
    way = None if tracer is None else tracer.take.__self__  # type: ignore[attr-defined]
    if isinstance(way, OtelTraces):
        way.flush()


async def whole(requests: int) -> None:
    """Print what requests cost."""
    async with AsyncExitStack() as exits:
        url = await listening(exits)
        kinds = {"off": None, "all recorded": TracesConfig(url), "none recorded": TracesConfig(url, 0)}
        nets: dict[str, tuple[Devnet, str]] = {}
        for name, traces in kinds.items():
            options = DevnetOptions(tokens_per_second=0.0, traces=traces)
            net = await exits.enter_async_context(Devnet(options, log=quiet))
            nets[name] = net, await net.new_customer()
        http = await exits.enter_async_context(aiohttp.ClientSession())
        body = {"model": "dev/echo", "messages": [{"role": "user", "content": "hello"}], "stream": False}
        best = dict.fromkeys(kinds, float("inf"))
        for _ in range(ROUNDS):
            for name, (net, key) in nets.items():
                begun = time.process_time_ns()
                for _ in range(requests):
                    headers = {"Authorization": f"Bearer {key}", "traceparent": PARENT[0]}
                    async with http.post(net.chat_url, json=body, headers=headers) as answer:
                        assert answer.status == 200, await answer.text()
                        await answer.read()
                await asyncio.to_thread(flush, net)
                best[name] = min(best[name], (time.process_time_ns() - begun) / requests / 1000)
        for name, found in best.items():
            print(f"request, traces {name:16} {found:8.0f} us of CPU")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--requests", type=int, default=400)
    chosen = parser.parse_args()
    parts(chosen.calls)
    asyncio.run(whole(chosen.requests))
