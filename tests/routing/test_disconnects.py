"""A client that leaves takes its upstream request with it, whatever the node was doing (P-28).

The limit of these waits bounds a failing test only: that it happens at once is what the events show.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from tests.routing.test_failover import ask, charged
from tests.support.http_client import UNIT, chat
from tests.support.providers import (
    INPUT,
    MODEL,
    OUTPUT,
    Exchange,
    Provider,
    Shop,
    Sold,
    answers,
    new_shop,
    serves,
    stalls,
    stalls_after,
)

PATIENCE_S = 5.0


async def asked(provider: Provider) -> Exchange:
    """The one request a provider has had, once it has."""
    async with asyncio.timeout(PATIENCE_S):
        while not provider.exchanges:
            await asyncio.sleep(0.001)
    (exchange,) = provider.exchanges
    return exchange


@contextlib.asynccontextmanager
async def client(shop: Shop, body: dict[str, Any]) -> AsyncIterator[asyncio.Task[None]]:
    """A buyer on a connection of its own, which is closed when its task is cancelled."""
    credential = await shop.pay(shop.payer.open(shop.payer.channel(), UNIT), body)

    async def buy() -> None:
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{shop.net.node.url}/v1/chat/completions", json=body, headers={"Authorization": credential}) as reply,
        ):
            await reply.read()

    task = asyncio.ensure_future(buy())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def leave(task: asyncio.Task[None]) -> None:
    """Hang up in the middle of a request."""
    assert not task.done(), "the answer came before the client could leave"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_p28_while_connecting() -> None:
    """P-28: a TLS handshake that hangs is given up with its client."""
    async with new_shop(Sold("plain", tls=True)) as shop, client(shop, ask()) as buyer:
        provider = shop.provider("plain")
        async with asyncio.timeout(PATIENCE_S):
            while not provider.greeted:
                await asyncio.sleep(0.001)
        await leave(buyer)
        async with asyncio.timeout(PATIENCE_S):
            while not provider.hung_up:
                await asyncio.sleep(0.001)
        assert await charged(shop) == [0]


async def test_p28_before_the_headers_and_before_the_first_byte() -> None:
    """P-28: a provider that thinks is told to stop; its prompt is the caller's once it has been taken, not before."""
    for script, due in ((stalls, 0), (stalls_after(0), len("hello there") // 6 * INPUT)):
        async with new_shop(Sold("mute", script)) as shop, client(shop, ask()) as buyer:
            exchange = await asked(shop.provider("mute"))
            await leave(buyer)
            await asyncio.wait_for(exchange.gone.wait(), PATIENCE_S)
            (owed,) = await charged(shop)
            assert owed in {0, due}, "the headers may or may not have been there"


async def test_p28_before_a_buffered_answer() -> None:
    """P-28: half of a buffered answer is worth nothing: the provider is cut off and the caller pays nothing."""

    async def half(exchange: Exchange) -> None:
        exchange.head(kind="application/json")
        exchange.send('{"choices":[')
        await exchange.gone.wait()

    async with new_shop(Sold("slow", half)) as shop, client(shop, ask(stream=False)) as buyer:
        exchange = await asked(shop.provider("slow"))
        await leave(buyer)
        await asyncio.wait_for(exchange.gone.wait(), PATIENCE_S)
        assert await charged(shop) == [0]


async def test_p28_in_the_middle_of_a_stream() -> None:
    """P-28: the provider is cut off, and what had been delivered is paid for."""
    async with new_shop(Sold("endless", stalls_after(3))) as shop:
        body = ask()
        credential = await shop.pay(shop.payer.open(shop.payer.channel(), UNIT), body)
        async with shop.stream(body, credential) as stream:
            await stream.tokens(3)
            stream.response.close()
        exchange = await asked(shop.provider("endless"))
        await asyncio.wait_for(exchange.gone.wait(), PATIENCE_S)
        assert await charged(shop) == [len("hello there") // 6 * INPUT + 3 * OUTPUT]


async def test_p28_during_a_failover() -> None:
    """P-28: who leaves while the second provider is tried cancels the second, and no third is asked."""
    async with new_shop(Sold("bad", answers(500)), Sold("mute", stalls), Sold("good", serves())) as shop:
        async with client(shop, ask("bad", "mute", "good")) as buyer:
            exchange = await asked(shop.provider("mute"))
            await leave(buyer)
            await asyncio.wait_for(exchange.gone.wait(), PATIENCE_S)
        assert await charged(shop) == [0]
        assert shop.asked() == {"bad": 1, "mute": 1, "good": 0}


async def test_p28_while_a_stream_waits_for_a_voucher() -> None:
    """P-28: a client that leaves instead of signing ends the upstream too; it owes what it received."""
    async with new_shop(Sold("long", stalls_after(400))) as shop:
        body = chat(MODEL, max_tokens=1000)
        channel = shop.payer.channel()
        credential = await shop.pay(shop.payer.open(channel, UNIT), body)
        async with shop.stream(body, credential) as stream:
            await stream.until("payment-need-voucher")
            paused = stream.text_chunks
            while stream.text_chunks < 99:
                assert await stream.next() is not None
            stream.response.close()
        exchange = await asked(shop.provider("long"))
        await asyncio.wait_for(exchange.gone.wait(), PATIENCE_S)
        (owed,) = await charged(shop)
        assert paused < 99
        assert 99 * OUTPUT <= owed <= UNIT * 1_000_000
