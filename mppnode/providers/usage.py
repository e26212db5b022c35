"""Usage reports of every provider, read into one shape.

Providers disagree about what their totals include: cached input is part of the prompt for OpenAI and beside it for
Anthropic, reasoning is part of the completion for most and beside it for xAI and Gemini. Here each becomes disjoint
parts of whole counts (:class:`~mppnode.kernel.usage.Usage`), and a report whose numbers cannot be true is no report.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mppnode.kernel.usage import Usage

TOKENS_MAX: Final = 10_000_000
"""A count above it is not a usage report: the longest contexts on sale are a tenth of it."""


def parse_usage(given: Any, *, reasoning_added: bool = False) -> Usage | None:
    """A report in the OpenAI shape, or ``None`` when its numbers cannot be true.

    With ``reasoning_added`` the provider reports reasoning beside ``completion_tokens``, unless its own total says
    otherwise: some of its models include it. Source: the ``usage`` objects of OpenAI (details), DeepSeek
    (``prompt_cache_hit_tokens``), OpenRouter (``cache_write_tokens``), Together (``cached_tokens``) and xAI.
    """
    if type(given) is not dict:
        return None
    prompt, completion = given.get("prompt_tokens"), given.get("completion_tokens", 0)
    cached = _cached(given)
    written = _detail(given, "prompt_tokens_details", "cache_write_tokens")
    reasoning = _detail(given, "completion_tokens_details", "reasoning_tokens")
    if reasoning_added and type(reasoning) is int and type(completion) is int and type(prompt) is int:
        included = given.get("total_tokens") == prompt + completion
        completion = completion if included else completion + reasoning
    return checked(prompt, cached, completion, reasoning, written)


def parse_anthropic_usage(given: Mapping[str, Any]) -> Usage | None:
    """A report of the Messages API, or ``None`` when it cannot be true; its three input counts are added up.

    Source: Anthropic Messages API, ``usage``: input, cache reads and cache writes are separate counts.
    """
    fresh = given.get("input_tokens")
    read, written = _count(given, "cache_read_input_tokens"), _count(given, "cache_creation_input_tokens")
    if checked(fresh, 0, read, 0, written=0) is None or checked(written, 0, 0, 0, written=0) is None:
        return None  # added up, a negative count could hide behind another
    completion, thinking = given.get("output_tokens"), _detail(given, "output_tokens_details", "thinking_tokens")
    return checked(fresh + read + written, read, completion, thinking, written)


def parse_gemini_usage(given: Any) -> Usage | None:
    """A report of the Gemini API, or ``None`` when it cannot be true; thoughts are beside the candidates' count.

    Source: Gemini API, ``UsageMetadata``: cached content is part of the prompt, prompts of tools are beside it.
    """
    if type(given) is not dict:
        return None
    prompt, tools = given.get("promptTokenCount"), _count(given, "toolUsePromptTokenCount")
    spoken, thought = _count(given, "candidatesTokenCount"), _count(given, "thoughtsTokenCount")
    if checked(prompt, 0, spoken, 0, written=0) is None or checked(tools, 0, thought, 0, written=0) is None:
        return None
    return checked(prompt + tools, _count(given, "cachedContentTokenCount"), spoken + thought, thought, 0)


def usage_document(usage: Usage) -> dict[str, Any]:
    """``usage`` as OpenAI writes it: parts inside their wholes."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt, "cache_write_tokens": usage.cache_write},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def checked(prompt: Any, cached: Any, completion: Any, reasoning: Any, written: Any) -> Usage | None:
    """The counts as usage when each is an integer within bounds and no part is larger than its whole."""
    for count in (prompt, cached, completion, reasoning, written):
        # type() and not isinstance(): True is an int, and a provider that sends it counts nothing.
        if type(count) is not int or not 0 <= count <= TOKENS_MAX:
            return None
    usage = Usage(prompt, cached, completion, reasoning, written)
    return usage if usage.consistent else None


def _cached(given: dict[str, Any]) -> Any:
    """Cached input tokens under the names in use, the most specific first; zero when none is there."""
    details = given.get("prompt_tokens_details")
    if details is not None and type(details) is not dict:
        return None
    if details is not None and details.get("cached_tokens") is not None:
        return details["cached_tokens"]
    hit = given.get("prompt_cache_hit_tokens")
    return hit if hit is not None else _count(given, "cached_tokens")


def _count(given: Mapping[str, Any], name: str) -> Any:
    """A count that may be absent or null, which is zero; anything odd is returned to be refused."""
    value = given.get(name)
    return 0 if value is None else value


def _detail(given: Mapping[str, Any], group: str, name: str) -> Any:
    """A count inside an optional group; absent and null are zero, anything odd is returned to be refused."""
    details = given.get(group)
    if details is None:
        return 0
    return _count(details, name) if type(details) is dict else None
