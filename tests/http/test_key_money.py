"""What a key can buy to the last token, what is told about it, and what a stream keeps of its request."""

from __future__ import annotations

import functools
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from channels.units import Pico
from mppnode.config.schema import ModelConfig
from mppnode.kernel.listing import Ability
from mppnode.kernel.requests import ChatRequest
from tests.http.test_keyed import KEY, agree
from tests.http.test_stream_traps import COVERED
from tests.support.customers import new_customer
from tests.support.http_client import TOKEN_UNITS, UNIT, World, chat, cost, new_world

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
DEAR: dict[str, Any] = {"request": Pico(7_000_000_001), "image": Pico(123_456_789), "abilities": ~Ability(0)}


@pytest.fixture
async def dear(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A node that charges for requests and pictures as well."""
    monkeypatch.setattr("mppnode.cli.devnet.ModelConfig", functools.partial(ModelConfig, **DEAR))
    async with new_world() as world:
        yield world
        assert world.log.bugs == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("pictures", [0, 3])
async def test_p43_the_affordable_number_is_the_largest(dear: World, stream: bool, choices: int, pictures: int) -> None:
    """P-43: what a 402 calls affordable is served and one token more is not, with pictures, choices and a price each."""
    customer = await new_customer(dear, 50_000_000_000 + 9_999_999)

    def body(tokens: int) -> dict[str, Any]:
        asked: dict[str, Any] = chat("dev/story", max_tokens=tokens, stream=stream, n=choices)
        asked["messages"] = [{"role": "user", "content": [{"type": "text", "text": "hello"}, *[PICTURE] * pictures]}]
        return asked

    refused = await customer.send(body(50_000))
    affordable = refused.json["error"]["affordable_max_tokens"]
    assert (refused.status, affordable > 1_000) == (402, True)
    beyond = await customer.send(body(affordable + 1))
    assert (beyond.status, beyond.json["error"]["affordable_max_tokens"]) == (402, affordable)
    assert (await customer.send(body(affordable))).status == 200
    await agree(customer)


async def test_p43_what_a_cap_leaves_is_affordable_only_with_the_money(world: World) -> None:
    """P-43: where both a cap and the credit fall short, the number told is the one that works, not a second refusal."""
    customer = await new_customer(world, cost(120, 0), spend_caps={"total": 1})
    refused = await customer.send(chat("dev/story", max_tokens=2_000, stream=False))
    assert (refused.status, refused.code) == (403, "cap_reached")
    affordable = refused.json["error"]["affordable_max_tokens"]
    assert 0 < affordable < 120
    assert (await customer.send(chat("dev/story", max_tokens=affordable, stream=False))).status == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_p43_what_the_credit_pays_for_still_fits_the_context(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """P-43: cut to its credit, an answer without a limit is also cut to its provider's context, or it would be a 400."""

    def short(*given: Any) -> ModelConfig:
        return ModelConfig(*given[:6], 3_000, 3_000)

    monkeypatch.setattr("mppnode.cli.devnet.ModelConfig", short)
    async with new_world() as world:
        text = "x" * 1_000
        customer = await new_customer(world, cost(2_990, 342))
        reply = await customer.send(chat("dev/story", text, stream=stream))
        assert reply.status == 200
        await agree(customer)
        (row,) = await customer.requests()
        assert 0 < row.completion <= 3_000 - 250, "beside a prompt of at least a quarter of its bytes"


async def test_p24_a_repeat_on_a_channel_asks_for_no_vouchers(world: World) -> None:
    """P-24, P32: vouchers the first stream asked for are no part of the answer; a payer would sign for them again."""
    body, channel = chat("dev/story", max_tokens=COVERED + 50), world.payer.channel()
    credential = await world.pay(world.payer.open(channel), body)
    async with world.stream(body, credential, headers=KEY) as stream:
        await stream.tokens(COVERED)
        await stream.until("payment-need-voucher") if not stream.needs else None
        assert (await world.manage(world.payer.voucher(channel, UNIT + 80 * TOKEN_UNITS))).status == 204
        await stream.rest()
    await world.settled()
    assert stream.needs
    outdated = await world.send(body, credential, headers=KEY)
    assert (outdated.status, outdated.json["error"]["code"]) == (402, "voucher_too_low")
    owed = (await world.account(channel)).owed_pico
    newest = await world.pay(world.payer.voucher(channel, UNIT + 80 * TOKEN_UNITS), body)
    async with world.stream(body, newest, headers=KEY) as again:
        await again.rest()
    assert (await world.account(channel)).owed_pico == owed
    assert again.response.headers["Idempotent-Replayed"] == "true"
    assert not again.needs
    assert again.texts == stream.texts


async def test_a_keys_stream_keeps_no_prompt(world: World) -> None:
    """A stream may last for an hour: neither it nor its handler keeps the request's messages for so long."""
    customer = await new_customer(world)
    gate = world.gate(lent=2)
    async with customer.stream(chat("dev/story", max_tokens=10)) as stream:
        await stream.tokens(2)
        gc.collect()
        assert not [kept for kept in gc.get_objects() if isinstance(kept, ChatRequest) and kept.messages]
        await gate.release(100)
        await stream.rest()
    await agree(customer)
