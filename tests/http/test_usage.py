"""P-35, P-36: one usage per stream, where the caller wants it, with the exact price on it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.test_stream_traps import owed
from tests.support.http_client import UNIT, World, chat, cost

ONE = 10**12


async def chunks(world: World, **options: Any) -> tuple[list[dict[str, Any]], int]:
    """The chunks of a stream of five tokens and what was charged for it, in pico."""
    channel, body = world.payer.channel(), chat("dev/story", max_tokens=5, **options)
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.rest()
    await world.settled()
    return [each for each in stream.chunks if each.get("object") != "payment.receipt"], await owed(world, channel)


def pico(usage: dict[str, Any]) -> int:
    whole, _, fraction = usage["cost"].partition(".")
    return int(whole) * ONE + int(fraction.ljust(12, "0"))


@pytest.mark.parametrize("options", [{}, {"stream_options": {}}, {"stream_options": {"include_usage": None}}])
async def test_p35_without_being_asked_the_usage_rides_on_the_last_chunk(world: World, options: dict[str, Any]) -> None:
    """P-35, seed 003: code that reads choices[0] of every chunk meets no chunk without choices."""
    seen, charged = await chunks(world, **options)
    assert all(chunk["choices"] for chunk in seen)
    assert [bool(chunk.get("usage")) for chunk in seen] == [False] * (len(seen) - 1) + [True]
    last = seen[-1]
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 5
    assert pico(last["usage"]) == charged == cost(5, last["usage"]["prompt_tokens"])


async def test_p35_asked_for_it_is_one_chunk_without_choices(world: World) -> None:
    """P-35: exactly one, the last, and the chunk with the finish reason has none."""
    seen, charged = await chunks(world, stream_options={"include_usage": True})
    assert [chunk["choices"] == [] for chunk in seen] == [False] * (len(seen) - 1) + [True]
    assert [bool(chunk.get("usage")) for chunk in seen] == [False] * (len(seen) - 1) + [True]
    assert pico(seen[-1]["usage"]) == charged


async def test_p35_refused_it_is_not_sent_and_still_counted(world: World) -> None:
    """P-35: the bill is made of the provider's report, which the caller did not want to see."""
    seen, charged = await chunks(world, stream_options={"include_usage": False})
    assert not any(chunk.get("usage") for chunk in seen)
    assert charged == cost(5, 2)


async def test_r14_a_buffered_answer_names_its_exact_cost(world: World) -> None:
    """R14: what the usage says is what the books have."""
    channel, body = await world.opened(), chat("dev/story", max_tokens=5, stream=False)
    reply = await world.buy(body, world.payer.voucher(channel, UNIT))
    usage = reply.json["usage"]
    assert pico(usage) == await owed(world, channel) == cost(5, usage["prompt_tokens"])
    assert int(usage["cost_base_units"].partition(".")[0]) == pico(usage) // 10**6
