"""`mppnode serve`: a real process, a real configuration file, and clear words when it cannot start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from channels.ids import to_hex
from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.units import Units
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devnet import CHAIN_ID, PATH_USD, Devnet, DevnetOptions
from mppnode.payer.client import PayingClient

ROOT = Path(__file__).resolve().parents[2]
CANARY = "challenge-secret-canary-0123456789abcdef"


def configuration(net: Devnet, *, chain_id: int = CHAIN_ID) -> str:
    return f"""
[node]
realm = "127.0.0.1"
challenge_secrets = [{{ env = "SECRET" }}]
port = 0
[chain]
rpc_url = "{net.chain_url}"
chain_id = {chain_id}
token = "{to_hex(PATH_USD)}"
payee_key = {{ env = "KEY" }}
[session]
min_deposit = "0.001"
suggested_deposit = "0.1"
chain_ttl_s = 0
[limits]
drain_s = 10
[[providers]]
name = "dev"
base_url = "{net.provider.url}/v1"
[[models]]
id = "dev/story"
provider = "dev"
input_usd_per_million = "0.50"
output_usd_per_million = "10"
context = 100000
max_output = 10000
"""


@pytest.fixture
async def net() -> AsyncIterator[Devnet]:
    async with Devnet(DevnetOptions(tokens_per_second=200)) as running:
        yield running


async def start(folder: Path, net: Devnet, text: str) -> asyncio.subprocess.Process:
    path = folder / "node.toml"
    path.write_text(text)
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mppnode.cli.main", "serve", "--config", str(path),
        env={**os.environ, "PYTHONPATH": str(ROOT), "SECRET": CANARY, "KEY": to_hex(net.payee_key)},
        stderr=asyncio.subprocess.PIPE,
    )


@asynccontextmanager
async def running(folder: Path, net: Devnet) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await start(folder, net, configuration(net))
    assert process.stderr is not None
    line = await asyncio.wait_for(process.stderr.readline(), 30)
    try:
        yield process, json.loads(line)["url"] + "/v1/chat/completions"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_stop_lets_a_running_stream_end_and_keeps_the_books(tmp_path: Path, net: Devnet) -> None:
    """SIGTERM takes no new requests, lets the stream finish with its receipt, and exits with 0; no secret is logged."""
    async with running(tmp_path, net) as (process, url), aiohttp.ClientSession() as http:
        client = PayingClient(
            http,
            chain=RpcChain(HttpTransport(http, net.chain_url), net.clock, limits=RpcLimits()),
            signer=LocalSigner(net.payer_key),
            policy=PayerPolicy(net.payer, net.payer, frozenset({net.escrow}), frozenset({PATH_USD}), Units(10**6), Units(10**6), Units(10**6)),
            now=net.clock.now_millis,
            entropy=os.urandom,
        )
        body = {"model": "dev/story", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 200}
        tokens, last = 0, ""
        async with client.stream(url, body) as events:
            async for data in events:
                tokens += '"content":"' in data and '"content":""' not in data
                last = data
                if tokens == 20:
                    process.send_signal(signal.SIGTERM)
        assert (tokens, last) == (200, "[DONE]")
        assert process.stderr is not None
        rest = (await asyncio.wait_for(process.stderr.read(), 20)).decode()
        assert await process.wait() == 0
        ended = next(json.loads(line) for line in rest.splitlines() if "request.ended" in line)
        assert ended["ending"] == "complete"
        assert ended["spent"] == 200 * 10  # ten units a token, and the prompt is below one unit
        assert CANARY not in rest
        assert net.payee_key.hex() not in rest
    (session,) = client.sessions()
    assert session.state.spent == ended["spent"]


async def test_the_wrong_chain_is_refused_at_start(tmp_path: Path, net: Devnet) -> None:
    """An endpoint of another chain than configured is one clear line and exit status 1."""
    process = await start(tmp_path, net, configuration(net, chain_id=4217))
    assert process.stderr is not None
    text = (await asyncio.wait_for(process.stderr.read(), 30)).decode()
    assert await process.wait() == 1
    assert "serves chain 1337, but chain.chain_id is 4217" in text
    assert "Traceback" not in text


async def test_two_nodes_never_share_a_ledger_file(tmp_path: Path, net: Devnet) -> None:
    """The second node on one file refuses to start."""
    async with running(tmp_path, net):
        second = await start(tmp_path, net, configuration(net))
        assert second.stderr is not None
        text = (await asyncio.wait_for(second.stderr.read(), 30)).decode()
        assert await second.wait() == 1
        assert "is in use by another node" in text
        assert "Traceback" not in text
