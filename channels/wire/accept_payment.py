"""The ``Accept-Payment`` request header: which offers the payer can pay, and which it would rather."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

T = TypeVar("T")

_HEADER_TEXT_MAX: Final = 4_096
_ANY: Final = "*"
_TAG = r"([a-z0-9-]+|\*)"
_ENTRY = re.compile(rf"{_TAG}[ \t]*/[ \t]*{_TAG}((?:[ \t]*;[ \t]*[A-Za-z0-9_-]+[ \t]*=[ \t]*[^\s;,]+)*)")
_PARAMETER = re.compile(r";[ \t]*([A-Za-z0-9_-]+)[ \t]*=[ \t]*([^\s;,]+)")
_QUALITY = re.compile(r"0(?:\.([0-9]{0,3}))?|1(?:\.0{0,3})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Preference:
    """One pattern of the header; ``quality`` is in thousandths, and 0 excludes what it matches."""

    method: str
    intent: str
    quality: int


def parse(header: str) -> tuple[Preference, ...] | None:
    """Read the header, or None when it is malformed: a preference is no reason to refuse a payer.

    Source: draft-httpauth-payment, Accept-Payment.
    """
    if len(header) > _HEADER_TEXT_MAX:
        return None
    entries = [stripped for entry in header.split(",") if (stripped := entry.strip(" \t"))]
    preferences = [_preference(entry) for entry in entries]
    # Filtering out the malformed entries alone would read a header its sender did not mean.
    whole = tuple(preference for preference in preferences if preference is not None)
    return whole if whole and len(whole) == len(preferences) else None


def rank(
    offers: Sequence[T], preferences: Sequence[Preference], *, key: Callable[[T], tuple[str, str]]
) -> list[T]:
    """The acceptable offers, best first; ``key`` gives an offer's method and intent.

    The most specific matching pattern decides, so ``tempo/charge;q=0`` overrules ``tempo/*``. Ties keep our order.
    """
    rated = [(_quality(key(offer), preferences), offer) for offer in offers]
    # sorted() is stable, which is what keeps our order among equals.
    return [offer for quality, offer in sorted(rated, key=lambda pair: -pair[0]) if quality > 0]


def choose(offers: Sequence[T], header: str | None, *, key: Callable[[T], tuple[str, str]]) -> list[T]:
    """The offers to put in a 402: ranked by the header, or all of ours when it is absent, malformed or matches none."""
    preferences = None if header is None else parse(header)
    ranked = rank(offers, preferences, key=key) if preferences is not None else []
    return ranked or list(offers)


def _preference(entry: str) -> Preference | None:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        return None
    quality = 1000
    for name, value in _PARAMETER.findall(match.group(3)):
        if name != "q":
            continue
        digits = _QUALITY.fullmatch(value)
        if digits is None:
            return None
        quality = 1000 if value.startswith("1") else int((digits.group(1) or "").ljust(3, "0"))
    return Preference(match.group(1), match.group(2), quality)


def _quality(offer: tuple[str, str], preferences: Sequence[Preference]) -> int:
    method, intent = offer
    ratings = [
        ((entry.method != _ANY) + (entry.intent != _ANY), entry.quality)
        for entry in preferences
        if entry.method in (_ANY, method) and entry.intent in (_ANY, intent)
    ]
    return max(ratings, default=(0, 0))[1]
