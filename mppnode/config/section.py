"""One table of the configuration file, read key by key; every problem is noted by its key and reading goes on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from channels.faults import ChannelFault
from channels.ids import Address, parse_address
from channels.units import Units, parse_decimal

T = TypeVar("T")

_MISSING: Final = object()


class Section:
    """One table of the file. A getter that records a problem still returns a usable value, so checking goes on."""

    def __init__(
        self, values: dict[str, Any], path: str, problems: list[str], environ: Mapping[str, str], base: Path
    ) -> None:
        self.values = values
        self._path = path
        self._problems = problems
        self.environ = environ
        self._used: set[str] = set()
        self.base = base

    def section(self, name: str, *, optional: bool = False) -> Section:
        self._used.add(name)
        value = self.values.get(name, {} if optional else _MISSING)
        if not isinstance(value, dict):
            self.problem(name, "section is missing" if value is _MISSING else "must be a table")
            value = {}
        return self._child(value, name)

    def sections(self, name: str, *, optional: bool = False) -> list[Section]:
        self._used.add(name)
        value = self.values.get(name, [])
        if optional and value == []:
            return []
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            self.problem(name, f"needs at least one [[{name}]] table")
            return []
        return [self._child(item, f"{name}[{index}]") for index, item in enumerate(value)]

    def _child(self, values: dict[str, Any], name: str) -> Section:
        return Section(values, self._key(name), self._problems, self.environ, self.base)

    def _key(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def problem(self, name: str, detail: str) -> None:
        self._problems.append(f"{self._key(name)}: {detail}")

    def get(self, name: str, read: Callable[[Any], T], default: Any = _MISSING, *, fallback: T) -> T:
        """Read one key through ``read``, which raises ``ValueError`` in words fit for people."""
        self._used.add(name)
        value = self.values.get(name, _MISSING)
        if value is _MISSING:
            if default is _MISSING:
                self.problem(name, "is required")
                return fallback
            return default  # type: ignore[no-any-return]
        try:
            return read(value)
        except ChannelFault as fault:
            self.problem(name, fault.detail)
        except ValueError as error:
            self.problem(name, str(error))
        return fallback

    def text(self, name: str, pattern: re.Pattern[str], example: str, default: Any = _MISSING) -> str:
        def read(value: Any) -> str:
            if not isinstance(value, str) or pattern.fullmatch(value) is None:
                raise ValueError(f"must look like {example}")
            return value

        return self.get(name, read, default, fallback="")

    def whole(self, name: str, low: int, high: int, default: Any = _MISSING) -> int:
        def read(value: Any) -> int:
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"must be an integer from {low} to {high}")
            return value

        return self.get(name, read, default, fallback=low)

    def usd(self, name: str, default: Units, *, zero: bool = True) -> Units:
        """An amount in dollars; ``zero=False`` where nothing would work any more with none."""

        def read(value: Any) -> Units:
            amount = parse_decimal(text_of(value), field=name)
            if not amount and not zero:
                raise ValueError("must be above zero")
            return amount

        return self.get(name, read, default, fallback=default)

    def names(self, name: str, pattern: re.Pattern[str], example: str, *, most: int) -> tuple[str, ...]:
        """A list of different names; empty when the key is absent."""

        def read(value: Any) -> tuple[str, ...]:
            if not isinstance(value, list) or not 0 < len(value) <= most:
                raise ValueError(f"must be a list of 1 to {most} names")
            if not all(isinstance(item, str) and pattern.fullmatch(item) for item in value):
                raise ValueError(f"must be a list of names such as {example}")
            if len(set(value)) != len(value):
                raise ValueError("names one thing twice")
            return tuple(value)

        return self.get(name, read, (), fallback=())

    def address(self, name: str, default: Any = _MISSING) -> Address:
        return self.get(name, lambda value: parse_address(value, field=name), default, fallback=Address(bytes(20)))

    def secret(self, name: str, read: Callable[[str], T], *, required: bool = True) -> T | None:
        default = _MISSING if required else None
        return self.get(name, lambda value: read(self._resolve(value)), default, fallback=None)

    def _resolve(self, value: Any) -> str:
        """A secret is named, never written in the file: ``{ env = "NAME" }`` or ``{ file = "path" }``."""
        match value:
            case {"env": str(name), **rest} if not rest:
                if not self.environ.get(name):
                    raise ValueError(f"environment variable {name} is not set")
                return self.environ[name]
            case {"file": str(name), **rest} if not rest:
                try:
                    return (self.base / name).read_text(encoding="utf-8").strip()
                except (OSError, UnicodeDecodeError):
                    raise ValueError("its file cannot be read") from None
            case _:
                raise ValueError('must be { env = "NAME" } or { file = "path" }, never the secret itself')

    def secrets(self, name: str, read: Callable[[str], T]) -> tuple[T, ...]:
        def every(value: Any) -> tuple[T, ...]:
            if not isinstance(value, list) or not value:
                raise ValueError("must be a list of at least one secret")
            return tuple(read(self._resolve(item)) for item in value)

        return self.get(name, every, fallback=())

    def done(self) -> None:
        for name in self.values:
            if name not in self._used:
                near = difflib.get_close_matches(name, self._used, n=1)
                self.problem(name, f"is not a known key{f'; did you mean {near[0]}?' if near else ''}")


def text_of(value: Any) -> str:
    """The text of a value that must be text. Raises ``ValueError``."""
    if not isinstance(value, str):
        # A TOML float would already have lost digits.
        raise ValueError('must be text; decimals are written as "1.50"')  # noqa: TRY004 - words for people
    return value


def flag_of(value: Any) -> bool:
    """A value that must be true or false. Raises ``ValueError``."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004 - words for people
    return value
