"""Token counts of one response."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as providers report them: ``cached_prompt`` is part of ``prompt``, ``reasoning`` of ``completion``."""

    prompt: int = 0
    cached_prompt: int = 0
    completion: int = 0
    reasoning: int = 0

    def to_json(self) -> dict[str, object]:
        """The OpenAI ``usage`` object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_prompt},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }
