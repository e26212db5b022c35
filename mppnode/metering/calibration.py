"""How many bytes a token of each model has, learned from usage reports.

What is kept is the most bytes per token seen lately, not the mean: a count made with it is too low for nearly every
response, and a payer whose stream ends without a report is charged for no token it did not get.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

_REPORTS_MIN: Final = 4  # before that, one odd response would be the whole truth
_TOKENS_MIN: Final = 32  # shorter answers are all beginning and end
_FORGET: Final = 64  # a sixty-fourth of the way back per report: a new tokenizer is learned within a few hundred
_RATIO_MIN: Final = 1_000  # thousandths of a byte per token; tokenizers lie between 2,000 and 6,000
_RATIO_MAX: Final = 16_000
_MODELS_MAX: Final = 4_096


@dataclass(slots=True)
class _Seen:
    reports: int
    ratio: int


class Calibration:
    """Thousandths of a byte per token, per provider and model."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, str], _Seen] = OrderedDict()

    def ratio(self, provider: str, model: str) -> int | None:
        """The most a token has had lately; None until enough reports have been seen."""
        seen = self._seen.get((provider, model))
        return None if seen is None or seen.reports < _REPORTS_MIN else seen.ratio

    def learn(self, provider: str, model: str, *, text_bytes: int, tokens: int) -> None:
        """Take note of a complete response whose report was believed and hid nothing of what it counted."""
        if tokens < _TOKENS_MIN:
            return
        # Up: rounded down, this very answer would be estimated a token longer than it was.
        observed = -(-text_bytes * 1000 // tokens)
        if not _RATIO_MIN <= observed <= _RATIO_MAX:
            return
        seen = self._seen.setdefault((provider, model), _Seen(0, observed))
        self._seen.move_to_end((provider, model))
        seen.reports += 1
        seen.ratio = max(observed, seen.ratio - (seen.ratio - observed) // _FORGET)
        if len(self._seen) > _MODELS_MAX:
            self._seen.popitem(last=False)
