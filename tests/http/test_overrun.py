"""A provider that ignores ``max_tokens`` costs the caller nothing beyond it."""

from __future__ import annotations

import json
import os

import aiohttp

from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.units import Units
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devnet import PATH_USD, Devnet, DevnetOptions
from mppnode.config.schema import LimitsConfig
from mppnode.payer.client import PayingClient


async def test_no_more_than_max_tokens_is_delivered_or_charged() -> None:
    """The stream ends with ``length`` at the limit, the provider is cut off, and the bill is the limit's."""
    options = DevnetOptions(tokens_per_second=5_000, limits=LimitsConfig(drain_s=0))
    async with Devnet(options) as net, aiohttp.ClientSession() as http:
        client = PayingClient(
            http,
            chain=RpcChain(HttpTransport(http, net.chain_url), net.clock, limits=RpcLimits()),
            signer=LocalSigner(net.payer_key),
            policy=PayerPolicy(net.payer, net.payer, frozenset({net.escrow}), frozenset({PATH_USD}), Units(10**6), Units(10**6), Units(10**6)),
            now=net.clock.now_millis,
            entropy=os.urandom,
        )
        body = {"model": "dev/never-ends", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}
        async with client.stream(net.chat_url, body) as events:
            chunks = [data async for data in events]
        assert chunks.pop() == "[DONE]"
        documents = [json.loads(chunk) for chunk in chunks]
        words = [c for d in documents for c in d["choices"] if c["delta"].get("content")]
        assert len(words) == 20
        assert documents[-1]["choices"][0]["finish_reason"] == "length"
        assert documents[-1]["usage"]["completion_tokens"] == 20
        assert net.node.books is not None
        (account,) = await net.node.books.accounts()
        assert account.spent == 20 * 10
        assert net.provider.requests == 1
