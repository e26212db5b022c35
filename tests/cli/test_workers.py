"""`mppnode serve --workers N` and `mppnode watchtower`: processes that share a ledger and a machine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from channels.ids import to_hex
from channels.model import Phase
from mppnode.cli.devnet import FUNDS
from tests.cli.operator import Desk, configuration, desk
from tests.grafana.server import free_port
from tests.support.postgres import postgres_database

PATIENCE_S = 40


@dataclass
class Service:
    """A supervisor with its workers, heard through their log."""

    process: asyncio.subprocess.Process
    url: str = ""
    workers: dict[str, int] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            try:
                record = json.loads(line)
            except ValueError:
                record = {"event": "text", "text": line.decode()}
            self.lines.append(record)
            if record["event"] == "workers.started":
                self.url = record["url"]
            self.news.set()

    def count(self, event: str) -> int:
        return sum(line["event"] == event for line in self.lines)

    async def until(self, event: str, times: int = 1) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.count(event) < times:
                self.news.clear()
                await self.news.wait()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@asynccontextmanager
async def service(shop: Desk, command: str, config: str, *more: str) -> AsyncIterator[Service]:
    process = await shop.start(command, "--config", str(shop.folder / config), *more)
    made = Service(process)
    listening = asyncio.ensure_future(made.listen())
    try:
        yield made
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            await process.wait()
        await listening


@pytest.fixture(params=["sqlite", "postgres"])
async def shop(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Desk]:
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(desk(tmp_path))
        ledger = '"workers.sqlite"'
        if request.param == "postgres":
            os.environ["DATABASE"] = await stack.enter_async_context(postgres_database())
            stack.callback(os.environ.pop, "DATABASE")
            ledger = '{ env = "DATABASE" }'
        (tmp_path / "workers.toml").write_text(configuration(made.net, ledger=ledger))
        yield made


async def test_workers_share_port_and_ledger_and_one_may_die(shop: Desk) -> None:
    """Requests land on both workers; a killed one comes back; what all of them wrote is one set of books."""
    net = shop.net
    async with service(shop, "serve", "workers.toml", "--workers", "2") as served:
        await served.until("node.started", 2)
        chat = f"{served.url}/v1/chat/completions"
        payers = [shop.payer() for _ in range(4)]
        assert await asyncio.gather(*(shop.stream(payer, 30, chat) for payer in payers)) == [30] * 4
        workers = children(served.process.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        await served.until("worker.died")
        await served.until("node.started", 3)
        # The same channels again: whichever worker a connection lands on knows them.
        assert await asyncio.gather(*(shop.stream(payer, 30, chat) for payer in payers)) == [30] * 4
        # And at once from one channel: the newer stream ends the older one, on whichever worker that runs.
        for payer in payers:
            closed = await payer.close(chat)
            assert closed is not None
    assert served.process.returncode == 0
    ran = await shop.run("channels", "list", "--all", "--json", config="workers.toml")
    assert {record["phase"] for record in ran.records} == {"closed"}
    spent = sum(int(record["spent"]) for record in ran.records)
    assert net.chain.balance(net.payee) - FUNDS == spent
    assert (await shop.run("reconcile", config="workers.toml")).status == 0


async def test_workers_count_as_one_and_a_killed_one_takes_nothing_back(tmp_path: Path) -> None:
    """Whichever worker is scraped, the page is everybody's; a worker that is killed has lost at most a second's counts."""
    port = free_port()
    async with desk(tmp_path) as shop, aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
        metrics = f"[metrics]\nport = {port}\n"
        (tmp_path / "workers.toml").write_text(configuration(shop.net, ledger='"workers.sqlite"') + metrics)

        async def refused(count: int, url: str) -> None:
            for _ in range(count):
                async with http.post(f"{url}/v1/chat/completions", json={"model": "dev/story", "messages": []}) as answer:
                    assert answer.status == 400

        async def page() -> dict[str, float]:
            async with http.get(f"http://127.0.0.1:{port}/metrics") as answer:
                families = text_string_to_metric_families(await answer.text())
            return {s.name + str(s.labels.get("reason", "")): s.value for family in families for s in family.samples}

        async def until(name: str, value: float) -> None:
            async with asyncio.timeout(PATIENCE_S):
                while (await page()).get(name) != value:
                    await asyncio.sleep(0.1)

        refusals = "mppnode_requests_refused_totalinvalid_field"
        async with service(shop, "serve", "workers.toml", "--workers", "2") as served:
            await served.until("node.started", 2)
            await until("mppnode_processes", 2)
            await refused(40, served.url)
            for _ in range(10):  # on new connections, so by both workers
                await until(refusals, 40)
            os.kill(children(served.process.pid)[0], signal.SIGKILL)
            await until(refusals, 40)
            await served.until("node.started", 3)
            await until("mppnode_processes", 2)
            await refused(5, served.url)
            for _ in range(10):
                await until(refusals, 45)


async def test_a_stream_follows_its_money_across_workers(shop: Desk) -> None:
    """A long stream on one worker is paid by vouchers that arrive at whichever worker; it never runs dry."""
    async with service(shop, "serve", "workers.toml", "--workers", "3") as served:
        await served.until("node.started", 3)
        chat = f"{served.url}/v1/chat/completions"
        payers = [shop.payer() for _ in range(3)]
        assert await asyncio.gather(*(shop.stream(payer, 2_000, chat) for payer in payers)) == [2_000] * 3
    ran = await shop.run("channels", "list", "--all", "--json", config="workers.toml")
    assert all(record["holds"] == 0 for record in ran.records)


async def test_workers_end_with_their_supervisor(shop: Desk) -> None:
    """However the supervisor goes, no worker stays behind to serve on its own."""
    async with service(shop, "serve", "workers.toml", "--workers", "2") as served:
        await served.until("node.started", 2)
        workers = children(served.process.pid)
        served.process.kill()
        async with asyncio.timeout(PATIENCE_S):
            while any(Path(f"/proc/{pid}").exists() for pid in workers):
                await asyncio.sleep(0.05)


async def test_a_second_supervisor_is_told_why_it_cannot_start(tmp_path: Path) -> None:
    """Two services on one SQLite file: the second says so and ends with a status of its own."""
    async with desk(tmp_path) as shop:
        (tmp_path / "workers.toml").write_text(configuration(shop.net, ledger='"workers.sqlite"'))
        async with service(shop, "serve", "workers.toml", "--workers", "2") as served:
            await served.until("node.started", 2)
            for more in ((), ("--workers", "2")):
                second = await shop.start("serve", "--config", str(tmp_path / "workers.toml"), *more)
                _, err = await second.communicate()
                assert second.returncode == 1
                assert b"in use by another node" in err


async def test_a_watchtower_settles_what_a_dead_node_earned(shop: Desk) -> None:
    """No port, no provider: it captures what a leaving payer owes, while no node runs."""
    net = shop.net
    async with service(shop, "serve", "workers.toml") as served:
        await served.until("node.started")
        url = next(line["url"] for line in served.lines if line["event"] == "node.started")
        payer = shop.payer()
        assert await shop.stream(payer, 900, f"{url}/v1/chat/completions") == 900
        served.process.kill()
    ran = await shop.run("channels", "list", "--json", config="workers.toml")
    (record,) = ran.records
    async with service(shop, "watchtower", "workers.toml") as tower:
        await tower.until("watchtower.started")
        await request_close(shop, record["channel"])
        await tower.until("channel.closed")
    assert net.chain.balance(net.payee) - FUNDS == int(record["spent"])
    ran = await shop.run("channels", "show", record["channel"], "--json", config="workers.toml")
    assert ran.records[0]["phase"] == Phase.CLOSED.value


async def request_close(shop: Desk, channel: str) -> None:
    """The payer's exit begins on chain, without a word to anybody."""
    from channels import escrow
    from channels.tempo_tx import Call
    from mppnode.chain.rpc import RpcChain, RpcLimits
    from mppnode.chain.transport import HttpTransport
    from mppnode.cli.devnet import PATH_USD

    net = shop.net
    chain = RpcChain(HttpTransport(shop.http, net.chain_url), net.clock, limits=RpcLimits())
    opened = next(
        event
        for event in escrow.decode_events(net.escrow, await chain.logs(net.escrow.address, topics=(), from_block=0, to_block=net.chain.head))
        if isinstance(event, escrow.ChannelOpened) and to_hex(event.channel_id) == channel
    )
    call = Call(net.escrow.address, escrow.encode_request_close(opened.descriptor))
    tx = await chain.prepare(net.payer, (call,), fee_token=PATH_USD, entropy=os.urandom(8))
    assert (await chain.broadcast(tx.sign(net.payer_key).raw)).succeeded
