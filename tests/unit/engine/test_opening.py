"""When a provider counts as working: with its first output, and with nothing less."""

from __future__ import annotations

from typing import Any

import pytest

from mppnode.engine.attempts import Opening
from mppnode.providers.base import UpstreamFault
from mppnode.providers.openai_compatible import OpenAIDecoder

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"w"},"finish_reason":null}]}\n\n'
STOP = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"


class Paused:
    """A response that only remembers whether it is read."""

    paused = 0

    def pause(self) -> None:
        self.paused += 1


def opened(*reads: bytes, end: Any = None) -> tuple[Opening, Paused]:
    response = Paused()
    made = Opening(response, OpenAIDecoder())  # type: ignore[arg-type]
    for data in reads:
        made.on_body(data)
    if end is not None:
        made.on_end(None if end is True else end)
    return made, response


@pytest.mark.parametrize(
    ("reads", "end"),
    [
        ((ROLE, WORD), None),
        ((ROLE + WORD + STOP + DONE,), None),
        ((WORD * 5_000,), None),  # much output in one read is output
        ((STOP, DONE), None),  # an empty answer with a reason is an answer
        ((ROLE, STOP), True),  # and so it is without the end marker
    ],
)
async def test_output_or_a_reason_for_none_is_an_answer(reads: tuple[bytes, ...], end: Any) -> None:
    """It is decided at once, the provider is not read further, and nothing that came is lost."""
    made, response = opened(*reads, end=end)
    assert made.verdict.done()
    assert made.verdict.result() is None
    assert response.paused == 1
    assert len(made.chunks) == sum(data.count(b"\n\n") for data in reads)


@pytest.mark.parametrize(
    ("reads", "end", "kind"),
    [
        ((ROLE, DONE), None, "error"),
        ((b'data: {"error":{"message":"secret"}}\n\n',), None, "error"),
        ((b"<html>secret</html>\n\n",), True, "closed"),
        ((b"data: {nonsense\n\n",), None, "error"),
        ((ROLE,), True, "closed"),
        ((), True, "closed"),
        ((), UpstreamFault("timeout"), "timeout"),
        ((ROLE * 4_097,), None, "protocol"),
    ],
)
async def test_everything_else_is_a_failure(reads: tuple[bytes, ...], end: Any, kind: str) -> None:
    """P-31, P-32: errors in a 200, web pages, silence and endless empty events; never with the provider's own words."""
    made, _ = opened(*reads, end=end)
    fault = made.verdict.result()
    assert fault is not None
    assert fault.kind == kind
    assert "secret" not in str(fault)


async def test_a_role_alone_decides_nothing() -> None:
    """A provider that has only said who speaks may still fail unseen."""
    made, response = opened(ROLE, b": ping\n\n")
    assert not made.verdict.done()
    assert response.paused == 0
