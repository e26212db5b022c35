"""A servable model and its exact prices; prices are integer pico-dollars per token (design D1)."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from channels.units import PICO_PER_UNIT

_USD = re.compile(r"([0-9]{1,6})(?:\.([0-9]{1,6}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Rates:
    """Prices of one model in pico-dollars per token."""

    input: int
    cached_input: int
    output: int

    @property
    def version(self) -> str:
        """Eight hex digits that change when any rate does; bound into challenges."""
        return hashlib.sha256(f"{self.input}|{self.cached_input}|{self.output}".encode()).hexdigest()[:8]

    def describe(self) -> str:
        """The exact rates as one ASCII sentence, for the challenge and the discovery document."""
        return (
            f"USD per million tokens: input {usd_text(self.input)}, cached input {usd_text(self.cached_input)}, "
            f"output {usd_text(self.output)}; price version {self.version}"
        )


@dataclass(frozen=True, slots=True)
class Model:
    """One servable model. Tokens for ``context`` and ``max_output``."""

    id: str
    provider: str
    upstream_model: str
    rates: Rates
    context: int
    max_output: int


def parse_usd_per_million(text: str) -> int:
    """Read ``"0.15"`` (dollars per million tokens) as pico-dollars per token, exactly.

    Raises:
        ValueError: when the text is not a plain decimal with at most six places.
    """
    match = _USD.fullmatch(text)
    if match is None:
        raise ValueError("is not a decimal price such as 0.15")
    return int(match.group(1) + (match.group(2) or "").ljust(6, "0"))


def usd_text(pico_per_token: int) -> str:
    """The inverse of :func:`parse_usd_per_million`, with at least two places."""
    whole, fraction = divmod(pico_per_token, PICO_PER_UNIT)
    return f"{whole}.{f'{fraction:06d}'.rstrip('0').ljust(2, '0')}"
