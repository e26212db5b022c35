"""Hostile payers against admission, streams and closes: P3, P4, P13, P20, P22, P25.

P1, P2, P8 to P12 and the first parts of P3, P13, P20 and P21 are with the traps beside this file; P5 to P7, P23 and
P24 are simulated.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from channels.ids import Address, Hash32
from channels.model import Phase
from channels.units import Units
from channels.wire.credential import source_of
from mppnode.cli.devnet import CHAIN_ID, V1_ESCROW, DevnetOptions
from mppnode.config.schema import SessionConfig
from tests.http.fleet import two_nodes, until
from tests.http.test_stream_traps import COVERED, LONG, PROTOCOLS, impatient, owed
from tests.support.http_client import (
    PATH,
    TOKEN_UNITS,
    UNIT,
    V2,
    Channel,
    Reply,
    Stream,
    World,
    chat,
    cost,
)

# ------------------------------------------------------------------------------------------------- P3: many at once


def hasty() -> DevnetOptions:
    """A stream whose channel is used up waits a moment for more, not a minute."""
    session = SessionConfig(PROTOCOLS, Units(1_000), Units(100_000), voucher_wait_s=0.15, chain_ttl_s=0)  # type: ignore[arg-type]
    return DevnetOptions(tokens_per_second=0.0, session=session)


async def consume(world: World, body: dict[str, Any], credential: str) -> int:
    """Read one answer to its end; what arrived, priced exactly in pico."""
    async with world.request(body, credential) as response:
        if response.status != 200:
            await response.read()
            return 0
        if not body["stream"]:
            usage = (await response.json())["usage"]
            return cost(usage["completion_tokens"], usage["prompt_tokens"])
        stream = await Stream(response).rest()
        assert stream.final.spent <= stream.final.accepted
        if not stream.text_chunks:
            return 0
        assert stream.text_chunks == stream.usage["completion_tokens"]
        return cost(stream.usage["completion_tokens"], stream.usage["prompt_tokens"])


async def rush(doors: list[World], channel: Channel, accepted: int, count: int, *, buffered: int) -> int:
    """``count`` requests of one payer at once, spread over the doors; what arrived in all, in pico."""
    payer, order = doors[0].payer, random.Random(count)
    bodies = [chat("dev/story", max_tokens=100, stream=n >= buffered) for n in range(count)]
    order.shuffle(bodies)
    jobs = []
    for number, body in enumerate(bodies):
        door = doors[number % len(doors)]
        jobs.append((door, body, await door.pay(payer.voucher(channel, accepted), body)))
    return sum(await asyncio.gather(*(consume(*job) for job in jobs)))


async def test_p3_fifty_requests_on_a_deposit_for_ten() -> None:
    """P3: fifty requests at once on a deposit worth ten: delivered is charged to the pico, and covered by vouchers."""
    async with impatient() as world:
        deposit = 10 * 100 * TOKEN_UNITS
        channel = await world.opened(deposit=deposit, cumulative=deposit)
        delivered = await rush([world], channel, deposit, 50, buffered=25)
        charged = await owed(world, channel)
        account = await world.account(channel)
        assert 0 < delivered == charged <= account.accepted * 1_000_000
        assert account.accepted == account.chain.deposit == deposit


async def test_p3_two_nodes_share_one_headroom() -> None:
    """P3: sixteen requests at once, spread over two nodes of one ledger: neither node sells the other's headroom."""
    async with two_nodes(hasty()) as (one, two):
        deposit = 4 * 100 * TOKEN_UNITS
        channel = await one.opened(deposit=deposit, cumulative=deposit)
        delivered = await rush([one, two], channel, deposit, 16, buffered=10)
        account = await until(one, channel, lambda account: not account.holds)
        assert 0 < delivered == account.owed_pico <= deposit * 1_000_000


# ---------------------------------------------------------------------------------------------- P4: one stream only


async def test_p4_a_newer_stream_on_another_node_ends_the_older_one() -> None:
    """P4: the owner of the older stream is asked, bills what arrived and gives its receipt; then the newer one runs."""
    async with two_nodes() as (one, two):
        gate, channel, body, short = one.gate(), one.payer.channel(), LONG(), chat("dev/story", max_tokens=5)
        async with one.stream(body, await one.pay(one.payer.open(channel), body)) as older:
            await gate.release(5)
            await older.tokens(5)
            two.net.provider.gate = None
            async with two.stream(short, await two.pay(two.payer.voucher(channel, 2 * UNIT), short)) as newer:
                await newer.rest()
            await older.rest()
        assert older.chunks[-1]["mppnode"] == {"ended": "superseded"}
        assert (older.text_chunks, newer.text_chunks) == (5, 5)
        assert newer.receipt.spent >= older.final.spent == 5 * TOKEN_UNITS
        account = await until(one, channel, lambda account: not account.holds)
        assert account.owed_pico == cost(5, 1) + cost(5, 2)


