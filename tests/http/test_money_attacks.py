"""Hostile payers against the bill itself: P26 and P28 to P31."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channels.model import Account, Finish, HoldId, Phase, Renew
from channels.units import Pico
from channels.wire import request as requests
from mppnode.cli.devnet import DevnetOptions
from mppnode.http.sse import EventStream
from mppnode.kernel.rates import Rates
from mppnode.pricing.catalog import Catalog
from tests.http.test_stream_traps import COVERED, LONG, owed, quiet
from tests.support.builders import decide, opened, reserve
from tests.support.http_client import PATH, UNIT, Channel, World, chat, cost, new_world

TOKEN = b'"delta":{"content":"'
WINDOW = 2_000 * 1_000_000
"""The stated loss per stream: one window, in pico."""

# ----------------------------------------------------------------------------------- P26: a dear prompt, then nothing

PROMPT = "an expensive question " * 2_700
PROMPT_PICO = cost(0, len(PROMPT) // 6)
"""Near 5,000 units: two and a half windows."""


async def hang_up(world: World, channel: Channel, body: dict[str, Any], *, after: int | None) -> None:
    """Ask, read ``after`` tokens (0: the provider has the prompt; None: it has not), and hang up."""
    assert world.net.node._engine is not None
    credential = await world.pay(world.payer.voucher(channel, 20 * UNIT), body)
    if after is None:
        asking = asyncio.ensure_future(world.send(body, credential))
        await world.eventually(lambda: len(world.net.node._engine._runs) == 1)  # type: ignore[union-attr]
        asking.cancel()
        await asyncio.wait({asking})
        return
    if after == 0:
        world.gate(lent=0)
        asking = asyncio.ensure_future(world.send(body, credential))
        rail = world.net.node.rail
        assert rail is not None
        enders = rail._live._enders
        await world.eventually(lambda: any(end.__self__.upstream is not None for end in enders.values()))
        asking.cancel()
        await asyncio.wait({asking})
        return
    async with world.stream(body, credential) as stream:
        assert world.net.provider.gate is not None
        await world.eventually(lambda: world.net.provider.live == 1)
        await world.net.provider.gate.release(after)
        await stream.tokens(after)
        stream.response.close()


@pytest.mark.parametrize("after", [0, 1, 2, 63, 64, 65, 400])
async def test_p26_a_dear_prompt_is_paid_whenever_the_payer_leaves(world: World, after: int) -> None:
    """P26: left after the provider took the prompt, before or after any token: no more than a window goes unpaid."""
    world.gate()
    channel, body = await world.opened(cumulative=20 * UNIT), chat("dev/story", PROMPT, max_tokens=500)
    await hang_up(world, channel, body, after=after)
    charged = await owed(world, channel)
    burnt = PROMPT_PICO + cost(after, 0)
    assert 0 <= burnt - charged <= WINDOW
    assert charged == burnt, "a provider that keeps time leaves nothing unpaid at all"
    assert world.net.provider.live == 0


async def test_p26_leaving_before_the_provider_answers_costs_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """P26, D10: what no provider has accepted is nobody's cost; the reservation is gone with the payer."""
    engine = world.net.node._engine
    assert engine is not None

    async def never(*_: object) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(engine, "_find", never)
    channel = await world.opened(cumulative=20 * UNIT)
    await hang_up(world, channel, chat("dev/story", PROMPT, max_tokens=500), after=None)
    assert await owed(world, channel) == 0
    assert world.net.provider.requests == 0


