"""llama.cpp's HTTP server, an OpenAI-compatible server that is not ours, as the provider behind a paid request."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.llama.tiny_model import CONTEXT, WORDS, write_model
from tests.interop.packages import unavailable
from tests.support.http_client import UNIT, chat
from tests.support.providers import INPUT, MODEL, OUTPUT, Shop, Sold, new_shop, serves

pytestmark = pytest.mark.interop

HERE = Path(__file__).parent
START_S = 30


@contextlib.asynccontextmanager
async def llama(directory: Path) -> AsyncIterator[str]:
    """The base URL of a running server."""
    if importlib.util.find_spec("xllamacpp") is None:
        unavailable("xllamacpp, which has llama.cpp's server in it, is not installed")
    model = write_model(directory / "tiny.gguf")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HERE / "serve.py"), str(model),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            address = (await process.stdout.readline()).decode().strip()
        yield f"{address}/v1"
    finally:
        process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def shop_of(directory: Path, *others: Sold) -> AsyncIterator[Shop]:
    """A node that sells over the server, by its preset, and over ``others``."""
    async with llama(directory) as url:
        real = Sold("llama", preset="llamacpp", url=url, cached_input=INPUT // 10, context=CONTEXT)
        async with new_shop(real, *others) as shop:
            yield shop


async def streamed(shop: Shop, body: dict[str, Any]) -> tuple[Any, int]:
    """A stream read to its end, and what it was charged."""
    channel = shop.payer.channel()
    credential = await shop.pay(shop.payer.open(channel, UNIT), body)
    async with shop.stream(body, credential) as stream:
        await stream.rest()
    await shop.settled()
    return stream, (await shop.account(channel)).owed_pico


def bill(usage: dict[str, Any]) -> int:
    """What a report costs."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return (usage["prompt_tokens"] - cached) * INPUT + cached * (INPUT // 10) + usage["completion_tokens"] * OUTPUT


async def test_a_paid_stream_of_llama_cpp_is_whole_and_exact(tmp_path: Path) -> None:
    """Every word arrives, counts once, and is charged by the server's own report; its cache hits are charged as such."""
    async with shop_of(tmp_path) as shop:
        body = chat(MODEL, "a channel opens once", max_tokens=30, stream_options={"include_usage": True})
        bills = []
        for _ in range(2):
            stream, owed = await streamed(shop, body)
            words = "".join(stream.texts).split()
            assert stream.response.headers["X-Provider"] == "llama"
            assert len(words) == stream.text_chunks == stream.usage["completion_tokens"] == 30
            assert set(words) <= set(WORDS)
            assert [choice["finish_reason"] for chunk in stream.chunks for choice in chunk["choices"]][-1] == "length"
            assert owed == bill(stream.usage)
            assert not any("timings" in chunk for chunk in stream.chunks)
            bills.append(owed)
        assert bills[1] < bills[0], "the second prompt was in the server's cache"


async def test_a_buffered_answer_of_llama_cpp(tmp_path: Path) -> None:
    """``stream: false`` gives the server's answer with our usage, and is charged by it."""
    async with shop_of(tmp_path) as shop:
        channel = shop.payer.channel()
        body = chat(MODEL, "every token", max_tokens=12, stream=False)
        reply = await shop.buy(body, shop.payer.open(channel, UNIT))
        assert reply.status == 200, reply.body
        (choice,) = reply.json["choices"]
        assert len(choice["message"]["content"].split()) == reply.json["usage"]["completion_tokens"] == 12
        assert (await shop.account(channel)).owed_pico == bill(reply.json["usage"])


async def test_what_is_asked_of_llama_cpp_is_obeyed(tmp_path: Path) -> None:
    """Stop words, log-probabilities, a seed and a JSON schema reach the server, and what they cause comes back."""
    schema = {"type": "object", "properties": {"paid": {"type": "boolean"}}, "required": ["paid"], "additionalProperties": False}
    async with shop_of(tmp_path) as shop:
        free, _ = await streamed(shop, chat(MODEL, "a token", max_tokens=10, temperature=0, seed=1))
        stop = free.texts[4]
        cut, _ = await streamed(shop, chat(MODEL, "a token", max_tokens=10, temperature=0, seed=1, stop=[stop]))
        assert "".join(cut.texts) == "".join(free.texts).partition(stop)[0]
        told, _ = await streamed(shop, chat(MODEL, "a token", max_tokens=3, logprobs=True, top_logprobs=2))
        shown = [choice["logprobs"] for chunk in told.chunks for choice in chunk["choices"] if choice.get("logprobs")]
        assert sum(len(each["content"]) for each in shown) == 3
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        shaped, _ = await streamed(shop, chat(MODEL, "a token", max_tokens=120, response_format=form))
        assert json.loads("".join(shaped.texts))["paid"] in {True, False}


async def test_llama_cpp_is_reached_by_failover_and_left_for_a_longer_context(tmp_path: Path) -> None:
    """A dead provider before it is not noticed; a prompt it refuses as too long goes to who takes longer ones."""
    longer = Sold("longer", serves(3), context=128_000)
    async with shop_of(tmp_path, Sold("dead", None), longer) as shop:
        order = {"order": ["dead", "llama", "longer"]}
        stream, owed = await streamed(shop, chat(MODEL, "once", max_tokens=5, provider=order))
        assert (stream.response.headers["X-Provider"], stream.response.headers["X-Route-Attempts"]) == ("llama", "2")
        assert owed == bill(stream.usage)
        # Two bytes a token: shorter by our estimate than by the server's count.
        text = "é" * (CONTEXT - 40)
        body = chat(MODEL, text, max_tokens=5, provider={"order": ["llama", "longer"]})
        stream, owed = await streamed(shop, body)
        assert stream.response.headers["X-Provider"] == "longer"
        assert shop.asked()["longer"] == 1
