"""A development network and the operator's commands on its ledger, each in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from channels.ids import to_hex
from channels.model import Account
from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.units import Units
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devnet import CHAIN_ID, PATH_USD, Devnet, DevnetOptions
from mppnode.config.schema import LimitsConfig
from mppnode.payer.client import PayingClient

ROOT = Path(__file__).resolve().parents[2]
SECRET = "challenge-secret-canary-0123456789abcdef"


def configuration(net: Devnet, *, ledger: str = '"ledger.sqlite"', more: str = "") -> str:
    """The configuration file of a node of this network; ``more`` goes into its ``[node]`` table."""
    return f"""
[node]
realm = "127.0.0.1"
challenge_secrets = [{{ env = "SECRET" }}]
ledger = {ledger}
port = 0
{more}
[chain]
rpc_url = "{net.chain_url}"
chain_id = {CHAIN_ID}
token = "{to_hex(PATH_USD)}"
payee_key = {{ env = "KEY" }}
[session]
min_deposit = "0.001"
suggested_deposit = "0.1"
chain_ttl_s = 0
[limits]
drain_s = 2
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
[log]
format = "json"
"""


@dataclass
class Ran:
    """What a command said."""

    status: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass
class Desk:
    """A network, a payer with a channel each call, and the operator's shell."""

    net: Devnet
    http: aiohttp.ClientSession

    @property
    def folder(self) -> Path:
        return self.net.directory

    @property
    def environment(self) -> dict[str, str]:
        key = to_hex(self.net.payee_key)
        return {**os.environ, "PYTHONPATH": str(ROOT), "SECRET": SECRET, "KEY": key}

    async def start(self, *command: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mppnode.cli.main", *command,
            env=self.environment, cwd=self.folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *command: str, config: str = "node.toml") -> Ran:
        path = self.folder / config
        if not path.exists():
            path.write_text(configuration(self.net))
        process = await self.start(*command, "--config", str(path))
        out, err = await process.communicate()
        assert process.returncode is not None
        assert SECRET not in (out + err).decode()
        assert to_hex(self.net.payee_key)[2:] not in (out + err).decode()
        return Ran(process.returncode, out.decode(), err.decode())

    def payer(self) -> PayingClient:
        net = self.net
        return PayingClient(
            self.http,
            chain=RpcChain(HttpTransport(self.http, net.chain_url), net.clock, limits=RpcLimits()),
            signer=LocalSigner(net.payer_key),
            policy=PayerPolicy(net.payer, net.payer, frozenset({net.escrow}), frozenset({PATH_USD}), Units(10**6), Units(10**6), Units(10**6)),
            now=net.clock.now_millis,
            entropy=os.urandom,
        )

    async def stream(self, payer: PayingClient, tokens: int = 40, url: str | None = None) -> int:
        seen = 0
        body = {"model": "dev/story", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": tokens}
        async with payer.stream(url or self.net.chat_url, body) as events:
            async for data in events:
                if data != "[DONE]":
                    seen += sum(bool(choice.get("delta", {}).get("content")) for choice in json.loads(data)["choices"])
        return seen

    async def accounts(self) -> list[Account]:
        assert self.net.node.books is not None
        return list(await self.net.node.books.accounts())


@asynccontextmanager
async def desk(folder: Path) -> AsyncIterator[Desk]:
    options = DevnetOptions(tokens_per_second=10_000, limits=LimitsConfig(drain_s=0), directory=folder)
    async with Devnet(options) as net, aiohttp.ClientSession() as http:
        yield Desk(net, http)
