"""What one response has consumed so far, counted low while it runs and exact once the provider reports usage.

While tokens stream, the count is a lower bound: at least one token per event with output, and where reports of earlier
responses have taught how many bytes a token of this model has at the most, at least the bytes divided by that. The
prompt counts at six bytes per token. The final report corrects upward inside the hold. Where a provider splits tokens
over several events the report corrects downward, and the account turns the difference into credit.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from channels.units import Pico
from mppnode.kernel.rates import Rates, price
from mppnode.kernel.usage import Usage
from mppnode.providers.base import Chunk

PROMPT_BYTES_PER_TOKEN_CHARGED: Final = 6
PROMPT_BYTES_PER_TOKEN_HELD: Final = 3
TOKENS_PER_IMAGE_HELD: Final = 2_048
"""An image at the finest setting of the models on sale takes 800 to 1,600 tokens."""
AUDIO_BYTES_PER_TOKEN_HELD: Final = 192
"""Of the encoded sound: 32 tokens a second, and speech is rarely packed under 6 kB a second."""
_COMPLETION_PLAUSIBLE_FACTOR: Final = 64  # tokens per content event above which a usage report is not believed
_RATIO_UNKNOWN: Final = 6_000  # thousandths of a byte per token, until reports have taught better
_TEMPLATE_TOKENS: Final = 4_096  # what chat templates add to a prompt
_SLACK_TOKENS: Final = 8  # a report may differ from a tokenizer's count by 2 % and these (reliability: U3)


class TokenSource(StrEnum):
    """Whose count a bill is made of."""

    REPORTED = "reported"
    TOKENIZER = "tokenizer"
    ESTIMATED = "estimated"


def prompt_tokens_charged(prompt_bytes: int) -> int:
    """The prompt as it is charged before a usage report arrives: an under-estimate on purpose."""
    return prompt_bytes // PROMPT_BYTES_PER_TOKEN_CHARGED


def prompt_tokens_held(prompt_bytes: int, *, images: int = 0, audio_bytes: int = 0) -> int:
    """The prompt as it is reserved: an over-estimate, so that the final report fits inside the hold."""
    return -(-prompt_bytes // PROMPT_BYTES_PER_TOKEN_HELD) + 8 + media_tokens_held(images, audio_bytes)


def media_tokens_held(images: int, audio_bytes: int) -> int:
    """The pictures and sounds of a prompt as they are reserved."""
    return images * TOKENS_PER_IMAGE_HELD + -(-audio_bytes // AUDIO_BYTES_PER_TOKEN_HELD)


class Tally:
    """Cumulative usage of one response and its price in pico-dollars."""

    __slots__ = (
        "_base",
        "_completion_max",
        "_images",
        "_media_tokens",
        "_output_rate",
        "_prompt_bytes",
        "_rates",
        "_ratio",
        "_running",
        "counted",
        "report",
        "text_bytes",
        "texts",
        "tokens",
    )

    def __init__(
        self,
        rates: Rates,
        *,
        prompt_bytes: int,
        completion_max: int,
        images: int = 0,
        audio_bytes: int = 0,
        ratio: int | None = None,
        running: bool = False,
    ) -> None:
        """``ratio`` is the most thousandths of a byte a token of this model has had; ``running`` whether the provider
        reports with every event.
        """
        self._completion_max = completion_max
        self._rates = rates
        self._prompt_bytes = prompt_bytes
        self._images = images
        self._media_tokens = media_tokens_held(images, audio_bytes)
        self._output_rate = min(rates.output, rates.reasoning)
        self._base = price(Usage(prompt=prompt_tokens_charged(prompt_bytes), images=images), rates)
        self._ratio = ratio
        self._running = running
        self.tokens = 0
        self.text_bytes = 0
        self.counted: int | None = None
        """Output tokens by a tokenizer, when the model has one and the response is complete."""
        self.texts: list[str] | None = None
        """What was delivered, kept only for models with a tokenizer of their own."""
        self.report: Usage | None = None

    @property
    def rates(self) -> Rates:
        """What this response is sold at."""
        return self._rates

    @property
    def prompt(self) -> Pico:
        """Price of the prompt alone, charged with the first token."""
        return self._base

    @property
    def output_rate(self) -> int:
        """Price of one output token, in pico; the lower one where reasoning has its own."""
        return self._output_rate

    def after(self, chunk: Chunk) -> int:
        """Output tokens once ``chunk`` has been delivered too; never fewer than before it."""
        tokens = self.tokens + chunk.tokens
        if self._ratio is not None and chunk.text:
            tokens = max(tokens, (self.text_bytes + size(chunk.text)) * 1000 // self._ratio)
        if self._running and chunk.usage is not None and chunk.usage.completion > tokens:
            # Believed as far as the final report would be: a broken counter must not run away with the hold.
            tokens = min(chunk.usage.completion, (tokens + chunk.tokens) * _COMPLETION_PLAUSIBLE_FACTOR)
        return tokens

    def take(self, chunk: Chunk, tokens: int) -> None:
        """Count a chunk as delivered; ``tokens`` is what :meth:`after` said of it."""
        self.tokens = tokens
        self.text_bytes += size(chunk.text)
        if self.texts is not None:
            self.texts.append(chunk.text)

    def count_whole(self, text: str) -> None:
        """Count an answer that came in one piece."""
        self.text_bytes = size(text)
        low = self.text_bytes * 1000 // (self._ratio or _RATIO_UNKNOWN)
        self.tokens = min(max(low, 1), self._completion_max) if text else 0
        if self.texts is not None:
            self.texts = [text]

    def price_at(self, tokens: int) -> int:
        """Cumulative price when ``tokens`` output tokens have been delivered; zero before the first."""
        return self._base + tokens * self._output_rate if tokens else 0

    @property
    def source(self) -> TokenSource:
        """Whose count :meth:`usage` is."""
        if self.report is not None and self.believes(self.report):
            return TokenSource.REPORTED
        return TokenSource.ESTIMATED if self.counted is None else TokenSource.TOKENIZER

    def usage(self) -> Usage:
        """The provider's report where it is believable, else our own count."""
        if self.report is not None and self.believes(self.report):
            return self._with_media(self.report)
        tokens = self.tokens if self.counted is None else min(self.counted, self._completion_max)
        return self._with_media(Usage(prompt=prompt_tokens_charged(self._prompt_bytes), completion=tokens))

    def _with_media(self, usage: Usage) -> Usage:
        """Count the images of the request: providers report them as tokens at best, and price them apart at worst."""
        if not self._images:
            return usage
        return Usage(
            usage.prompt, usage.cached_prompt, usage.completion, usage.reasoning, usage.cache_write, self._images
        )

    def total(self) -> Pico:
        """The exact price of the finished response; a response without a single token costs nothing."""
        usage = self.usage()
        return price(usage, self._rates) if usage.completion else Pico(0)

    def believes(self, report: Usage) -> bool:
        """Whether a usage report can be true of what was seen."""
        # A report that claims far more than was seen would let a broken or hostile upstream bill our payers.
        if not report.consistent or report.completion > self._completion_max:  # reasoning was asked for like the rest
            return False
        # A byte is at most a token; chat templates and media add some.
        if report.prompt > self._prompt_bytes + _TEMPLATE_TOKENS + self._media_tokens:
            return False
        if self.counted is not None:
            return report.completion - report.reasoning <= self.counted + self.counted // 50 + _SLACK_TOKENS
        return report.completion <= self.tokens * _COMPLETION_PLAUSIBLE_FACTOR + report.reasoning


def size(text: str) -> int:
    """UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
