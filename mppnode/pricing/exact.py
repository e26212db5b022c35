"""Price lists read digit for digit: a JSON number stays text until it is an integer of pico-dollars."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

from channels.units import Pico
from channels.wire.strict_json import nested_within

PER_TOKEN_PLACES: Final = 12
"""US dollars per token times 10**12 is pico per token; so is the price of one request, image or second."""
PER_MILLION_PLACES: Final = 6
"""US dollars per million tokens times 10**6 is pico per token."""

_DECIMAL = re.compile(r"(-?)([0-9]{1,30})(?:\.([0-9]{1,60}))?(?:[eE]([+-]?[0-9]{1,2}))?", re.ASCII)
_DEPTH_MAX: Final = 32  # several times what any provider's list needs, far under what exhausts the stack


class BadPrice(Exception):
    """A price list or one price in it cannot be used; the words are ours and repeat nothing of the list."""


class Number(str):
    """The text of a JSON number. ``float`` would have turned ``0.055`` into the nearest binary fraction."""

    __slots__ = ()


def load_json(data: bytes) -> Any:
    """Read JSON with every number as :class:`Number`.

    Raises:
        BadPrice: for anything but strict JSON; NaN, Infinity and a key twice in one object are not.

    Source: RFC 8259, RFC 7493.
    """
    try:
        text = data.decode("utf-8")
        if not nested_within(text, _DEPTH_MAX):
            raise BadPrice("is nested too deeply")
        return json.loads(
            text, parse_float=Number, parse_int=Number, parse_constant=_no_constant, object_pairs_hook=_unique
        )
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise BadPrice("is not JSON") from None


def _no_constant(_: str) -> NoReturn:
    raise BadPrice("has a number that JSON does not have")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise BadPrice("has the same key twice in one object")
    return made


def pico_up(text: object, places: int) -> tuple[Pico, bool]:
    """A decimal of dollars times ``10**places``, rounded up, and whether nothing had to be rounded.

    Up, because this is what a provider charges us: rounded down, the node would sell below its cost.

    Raises:
        BadPrice: when it is no decimal or negative.
    """
    match = _DECIMAL.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise BadPrice("is not a decimal")
    sign, whole, fraction, exponent = match.group(1), match.group(2), match.group(3) or "", int(match.group(4) or 0)
    digits = int(whole + fraction)
    if sign and digits:
        raise BadPrice("is negative")
    shift = exponent + places - len(fraction)
    if shift >= 0:
        value, exact = digits * 10**shift, True
    else:
        value, exact = -(-digits // 10**-shift), digits % 10**-shift == 0
    return Pico(value), exact
