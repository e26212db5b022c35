"""A client that leaves at the worst moment leaves no reservation behind."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import aiohttp

from channels.ids import ChannelId
from channels.model import Command, Outcome, Plan, Reserve
from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.units import Units
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devnet import PATH_USD, Devnet, DevnetOptions
from mppnode.config.schema import LimitsConfig
from mppnode.payer.client import PayingClient

BODY = {"model": "dev/story", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}


async def test_a_hold_committed_for_a_client_that_has_gone_is_released() -> None:
    """The reservation is on disk, its request is cancelled before it hears of it: the hold ends all the same."""
    async with Devnet(DevnetOptions(limits=LimitsConfig(drain_s=1))) as net, aiohttp.ClientSession() as http:
        rail = net.node.rail
        assert rail is not None
        real = rail._books.apply
        committed = asyncio.Event()
        heard = asyncio.Event()

        async def slow_news(channel: ChannelId, command: Command) -> Plan[Outcome]:
            plan = await real(channel, command)
            if isinstance(command, Reserve):
                committed.set()
                await heard.wait()
            return plan

        books: Any = rail._books
        books.apply = slow_news
        client = PayingClient(
            http,
            chain=RpcChain(HttpTransport(http, net.chain_url), net.clock, limits=RpcLimits()),
            signer=LocalSigner(net.payer_key),
            policy=PayerPolicy(net.payer, net.payer, frozenset({net.escrow}), frozenset({PATH_USD}), Units(10**6), Units(10**6), Units(10**6)),
            now=net.clock.now_millis,
            entropy=os.urandom,
        )

        async def ask() -> None:
            async with client.stream(net.chat_url, BODY) as events:
                async for _ in events:
                    pass

        asking = asyncio.ensure_future(ask())
        await asyncio.wait_for(committed.wait(), 10)
        (account,) = await books.accounts()
        assert len(account.holds) == 1
        server = net.node._runner.server  # type: ignore[union-attr]
        before = len(server.connections)
        asking.cancel()
        await asyncio.wait({asking})
        async with asyncio.timeout(10):
            while len(server.connections) >= before:  # until the node has seen the connection close
                await asyncio.sleep(0.01)
            heard.set()
            while (await books.accounts())[0].holds:
                await asyncio.sleep(0.01)
        assert (await books.accounts())[0].owed_pico == 0