async def test_p26_leaving_in_the_moment_of_acceptance_leaves_no_provider_running(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P26, P28: the provider's answer and the payer's hang-up in one turn of the loop: cancelled, and the prompt paid."""
    engine = world.net.node._engine
    assert engine is not None
    start, connect, handlers = engine.start, engine._find, []

    async def started(*args: Any, **more: Any) -> Any:
        handlers.append(asyncio.current_task())
        return await start(*args, **more)

    async def connected(*args: Any) -> Any:
        response = await connect(*args)
        handlers[0].cancel()
        return response

    monkeypatch.setattr(engine, "start", started)
    monkeypatch.setattr(engine, "_find", connected)
    world.gate()
    channel, body = await world.opened(cumulative=20 * UNIT), chat("dev/story", PROMPT, max_tokens=500)
    credential = await world.pay(world.payer.voucher(channel, 20 * UNIT), body)
    with contextlib.suppress(aiohttp.ClientError):
        await world.send(body, credential)
    await world.eventually(lambda: world.net.provider.requests == 1)
    assert await owed(world, channel) == PROMPT_PICO
    assert world.net.provider.cancelled == 1


async def test_p26_a_request_superseded_in_the_moment_of_acceptance_costs_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P26: the provider's answer and the end of the request by the node in one turn: refused, cancelled, not charged."""
    engine = world.net.node._engine
    assert engine is not None
    connect = engine._find

    async def connected(*args: Any) -> Any:
        response = await connect(*args)
        (ender,) = world.net.node.rail._live._enders.values()  # type: ignore[union-attr]
        ending = ender()
        with contextlib.suppress(StopIteration):
            ending.send(None)  # up to where it waits for the bill: what a close or a newer stream does to this request
        endings.append(ending)
        return response

    endings: list[Any] = []
    monkeypatch.setattr(engine, "_find", connected)
    world.gate()
    channel, body = await world.opened(cumulative=20 * UNIT), chat("dev/story", PROMPT, max_tokens=500)
    reply = await world.buy(body, world.payer.voucher(channel, 20 * UNIT))
    assert (reply.status, reply.code) == (409, "hold_fenced")
    for ending in endings:
        ending.close()
    assert await owed(world, channel) == 0
    assert world.net.provider.cancelled == 1


async def test_p26_a_request_superseded_before_it_begins_to_look_leaves_nothing_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P26: ended between its reservation and the first step of its search: refused, not charged, nobody was asked."""
    engine = world.net.node._engine
    assert engine is not None
    admit, endings = engine._admit, []

    async def admitted(*args: Any, **more: Any) -> Any:
        run = await admit(*args, **more)

        def end() -> None:
            ending = run.supersede()
            with contextlib.suppress(StopIteration):
                ending.send(None)
            endings.append(ending)

        asyncio.get_running_loop().call_soon(end)  # runs ahead of the task that is started next
        return run

    monkeypatch.setattr(engine, "_admit", admitted)
    channel, body = await world.opened(cumulative=20 * UNIT), chat("dev/story", max_tokens=5)
    reply = await world.buy(body, world.payer.voucher(channel, 20 * UNIT))
    assert (reply.status, reply.code) == (409, "hold_fenced")
    for ending in endings:
        ending.close()
    assert await owed(world, channel) == 0
    assert world.net.provider.requests == 0


async def test_p26_a_prompt_nobody_can_pay_reaches_no_provider(world: World) -> None:
    """P26: prompt and first token are held before the provider hears of them; the refusal names what would do."""
    channel, body = await world.opened(cumulative=UNIT), chat("dev/story", PROMPT, max_tokens=500)
    reply = await world.buy(body, world.payer.voucher(channel, UNIT))
    assert (reply.status, reply.code) == (402, "insufficient_balance")
    required = int(reply.json["details"]["required"])
    assert required * 1_000_000 > PROMPT_PICO
    assert (await world.buy(body, world.payer.voucher(channel, required - 1))).status == 402
    assert world.net.provider.requests == 0
    world.gate()
    await hang_up(world, channel, body, after=0)
    assert world.net.provider.requests == 1


async def test_p26_max_tokens_beyond_the_deposit_sells_the_deposit(world: World) -> None:
    """P26: whoever asks for a hundred thousand tokens on a deposit for a hundred gets a hundred, paid."""
    channel, body = world.payer.channel(deposit=UNIT), chat("dev/never-ends", max_tokens=100_000)
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await quiet(stream)
        assert stream.text_chunks == COVERED
        stream.response.close()
    assert await owed(world, channel) == cost(COVERED, 1)


# -------------------------------------------------------------------------------------- P28: two hundred disconnects


async def test_p28_two_hundred_random_disconnects(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """P28: cut at any byte, 200 times: never charged for more than left the node, at most a window for less."""
    written = 0
    write = EventStream.write

    def counted(self: EventStream, frames: bytes) -> None:
        nonlocal written
        written += frames.count(TOKEN)
        write(self, frames)

    # What waits in the node's buffer at a cut is dropped with it: the payer has the use of what it has read, no more.
    monkeypatch.setattr(EventStream, "write", counted)
    cuts, losses = random.Random(28), []
    accepted = 4_000 * UNIT
    channel = await world.opened(deposit=accepted, cumulative=accepted)
    body = chat("dev/burst", max_tokens=1_500)
    before = 0
    for _ in range(200):
        written = 0
        credential = await world.pay(world.payer.voucher(channel, accepted), body)
        async with world.request(body, credential) as response:
            assert response.status == 200
            left = cuts.choice((0, 1, 300, cuts.randrange(1, 3_000), cuts.randrange(1, 150_000)))
            got = bytearray()
            while len(got) < left and (data := await response.content.readany()):
                got += data
            if cuts.random() < 0.5 and response.connection is not None and response.connection.transport is not None:
                response.connection.transport.abort()  # with a reset, instead of a polite end
            response.close()
        charged = await owed(world, channel)
        due = charged - before
        before = charged
        assert due <= cost(written, 1), "a payer is charged for what never left the node"
        losses.append(cost(got.count(TOKEN), 1) - due)
        assert losses[-1] <= WINDOW
        assert world.net.provider.live == 0
    assert len(losses) == 200
    assert max(losses) > 0, "some cuts lose something, or the bound is not tested"
    assert before > 0


async def test_p28_a_reader_that_never_catches_up_pays_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P27, P28: who reads so that the node's buffer never runs empty, and then resets, has paid to within a window."""
    buffered = EventStream.buffered
    monkeypatch.setattr(EventStream, "buffered", lambda self: max(buffered(self), 1))  # the last byte never leaves
    accepted = 10 * UNIT
    channel, body = await world.opened(cumulative=accepted), chat("dev/never-ends", max_tokens=50_000)
    async with world.stream(body, await world.pay(world.payer.voucher(channel, accepted), body)) as stream:
        await stream.tokens(700)
        assert stream.response.connection is not None
        assert stream.response.connection.transport is not None
        stream.response.connection.transport.abort()
    charged = await owed(world, channel)
    assert cost(stream.text_chunks, 1) - charged <= WINDOW, "a payer who reads slowly and resets has read for nothing"
    assert charged <= accepted * 1_000_000


async def test_p28_a_slow_reader_of_dear_tokens_gets_and_pays_them_all() -> None:
    """P28: twenty tokens fill a window; who reads slowly is waited for, neither cut off nor owed nor overcharged."""
    async with new_world(DevnetOptions(tokens_per_second=0.0, output=Pico(100_000_000))) as world:
        accepted, loop = 50_000, asyncio.get_running_loop()
        channel, body = await world.opened(cumulative=accepted), chat("dev/story", max_tokens=400)
        credential, data = await world.pay(world.payer.voucher(channel, accepted), body), json.dumps(body).encode()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", int(world.net.node.url.rpartition(":")[2])))
            head = f"POST {PATH} HTTP/1.0\r\nHost: x\r\nAuthorization: {credential}\r\nContent-Length: {len(data)}\r\n\r\n"
            await loop.sock_sendall(sock, head.encode() + data)
            got = bytearray()
            while piece := await loop.sock_recv(sock, 1_000):
                got += piece
                for _ in range(5):
                    await asyncio.sleep(0)
        assert got.count(TOKEN) == 400
        assert got.endswith(b"data: [DONE]\n\n")
        assert await owed(world, channel) == 400 * 100_000_000 + cost(0, 2)


# ------------------------------------------------------------------------------------------- P29: disputed receipts


async def test_p29_a_receipt_after_a_reset_is_the_durable_account(world: World) -> None:
    """P29: the payer resets after the last token and disputes: every later proof says what is on disk, restarts included."""
    gate, channel, body = world.gate(), world.payer.channel(), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await gate.release(7)
        await stream.tokens(7)
        assert stream.response.connection is not None
        assert stream.response.connection.transport is not None
        stream.response.connection.transport.abort()
    assert await owed(world, channel) == cost(7, 1)
    account = await world.account(channel)
    proofs = []
    for restart in (False, True):
        if restart:
            await world.net.node.stop()
            world.net.node = world.net.new_node()
            await world.net.node.start()
            assert await world.account(channel) == account
        for method in ("POST", "HEAD", "POST"):
            credential = await world.pay(world.payer.voucher(channel, UNIT))
            reply = await world.send(None, credential, method=method)
            assert reply.status == 204
            assert reply.receipt is not None
            proofs.append((reply.receipt.channel_id, reply.receipt.accepted, reply.receipt.spent))
    assert set(proofs) == {(channel.id, account.accepted, account.spent)}
    assert account.spent == 70
    assert await world.account(channel) == account, "asking for a proof changes nothing"


# ---------------------------------------------------------------------------------------- P30: dust between requests

_CUTS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(rate=st.integers(1, 3_000_001), slices=_CUTS)
def test_p30_slicing_into_requests_gives_no_dust_away(rate: int, slices: list[tuple[int, int]]) -> None:
    """P30: work cut into any requests and any folds costs the floor of its exact total, once, at any price."""
    account: Account = opened(cumulative=10**9, deposit=10**9)
    total = 0
    for number, (tokens, first) in enumerate(slices):
        due, hold = tokens * rate, HoldId(f"h{number}")
        ask = reserve(hold=hold, ticket=f"t{number}")
        account = decide(account, replace(ask, floor=Pico(1), want=Pico(due))).account
        folded = min(first, tokens) * rate
        if folded:
            account = decide(account, Renew(hold, Pico(folded), Pico(due))).account
        account = decide(account, Finish(hold, Pico(due))).account
        total += due
        assert account.spent == total // 1_000_000
        assert account.owed_pico == total
    assert account.capturable == total // 1_000_000


async def test_p30_forty_tiny_requests_cost_what_one_large_one_costs() -> None:
    """P30: at a price of 0.030001 units a token, requests of one to three tokens: the bill is the floor of the sum."""
    prices = DevnetOptions(tokens_per_second=0.0, input=Pico(7), output=Pico(30_001))
    async with new_world(prices) as world:
        channel, tokens, charged = await world.opened(cumulative=10 * UNIT), 0, 0
        for number in range(40):
            body = chat("dev/story", max_tokens=1 + number % 3, stream=bool(number % 2))
            reply = await world.buy(body, world.payer.voucher(channel, 10 * UNIT))
            assert reply.status == 200
            tokens += 1 + number % 3
            charged = await owed(world, channel)
        assert charged == tokens * 30_001 + 40 * 2 * 7
        closed = await world.manage(world.payer.close(channel, 10 * UNIT))
        assert closed.status == 204
        account = await world.account(channel)
        assert account.close is not None
        assert (account.phase, account.close.capture) == (Phase.CLOSED, charged // 1_000_000)
        assert charged // 1_000_000 > 0


# ------------------------------------------------------------------------------------------- P31: the price changes


def reprice(world: World, factor: int) -> None:
    """The operator changes every price; what was quoted is known by its version."""
    engine = world.net.node._engine
    assert engine is not None

    def dearer(rates: Rates) -> Rates:
        return Rates(*(Pico(rate * factor) for rate in rates.axes))

    shelf = world.net.node.sales.shelf
    shelf.current = Catalog((replace(each, rates=dearer(each.rates)) for each in shelf.current), stale_s=10**9)


async def test_p31_a_challenge_of_the_old_price_buys_nothing_at_the_new_one(world: World) -> None:
    """P31: refused clearly, with a challenge at the new price; nothing is charged; the old one still carries vouchers."""
    channel, body = await world.opened(cumulative=2 * UNIT), chat("dev/story", max_tokens=10)
    old = await world.challenge(body)
    reprice(world, 3)
    state = await world.state()
    refused = await world.send(body, world.payer.credential(old, world.payer.voucher(channel, 2 * UNIT)))
    assert (refused.status, refused.code, refused.field) == (402, "invalid_challenge", "opaque")
    assert await world.state() == state
    asked, was = requests.decode(refused.challenge().request), requests.decode(old.request)
    assert (asked.amount, asked.unit_type) != (was.amount, was.unit_type)
    managed = await world.send(None, world.payer.credential(old, world.payer.voucher(channel, 3 * UNIT)))
    assert managed.status == 204
    served = await world.send(body, world.payer.credential(refused.challenge(), world.payer.voucher(channel, 3 * UNIT)))
    assert served.status == 200
    assert await owed(world, channel) == 3 * cost(10, 2)


@pytest.mark.parametrize("factor", [2, 0])
async def test_p31_a_running_stream_keeps_its_price(world: World, factor: int) -> None:
    """P31: a price that rises or falls to nothing mid-stream is the next stream's; this one ends at the price it began."""
    gate, channel, body = world.gate(), world.payer.channel(), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel, 9 * UNIT), body)) as stream:
        await gate.release(50)
        await stream.tokens(50)
        reprice(world, factor)
        await gate.release(350)
        await stream.rest()
    assert stream.text_chunks == 400
    assert await owed(world, channel) == cost(400, 2)


async def test_p31_an_open_for_the_old_price_is_not_broadcast(world: World) -> None:
    """P31: a payer who answers an old price by opening a channel keeps the money, and opens at the new price."""
    channel, body = world.payer.channel(), chat("dev/story", max_tokens=10)
    credential = await world.pay(world.payer.open(channel), body)
    reprice(world, 2)
    before = world.broadcasts()
    refused = await world.send(body, credential)
    assert (refused.status, refused.code) == (402, "invalid_challenge")
    assert world.broadcasts() == before
    again = world.payer.credential(refused.challenge(), world.payer.open(channel))
    assert (await world.send(body, again)).status == 200
    assert await owed(world, channel) == 2 * cost(10, 2)
