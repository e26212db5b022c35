"""Canonical JSON (RFC 8785) for the values payment objects are made of.

The payer parses a challenge's ``request`` and sends back its own canonical encoding of it. Unless ours is byte for byte
the same, the challenge id no longer verifies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from channels.wire.strict_json import SAFE_INTEGER_MAX


def canonicalize(value: object) -> str:
    """Write ``value`` in the one form RFC 8785 allows.

    Floats are refused: payment objects hold none, and their shortest ECMAScript form is the only hard part of the RFC.

    Raises:
        TypeError: for a value JSON objects of ours never contain (a float, bytes, a key that is not text).
        ValueError: for an integer beyond 53 bits or text with half a surrogate pair.
    """
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            if abs(value) > SAFE_INTEGER_MAX:
                raise ValueError("an integer of more than 53 bits has no agreed JSON form")
            return str(value)
        case str():
            return _string(value)
        case Mapping():
            members = sorted(value.items(), key=_utf16_key)
            return "{" + ",".join(f"{_string(name)}:{canonicalize(item)}" for name, item in members) + "}"
        case Sequence() if not isinstance(value, bytes | bytearray | memoryview):
            return "[" + ",".join(canonicalize(item) for item in value) + "]"
        case _:
            raise TypeError("a value of this type has no canonical JSON form here")


def _utf16_key(member: tuple[object, object]) -> bytes:
    # Sorting str compares code points, which puts U+FF00 before U+1F600; RFC 8785 compares UTF-16 code units.
    name = member[0]
    if not isinstance(name, str):
        raise TypeError("JSON member names are text")
    return name.encode("utf-16-be")


def _string(text: str) -> str:
    text.encode("utf-8")  # half a surrogate pair has no UTF-8 form: this raises ValueError before it is written
    return json.dumps(text, ensure_ascii=False)
