"""One provider's listing of one model: what it can do and what the node sells it for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag, StrEnum

from channels.instants import UnixSeconds
from mppnode.kernel.rates import Rates


class ProviderKind(StrEnum):
    """Whose capacity it is (design D10); the order is the order of preference."""

    NATIVE = "native"
    QUOTA = "quota"
    EXTERNAL = "external"


class Ability(IntFlag):
    """What a request may need beyond text in and text out."""

    TOOLS = 1
    JSON_SCHEMA = 2
    VISION = 4
    AUDIO_INPUT = 8
    LOGPROBS = 16
    CHOICES = 32
    """More than one answer to a prompt (``n``)."""
    REASONING = 64
    """Can be told how long to think."""


@dataclass(frozen=True, slots=True)
class Listing:
    """One model at one provider. ``context`` and ``max_output`` are tokens.

    ``rates`` is what a caller pays, markup included; a listing without a price does not exist, so nothing is served
    for nothing by accident.
    """

    model: str
    provider: str
    kind: ProviderKind
    upstream_model: str
    rates: Rates
    context: int
    max_output: int
    abilities: Ability = Ability.TOOLS | Ability.JSON_SCHEMA | Ability.LOGPROBS | Ability.CHOICES
    priced_at: UnixSeconds | None = None
    """When the price was read from its source; None when the operator wrote it down, which does not go stale."""
    source: str = "configuration"
    markup_bps: int = 0
    """What of ``rates`` is the node's own, in hundredths of a per cent of the provider's price."""
    quality: int = 0
    """Of the model's answers, 0 to 100, by whoever compiled the list; 0 is unknown."""

    @property
    def combined(self) -> int:
        """Input and output price of a token each, in pico: what providers are compared by (design D10)."""
        return self.rates.input + self.rates.output
