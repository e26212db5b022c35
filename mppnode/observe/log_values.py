"""What a log shows of a value: bounded, one line, and nothing that could be a secret or somebody's text.

Two nets. A value of a type that is not plain data (a ``Secret``, bytes, an exception, an object of ours) is shown as
the name of its type. A text under a name that sounds like a secret's is shown as its type too, whoever logged it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from functools import lru_cache
from pathlib import PurePath
from typing import Final

TEXT_MAX: Final = 1_024
"""Characters of one text: a URL or a sentence of ours; whatever is longer is somebody else's."""
ITEMS_MAX: Final = 64
"""Items of a list or a mapping: the problems of a configuration file fit."""
DEPTH_MAX: Final = 4
"""Levels of nesting; a value that contains itself ends there too."""
_INTEGER_BITS_MAX: Final = 512  # amounts have 96, hashes 256; Python refuses to write out what is much longer
_WORDS: Final = re.compile(r"[a-z0-9]+")
_SECRET_WORDS: Final = frozenset(
    {
        "apikey",
        "auth",
        "authorization",
        "bearer",
        "cookie",
        "credential",
        "credentials",
        "jwt",
        "key",
        "mnemonic",
        "passphrase",
        "password",
        "passwd",
        "private",
        "secret",
        "secrets",
        "signature",
        "signatures",
        "token",
    }
)
NOT_SECRET: Final = frozenset({"token_source"})
"""Names that sound like a secret's and hold a word of ours: whose count of tokens was charged."""
KEY_ID: Final = re.compile(r"key_[A-Za-z0-9_-]{1,64}", re.ASCII)
"""The public id of an API key, which may stand under ``key``; a key's text begins with ``sk-``."""


_Several = Mapping[object, object] | list[object] | tuple[object, ...] | AbstractSet[object]


@lru_cache(maxsize=1_024)  # names are the program's own; those inside a mapping may be anybody's
def sounds_secret(name: str) -> bool:
    """Whether a field of this name is expected to hold a secret."""
    lowered = name.lower()
    return lowered not in NOT_SECRET and not _SECRET_WORDS.isdisjoint(_WORDS.findall(lowered))


def shown(name: str, value: object) -> object:
    """What a line shows under ``name``: plain data for JSON, never longer than the limits above."""
    kind = type(value)
    if kind is int or kind is bool or value is None:
        return value if kind is not int or _short(value) else _cut_number(value)
    if isinstance(value, str) and sounds_secret(name) and KEY_ID.fullmatch(value) is None:
        return f"<{kind.__name__}>"
    return _plain(value, 0, hidden=sounds_secret(name))


def cut(text: str, most: int = TEXT_MAX) -> str:
    """``text``, or its beginning and a mark that says how many characters are missing."""
    return text if len(text) <= most else f"{text[:most]}...(+{len(text) - most})"


def _short(value: object) -> bool:
    return isinstance(value, int) and value.bit_length() <= _INTEGER_BITS_MAX


def _cut_number(value: object) -> str:
    assert isinstance(value, int)
    return f"<int of {value.bit_length()} bits>"


def _plain(value: object, depth: int, *, hidden: bool) -> object:
    if isinstance(value, str):
        return f"<{type(value).__name__}>" if hidden and KEY_ID.fullmatch(value) is None else cut(_unicode(value))
    if isinstance(value, int):
        return (value if isinstance(value, bool) else int(value)) if _short(value) else _cut_number(value)
    if isinstance(value, float):
        # JSON has no infinity, and a reader that is strict drops the whole line.
        return float(value) if -float("inf") < value < float("inf") else repr(float(value))
    if value is None:
        return None
    if isinstance(value, PurePath):
        return cut(_unicode(str(value)))
    if isinstance(value, (Mapping, list, tuple, AbstractSet)):
        return f"<{type(value).__name__}>" if depth >= DEPTH_MAX else _several(value, depth + 1, hidden=hidden)
    return f"<{type(value).__name__}>"


def _several(value: _Several, depth: int, *, hidden: bool) -> object:
    more = len(value) - ITEMS_MAX
    if isinstance(value, Mapping):
        shown_items: dict[str, object] = {}
        for name, item in list(value.items())[:ITEMS_MAX]:
            text = cut(_unicode(name), 64) if isinstance(name, str) else f"<{type(name).__name__}>"
            shown_items[text] = _plain(item, depth, hidden=hidden or sounds_secret(text))
        return shown_items if more <= 0 else {**shown_items, "...": more}
    items = [_plain(item, depth, hidden=hidden) for item in list(value)[:ITEMS_MAX]]
    return items if more <= 0 else [*items, f"...(+{more})"]


def _unicode(text: str) -> str:
    """Text without lone surrogates, which are no characters: strict readers of JSON refuse a line that has one."""
    if text.isascii():
        return text
    return text[: TEXT_MAX + 1].encode("utf-8", "replace").decode() + text[TEXT_MAX + 1 :]
