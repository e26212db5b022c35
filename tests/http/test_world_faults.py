"""The world around a node fails: the RPC (C1, C5), the process (D4, D9), the clock (D6), the provider (D10).

C2 to C4 and C8 are with the chain adapters and in the simulation, D1 to D3 with the crash tests, D7 in
``tests/fault/test_many_nodes.py``; a whole node with a fault in every operation is ``tests/fault/test_node_sweep.py``.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from channels.instants import UnixMillis, UnixSeconds
from channels.model import Phase
from channels.units import Units
from mppnode import app
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.schema import LimitsConfig, SessionConfig
from mppnode.kernel.clock import Clock
from mppnode.ledger.base import LedgerError
from tests.http.fleet import new_node, two_nodes, until
from tests.http.test_open_traps import failing, rpc_hook
from tests.http.test_stream_traps import COVERED, LONG, PROTOCOLS, owed, quiet
from tests.support.http_client import DEPOSIT, UNIT, World, chat, cost, new_world

BLIND_S = 600
"""How long vouchers are taken without seeing the chain: a payer's exit takes 900 s."""

# --------------------------------------------------------------------------------------------------- C1: no RPC


@pytest.fixture
async def careful() -> AsyncIterator[World]:
    """A node that looks at the chain again when its last look is five seconds old."""
    session = SessionConfig(PROTOCOLS, Units(1_000), Units(100_000), chain_ttl_s=5)
    async with new_world(DevnetOptions(tokens_per_second=0.0, session=session)) as world:
        yield world
        assert world.log.bugs == []


OUTAGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "down": failing,
    "too many requests": functools.partial(failing, code=-32005),
    "another's answer": lambda request: {"jsonrpc": "2.0", "id": -1, "result": "0x1"},
    "nonsense": lambda request: {"jsonrpc": "2.0", "id": request["id"], "result": {"x": []}},
}


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
async def test_c1_without_the_chain_nothing_opens_and_what_is_open_goes_on(
    careful: World, outage: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """C1: no RPC: new channels are 503, open ones stream on until the look is ten minutes old, then wait for it."""
    world, gate = careful, careful.gate()
    channel, body = world.payer.channel(), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await gate.release(400)
        await stream.tokens(COVERED)
        restore = rpc_hook(world, lambda request, _: outage(request))
        before = world.net.chain.model.reserve.slots[channel.id]
        newcomer = await world.manage(world.payer.open(world.payer.channel()))
        assert newcomer.status == 503
        assert newcomer.code in ("chain_unavailable", "chain_outcome_unknown")
        assert int(newcomer.headers["Retry-After"]) > 0
        world.clock.advance(BLIND_S - 1)
        assert (await world.manage(world.payer.voucher(channel, UNIT + 500))).status == 204
        await stream.tokens(COVERED + 50)
        await quiet(stream)
        world.clock.advance(2)
        state = await world.state()
        for _ in range(2):
            late = await world.manage(world.payer.voucher(channel, 6 * UNIT))
            assert (late.status, late.code) == (503, "chain_unavailable")
        assert await world.state() == state
        await quiet(stream)
        assert stream.text_chunks == COVERED + 50, "and not a token more until the chain is seen"
        restore()
        assert (await world.manage(world.payer.voucher(channel, 6 * UNIT))).status == 204
        await stream.rest()
    assert stream.text_chunks == 400
    assert await owed(world, channel) == cost(400, 2)
    assert world.net.chain.model.reserve.slots[channel.id] == before


# ------------------------------------------------------------------------------------- C5: success without an effect


def without_logs(request: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
    """Receipts say success and show nothing that happened."""
    if request["method"] != "eth_getTransactionReceipt" or not reply.get("result"):
        return reply
    return reply | {"result": reply["result"] | {"logs": []}}


def another_amount(request: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
    """Receipts say success, and their last log names one unit more."""
    if request["method"] != "eth_getTransactionReceipt" or not reply.get("result"):
        return reply
    *others, last = reply["result"]["logs"]
    data = bytearray.fromhex(last["data"][2:])
    data[31] ^= 1
    return reply | {"result": reply["result"] | {"logs": [*others, last | {"data": "0x" + data.hex()}]}}


@pytest.mark.parametrize("lie", [without_logs, another_amount])
async def test_c5_a_close_that_shows_no_effect_is_no_close(world: World, lie: Any) -> None:
    """C5: a successful receipt without our capture in its logs closes nothing and gets no receipt; the truth does."""
    channel = await world.opened()
    assert (await world.buy(chat("dev/story", max_tokens=5), world.payer.voucher(channel, UNIT))).status == 200
    credential = await world.pay(world.payer.close(channel, UNIT))
    restore = rpc_hook(world, lie)
    assert world.net.node.treasury is not None
    world.net.node.treasury.closer._sleep = lambda _: asyncio.sleep(0.01)
    reply = await world.send(None, credential)
    assert reply.status == 503
    assert reply.receipt is None
    account = await world.account(channel)
    assert account.phase is Phase.CAPTURED
    restore()
    reply = await world.send(None, credential)
    assert reply.status == 204
    assert reply.receipt is not None
    assert reply.receipt.spent == 51
    account = await world.account(channel)
    assert (account.phase, account.close is not None and account.close.capture) == (Phase.CLOSED, 51)


@pytest.mark.parametrize("lie", [without_logs, another_amount])
async def test_c5_a_top_up_that_shows_no_effect_adds_nothing(world: World, lie: Any) -> None:
    """C5: a successful receipt without the exact deposit in its logs is no money: nothing above the old one is served."""
    channel = await world.opened()
    rpc_hook(world, lie)
    reply = await world.manage(world.payer.top_up(channel, 5_000))
    assert reply.status in (402, 503)
    account = await world.account(channel)
    assert account.top_ups == ()
    assert account.chain.deposit == DEPOSIT


# ------------------------------------------------------------------------------------------- D4, D9: other processes


async def test_d4_a_second_node_on_the_same_file_does_not_start(world: World) -> None:
    """D4: it refuses before it serves anybody, and the first one does not notice."""
    channel = await world.opened()
    with pytest.raises(LedgerError):
        await world.net.new_node().start()
    assert (await world.buy(chat(), world.payer.voucher(channel, UNIT))).status == 200
    assert await owed(world, channel) == cost(2, 2)


async def test_d9_twenty_rolling_restarts_leave_no_hold_behind() -> None:
    """D9: two nodes stop and start in turn under load: streams in flight end whole, nothing stays held, bills are exact."""
    options = DevnetOptions(tokens_per_second=5_000.0, limits=LimitsConfig(drain_s=2))
    async with two_nodes(options) as (one, two):
        doors = [one, two]
        payers = [one.payer, one.new_payer()]
        channels = [await one.opened(cumulative=DEPOSIT, payer=payer) for payer in payers]
        body, due = chat("dev/story", max_tokens=100), [0, 0]
        for number in range(20):
            stopping, staying = doors[number % 2], doors[1 - number % 2]

            async def buy(door: World, index: int, started: asyncio.Event) -> None:
                payer = payers[index]
                credential = await door.pay(payer.voucher(channels[index], DEPOSIT), body, payer=payer)
                async with door.stream(body, credential) as stream:
                    await stream.tokens(1)
                    started.set()
                    await stream.rest()
                assert stream.text_chunks == 100
                due[index] += cost(100, 2)

            started = [asyncio.Event(), asyncio.Event()]
            running = asyncio.gather(buy(stopping, 0, started[0]), buy(staying, 1, started[1]))
            await asyncio.gather(*(event.wait() for event in started))
            name = f"{'one' if number % 2 == 0 else 'two'}"
            assert stopping.net.node.rail is not None
            old = stopping.net.node.rail._node()
            await stopping.net.node.stop()
            await running
            account = await staying.account(channels[0])
            assert not account.holds, "a graceful stop leaves nothing to sweep"
            assert account.owed_pico == due[0]
            assert staying.net.node.ledger is not None
            assert old not in await staying.net.node.ledger.living()
            fresh = new_node(one, name)
            await fresh.start()
            stopping.net.node = fresh
        for channel, each in zip(channels, due, strict=True):
            account = await until(one, channel, lambda account: not account.holds)
            assert account.owed_pico == each == 20 * cost(100, 2)


async def test_d9_who_is_cut_off_by_a_stop_pays_for_what_arrived() -> None:
    """D9, P26: streams that outlast the drain are billed what left, and a prompt nobody answered is the node's loss."""
    options = DevnetOptions(tokens_per_second=1.0, limits=LimitsConfig(drain_s=1))
    async with new_world(options) as world:
        mute, body = chat("dev/stalls-first", max_tokens=9), chat("dev/burst", max_tokens=400)
        channels = [await world.opened() for _ in range(2)]
        credential = await world.pay(world.payer.voucher(channels[0], UNIT), mute)
        waiting = asyncio.ensure_future(world.send(mute, credential))
        async with world.stream(body, await world.pay(world.payer.voucher(channels[1], UNIT), body)) as speaking:
            await speaking.tokens(COVERED)
            await world.eventually(lambda: world.net.provider.requests == 2)
            await world.net.node.stop()
        await asyncio.gather(waiting, return_exceptions=True)
        world.net.node = world.net.new_node()
        await world.net.node.start()
        accounts = [await world.account(channel) for channel in channels]
        assert [account.owed_pico for account in accounts] == [0, cost(COVERED, 1)]
        assert not any(account.holds for account in accounts)


# --------------------------------------------------------------------------------------------------- D6: the clock


@dataclass
class Skewed:
    """A machine whose wall clock is wrong; its monotonic clock is not."""

    true: Clock
    off_s: int = 0

    def now(self) -> UnixSeconds:
        return UnixSeconds(self.true.now() + self.off_s)

    def now_millis(self) -> UnixMillis:
        return UnixMillis(self.true.now_millis() + self.off_s * 1_000)

    def monotonic(self) -> float:
        return self.true.monotonic()


@pytest.fixture
async def apart(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[World, World, Skewed, Skewed]]:
    """A node half a minute behind and one half a minute ahead, on a ledger whose own clock is right."""
    made: list[Skewed] = []
    opening = app.open_ledger

    def truthful(config: Any, world: Any, **more: Any) -> Any:
        clock = world.clock.true if isinstance(world.clock, Skewed) else world.clock
        return opening(config, replace(world, clock=clock), **more)

    monkeypatch.setattr(app, "open_ledger", truthful)

    def clocks(world: World) -> tuple[Clock, Clock]:
        made.extend((Skewed(world.clock, -30), Skewed(world.clock, 30)))
        return made[0], made[1]

    async with two_nodes(clocks=clocks) as (slow, fast):
        yield slow, fast, made[0], made[1]


async def test_d6_nodes_a_minute_apart_serve_one_channel(apart: tuple[World, World, Skewed, Skewed]) -> None:
    """D6: challenges, vouchers and receipts of either node hold on the other; the close is exact; nothing is lost."""
    slow, fast, *_ = apart
    gate, payer, body = slow.gate(), slow.payer, LONG()
    channel = await slow.opened()
    before = slow.net.chain.balance(slow.net.payee)
    challenge = await slow.challenge(body)
    async with fast.stream(body, payer.credential(challenge, payer.voucher(channel, UNIT))) as stream:
        await gate.release(400)
        await stream.tokens(COVERED)
        for door, amount in ((slow, 2 * UNIT), (fast, 3 * UNIT), (slow, 5 * UNIT)):
            assert (await door.manage(payer.voucher(channel, amount))).status == 204
        await stream.rest()
    assert stream.text_chunks == 400
    replay = await slow.send(body, payer.credential(challenge, payer.voucher(channel, 5 * UNIT)))
    assert (replay.status, replay.code) == (402, "credential_used")
    account = await until(slow, channel, lambda account: not account.holds)
    assert (account.accepted, account.owed_pico) == (5 * UNIT, cost(400, 2))
    closed = await fast.manage(payer.close(channel, 5 * UNIT))
    assert closed.status == 204, closed.body
    assert slow.net.chain.balance(slow.net.payee) - before == cost(400, 2) // 1_000_000


async def test_d6_an_open_that_looks_too_old_is_refused_and_costs_nothing(
    apart: tuple[World, World, Skewed, Skewed],
) -> None:
    """D6: a node that is ahead refuses a payer's still valid transaction before it is sent; the other node takes it."""
    slow, fast, *_ = apart
    channel = slow.payer.channel()
    refused = await fast.manage(fast.payer.open(channel))
    assert (refused.status, refused.code) == (402, "transaction_rejected")
    assert fast.broadcasts() == 0
    assert (await slow.manage(slow.payer.open(channel))).status == 204


@pytest.mark.parametrize("jump", [3_600, -3_600])
async def test_d6_a_clock_that_jumps_loses_no_voucher_and_gives_nothing_away(
    apart: tuple[World, World, Skewed, Skewed], jump: int
) -> None:
    """D6: an hour forth or back in mid-stream, and back again: the stream goes on, and every service is charged."""
    slow, _, clock, _ = apart
    gate, payer, body, short = slow.gate(), slow.payer, LONG(), chat("dev/story", max_tokens=5)
    channel = await slow.opened()
    first = await slow.pay(payer.voucher(channel, UNIT), body)
    async with slow.stream(body, first) as stream:
        await gate.release(400)
        await stream.tokens(COVERED)
        clock.off_s += jump
        assert (await slow.manage(payer.voucher(channel, 5 * UNIT))).status == 204
        await stream.rest()
    assert stream.text_chunks == 400
    slow.net.provider.gate = None
    assert (await slow.buy(short, payer.voucher(channel, 5 * UNIT))).status == 200
    account = await until(slow, channel, lambda account: not account.holds)
    assert account.owed_pico == cost(400, 2) + cost(5, 2)
    clock.off_s -= jump
    again = await slow.send(body, first)
    account = await until(slow, channel, lambda account: not account.holds)
    served = again.body.count(b'"delta":{"content":"')
    assert again.status in (200, 402)
    assert account.owed_pico == cost(400, 2) + cost(5, 2) + (cost(served, 2) if served else 0)
    assert account.accepted == 5 * UNIT


async def test_d6_a_lease_ends_by_the_ledgers_clock_alone(apart: tuple[World, World, Skewed, Skewed]) -> None:
    """D6: a node whose own clock jumps an hour neither loses its life nor takes anybody else's."""
    slow, fast, *clocks = apart
    nodes = [slow.net.node, fast.net.node]
    ids = {node.rail._node() for node in nodes if node.rail is not None}
    assert len(ids) == 2
    for clock in clocks:
        clock.off_s += 3_600
        for node in nodes:
            assert node.ledger is not None
            assert await node.ledger.living() >= ids
        clock.off_s -= 7_200
        for node in nodes:
            assert node.ledger is not None
            assert await node.ledger.living() >= ids
    slow.clock.advance(3_600)  # the ledger's own: now everybody is late
    assert nodes[0].ledger is not None
    assert await nodes[0].ledger.living() == frozenset()


# ----------------------------------------------------------------------------------------------- D10: the provider

FAILURES = [
    ("dev/error-500", True, 0),
    ("dev/error-500", False, 0),
    ("dev/dies-after-3", True, 3),
    ("dev/garbage", True, 0),
    ("dev/error-in-200", True, 0),
    ("dev/error-in-200", False, 0),
    ("dev/story", True, 10),
]


async def test_d10_failures_of_the_provider_release_everything(world: World) -> None:
    """D10: over all failures in turn: charged is delivered, holds are gone at once, and spent never falls."""
    channel = await world.opened(cumulative=20 * UNIT)
    assert world.net.node.books is not None
    spent: list[int] = []
    world.net.node.books.subscribe(lambda account: spent.append(account.spent))
    due = 0
    for model, stream, tokens in FAILURES * 3:
        body = chat(model, stream=stream, max_tokens=10)
        reply = await world.buy(body, world.payer.voucher(channel, 20 * UNIT))
        assert reply.status in (200, 502, 503), "503 when it is avoided already"
        assert reply.body.count(b'"delta":{"content":"') == tokens
        due += (cost(tokens, 2) if model == "dev/story" else cost(tokens, 1)) if tokens else 0
        assert await owed(world, channel) == due
    assert spent == sorted(spent)
    assert (await world.account(channel)).spent == due // 1_000_000
    assert world.net.provider.live == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_d10_a_provider_that_is_not_there_costs_nothing(world: World, stream: bool) -> None:
    """D10: nobody listens at the provider's address: 502, the reservation is gone, the voucher still buys elsewhere."""
    channel = await world.opened()
    engine = world.net.node._engine
    assert engine is not None
    endpoints = engine.market.endpoints
    real = dict(endpoints)
    endpoints |= {name: replace(each, base_url="http://127.0.0.1:1/v1") for name, each in real.items()}
    reply = await world.buy(chat(stream=stream, max_tokens=10), world.payer.voucher(channel, UNIT))
    assert (reply.status, reply.code) == (502, "all_providers_failed")
    assert await owed(world, channel) == 0
    endpoints |= real
    assert (await world.buy(chat(), world.payer.voucher(channel, UNIT))).status == 200
