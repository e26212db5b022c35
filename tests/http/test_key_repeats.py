"""An Idempotency-Key under pressure: at once, after lost answers, for too much memory, and for answers that were cut."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from channels.faults import ChannelFault, Reason
from mppnode.engine import record
from mppnode.engine.record import Record
from mppnode.ledger.credits import Credits
from tests.http.test_keyed import KEY, agree
from tests.support.customers import customers_of, new_customer
from tests.support.http_client import World, chat, cost


async def test_p24_of_two_at_once_one_is_served(world: World) -> None:
    """P-24: ten first requests with one key in the same moment: one answer, one charge, and nine are told to wait."""
    customer, body = await new_customer(world), chat("dev/story", max_tokens=5, stream=False)
    replies = await asyncio.gather(*(customer.send(body, headers=KEY) for _ in range(10)))
    assert world.net.provider.requests == 1
    told = {(reply.status, reply.headers.get("Idempotent-Replayed")) for reply in replies}
    assert told <= {(200, None), (200, "true"), (409, None)}
    assert [reply.status for reply in replies if "Idempotent-Replayed" not in reply.headers].count(200) == 1
    assert await agree(customer) == cost(5, replies[0].json.get("usage", {}).get("prompt_tokens", 2))


async def test_p24_on_a_channel_of_two_at_once_one_is_served(world: World) -> None:
    """P-24: the same on the session rail, where a second request without a key would be a second charge."""
    channel = world.payer.channel()
    first = chat(stream=False, max_tokens=5)
    assert (await world.send(first, await world.pay(world.payer.open(channel), first))).status == 200
    body = chat("dev/story", max_tokens=5, stream=False)
    credentials = [await world.pay(world.payer.voucher(channel, 2_000), body) for _ in range(5)]
    before, asked = (await world.account(channel)).owed_pico, world.net.provider.requests
    replies = await asyncio.gather(*(world.send(body, credential, headers=KEY) for credential in credentials))
    assert world.net.provider.requests == asked + 1
    assert {reply.status for reply in replies} <= {200, 409}
    assert (await world.account(channel)).owed_pico - before <= cost(5, 2)


@pytest.mark.parametrize("stream", [True, False])
async def test_p24_an_answer_that_was_cut_at_its_limit_is_an_answer(world: World, stream: bool) -> None:
    """P-24: a provider that ignores ``max_tokens`` is cut off, its caller pays for a whole answer, and pays once."""
    customer, body = await new_customer(world), chat("dev/never-ends" if stream else "dev/story", max_tokens=20, stream=stream)
    assert (await customer.send(body, headers=KEY)).status == 200
    charged = await agree(customer)
    assert (await customer.send(body, headers=KEY)).headers["Idempotent-Replayed"] == "true"
    assert await agree(customer) == charged


async def test_p24_a_claim_whose_answer_was_lost_blocks_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """P-24: claimed, and the ledger's word for it lost on the way: 503, and the repeat is a first try."""
    customer, body = await new_customer(world), chat("dev/story", max_tokens=5, stream=False)
    write = Credits.write

    async def lost(self: Credits, talk: Any, *, of: str) -> Any:
        await write(self, talk, of=of)
        raise ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger is not available")

    with monkeypatch.context() as patch:
        patch.setattr(Credits, "write", lost)
        assert (await customer.send(body, headers=KEY)).status == 503
    assert (await customer.send(body, headers=KEY)).status == 200
    assert await agree(customer) > 0


async def test_p24_a_claim_given_up_late_takes_no_later_one_with_it(world: World) -> None:
    """P-24: what is given up late is that claim, not the one that was made of its name since."""
    idempotence = customers_of(world).idempotence
    first = await idempotence.begin("account:a", "order-17", b"x")
    assert isinstance(first, Record)
    await first.drop()
    second = await idempotence.begin("account:a", "order-17", b"x")
    assert isinstance(second, Record)
    await idempotence.give_up(first._name)
    with pytest.raises(Exception, match="is being served"):
        await idempotence.begin("account:a", "order-17", b"x")
    await second.drop()


async def test_p24_answers_wait_in_bounded_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """P-24: beyond the memory for waiting answers an answer is served and charged and not kept; its repeat is told so."""
    monkeypatch.setattr(record, "_WAITING_MAX", 2_000)
    customer = await new_customer(world)
    large, small = chat("dev/story", max_tokens=200), chat("dev/story", max_tokens=1)
    assert (await customer.send(large, headers=KEY)).status == 200
    again = await customer.send(large, headers=KEY)
    assert (again.status, again.code) == (409, "conflict")
    assert customers_of(world).idempotence.waiting == 0
    other = {"Idempotency-Key": "order-18"}
    assert (await customer.send(small, headers=other)).status == 200
    assert (await customer.send(small, headers=other)).headers["Idempotent-Replayed"] == "true"
    assert customers_of(world).idempotence.waiting == 0
    await agree(customer)


async def test_p24_another_kind_of_answer_is_another_request(world: World) -> None:
    """P-24: the kind of answer is part of the request, also where only ``Accept`` says which; a key's case is too."""
    customer, silent = await new_customer(world), chat("dev/story", max_tokens=5)
    silent.pop("stream", None)
    as_json = {**KEY, "Accept": "application/json"}
    assert (await customer.send(silent, headers=as_json)).status == 200
    assert (await customer.send(silent, headers={**KEY, "Accept": "text/event-stream"})).status == 422
    same = {"idempotency-KEY": KEY["Idempotency-Key"], "Accept": "application/json"}
    assert (await customer.send(silent, headers=same)).headers["Idempotent-Replayed"] == "true"
    other = {"Idempotency-Key": KEY["Idempotency-Key"].upper(), "Accept": "application/json"}
    assert "Idempotent-Replayed" not in (await customer.send(silent, headers=other)).headers


async def test_p24_the_node_goes_on_catching_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """P-24: what is late is tried again until it is written, and old answers are forgotten now and then."""
    idempotence, rounds, errors = customers_of(world).idempotence, list[float](), list[ChannelFault]()
    claimed = await idempotence.begin("account:a", "order-17", b"x")
    assert isinstance(claimed, Record)
    write, away = Credits.write, True

    async def sometimes(self: Credits, talk: Any, *, of: str) -> Any:
        if away:
            raise ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger is not available")
        return await write(self, talk, of=of)

    async def sleep(seconds: float) -> None:
        nonlocal away
        rounds.append(seconds)
        away = sum(rounds) < 1_000
        if sum(rounds) > 1_300:
            raise asyncio.CancelledError

    monkeypatch.setattr(Credits, "write", sometimes)
    await claimed.drop()
    with pytest.raises(asyncio.CancelledError):
        await idempotence.keep(sleep, errors.append)
    assert [fault.reason for fault in errors] == [Reason.STORE_UNAVAILABLE], "one of two purges came too early"
    assert isinstance(await idempotence.begin("account:a", "order-17", b"x"), Record)
