"""Prices as people write them: dollars per million tokens."""

from __future__ import annotations

from typing import Final

from channels.faults import ChannelFault, Reason
from channels.units import Pico, parse_decimal

_RATE_MAX: Final = 10**12
"""One dollar per token: a thousand times the dearest model on sale, so anything above it is a misplaced decimal."""


def parse_rate(text: str, *, field: str = "rate") -> Pico:
    """Read US dollars per million tokens, such as ``"0.50"``, as pico-dollars per token, exactly.

    The factor is one: 1 USD per million tokens is 10**12 / 10**6 pico per token, and dollars are read with six places,
    so the digits that make base units out of an amount make pico per token out of a rate.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming ``field`` when it is not a decimal with at most six places.
    """
    rate = int(parse_decimal(text, field=field))
    if rate > _RATE_MAX:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=field, detail="is above one dollar per token")
    return Pico(rate)
