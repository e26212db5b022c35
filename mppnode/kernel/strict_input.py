"""Caller JSON, read so that no two readers could understand it differently."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, NoReturn, Protocol

from channels.wire.strict_json import nested_within
from mppnode.kernel.faults import NodeFault, NodeReason

_INT_DIGITS_MAX: Final = 20  # of 2**64; int() of thousands of digits raises


class JsonLimits(Protocol):
    """Bounds of one document: bytes, levels, and keys in all its objects."""

    @property
    def body_bytes(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def keys(self) -> int: ...


def parse_object(body: bytes, *, limits: JsonLimits) -> dict[str, Any]:
    """Read exactly one JSON object, within the limits.

    Raises:
        NodeFault: ``BODY_TOO_LARGE`` or ``INVALID_JSON``.

    Source: RFC 8259, RFC 7493.
    """
    if len(body) > limits.body_bytes:
        raise NodeFault(NodeReason.BODY_TOO_LARGE, detail=f"the body is larger than {limits.body_bytes} bytes")
    # orjson is faster but keeps the last of two equal keys and turns large integers into floats, silently.
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        _not_json("is not UTF-8")
    if not nested_within(text, limits.depth):
        _not_json("is nested too deeply")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_pairs,
            parse_constant=_no_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
    except ValueError:
        _not_json("is not valid JSON")
    if not isinstance(value, dict):
        _not_json("is not a JSON object")
    _check_tree(value, limits, escapes="\\u" in text)
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        _not_json("has the same key twice in one object")
    return made


def _no_constant(_: str) -> NoReturn:
    _not_json("has a number that JSON does not have")


def _bounded_int(digits: str) -> int:
    value = int(digits) if len(digits) <= _INT_DIGITS_MAX else 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        _not_json("has an integer beyond 64 bits")  # encoders downstream would change it
    return value


def _finite_float(digits: str) -> float:
    value = float(digits)
    if value in {float("inf"), float("-inf")}:
        _not_json("has a number that is too large")
    return value


def _check_tree(root: dict[str, Any], limits: JsonLimits, *, escapes: bool) -> None:
    """Bound depth and keys, and refuse lone surrogates, which only an escape can smuggle past UTF-8."""
    level: list[Any] = [root]
    keys = depth = 0
    while level:
        depth += 1
        if depth > limits.depth:
            _not_json(f"is nested deeper than {limits.depth} levels")
        below: list[Any] = []
        for node in level:
            members: Iterator[Any]
            if isinstance(node, dict):
                keys += len(node)
                members = iter(node.values())
                if escapes:
                    _check_text("".join(node))
            else:
                members = iter(node)
            for member in members:
                if isinstance(member, (dict, list)):
                    below.append(member)
                elif escapes and isinstance(member, str):
                    _check_text(member)
        if keys > limits.keys:
            _not_json(f"has more than {limits.keys} keys")
        level = below


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        _not_json("has half of a surrogate pair")


def _not_json(detail: str) -> NoReturn:
    raise NodeFault(NodeReason.INVALID_JSON, field="the body", detail=detail) from None
