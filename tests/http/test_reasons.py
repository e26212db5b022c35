"""Every reason a request can be refused for is reached over HTTP, or listed with why it cannot be."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from channels.faults import Reason
from channels.units import Units
from channels.wire.problems import PROBLEMS
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.schema import LimitsConfig, SessionConfig, TreasuryConfig
from mppnode.http.problem import STATUS
from mppnode.kernel.faults import NodeReason
from tests.http import key_reasons
from tests.http.test_open_traps import failing, rpc_hook
from tests.support.http_client import DEPOSIT, UNIT, V1, V2, Reply, World, bent, chat, new_world

Scenario = Callable[[World], Awaitable[Reply]]
CASES: dict[Reason | NodeReason, Scenario] = {**key_reasons.CASES}
UNREACHABLE: dict[Reason | NodeReason, str] = {
    Reason.AMBIGUOUS_CREDENTIAL: "the first Payment credential counts, as in the reference server; two are no fault",
    NodeReason.NO_PROVIDER: "one provider per model until routing comes: it is configured or the node does not start",
    NodeReason.IDENTITY_UNAVAILABLE: "needs an issuer that is away: test_bearers",
    NodeReason.BILLING_UNAVAILABLE: "needs a payment processor that is away: tests/billing",
}


def reaches(reason: Reason | NodeReason) -> Callable[[Scenario], Scenario]:
    def register(scenario: Scenario) -> Scenario:
        assert reason not in CASES
        CASES[reason] = scenario
        return scenario

    return register


# ------------------------------------------------------------------------------------------------------- the credential


@reaches(Reason.PAYMENT_REQUIRED)
async def _nothing_paid(world: World) -> Reply:
    return await world.send(chat())


@reaches(Reason.MALFORMED_CREDENTIAL)
async def _malformed(world: World) -> Reply:
    return await world.send(None, "Payment !!!")


@reaches(Reason.INVALID_CHALLENGE)
async def _forged(world: World) -> Reply:
    return await world.send(None, bent(await world.pay(world.payer.open(world.payer.channel())), "challenge.id", "x"))


@reaches(Reason.PAYMENT_EXPIRED)
async def _expired(world: World) -> Reply:
    credential = await world.pay(world.payer.open(world.payer.channel()))
    world.clock.advance(301)
    return await world.send(None, credential)


@reaches(Reason.INVALID_PAYLOAD)
async def _payload(world: World) -> Reply:
    return await world.send(None, bent(await world.pay(world.payer.open(world.payer.channel())), "payload.action", "x"))


@reaches(Reason.DESCRIPTOR_MISMATCH)
async def _descriptor(world: World) -> Reply:
    channel = world.payer.channel(call={"payee": world.payer.address})
    return await world.manage(world.payer.open(channel))


@reaches(Reason.SOURCE_MISMATCH)
async def _source(world: World) -> Reply:
    return await world.manage(world.payer.voucher(await world.opened(), 2 * UNIT), payer=world.new_payer())


@reaches(Reason.TRANSACTION_REJECTED)
async def _transaction(world: World) -> Reply:
    return await world.manage(world.payer.open(world.payer.channel(chain_id=1)))


@reaches(Reason.INVALID_SIGNATURE)
async def _signature(world: World) -> Reply:
    return await world.manage(world.payer.voucher(await world.opened(), 2 * UNIT, key=b"\x05" * 32))


# ---------------------------------------------------------------------------------------------------------- the channel


@reaches(Reason.CHANNEL_NOT_FOUND)
async def _unknown(world: World) -> Reply:
    return await world.manage(world.payer.voucher(world.payer.channel(), UNIT))


@reaches(Reason.CHANNEL_FINALIZED)
async def _finished(world: World) -> Reply:
    channel = await world.opened()
    await world.manage(world.payer.close(channel, UNIT))
    return await world.manage(world.payer.voucher(channel, 2 * UNIT))


@reaches(Reason.CHANNEL_BUSY)
async def _busy(world: World) -> Reply:
    """Nine buffered requests at once on one channel: eight share it."""
    channel, body = await world.opened(cumulative=50 * UNIT), chat("dev/story", stream=False, max_tokens=3)
    silent, _, reached = await black_hole(world)
    credentials = [await world.pay(world.payer.voucher(channel, 50 * UNIT), body) for _ in range(9)]
    waiting = [asyncio.ensure_future(world.send(body, credential)) for credential in credentials[:8]]
    await world.eventually(lambda: len(reached) == 8)
    reply = await world.send(body, credentials[8])
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await world.settled()
    silent.close()
    return reply


@reaches(Reason.HOLD_FENCED)
async def _fenced(world: World) -> Reply:
    """A stream whose provider has not answered yet is overtaken by a newer one."""
    silent, restore, reached = await black_hole(world)
    channel, body = await world.opened(), chat("dev/story", max_tokens=3)
    first = asyncio.ensure_future(world.buy(body, world.payer.voucher(channel, UNIT)))
    await world.eventually(lambda: len(reached) == 1)
    restore()
    assert (await world.buy(body, world.payer.voucher(channel, UNIT))).status == 200
    reply = await first
    silent.close()
    return reply


@reaches(Reason.RATE_LIMITED)
async def _flood(world: World) -> Reply:
    channel = await world.opened()
    for number in range(20):
        await world.manage(world.payer.voucher(channel, 2 * UNIT + number))
    return await world.manage(world.payer.voucher(channel, 3 * UNIT))


@reaches(Reason.DEPOSIT_TOO_SMALL)
async def _small(world: World) -> Reply:
    return await world.manage(world.payer.open(world.payer.channel(deposit=10), 1))


@reaches(Reason.VOUCHER_EXCEEDS_DEPOSIT)
async def _exceeds(world: World) -> Reply:
    return await world.manage(world.payer.voucher(await world.opened(), DEPOSIT + 1))


@reaches(Reason.VOUCHER_TOO_LOW)
async def _low(world: World) -> Reply:
    return await world.manage(world.payer.voucher(await world.opened(), UNIT - 1))


@reaches(Reason.VOUCHER_DELTA_TOO_SMALL)
async def _delta(world: World) -> Reply:
    return await world.manage(world.payer.voucher(await world.opened(), UNIT + 1))


@reaches(Reason.CLOSE_BELOW_SPENT)
async def _below(world: World) -> Reply:
    channel = await world.opened()
    assert (await world.buy(chat(), world.payer.voucher(channel, 2 * UNIT))).status == 200
    return await world.manage(world.payer.close(channel, 1))


@reaches(Reason.CREDENTIAL_USED)
async def _used(world: World) -> Reply:
    credential = await world.pay(world.payer.voucher(await world.opened(), 2 * UNIT), chat())
    assert (await world.send(chat(), credential)).status == 200
    return await world.send(chat(), credential)


@reaches(Reason.INSUFFICIENT_BALANCE)
async def _insufficient(world: World) -> Reply:
    channel = await world.opened()
    return await world.buy(chat(stream=False, max_tokens=5_000), world.payer.voucher(channel, UNIT))


@reaches(Reason.EXPOSURE_LIMIT)
async def _exposed(world: World) -> Reply:
    """The channel owes more than this node lets anybody owe before the chain has paid."""
    channel = await world.opened()
    assert (await world.buy(chat(), world.payer.voucher(channel, 2 * UNIT))).status == 200
    return await world.buy(chat(), world.payer.voucher(channel, 3 * UNIT))


# ------------------------------------------------------------------------------------------------------------ the world


@reaches(Reason.CHAIN_REJECTED)
async def _reverts(world: World) -> Reply:
    """The payer promises more than they hold."""
    return await world.manage(world.payer.open(world.payer.channel(deposit=10**12)))


@reaches(Reason.CHAIN_UNAVAILABLE)
async def _no_chain(world: World) -> Reply:
    credential = await world.pay(world.payer.open(world.payer.channel()))
    rpc_hook(world, lambda request, _: failing(request))
    return await world.send(None, credential)


@reaches(Reason.CHAIN_OUTCOME_UNKNOWN)
async def _no_receipt(world: World) -> Reply:
    def lose(request: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        world.clock.advance(2)
        return failing(request) if request["method"] == "eth_getTransactionReceipt" else reply

    credential = await world.pay(world.payer.open(world.payer.channel()))
    rpc_hook(world, lose)
    return await world.send(None, credential)


@reaches(Reason.STORE_UNAVAILABLE)
async def _no_ledger(world: World) -> Reply:
    channel = await world.opened()
    credential = await world.pay(world.payer.voucher(channel, 2 * UNIT))
    store: Any = world.net.node.books._store  # type: ignore[union-attr]
    store._broken = True
    reply = await world.send(None, credential)
    store._broken = False
    return reply


# ------------------------------------------------------------------------------------------------------ not about money


async def black_hole(world: World) -> tuple[asyncio.Server, Callable[[], None], list[object]]:
    """Put a provider that never answers in the place of the real one: it, how to undo that, and who has come."""
    reached: list[object] = []

    async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(writer)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(nothing, "127.0.0.1", 0)
    engine: Any = world.net.node._engine
    endpoints = engine.market.endpoints
    real = endpoints["dev"]
    port = server.sockets[0].getsockname()[1]
    endpoints["dev"] = replace(real, base_url=f"http://127.0.0.1:{port}/v1")
    return server, functools.partial(endpoints.__setitem__, "dev", real), reached


@reaches(NodeReason.NOT_FOUND)
async def _no_route(world: World) -> Reply:
    return await world.send(chat(), path="/v1/nothing")


@reaches(NodeReason.METHOD_NOT_ALLOWED)
async def _wrong_method(world: World) -> Reply:
    return await world.send(method="PUT")


@reaches(NodeReason.UNSUPPORTED_MEDIA_TYPE)
async def _compressed(world: World) -> Reply:
    return await world.send(b"x", headers={"Content-Encoding": "gzip"})


@reaches(NodeReason.BODY_TOO_LARGE)
async def _too_large(world: World) -> Reply:
    return await world.send(b"x" * (1024 * 1024 + 1))


@reaches(NodeReason.INVALID_JSON)
async def _no_json(world: World) -> Reply:
    return await world.send(b"{")


@reaches(NodeReason.INVALID_FIELD)
async def _bad_field(world: World) -> Reply:
    return await world.send(chat(temperature=3))


@reaches(NodeReason.UNKNOWN_MODEL)
async def _no_model(world: World) -> Reply:
    return await world.send(chat("dev/nothing"))


@reaches(NodeReason.SHUTTING_DOWN)
async def _stopping(world: World) -> Reply:
    channel = await world.opened()
    credential = await world.pay(world.payer.voucher(channel, 2 * UNIT), chat())
    assert world.net.node._engine is not None
    world.net.node._engine.stop()
    return await world.send(chat(), credential)


@reaches(NodeReason.OVERLOADED)
async def _full(world: World) -> Reply:
    engine: Any = world.net.node._engine
    engine._streams_max = 0
    return await world.buy(chat(), world.payer.voucher(await world.opened(), 2 * UNIT))


@reaches(NodeReason.PROVIDER_TIMEOUT)
async def _slow_provider(world: World) -> Reply:
    silent, _, _ = await black_hole(world)
    channel = await world.opened()
    reply = await world.buy(chat(timeout_ms=30), world.payer.voucher(channel, 2 * UNIT))
    silent.close()
    return reply


@reaches(NodeReason.PROVIDERS_BUSY)
async def _busy_provider(world: World) -> Reply:
    return await world.buy(chat("dev/rate-limited"), world.payer.voucher(await world.opened(), 2 * UNIT))


@reaches(NodeReason.ALL_PROVIDERS_FAILED)
async def _no_provider(world: World) -> Reply:
    return await world.buy(chat("dev/error-500"), world.payer.voucher(await world.opened(), 2 * UNIT))


@reaches(NodeReason.INTERNAL)
async def _bug(world: World) -> Reply:
    """Only a mistake of ours gives a 500; one is put in here."""
    rail: Any = world.net.node.rail

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret")

    rail.challenges = broken
    reply = await world.send(chat())
    world.log.lines = [line for line in world.log.lines if line["event"] != "request.bug"]
    return reply


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("reason", list(CASES), ids=lambda reason: reason.value)
async def test_each_reason_has_its_status_and_shape(reason: Reason | NodeReason) -> None:
    """P-52: every reason has its status from the one table, OpenAI's error member, a problem for payments, no secret."""
    session = SessionConfig(
        (V2.protocol, V1.protocol), Units(1_000), Units(100_000), min_voucher_delta=Units(2), chain_ttl_s=0
    )
    if reason is Reason.RATE_LIMITED:
        session = SessionConfig((V2.protocol, V1.protocol), Units(1_000), Units(100_000), chain_ttl_s=0)
    exposure = 1 if reason is Reason.EXPOSURE_LIMIT else 5_000_000
    options = DevnetOptions(
        tokens_per_second=0.0,
        session=session,
        limits=LimitsConfig(drain_s=1),
        treasury=TreasuryConfig(exposure_max=Units(exposure)),
        accounts=key_reasons.ACCOUNTS,
    )
    async with new_world(options) as world:
        reply = await CASES[reason](world)
        assert (reply.status, reply.code) == (STATUS[reason], reason.value), reply.body
        error = reply.json["error"]
        extra = {"attempts", "affordable_max_tokens", "top_up_url", "window", "resets_in_s"}
        assert set(error) - extra == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert b"secret" not in reply.body
        assert "Payment-Receipt" not in reply.headers
        if isinstance(reason, Reason):
            assert reply.headers["Content-Type"].startswith("application/problem+json")
            assert reply.json["type"] == PROBLEMS[reason].type_uri
            assert reply.json["status"] == reply.status
            assert reply.json["challengeId"] == reply.challenges[0].id
        else:
            assert reply.headers["Content-Type"].startswith("application/json")
        assert ("Retry-After" in reply.headers) or reply.headers.get("x-should-retry") == "false" or reply.status >= 500
        assert world.log.bugs == []


def test_every_reason_is_reached_or_explained() -> None:
    """No reason is forgotten: adding one without a request that reaches it fails here."""
    assert set(CASES) | set(UNREACHABLE) == {*Reason, *NodeReason}
    assert not set(CASES) & set(UNREACHABLE)
    assert all(UNREACHABLE.values())
