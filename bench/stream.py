"""CPU the node spends per paid token: a real node process, a real ledger, real vouchers, over loopback.

    python bench/stream.py [--streams 20] [--tokens 400] [--rate 50]

The node runs alone in a child process (``mppnode serve``, uvloop); the chain, the provider and the payers run here.
Printed is the child's own CPU time between the first and the last stream, divided by the tokens delivered: it includes
challenges, opens, vouchers, holds and receipts. Compare figures only from one run on one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

import aiohttp

from channels.descriptor import RESERVE_ADDRESS, Escrow, SessionProtocol
from channels.ids import to_hex
from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.signature import address_of
from channels.units import Units
from mppnode.chain.devchain import DevChain
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devchain_server import start_devchain
from mppnode.cli.devprovider_server import start_devprovider
from mppnode.kernel.clock import SystemClock
from mppnode.payer.client import PayingClient, VoucherSent

CHAIN_ID = 1337
TOKEN = "0x20c0000000000000000000000000000000000000"
CONFIG = """
[node]
realm = "127.0.0.1"
challenge_secrets = [{{ env = "BENCH_SECRET" }}]
port = {port}
[chain]
rpc_url = "{rpc}"
chain_id = {chain}
token = "{token}"
payee_key = {{ env = "BENCH_KEY" }}
[session]
min_deposit = "0.01"
suggested_deposit = "1"
[[providers]]
name = "dev"
base_url = "{provider}/v1"
[[models]]
id = "dev/story"
provider = "dev"
input_usd_per_million = "0.5"
output_usd_per_million = "10"
context = 100000
max_output = 100000
[log]
level = "warning"
"""


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def wait_for(http: aiohttp.ClientSession, url: str) -> None:
    for _ in range(200):
        try:
            async with http.head(url):
                return
        except aiohttp.ClientConnectorError:
            await asyncio.sleep(0.05)
    raise SystemExit("the node did not start")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rate", type=float, default=50.0, help="tokens per second of each stream")
    options = parser.parse_args()
    clock = SystemClock()
    chain = DevChain(clock, chain_id=CHAIN_ID)
    payee = os.urandom(32)
    chain.fund(address_of(payee), Units(10**9))
    runner, rpc = await start_devchain(chain, "127.0.0.1", 0)
    provider = await start_devprovider(tokens_per_second=options.rate)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "node.toml"
        port = 18_402
        path.write_text(CONFIG.format(port=port, rpc=rpc, chain=CHAIN_ID, token=TOKEN, provider=provider.url))
        environ = {**os.environ, "BENCH_SECRET": "x" * 32, "BENCH_KEY": to_hex(payee)}
        command = (sys.executable, "-m", "mppnode.cli.main", "serve", "--config", str(path))
        node = await asyncio.create_subprocess_exec(*command, env=environ)
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            await wait_for(http, url)
            vouchers: list[object] = []
            clients = [client(http, rpc, chain, clock, vouchers) for _ in range(options.streams)]
            before, start = cpu_seconds(node.pid), clock.monotonic()
            tokens = sum(await asyncio.gather(*(stream(one, url, options.tokens) for one in clients)))
            used, wall = cpu_seconds(node.pid) - before, clock.monotonic() - start
        node.terminate()
        await node.wait()
    await provider.stop()
    await runner.cleanup()
    print(
        json.dumps(
            {
                "streams": options.streams,
                "tokens": tokens,
                "vouchers": len(vouchers),
                "wall_s": round(wall, 2),
                "node_cpu_us_per_token": round(used / tokens * 1e6, 1),
            }
        )
    )


def client(
    http: aiohttp.ClientSession, rpc: str, chain: DevChain, clock: SystemClock, vouchers: list[object]
) -> PayingClient:
    signer = LocalSigner(os.urandom(32))
    chain.fund(signer.address, Units(10**9))
    return PayingClient(
        http,
        chain=RpcChain(HttpTransport(http, rpc), clock, limits=RpcLimits()),
        signer=signer,
        policy=PayerPolicy(
            payer=signer.address,
            signer=signer.address,
            escrows=frozenset({Escrow(SessionProtocol.V2, CHAIN_ID, RESERVE_ADDRESS)}),
            tokens=frozenset({TOKEN_ADDRESS}),
            request_cap=Units(10**7),
            channel_cap=Units(10**7),
            max_deposit=Units(10**7),
        ),
        now=clock.now_millis,
        entropy=os.urandom,
        observer=lambda note: vouchers.append(note) if isinstance(note, VoucherSent) else None,
    )


TOKEN_ADDRESS = bytes.fromhex(TOKEN[2:])


async def stream(payer: PayingClient, url: str, tokens: int) -> int:
    body = {"model": "dev/story", "messages": [{"role": "user", "content": "go"}], "max_tokens": tokens}
    seen = 0
    async with payer.stream(url, body) as events:
        async for data in events:
            seen += '"content":"' in data and '"content":""' not in data
    return seen


if __name__ == "__main__":
    asyncio.run(main())
