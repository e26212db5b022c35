"""JSON from strangers, read so that no two parsers can disagree about it.

``json.loads`` keeps the last of two equal keys, accepts ``NaN``, lone surrogates and ``1e400``, and can be driven into
``RecursionError``. Payment objects need none of that, so all of it is refused (RFC 8259 leaves it undefined).
"""

from __future__ import annotations

import json
import math
import re
from typing import Final, NoReturn

from channels.faults import ChannelFault, Reason

SAFE_INTEGER_MAX: Final = 2**53 - 1
"""Largest integer every JSON reader agrees on; amounts are strings, so nothing honest is larger."""
_INT_DIGITS_MAX: Final = 17  # sign and 16 digits; checked before int(), which raises on thousands of digits
# A string (closed or not) is consumed whole, so brackets inside it do not count. The closing quote is optional and the
# quantifiers possessive to keep the scan linear: else an unterminated string is rescanned from each of its quotes.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    """Carries one of our own words out of the decoder's callbacks."""


def loads(
    data: bytes | str,
    *,
    field: str,
    size_max: int = 16_384,
    depth_max: int = 16,
    floats: bool = False,
    reason: Reason = Reason.MALFORMED_CREDENTIAL,
) -> object:
    """Read one JSON text of at most ``size_max`` bytes and ``depth_max`` nested containers.

    Numbers are integers of at most 53 bits, or finite with ``floats`` (chat bodies have them, payment objects never);
    members are unique; strings are valid Unicode.

    Raises:
        ChannelFault: ``reason`` naming ``field``.
    """
    try:
        text = _text(data, size_max)
        if not nested_within(text, depth_max):
            raise _Refused("is nested too deeply")
        value: object = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite if floats else _no_float,
            parse_constant=_no_float,
        )
        if _SURROGATE_ESCAPE.search(text):
            _refuse_surrogates(value)
    except _Refused as refused:
        raise ChannelFault(reason, field=field, detail=str(refused)) from None
    except ValueError:  # JSONDecodeError; its message quotes the peer, so it is dropped
        raise ChannelFault(reason, field=field, detail="is not JSON") from None
    return value


def _text(data: bytes | str, size_max: int) -> str:
    try:
        raw = data if isinstance(data, bytes) else data.encode("utf-8")
        if len(raw) > size_max:
            raise _Refused("is larger than its limit")
        return raw.decode("utf-8") if isinstance(data, bytes) else data
    except UnicodeError:
        raise _Refused("is not UTF-8") from None


def nested_within(text: str, depth_max: int) -> bool:
    """Tell, without parsing, whether no more than ``depth_max`` containers of a JSON text are open at once.

    For before the parser, not after: the parser recurses once per level, and how deep it may go depends on the caller.
    """
    if text.count("[") + text.count("{") <= depth_max:
        return True
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        found = match.group()
        if found in ("[", "{"):
            depth += 1
            if depth > depth_max:
                return False
        elif found in ("]", "}"):
            depth -= 1
    return True


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Refused("has a duplicate member")
    return members


def _integer(digits: str) -> int:
    if len(digits) > _INT_DIGITS_MAX or abs(value := int(digits)) > SAFE_INTEGER_MAX:
        raise _Refused("has an integer of more than 53 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused("has a number beyond every float")
    return value


def _no_float(_: str) -> NoReturn:
    raise _Refused("has a number that is not an integer")


def _refuse_surrogates(value: object) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeError:
            raise _Refused("has half a surrogate pair") from None
    elif isinstance(value, list):
        for item in value:
            _refuse_surrogates(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            _refuse_surrogates(name)
            _refuse_surrogates(item)
