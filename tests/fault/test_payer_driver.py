"""The paying client when its server vanishes in the middle of opening a channel."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from channels.descriptor import RESERVE_ADDRESS, Escrow, SessionProtocol
from channels.ids import Address
from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.units import Units
from channels.wire.challenge import ChallengeMac, expires_text
from channels.wire.headers import serialize_challenge
from channels.wire.request import SessionRequest
from mppnode.chain.devchain import DevChain
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devchain_server import start_devchain
from mppnode.cli.devnet import CHAIN_ID, PATH_USD, V1_ESCROW
from mppnode.kernel.clock import ManualClock
from mppnode.payer.client import PayingClient

V2 = Escrow(SessionProtocol.V2, CHAIN_ID, RESERVE_ADDRESS)
MAC = ChallengeMac((b"k" * 32,))
TERMS = SessionRequest(
    amount=Units(25), currency=PATH_USD, recipient=Address(b"\x15" * 20), unit_type="token", escrow=V2, suggested_deposit=Units(1_000)
)
PATIENCE_S = 10
"""Only a client that waits for nothing makes a test wait this long."""


class Server:
    """Asks for payment, and hangs up on or serves whoever pays."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.hangs_up = True
        self.paid = 0
        self.reached = asyncio.Event()
        self.holds_answer = asyncio.Event()
        self.holds_answer.set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        if "Authorization" not in request.headers:
            expires = expires_text(type(self.clock.now_millis())(self.clock.now_millis() + 300_000), self.paid)
            challenge = MAC.issue(realm="r", method="tempo", intent="session", request=TERMS.encode(), expires=expires)
            return web.Response(status=402, headers={"WWW-Authenticate": serialize_challenge(challenge)})
        self.paid += 1
        self.reached.set()
        await self.holds_answer.wait()
        if self.hangs_up:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(body=b"data: [DONE]\n\n", content_type="text/event-stream")


@asynccontextmanager
async def rig() -> AsyncIterator[tuple[Server, PayingClient, str]]:
    server, key = Server(), os.urandom(32)
    chain = DevChain(server.clock, chain_id=CHAIN_ID, v1_address=V1_ESCROW)
    chain.fund(LocalSigner(key).address, Units(10**6))
    chain_runner, chain_url = await start_devchain(chain, "127.0.0.1", 0)
    app = web.Application()
    app.router.add_post("/", server.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    signer = LocalSigner(key)
    policy = PayerPolicy(signer.address, signer.address, frozenset({V2}), frozenset({PATH_USD}), Units(500), Units(5_000), Units(5_000))
    try:
        async with aiohttp.ClientSession() as http:
            books = RpcChain(HttpTransport(http, chain_url), server.clock, limits=RpcLimits())
            client = PayingClient(http, chain=books, signer=signer, policy=policy, now=server.clock.now_millis, entropy=os.urandom)
            yield server, client, f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()
        await chain_runner.cleanup()


async def read(client: PayingClient, url: str) -> list[str]:
    async with client.stream(url, {"model": "m"}) as events:
        return [data async for data in events]


async def test_a_lost_open_is_looked_up_before_the_next_request() -> None:
    """A connection that broke on the opening credential leaves the channel in doubt; the chain settles it, nothing waits."""
    async with rig() as (server, client, url):
        with pytest.raises(aiohttp.ClientError):
            await read(client, url)
        server.hangs_up = False
        assert await asyncio.wait_for(read(client, url), PATIENCE_S) == ["[DONE]"]
        assert server.paid == 2


async def test_a_request_that_waits_for_the_open_of_another_goes_on_when_that_one_dies() -> None:
    """Whoever waits beside a request that vanishes performs the look-up in its place."""
    async with rig() as (server, client, url):
        server.holds_answer.clear()
        first = asyncio.ensure_future(read(client, url))
        await server.reached.wait()
        second = asyncio.ensure_future(read(client, url))
        while not any(session.state.waiting for session in client.sessions()):
            await asyncio.sleep(0)
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        server.hangs_up = False
        server.holds_answer.set()
        assert await asyncio.wait_for(second, PATIENCE_S) == ["[DONE]"]


async def test_closing_after_a_lost_open_does_not_wait() -> None:
    """There may be nothing to close, but there is an answer."""
    async with rig() as (server, client, url):
        with pytest.raises(aiohttp.ClientError):
            await read(client, url)
        done: Any = await asyncio.wait_for(asyncio.gather(client.close(url), return_exceptions=True), PATIENCE_S)
        assert type(done[0]).__name__ in ("PaymentGivenUp", "NoneType")
        assert server.paid == 1
