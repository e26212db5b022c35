"""How much a response took, as plain counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one response, in one shape for every provider; adapters translate theirs.

    ``cached_prompt`` and ``cache_write`` are disjoint parts of ``prompt``; ``reasoning`` is part of ``completion``.
    Some providers report them beside the total instead, and counting them there too would charge them twice.
    ``images`` and ``audio_seconds`` are of the prompt. Source: the ``usage`` object of the OpenAI chat completion API.
    """

    prompt: int = 0
    cached_prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    cache_write: int = 0
    images: int = 0
    audio_seconds: int = 0

    @property
    def consistent(self) -> bool:
        """Whether no count is negative and no part is larger than its whole."""
        return (
            min(self.prompt, self.cached_prompt, self.completion, self.reasoning, self.cache_write) >= 0
            and min(self.images, self.audio_seconds) >= 0
            and self.cached_prompt + self.cache_write <= self.prompt
            and self.reasoning <= self.completion
        )
