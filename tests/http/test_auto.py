"""``model: "auto"`` through the whole node: the choice is told first, and the bill is the chosen model's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.test_openai_sdk import client
from tests.http.test_stream_traps import owed
from tests.support.http_client import UNIT, World, chat, cost

POOL = ["dev/story", "dev/burst"]


def auto(**members: Any) -> dict[str, Any]:
    return chat("auto", "Write a Python function to sort a list", max_tokens=5, **members)


async def test_the_first_event_is_the_decision(world: World) -> None:
    """Seed 002: task, complexity, confidence, model and time, before any content; other models stay out."""
    channel, body = world.payer.channel(), auto(routing={"model_pool": POOL})
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.rest()
        assert stream.response.headers["X-Model"] in POOL
        model = stream.response.headers["X-Model"]
    first, *others = stream.chunks
    assert first["object"] == "routing"
    assert first["choices"] == []
    assert (first["model"], first["task"], first["complexity"]) == (model, "code_generation", "simple")
    assert 0 <= first["confidence"] <= 1
    assert first["routing_time_ms"] >= 0
    assert not any(chunk.get("object") == "routing" for chunk in others)
    assert stream.text_chunks == 5
    assert await owed(world, channel) == cost(5, stream.usage["prompt_tokens"])


async def test_a_caller_who_names_a_model_gets_no_such_event(world: World) -> None:
    """The event is only for who left the choice to the node."""
    channel, body = world.payer.channel(), chat("dev/story", max_tokens=2)
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.rest()
    assert not any(chunk.get("object") == "routing" for chunk in stream.chunks)


async def test_the_sdk_reads_past_the_decision(world: World) -> None:
    """Seed 002 with a stock client: the event is a chunk without choices to it."""
    channel, body = world.payer.channel(), auto(routing={"model_pool": POOL})
    credential = await world.pay(world.payer.open(channel), body)
    async with client(world, credential) as sdk:
        stream = await sdk.chat.completions.create(
            model="auto",
            messages=body["messages"],
            max_tokens=5,
            stream=True,
            extra_body={"routing": {"model_pool": POOL}},
        )
        texts = [choice.delta.content async for chunk in stream for choice in chunk.choices if choice.delta.content]
    assert len(texts) == 5


async def test_a_buffered_answer_carries_the_decision(world: World) -> None:
    """Who does not stream learns the choice as well."""
    channel, body = await world.opened(), auto(stream=False, routing={"model_pool": POOL, "task": "math"})
    reply = await world.buy(body, world.payer.voucher(channel, 2 * UNIT))
    assert reply.status == 200, reply.body
    assert reply.json["routing"]["task"] == "math"
    assert reply.json["routing"]["model"] == reply.headers["X-Model"]


@pytest.mark.parametrize(
    ("routing", "status", "field"),
    [
        ({"model_pool": []}, 400, "routing.model_pool"),
        ({"model_pool": ["dev/story", "dev/stroy"]}, 404, "routing.model_pool[1]"),
        ({"task": "juggling"}, 400, "routing.task"),
        ({"optimize": "fast"}, 400, "routing.optimize"),
        ({"pool": []}, 400, "routing"),
    ],
)
async def test_a_bad_choice_is_named(world: World, routing: dict[str, Any], status: int, field: str) -> None:
    """Before any money: the entry at fault, by its path."""
    reply = await world.send(auto(routing=routing))
    assert (reply.status, reply.field) == (status, field)


async def test_a_challenge_for_auto_buys_no_named_model(world: World) -> None:
    """What was quoted for a choice of the node's is not a quote for a choice of the caller's."""
    channel = await world.opened()
    credential = await world.pay(world.payer.voucher(channel, 2 * UNIT), auto())
    reply = await world.send(chat("dev/story"), credential)
    assert (reply.status, reply.code) == (402, "invalid_challenge")
