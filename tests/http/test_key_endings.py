"""Every way a key's request can end: never above its hold, never for what did not leave the node, and nothing stays held."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import aiohttp
import pytest

from channels.credit import Fold, Settle
from channels.faults import ChannelFault, Reason
from mppnode.engine.stream import StreamLimits
from mppnode.ledger.credits import Credits
from tests.http.test_keyed import KEY, PROMPT_PICO, agree
from tests.support.customers import Customer, customers_of, new_customer
from tests.support.http_client import PATH, World, chat, cost

HELD = cost(40, 12)
"""The most a request for 40 tokens with the default text may hold: 11 bytes of prompt are at most 12 tokens."""


async def ending(customer: Customer) -> str:
    (row,) = await customer.requests()
    return str(json.loads(row.document)["ending"])


@pytest.mark.parametrize(
    ("model", "how", "least", "most"),
    [
        ("dev/dies-after-3", "upstream_failed", cost(3, 1), cost(3, 12)),
        ("dev/closes-early", "upstream_failed", cost(3, 1), cost(3, 12)),
        ("dev/error-500", "upstream_failed", 0, 0),
        ("dev/garbage-200", "upstream_failed", 0, 0),
        ("dev/empty", "upstream_failed", 0, 0),
        ("dev/never-ends", "overrun", cost(40, 1), cost(40, 12)),
        ("dev/usage-huge", "complete", cost(1, 1), HELD),
    ],
)
async def test_a_provider_that_misbehaves_costs_what_arrived(
    world: World, model: str, how: str, least: int, most: int
) -> None:
    """Failed before the first token it is free, after it costs what was delivered, and lies are capped at the hold."""
    customer = await new_customer(world)
    reply = await customer.send(chat(model, max_tokens=40))
    assert (reply.status == 200) == (most > 0)
    charged = await agree(customer)
    assert least <= charged <= most
    assert await ending(customer) == how


async def test_leaving_before_the_first_token_costs_the_prompt(world: World) -> None:
    """The provider has read the prompt: that much, and never a token."""
    customer = await new_customer(world)
    gate = world.gate(lent=0)
    asking = asyncio.ensure_future(customer.send(chat("dev/story", max_tokens=40), headers=KEY))
    await world.eventually(lambda: world.net.provider.live == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await world.eventually(lambda: world.net.provider.live == 0)
    await gate.release(100)
    assert await agree(customer) <= cost(0, 12)
    world.net.provider.gate = None
    assert (await customer.send(chat("dev/story", max_tokens=40), headers=KEY)).status == 200
    await agree(customer)


async def _away(*_: Any, **__: Any) -> Any:
    raise ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger is not available")


async def test_a_fold_that_fails_ends_the_stream_at_its_window(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a ledger no more than two windows are delivered, and they are charged when it is back."""
    customer = await new_customer(world)
    with monkeypatch.context() as patch:
        patch.setattr(Credits, "apply", _away)
        async with customer.stream(chat("dev/never-ends", max_tokens=5_000)) as stream:
            await stream.rest()
    charged = await agree(customer)
    window = 2_000 * 10**6
    assert cost(stream.text_chunks, 0) <= charged <= cost(stream.text_chunks, 12) <= 2 * window + PROMPT_PICO * 12
    assert await ending(customer) == "closed"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_bill_that_cannot_be_written_is_the_nodes_loss(
    world: World, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The hold is released by a sweep, charged at what was recorded, and a repeat by Idempotency-Key is not charged."""
    customer, body = await new_customer(world), chat("dev/story", max_tokens=40, stream=stream)
    transact, held = Credits.transact, list[bool]()

    async def once(self: Credits, account: Any, step: Any) -> Any:
        if held:
            await _away()
        held.append(True)
        return await transact(self, account, step)

    with monkeypatch.context() as patch:
        patch.setattr(Credits, "transact", once)
        with pytest.raises(aiohttp.ClientPayloadError) if stream else contextlib.nullcontext():
            assert (await customer.send(body, headers=KEY)).status == 503
        await world.settled()
    assert len((await customer.credit()).holds) == 1
    assert await customers_of(world).sweeper.sweep() == 0, "it may be being settled"
    assert await customers_of(world).sweeper.sweep() == 1
    assert await agree(customer) == 0
    again = await customer.send(body, headers=KEY)
    assert (again.status, again.headers["Idempotent-Replayed"]) == (200, "true")
    assert await agree(customer) == 0


async def test_p42_folds_follow_deliveries(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """P-42: however slowly a client reads and the ledger writes, a stream goes on, and no fold repeats the one before."""
    customer, folds = await new_customer(world), list[int]()
    apply = Credits.apply

    async def slow(self: Credits, account: Any, command: Any) -> Any:
        if isinstance(command, Fold):
            folds.append(command.consumed)
            for _ in range(50):
                await asyncio.sleep(0)
        return await apply(self, account, command)

    monkeypatch.setattr(Credits, "apply", slow)
    reply = await customer.send(chat("dev/never-ends", max_tokens=6_000))
    assert reply.body.count(b'"content":') >= 6_000
    assert len(folds) > 1
    assert [0, *folds] == sorted({0, *folds}), "each records more than the one before"
    assert cost(6_000, 1) <= await agree(customer) <= cost(6_000, 12)


async def test_a_chunk_dearer_than_a_window_is_delivered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window bounds the node's loss; it never stops a stream whose chunks are larger."""
    monkeypatch.setattr(customers_of(world).rail, "_window", 5_000_000)
    customer = await new_customer(world)
    async with customer.stream(chat("dev/story", max_tokens=60)) as stream:
        await stream.rest()
    assert stream.text_chunks == 60
    assert await agree(customer) == cost(60, stream.usage["prompt_tokens"])


async def test_a_sweep_beats_the_bill_only_once(world: World) -> None:
    """A hold that was dropped as a dead one's is not charged again by the request that comes to its end after all."""
    customer = await new_customer(world)
    gate = world.gate(lent=5)
    async with customer.stream(chat("dev/story", max_tokens=40)) as stream:
        await stream.tokens(5)
        (hold,) = (await customer.credit()).holds
        await customer.books.apply(customer.account, Settle(hold, 0))  # type: ignore[arg-type]
        await gate.release(100)
        await stream.rest()
    await world.settled()
    credit = await customer.credit()
    assert (credit.owed, dict(credit.holds)) == (0, {})


async def test_a_fenced_node_ends_its_streams_at_what_was_delivered(world: World) -> None:
    """Its life in the ledger over, the node delivers nothing more; what had left is charged, and nothing stays held."""
    customer = await new_customer(world)
    gate = world.gate(lent=5)
    async with customer.stream(chat("dev/story", max_tokens=40), headers=KEY) as stream:
        await stream.tokens(5)
        customers_of(world).rail.end_everything()
        await stream.rest()
    await gate.release(100)
    assert stream.text_chunks == 5
    assert cost(5, 1) <= await agree(customer) <= cost(5, 12)
    assert await ending(customer) == "superseded"


async def test_a_client_that_stalls_is_charged_what_it_took(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stops reading is cut off: what waits for it in this process is not its bill."""
    monkeypatch.setattr(world.net.node._engine, "_limits", StreamLimits(stall_s=0.05))
    customer = await new_customer(world)
    body = json.dumps(chat("dev/never-ends", max_tokens=20_000)).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: {customer.bearer}\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", int(world.net.node.url.rpartition(":")[2]), limit=1_024)
    writer.write(head.encode() + body)
    await world.eventually(lambda: world.net.provider.live == 1)
    await world.eventually(lambda: world.net.provider.live == 0)
    charged = await agree(customer)
    assert await ending(customer) == "stalled"
    assert 0 < charged < cost(20_000, 1)
    got = await reader.read(1_024)
    assert got.startswith(b"HTTP/1.1 200 OK")
    writer.close()
