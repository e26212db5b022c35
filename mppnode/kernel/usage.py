"""How many tokens a response took, as plain counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one response. ``cached_prompt`` is part of ``prompt`` and is never larger.

    ``reasoning`` is informational: providers disagree on whether it is part of ``completion``, so it never enters a
    price. Source: the ``usage`` object of the OpenAI chat completion API.
    """

    prompt: int = 0
    cached_prompt: int = 0
    completion: int = 0
    reasoning: int = 0
