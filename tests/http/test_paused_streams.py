"""P25: streams that wait for money hold little, read nothing, cost little memory, and end."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from channels.descriptor import ChainSnapshot
from channels.ids import ChannelId
from channels.model import Command, Open, Outcome, Plan, Renew, Voucher
from channels.units import Units
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.schema import LimitsConfig, SessionConfig
from mppnode.engine.stream import PaidStream
from mppnode.ledger.books import Books
from tests.http.test_stream_traps import COVERED, LONG, PROTOCOLS, impatient, owed, quiet
from tests.support.http_client import PATH, TOKEN_UNITS, UNIT, Channel, World, chat, cost, new_world

PAUSED = 300
PROVIDER = Path(__file__).with_name("token_provider.py")
EACH_MAX = 32 * 1024
"""Reliability brief, R12: bytes per paused stream."""


async def test_p25_a_waiting_stream_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """P25: an endless provider is read up to the pause and not a byte further; the hold is what was delivered."""
    reads: list[int] = []
    on_body = PaidStream.on_body

    def counted(self: PaidStream, data: bytes) -> None:
        reads.append(len(data))
        on_body(self, data)

    monkeypatch.setattr(PaidStream, "on_body", counted)
    async with impatient(wait_s=2) as world:
        channel, body = world.payer.channel(), chat("dev/never-ends", max_tokens=50_000)
        async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
            await stream.tokens(COVERED)
            await quiet(stream)
            before = len(reads)
            for _ in range(200):
                await asyncio.sleep(0)
            await quiet(stream)
            assert len(reads) == before, "what the payer has not paid for is not even read"
            account = await world.account(channel)
            assert account.owed_pico + account.held_pico <= UNIT * 1_000_000
            assert world.net.provider.live == 1
            assert (await world.manage(world.payer.voucher(channel, UNIT + 50 * TOKEN_UNITS))).status == 204
            await stream.tokens(COVERED + 50)
            assert len(reads) >= before, "paid for, it is read again"
            await quiet(stream)
            assert stream.text_chunks == COVERED + 50
            stream.response.close()
        assert await owed(world, channel) == cost(COVERED + 50, 1)


async def test_p25_waiting_streams_end_after_their_deadline() -> None:
    """P25: thirty streams nobody pays for end by themselves; each is billed what arrived, and nothing stays held."""
    async with impatient(wait_s=0.2) as world:
        body, channels = LONG(), [world.payer.channel() for _ in range(30)]
        credentials = [await world.pay(world.payer.open(channel), body) for channel in channels]

        async def read(credential: str) -> list[dict[str, object]]:
            async with world.stream(body, credential) as stream:
                await stream.rest()
                assert stream.text_chunks == COVERED
                return stream.chunks

        for chunks in await asyncio.gather(*(read(credential) for credential in credentials)):
            assert chunks[-1]["mppnode"] == {"ended": "unpaid"}
        assert {await owed(world, channel) for channel in channels} == {cost(COVERED, 1)}
        assert world.net.provider.live == 0


async def test_p25_a_slow_ledger_is_not_an_unpaid_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """P25: while the node's own books are slow nobody owes a voucher, however long a renewal takes."""
    apply = Books.apply

    async def slow(self: Books, channel: ChannelId, command: Command) -> Plan[Outcome]:
        if isinstance(command, Renew):
            await asyncio.sleep(0.2)
        return await apply(self, channel, command)

    monkeypatch.setattr(Books, "apply", slow)
    async with impatient(wait_s=0.05) as world:
        channel, body = world.payer.channel(), LONG()
        async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
            await stream.rest()
        assert stream.text_chunks == COVERED
        assert stream.chunks[-1]["mppnode"] == {"ended": "unpaid"}


async def _known(world: World, channel: Channel) -> None:
    """Write a channel into the books as if the chain had confirmed it: three hundred opens are another test's time."""
    node = world.net.node
    assert node.books is not None
    assert node.rail is not None
    snapshot = ChainSnapshot(Units(channel.deposit), Units(0), None, 1)
    voucher = Voucher(Units(UNIT), world.payer.sign(channel, UNIT))
    await node.books.apply(channel.id, Open(channel.id, channel.escrow, channel.descriptor, snapshot, voucher))
    node.rail._live.checked(channel.id)


async def _ask(world: World, request: bytes) -> socket.socket:
    """Ask from a bare socket, which costs this process nothing worth counting."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", int(world.net.node.url.rpartition(":")[2])))
    await loop.sock_sendall(sock, request)
    return sock


async def test_p25_three_hundred_paused_streams_are_cheap(capsys: pytest.CaptureFixture[str]) -> None:
    """P25, R12: 300 streams wait for vouchers while their provider goes on, in less than 32 KiB of memory each."""
    session = SessionConfig(PROTOCOLS, Units(1_000), Units(100_000), chain_ttl_s=600)
    options = DevnetOptions(tokens_per_second=0.0, session=session, limits=LimitsConfig(drain_s=0))
    async with new_world(options) as world:
        provider = await asyncio.create_subprocess_exec(
            sys.executable, str(PROVIDER), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert provider.stdout is not None
        assert provider.stdin is not None
        node = world.net.node
        assert node._engine is not None
        assert node.rail is not None
        assert node.books is not None
        await node._daemons.drain(deadline_s=0)  # the watcher would miss these channels on the chain
        url = f"http://127.0.0.1:{int(await provider.stdout.readline())}/v1"
        endpoints = node._engine.market.endpoints
        endpoints |= {name: replace(endpoint, base_url=url) for name, endpoint in endpoints.items()}
        body, challenge, requests = json.dumps(LONG()).encode(), await world.challenge(LONG()), []
        for _ in range(PAUSED):
            channel = world.payer.channel()
            await _known(world, channel)
            credential = world.payer.credential(challenge, world.payer.voucher(channel, UNIT))
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: {credential}\r\nContent-Length: {len(body)}\r\n\r\n"
            requests.append(head.encode() + body)
        gc.collect()
        live = node.rail._live
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            socks = [await _ask(world, request) for request in requests]
            async with asyncio.timeout(60):
                while sum(tab.starved for tabs in live._tabs.values() for tab in tabs) < PAUSED:
                    await asyncio.sleep(0.05)
            gc.collect()
            each = (tracemalloc.get_traced_memory()[0] - before) // PAUSED
        finally:
            tracemalloc.stop()
        with capsys.disabled():
            print(f"\n{PAUSED} paused streams: {each} bytes each")
        assert each <= EACH_MAX
        accounts = await node.books.accounts()
        assert {account.owed_pico + account.held_pico <= UNIT * 1_000_000 for account in accounts} == {True}
        for sock in socks:
            sock.close()
        await world.eventually(lambda: not live._tabs, seconds=30)
        provider.stdin.close()
        await provider.wait()
        assert {len(account.holds) for account in await node.books.accounts()} == {0}
