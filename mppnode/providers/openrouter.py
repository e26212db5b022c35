"""OpenRouter: the OpenAI shape, a price limit, and a record of every generation.

Source: OpenRouter documentation, "Provider Routing", "Usage Accounting" and ``GET /generation``.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

import orjson

from mppnode.kernel.usage import Usage
from mppnode.providers.base import Call, UpstreamRequest
from mppnode.providers.openai_compatible import OpenAICompatible
from mppnode.providers.usage import checked

_PICO_PER_TOKEN: Final = 1_000_000  # of one dollar per million tokens; so six decimals are exact
_NEEDED: Final = ("response_format", "tools", "logprobs", "reasoning_effort", "reasoning")
"""Members that an upstream behind OpenRouter may ignore unless it is told that they matter."""


class OpenRouter(OpenAICompatible):
    """The adapter of OpenRouter, which is also a :class:`~mppnode.providers.base.Lookup`.

    Its report of what a request cost us stays in the document and decides nothing: callers pay the quoted price.
    """

    def _extra(self, call: Call) -> dict[str, Any]:
        routing: dict[str, Any] = {"allow_fallbacks": True}
        if any(call.chat.raw.get(name) for name in _NEEDED):
            routing["require_parameters"] = True
        if call.cap is not None:
            limits = {"prompt": _dollars(call.cap.prompt), "completion": _dollars(call.cap.completion)}
            routing["max_price"] = {name: orjson.Fragment(number) for name, number in limits.items()}
        return {"provider": routing}

    def encode_lookup(self, generation: str, *, base_url: str, api_key: str | None) -> UpstreamRequest:
        """The request for one generation's record. Source: OpenRouter API, ``GET /generation``."""
        headers = [("Accept", "application/json"), ("User-Agent", "mppnode")]
        if api_key is not None:
            headers.append(("Authorization", f"Bearer {api_key}"))
        # The id is the provider's text: quoted, so that it cannot add to the URL.
        url = f"{base_url.rstrip('/')}/generation?id={quote(generation, safe='')}"
        return UpstreamRequest("GET", url, tuple(headers), b"")

    def decode_lookup(self, body: bytes) -> Usage | None:
        """The counts of the record in the model's own tokens, or None when it is not ready or cannot be true."""
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        record = answer.get("data") if type(answer) is dict else None
        if type(record) is not dict:
            return None
        cached, reasoning = record.get("native_tokens_cached"), record.get("native_tokens_reasoning")
        return checked(
            record.get("native_tokens_prompt"),
            0 if cached is None else cached,
            record.get("native_tokens_completion"),
            0 if reasoning is None else reasoning,
            written=0,
        )


def _dollars(pico: int) -> bytes:
    """Pico-dollars per token as dollars per million tokens: an exact decimal, written as a JSON number."""
    whole, rest = divmod(pico, _PICO_PER_TOKEN)
    return f"{whole}.{rest:06d}".rstrip("0").rstrip(".").encode()
