"""What one response has consumed so far, counted low while it runs and exact once the provider reports usage.

While tokens stream, each content event counts as one token and the prompt counts at six bytes per token. Both are
lower bounds in practice (an event carries at least one token, prose runs at about four bytes per token), so the final
report corrects upward inside the hold. Where a provider splits tokens over several events the report corrects
downward, and the account turns the difference into credit.
"""

from __future__ import annotations

from typing import Final

from channels.units import Pico
from mppnode.kernel.rates import Rates, price
from mppnode.kernel.usage import Usage

PROMPT_BYTES_PER_TOKEN_CHARGED: Final = 6
PROMPT_BYTES_PER_TOKEN_HELD: Final = 3
_COMPLETION_PLAUSIBLE_FACTOR: Final = 64  # tokens per content event above which a usage report is not believed


def prompt_tokens_charged(prompt_bytes: int) -> int:
    """The prompt as it is charged before a usage report arrives: an under-estimate on purpose."""
    return prompt_bytes // PROMPT_BYTES_PER_TOKEN_CHARGED


def prompt_tokens_held(prompt_bytes: int) -> int:
    """The prompt as it is reserved: an over-estimate, so that the final report fits inside the hold."""
    return -(-prompt_bytes // PROMPT_BYTES_PER_TOKEN_HELD) + 8


class Tally:
    """Cumulative usage of one response and its price in pico-dollars."""

    __slots__ = ("_base", "_completion_max", "_output_rate", "_prompt_bytes", "_rates", "report", "tokens")

    def __init__(self, rates: Rates, *, prompt_bytes: int, completion_max: int) -> None:
        self._completion_max = completion_max
        self._rates = rates
        self._prompt_bytes = prompt_bytes
        self._output_rate = rates.output
        self._base = price(Usage(prompt=prompt_tokens_charged(prompt_bytes)), rates)
        self.tokens = 0
        self.report: Usage | None = None

    @property
    def prompt(self) -> Pico:
        """Price of the prompt alone, charged with the first token."""
        return self._base

    @property
    def output_rate(self) -> int:
        """Price of one output token, in pico."""
        return self._output_rate

    def price_at(self, tokens: int) -> int:
        """Cumulative price when ``tokens`` output tokens have been delivered; zero before the first."""
        return self._base + tokens * self._output_rate if tokens else 0

    def usage(self) -> Usage:
        """The provider's report where it is believable, else our own count."""
        if self.report is not None and self.believes(self.report):
            return self.report
        return Usage(prompt=prompt_tokens_charged(self._prompt_bytes), completion=self.tokens)

    def total(self) -> Pico:
        """The exact price of the finished response; a response without a single token costs nothing."""
        usage = self.usage()
        return price(usage, self._rates) if usage.completion else Pico(0)

    def believes(self, report: Usage) -> bool:
        """Whether a usage report can be true of what was seen."""
        # A report that claims far more than was seen would let a broken or hostile upstream bill our payers.
        return (
            report.completion <= self.tokens * _COMPLETION_PLAUSIBLE_FACTOR + report.reasoning
            and report.completion <= self._completion_max  # reasoning hides, but it is part of what was asked for
            and report.reasoning <= report.completion
            and report.prompt <= self._prompt_bytes + 4096  # a byte is at most a token; chat templates add some
        )
