"""A node that dies or is restarted under the reference client: the client goes on, and no book loses a unit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from channels.ids import to_hex
from channels.policy import Policy
from channels.units import Units
from mppnode.cli.devnet import CHAIN_ID, PATH_USD, V1_ESCROW, Devnet, DevnetOptions
from mppnode.cli.devprovider_server import Gate
from mppnode.config.schema import LimitsConfig
from mppnode.ledger.books import Books
from mppnode.ledger.sqlite import SqliteStore
from tests.interop.mppx.rig import (
    ClientFailed,
    ReferenceClient,
    chat,
    only_account,
    price_pico,
    require_agreement,
    units_of,
)

pytestmark = pytest.mark.interop

ROOT = Path(__file__).resolve().parents[3]
CONFIG = """
[node]
realm = "127.0.0.1"
challenge_secrets = [{{ env = "SECRET" }}]
ledger = "ledger.sqlite"
port = {port}

[chain]
rpc_url = "{rpc}"
chain_id = {chain}
token = "{token}"
payee_key = {{ env = "PAYEE" }}
v1_escrow = "{v1}"

[session]
protocols = ["v2", "v1"]
min_deposit = "0.001"
suggested_deposit = "0.1"
chain_ttl_s = 0

[limits]
drain_s = 2

[[providers]]
name = "dev"
base_url = "{provider}/v1"

[[models]]
id = "dev/burst"
provider = "dev"
input_usd_per_million = "0.5"
output_usd_per_million = "10"
context = 128000
max_output = 100000
"""


class NodeProcess:
    """``mppnode serve`` in a process of its own, on a development network's chain and provider."""

    def __init__(self, net: Devnet, directory: Path) -> None:
        self._net = net
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self.port = 0
        self.starts = 0

    @property
    def chat_url(self) -> str:
        """Where this node takes chat requests."""
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    async def start(self) -> None:
        """Start, and wait for the log line that says where it listens."""
        net, path = self._net, self._directory / "node.toml"
        places = {"rpc": net.chain_url, "chain": CHAIN_ID, "token": to_hex(PATH_USD), "v1": to_hex(V1_ESCROW)}
        path.write_text(CONFIG.format(port=self.port, provider=net.provider.url, **places))
        self.starts += 1
        log = self._directory / f"log{self.starts}"
        secrets = {"SECRET": "s" * 32, "PAYEE": to_hex(net.payee_key)}
        with log.open("wb") as sink:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "mppnode.cli.main", "serve", "--config", str(path)),
                cwd=ROOT,
                env={**os.environ, **secrets},
                stdout=sink,
                stderr=sink,
            )
        async with asyncio.timeout(20):
            while b"node.started" not in log.read_bytes():
                assert self._process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)  # polls a file; nothing here depends on how long it takes
        if not self.port:
            (line,) = (line for line in log.read_text().splitlines() if "node.started" in line)
            self.port = int(line.partition("http://127.0.0.1:")[2].partition('"')[0])

    async def end(self, number: signal.Signals) -> int:
        """Send a signal and wait for the process to be gone."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        return await asyncio.wait_for(self._process.wait(), 20)


@contextlib.asynccontextmanager
async def books_of(net: Devnet, directory: Path) -> AsyncIterator[Books]:
    """The ledger of a node that does not run any more."""
    store = SqliteStore(directory / "ledger.sqlite", clock=net.clock, on_fatal=lambda error: None)
    await store.start()
    try:
        yield Books(store, clock=net.clock, policy=Policy(deposit_units_min=Units(1_000)))
    finally:
        await store.stop()


@pytest.mark.parametrize("kind", ["manager", "legacy"])
async def test_killed_in_mid_stream(payer: ReferenceClient, tmp_path: Path, kind: str) -> None:
    """SIGKILL in a stream: the restarted node knows the channel, the client pays on with it and closes it.

    What was on its way is lost to the node, never to the payer: the charge is at most the words that were sent.
    """
    async with Devnet(DevnetOptions()) as net:
        gate = net.provider.gate = Gate()
        node = NodeProcess(net, tmp_path)
        await node.start()
        try:
            await payer.make(net, kind, maxDeposit="0.05")
            broken = payer.start("sse", name="payer", url=node.chat_url, body=chat(300))
            await gate.release(150)
            await broken.until("chunk", 140)
            assert await node.end(signal.SIGKILL) == -signal.SIGKILL
            with pytest.raises(ClientFailed):
                await broken.end()
            net.provider.gate = None
            await node.start()
            whole = payer.start("sse", name="payer", url=node.chat_url, body=chat(60))
            await whole.end()
            closed = await payer.run("close", name="payer")
            assert await node.end(signal.SIGTERM) == 0
        finally:
            await node.end(signal.SIGKILL)
        async with books_of(net, tmp_path) as books:
            account = await only_account(books)
        whole_price, broken_words = units_of(price_pico(chat(60))), len(broken.text.split())
        assert len(whole.text.split()) == 60
        assert len(payer.sent("open")) == 1
        assert whole_price < account.spent <= whole_price + units_of(price_pico(chat(150)))
        assert 139 <= broken_words <= 150
        assert int(closed["receipt"]["spent"]) == account.spent
        await require_agreement(net, [account])


async def test_killed_after_the_open_was_served(payer: ReferenceClient, tmp_path: Path) -> None:
    """SIGKILL between two requests: every unit the client was shown a receipt for is still there after the start."""
    async with Devnet(DevnetOptions()) as net:
        node = NodeProcess(net, tmp_path)
        await node.start()
        try:
            await payer.make(net, "manager")
            first = payer.start("sse", name="payer", url=node.chat_url, body=chat(70))
            await first.end()
            await node.end(signal.SIGKILL)
            await node.start()
            second = payer.start("sse", name="payer", url=node.chat_url, body=chat(80))
            await second.end()
            await payer.run("close", name="payer")
            await node.end(signal.SIGTERM)
        finally:
            await node.end(signal.SIGKILL)
        async with books_of(net, tmp_path) as books:
            account = await only_account(books)
        assert int(first.receipt["spent"]) == units_of(price_pico(chat(70)))
        assert int(second.receipt["spent"]) == account.spent
        assert account.owed_pico == price_pico(chat(70), chat(80))
        await require_agreement(net, [account])


async def test_restarted_in_mid_stream(payer: ReferenceClient) -> None:
    """A node that is stopped in order bills what it sent, and its successor carries the channel on."""
    async with Devnet(DevnetOptions(limits=LimitsConfig(drain_s=1))) as net:
        gate = net.provider.gate = Gate()
        await payer.make(net, "manager")
        broken = payer.start("sse", name="payer", url=net.chat_url, body=chat(300))
        await gate.release(80)
        await broken.until("chunk", 70)
        port = int(net.node.url.rpartition(":")[2])
        await net.node.stop()
        with contextlib.suppress(ClientFailed):
            await broken.end()
        net.provider.gate = None
        net.node = net.new_node(port)
        await net.node.start()
        billed = (await only_account(net.node.books)).spent
        assert 70 * 10 <= billed <= units_of(price_pico(chat(80)))
        whole = payer.start("sse", name="payer", url=net.chat_url, body=chat(60))
        await whole.end()
        closed = await payer.run("close", name="payer")
        account = await only_account(net.node.books)
        assert len(whole.text.split()) == 60
        assert len(payer.sent("open")) == 1
        assert int(closed["receipt"]["spent"]) == account.spent > billed
        await require_agreement(net, [account])
