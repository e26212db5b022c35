"""The official OpenAI SDK as a client: it knows nothing of payments and must not be disturbed by them."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.support.http_client import UNIT, World, chat, cost


def client(world: World, credential: str) -> Any:
    """An SDK client whose requests carry a credential, added below it: on a hook of its own HTTP client."""

    async def pay(request: Any) -> None:
        request.headers["Authorization"] = credential

    http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [pay]}, trust_env=False)
    return openai.AsyncOpenAI(
        base_url=f"{world.net.node.url}/v1", api_key="unused", http_client=http, max_retries=0
    )


async def test_p01_the_sdk_reads_a_paid_stream_to_its_end(world: World) -> None:
    """P-01: need-voucher and receipt events are chunks without choices to the SDK; text and usage arrive whole."""
    channel, messages = world.payer.channel(), chat()["messages"]
    body = chat("dev/story", max_tokens=120)
    credential = await world.pay(world.payer.open(channel), body)
    texts, usage, asked = [], None, False
    async with client(world, credential) as sdk:
        stream = await sdk.chat.completions.create(model="dev/story", messages=messages, max_tokens=120, stream=True)
        async for chunk in stream:
            texts += [choice.delta.content for choice in chunk.choices if choice.delta.content]
            usage = chunk.usage or usage
            if len(texts) == 90 and not asked:
                asked = (await world.manage(world.payer.voucher(channel, 2 * UNIT))).status == 204
    assert usage is not None
    assert usage.completion_tokens == len(texts) == 120
    await world.settled()
    assert (await world.account(channel)).owed_pico == cost(120, usage.prompt_tokens)


async def test_p01_the_sdk_reads_a_buffered_answer(world: World) -> None:
    """P-01: ``stream=False`` is an ordinary completion."""
    channel, body = await world.opened(), chat("dev/story", max_tokens=8, stream=False)
    credential = await world.pay(world.payer.voucher(channel, UNIT), body)
    async with client(world, credential) as sdk:
        answer = await sdk.chat.completions.create(
            model="dev/story", messages=body["messages"], max_tokens=8, stream=False
        )
    assert answer.choices[0].message.content.startswith("a channel opens")
    assert answer.usage.completion_tokens == 8


async def test_p54_the_sdk_gets_what_it_can_read_without_saying_stream(world: World) -> None:
    """P-54: the SDKs leave ``stream`` out for an answer in one piece; everybody else gets a stream."""
    channel, body = await world.opened(), chat("dev/story", max_tokens=8)
    credential = await world.pay(world.payer.voucher(channel, UNIT), body)
    async with client(world, credential) as sdk:
        answer = await sdk.chat.completions.create(model="dev/story", messages=body["messages"], max_tokens=8)
    assert answer.choices[0].message.content.startswith("a channel opens")
    for accept, kind in (("*/*", "text/event-stream"), ("application/json, text/event-stream", "text/event-stream"), ("application/json", "application/json")):
        credential = await world.pay(world.payer.voucher(channel, 3 * UNIT), body)
        reply = await world.send(body, credential, headers={"Accept": accept})
        assert reply.headers["Content-Type"].startswith(kind), accept


async def test_p01_refusals_are_the_sdks_own_errors(world: World) -> None:
    """P-01: a 402, a 400 and a 404 are raised with our message and code, and are not retried."""
    async with client(world, "Unpaid x") as sdk:
        for change, status, code in (
            ({}, 402, "payment_required"),
            ({"temperature": 9}, 400, "invalid_field"),
            ({"model": "no/such"}, 404, "unknown_model"),
        ):
            arguments = {"model": "dev/echo", "messages": chat()["messages"]} | change
            with pytest.raises(openai.APIStatusError) as caught:
                await sdk.chat.completions.create(**arguments)
            assert (caught.value.status_code, caught.value.code) == (status, code)
            assert json.loads(caught.value.response.content)["error"]["code"] == code
            assert caught.value.response.headers["x-should-retry"] == "false"


async def test_p01_a_failing_provider_is_an_error_in_the_stream(world: World) -> None:
    """P-01: the error chunk of a stream that broke makes the SDK raise, after the text that was paid for."""
    channel, body = world.payer.channel(), chat("dev/dies-after-3")
    credential, texts = await world.pay(world.payer.open(channel), body), []
    async with client(world, credential) as sdk:
        stream = await sdk.chat.completions.create(model="dev/dies-after-3", messages=body["messages"], stream=True)

        async def read() -> None:
            async for chunk in stream:
                texts.extend(choice.delta.content for choice in chunk.choices if choice.delta.content)

        with pytest.raises(openai.APIError):
            await read()
    assert len(texts) == 3
    await world.settled()
    assert (await world.account(channel)).owed_pico == cost(3, 1)