async def test_p4_a_node_that_does_not_listen_is_fenced() -> None:
    """P4: the older stream's node hears nothing: after the patience it is fenced, and delivers its hold and no more."""
    async with two_nodes() as (one, two):
        gate, channel, body, short = one.gate(), one.payer.channel(), LONG(), chat("dev/story", max_tokens=5)
        async with one.stream(body, await one.pay(one.payer.open(channel, 3 * UNIT), body)) as older:
            await gate.release(20)
            await older.tokens(20)
            assert one.net.node.rail is not None
            (tab,) = one.net.node.rail._live._tabs[channel.id]
            tab.observe, tab.must_end = lambda account: None, lambda account: False
            account = await one.account(channel)
            (hold,) = account.holds.values()
            credential = await two.pay(two.payer.voucher(channel, 3 * UNIT), short)
            newer = asyncio.ensure_future(consume(two, short | {"stream": True}, credential))
            await until(two, channel, lambda account: any(hold.ending for hold in account.holds.values()))
            one.clock.advance(4)
            await until(two, channel, lambda account: all(not hold.ending for hold in account.holds.values()))
            await gate.release(10_000)
            await older.rest()
            assert await newer == cost(5, 2)
        assert older.chunks[-1]["mppnode"] == {"ended": "superseded"}
        assert cost(older.text_chunks, 1) <= hold.granted, "not a token beyond the hold it had"
        account = await until(one, channel, lambda account: not account.holds)
        assert account.owed_pico == hold.consumed + cost(5, 2), "charged as recorded: the rest is the node's loss"


# --------------------------------------------------------------------------------------------- P13: closes and races


@pytest.mark.parametrize("tokens", [1, 50, COVERED])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same node", "another node"])
async def test_p13_a_close_at_any_moment_captures_what_was_delivered(tokens: int, elsewhere: bool) -> None:
    """P13: closed at and after any token, here or through another node: captured is spent is delivered."""
    async with two_nodes() as (one, two):
        gate, channel, body = one.gate(), one.payer.channel(), LONG()
        before = one.net.chain.balance(one.net.payee)
        door = two if elsewhere else one
        async with one.stream(body, await one.pay(one.payer.open(channel), body)) as stream:
            await gate.release(tokens)
            await stream.tokens(tokens)
            closed = await door.manage(door.payer.close(channel, UNIT))
            await gate.release(10_000)
            await stream.rest()
        assert closed.status == 204, closed.body
        assert stream.text_chunks == tokens
        delivered = cost(tokens, 1) // 1_000_000
        account = await one.account(channel)
        assert account.close is not None
        assert (account.phase, account.close.capture, account.spent) == (Phase.CLOSED, delivered, delivered)
        assert one.net.chain.balance(one.net.payee) - before == delivered
        assert closed.receipt is not None
        assert closed.receipt.spent == delivered


async def late(world: World, credential: str, turns: int) -> Reply:
    """Send after some turns of the loop."""
    for _ in range(turns):
        await asyncio.sleep(0)
    return await world.send(None, credential)


async def test_p13_closes_race_streams_and_vouchers(world: World) -> None:
    """P13: closes, vouchers and content at once, twelve channels: one end each, capture never above spent."""
    totals = []
    for seed in range(12):
        order, channel = random.Random(seed), await world.opened(cumulative=2 * UNIT)
        body = chat("dev/story", max_tokens=60)
        payer, before = world.payer, world.net.chain.balance(world.net.payee)
        work: list[Any] = [
            consume(world, body | {"stream": True}, await world.pay(payer.voucher(channel, 3 * UNIT), body)),
            consume(world, body | {"stream": True}, await world.pay(payer.voucher(channel, 3 * UNIT), body)),
        ]
        managed = (payer.voucher(channel, 4 * UNIT), payer.close(channel, 4 * UNIT), payer.close(channel, 4 * UNIT))
        work += [late(world, await world.pay(payload), 120 * seed + order.randrange(20)) for payload in managed]
        order.shuffle(work)
        results = await asyncio.gather(*work)
        delivered = sum(result for result in results if isinstance(result, int))
        account = await until(world, channel, lambda account: account.phase is Phase.CLOSED)
        assert account.close is not None
        assert account.close.capture == account.spent == delivered // 1_000_000
        assert world.net.chain.balance(world.net.payee) - before == account.spent
        totals.append(delivered)
    assert len(set(totals)) > 1, "the race is won by different runners"


