"""Secrets that cannot be printed by accident."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Secret(Generic[T]):
    """A value whose ``repr`` and ``str`` say nothing; :meth:`reveal` is the one way to it, and easy to search for."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value: T = value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def reveal(self) -> T:
        """The value itself."""
        return self._value
