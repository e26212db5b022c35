"""Prices of one model as exact integers, and what a usage costs under them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from channels.units import Pico
from mppnode.kernel.usage import Usage

_VERSION_DIGITS: Final = 12  # 48 bits of hash: enough to tell the price lists of one node apart, short enough to read


@dataclass(frozen=True, slots=True)
class Rates:
    """Pico-dollars per token, and the version that names exactly these numbers."""

    input: Pico
    cached_input: Pico
    output: Pico
    version: str = field(init=False)
    """Derived, never given: two price lists with one version could be billed as each other."""

    def __post_init__(self) -> None:
        if min(self.input, self.cached_input, self.output) < 0:
            raise ValueError("a rate is negative")
        text = f"pico-per-token:{self.input}:{self.cached_input}:{self.output}"
        object.__setattr__(self, "version", hashlib.sha256(text.encode()).hexdigest()[:_VERSION_DIGITS])


def price(usage: Usage, rates: Rates) -> Pico:
    """The exact price of ``usage`` in pico-dollars. Reasoning tokens are paid as the output they are part of."""
    assert 0 <= usage.cached_prompt <= usage.prompt
    fresh = usage.prompt - usage.cached_prompt
    return Pico(fresh * rates.input + usage.cached_prompt * rates.cached_input + usage.completion * rates.output)