# ------------------------------------------------------------------------------------------------- P20: side doors


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "post", "QUERY")
PATHS = (
    PATH, f"{PATH}/", f"/{PATH}", f"{PATH}%2F", f"{PATH};x", PATH.upper(), "/v1/chat%2Fcompletions",
    "/", "/v1", "/v1/models", "/v1/completions", "/v1/embeddings", "/metrics", "/admin", "/health", "/.well-known/mpp",
)  # fmt: skip


FREE = (("GET", "/v1/models"), ("HEAD", "/v1/models"))
"""What is on sale is told to everybody."""


@pytest.mark.parametrize("path", PATHS)
async def test_p20_no_route_and_method_serves_for_free(world: World, path: str) -> None:
    """P20: every method on every path, unpaid and paid: only a paid POST to the route reaches a provider."""
    channel = await world.opened(cumulative=50 * UNIT)
    override = {"X-HTTP-Method-Override": "POST", "X-Original-URL": PATH, "X-Rewrite-URL": PATH}
    body = chat("dev/story", max_tokens=1)
    for method in METHODS:
        for authorization in (None, await world.pay(world.payer.voucher(channel, 50 * UNIT), body)):
            for sent in (None, body):
                if (method.upper(), path, bool(authorization and sent)) == ("POST", PATH, True):
                    continue  # the door with the price on it
                reply = await world.send(sent, authorization, method=method, path=path, headers=override)
                assert reply.status in (200, 204, 400, 402, 404, 405), (method, reply.status)
                assert reply.status != 200 or (method, path) in FREE
                assert b'"choices":' not in reply.body
    assert world.net.provider.requests == 0
    assert (await world.account(channel)).owed_pico == 0


# -------------------------------------------------------------------------------------------------- P22: who signs


@pytest.mark.parametrize("content", [False, True])
async def test_p22_only_the_authorised_signer_signs(world: World, content: bool) -> None:
    """P22: a channel that names a signer takes that key's signatures; the payer's own opens, moves and closes nothing."""
    delegate, payer = world.new_payer(), world.payer
    body = chat("dev/story", max_tokens=2) if content else None
    channel = payer.channel(call={"authorized_signer": delegate.address, "salt": Hash32(b"\x07" * 32)})
    before = world.broadcasts()
    refused = await world.buy(body, payer.open(channel, key=payer.key))
    assert (refused.status, refused.code) == (402, "invalid_signature")
    assert world.broadcasts() == before
    assert (await world.manage(payer.open(channel, key=delegate.key))).status == 204
    state = await world.state()
    for payload in (payer.voucher(channel, 2 * UNIT), payer.close(channel, 2 * UNIT)):
        if content and payload.__class__.__name__ == "ClosePayload":
            continue
        refused = await world.buy(body, payload)
        assert (refused.status, refused.code) == (402, "invalid_signature")
    assert await world.state() == state
    source = source_of(CHAIN_ID, delegate.address)
    assert (await world.manage(payer.voucher(channel, 2 * UNIT, key=delegate.key), source=source)).status == 204


CONTRACTS = {"an escrow": V1_ESCROW, "the reserve": V2.address, "a precompile": Address(bytes(19) + b"\x01")}


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)
async def test_p22_a_contract_as_signer_gets_nothing(world: World, contract: Address) -> None:
    """P22: nobody holds a contract's key, and wrapped signatures count for none: no deposit is taken, nothing served."""
    payer = world.payer
    channel = payer.channel(call={"authorized_signer": contract})
    good = payer.sign(channel, UNIT)
    wrapped = {
        "the payer's own": good,
        "keychain 1": b"\x03" + contract + good,
        "keychain 2": b"\x04" + contract + good,
        "EIP-6492": contract.rjust(32, b"\0") + good + b"\x64\x92" * 16,
        "pre-approved": contract.rjust(32, b"\0") + bytes(32) + b"\x01",
    }
    before = await world.state()
    for name, signature in wrapped.items():
        opening = payer.open(channel)
        for body in (None, chat()):
            reply = await world.buy(body, type(opening)(*(getattr(opening, field) for field in opening.__slots__[:-1]), signature))
            assert (reply.status, reply.code) == (402, "invalid_signature"), name
    assert await world.state() == before
