"""Prices as people write them: dollars per million tokens, and dollars apiece."""

from __future__ import annotations

import re
from typing import Final

from channels.faults import ChannelFault, Reason
from channels.units import Pico, parse_decimal

RATE_MAX: Final = 10**12
"""One dollar per token: a thousand times the dearest model on sale, so anything above it is a misplaced decimal."""
_PLACES: Final = 12
"""Of a dollar: one pico-dollar, the smallest amount anything here is counted in."""
EACH_MAX: Final = 1_000 * 10**12
"""A thousand dollars for one request, image or second: above it somebody meant a million of them."""
_EACH = re.compile(r"([0-9]{1,4})(?:\.([0-9]{1,12}))?", re.ASCII)


def parse_rate(text: str, *, field: str = "rate") -> Pico:
    """Read US dollars per million tokens, such as ``"0.50"``, as pico-dollars per token, exactly.

    The factor is one: 1 USD per million tokens is 10**12 / 10**6 pico per token, and dollars are read with six places,
    so the digits that make base units out of an amount make pico per token out of a rate.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming ``field`` when it is not a decimal with at most six places.
    """
    rate = int(parse_decimal(text, field=field))
    if rate > RATE_MAX:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=field, detail="is above one dollar per token")
    return Pico(rate)


def parse_each(text: str, *, field: str = "price") -> Pico:
    """Read the US dollars of one request, image or second of audio, such as ``"0.005"``, as pico-dollars, exactly.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming ``field`` when it is not a decimal with at most twelve places.
    """
    match = _EACH.fullmatch(text)
    if match is None:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=field, detail="is not a decimal amount with at most 12 places")
    value = int(match.group(1) + (match.group(2) or "").ljust(_PLACES, "0"))
    if value > EACH_MAX:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=field, detail="is above a thousand dollars")
    return Pico(value)


def format_rate(rate: Pico) -> str:
    """Write pico-dollars per token as US dollars per million tokens: ``500000 -> "0.50"``; what parse_rate reads."""
    return _trimmed(rate, 6)


def format_each(price: Pico) -> str:
    """Write pico-dollars as US dollars: ``5000000000 -> "0.005"``; what parse_each reads."""
    return _trimmed(price, _PLACES)


def _trimmed(value: int, places: int) -> str:
    """A decimal with two places at least, and without the zeros that say nothing."""
    digits = str(value).rjust(places + 1, "0")
    return f"{digits[:-places]}.{digits[-places:].rstrip('0').ljust(2, '0')}"
