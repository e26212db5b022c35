"""Compares two configurations by their keys, secrets by what they are and never by how they print."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from mppnode.config.schema import Config
from mppnode.config.secrets import Secret


def same(one: Any, other: Any) -> bool:
    """Whether two values of a configuration mean the same; ``==`` would tell two readings of one secret apart."""
    if isinstance(one, Secret) and isinstance(other, Secret):
        return same(one.reveal(), other.reveal())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if is_dataclass(one) and type(one) is type(other):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return bool(one == other)


def changed_keys(old: Config, new: Config) -> tuple[str, ...]:
    """The keys at which two configurations differ, such as ``limits.drain_s``; a table that came or went is one key."""
    return tuple(_changed(old, new, ""))


def _changed(old: Any, new: Any, path: str) -> list[str]:
    if same(old, new):
        return []
    if is_dataclass(old) and type(old) is type(new):
        found: list[str] = []
        for field in fields(old):
            place = f"{path}.{field.name}" if path else field.name
            found += _changed(getattr(old, field.name), getattr(new, field.name), place)
        return found
    return [path]

