"""Prices of one model as exact integers, and what a usage costs under them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from channels.units import Pico
from mppnode.kernel.usage import Usage

_VERSION_DIGITS: Final = 12  # 48 bits of hash: enough to tell the price lists of one node apart, short enough to read
_SAME: Final = Pico(-1)


@dataclass(frozen=True, slots=True)
class Rates:
    """Pico-dollars per token, request, image and second of audio, and the version that names these numbers.

    What a price list leaves out costs what it is a part of: cache writes as input, reasoning as output; never nothing.
    """

    input: Pico
    cached_input: Pico
    output: Pico
    cache_write: Pico = _SAME
    reasoning: Pico = _SAME
    request: Pico = Pico(0)
    image: Pico = Pico(0)
    audio_second: Pico = Pico(0)
    axes: tuple[Pico, ...] = field(init=False, repr=False, compare=False, default=())
    """Every rate, in the order of the fields."""
    version: str = field(init=False, default="")
    """Derived, never given: two price lists with one version could be billed as each other."""

    def __post_init__(self) -> None:
        if self.cache_write == _SAME:
            object.__setattr__(self, "cache_write", self.input)
        if self.reasoning == _SAME:
            object.__setattr__(self, "reasoning", self.output)
        axes = (
            self.input,
            self.cached_input,
            self.output,
            self.cache_write,
            self.reasoning,
            self.request,
            self.image,
            self.audio_second,
        )
        if min(axes) < 0:
            raise ValueError("a rate is negative")
        object.__setattr__(self, "axes", axes)
        text = "pico:" + ":".join(str(int(axis)) for axis in axes)
        object.__setattr__(self, "version", hashlib.sha256(text.encode()).hexdigest()[:_VERSION_DIGITS])

    def within(self, bound: Rates) -> bool:
        """Whether nothing costs more here than under ``bound``."""
        return all(mine <= most for mine, most in zip(self.axes, bound.axes, strict=True))

    def dearest(self, other: Rates) -> Rates:
        """The least bound of both: on each axis the larger rate."""
        return Rates(*map(max, self.axes, other.axes))

    @property
    def input_max(self) -> Pico:
        """The most a token of a prompt can cost, whichever kind it turns out to be."""
        return max(self.input, self.cached_input, self.cache_write)

    @property
    def output_max(self) -> Pico:
        """The most a token of the completion can cost."""
        return max(self.output, self.reasoning)


def price(usage: Usage, rates: Rates) -> Pico:
    """The exact price of ``usage`` in pico-dollars."""
    assert usage.consistent
    fresh = usage.prompt - usage.cached_prompt - usage.cache_write
    tokens = (
        fresh * rates.input
        + usage.cached_prompt * rates.cached_input
        + usage.cache_write * rates.cache_write
        + (usage.completion - usage.reasoning) * rates.output
        + usage.reasoning * rates.reasoning
    )
    return Pico(tokens + rates.request + usage.images * rates.image + usage.audio_seconds * rates.audio_second)
