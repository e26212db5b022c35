"""The record of a generation whose stream died before its report: asked for some times, logged once, never billed."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from channels.units import Pico
from mppnode.engine.attempts import Endpoint
from mppnode.engine.lookup import look_up
from mppnode.kernel.listing import Listing, ProviderKind
from mppnode.kernel.rates import Rates
from mppnode.providers.base import UpstreamFault
from mppnode.providers.openai_compatible import OpenAICompatible
from mppnode.providers.openrouter import OpenRouter
from mppnode.providers.quirks import Quirks

RATES = Rates(Pico(1), Pico(1), Pico(1))
LISTING = Listing("m/x", "openrouter", ProviderKind.EXTERNAL, "m/x", RATES, 1000, 100)
RECORD = orjson.dumps({"data": {"native_tokens_prompt": 12, "native_tokens_completion": 34}})


class Answers:
    """A transport whose answers are given beforehand: a status with a body, or a fault."""

    def __init__(self, *answers: tuple[int, bytes] | UpstreamFault) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self.cancelled = 0
        self.status, self.body = 0, b""

    async def open(self, request: Any) -> Any:
        self.asked.append(request.url)
        answer = self.answers.pop(0)
        if isinstance(answer, UpstreamFault):
            raise answer
        self.status, self.body = answer
        return self

    async def read(self, limit: int) -> bytes:
        assert len(self.body) <= limit
        return self.body

    def cancel(self) -> None:
        self.cancelled += 1


async def looked(adapter: Any, *answers: tuple[int, bytes] | UpstreamFault, generation: str = "gen-1") -> tuple[Any, ...]:
    transport, lines, slept = Answers(*answers), [], []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    await look_up(
        generation,
        LISTING,
        Endpoint("https://openrouter.ai/api/v1", lambda: "secret-key", adapter),
        transport=transport,  # type: ignore[arg-type]
        counted=30,
        log=lambda event, **fields: lines.append((event, fields)),
        sleep=sleep,
    )
    return transport, lines, slept


async def test_a_record_is_logged_beside_our_own_count() -> None:
    """Once it is there, nobody asks again; the key is not in the log."""
    transport, lines, slept = await looked(OpenRouter(Quirks()), (404, b""), (200, RECORD))
    assert transport.asked == ["https://openrouter.ai/api/v1/generation?id=gen-1"] * 2
    assert (len(slept), transport.cancelled) == (2, 1)
    ((event, fields),) = lines
    assert (event, fields["prompt"], fields["completion"], fields["counted"]) == ("generation.found", 12, 34, 30)
    assert "secret-key" not in repr(lines)


@pytest.mark.parametrize(
    "answer", [(404, b""), (200, b"{}"), (200, b"<html>"), UpstreamFault("connect"), (200, RECORD.replace(b"34", b"-4"))]
)
async def test_a_record_that_never_comes_is_given_up(answer: Any) -> None:
    """Three times, then one line that says so."""
    transport, lines, _ = await looked(OpenRouter(Quirks()), answer, answer, answer)
    assert len(transport.asked) == 3
    assert [event for event, _ in lines] == ["generation.unknown"]


@pytest.mark.parametrize(("adapter", "generation"), [(OpenAICompatible(Quirks()), "g"), (OpenRouter(Quirks()), "x" * 257)])
async def test_nobody_else_is_asked(adapter: Any, generation: str) -> None:
    """A provider without records, or an id that is none, costs nothing."""
    transport, lines, _ = await looked(adapter, generation=generation)
    assert (transport.asked, lines) == ([], [])
