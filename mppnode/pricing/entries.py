"""The catalog file: what providers charge, where and when that was read, and what they charged before.

The file is the operator's: it can be read, edited and kept under version control. It is therefore parsed as strictly as
a request is, and nothing of a file with one wrong field is used.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from channels.faults import ChannelFault
from channels.instants import UnixMillis, UnixSeconds, parse_rfc3339, to_rfc3339
from channels.units import Pico
from mppnode.config.catalog import MODEL_ID, PROVIDER_NAME, ability_names, parse_abilities
from mppnode.config.rates import format_each, format_rate, parse_each, parse_rate
from mppnode.config.schema import DEFAULT_ABILITIES
from mppnode.kernel.listing import Ability, ProviderKind
from mppnode.kernel.rates import Rates
from mppnode.pricing.exact import BadPrice, Number, load_json

VERSION: Final = "1"
HISTORY_MAX: Final = 20
"""Dated earlier prices of one entry: enough to explain a year of bills, few enough to read."""
ENTRIES_MAX: Final = 20_000  # forty times the largest aggregator's list
FILE_BYTES_MAX: Final = 64 * 1024 * 1024  # that many entries with a full history each, several times over
_TOKENS_MAX: Final = 100_000_000
_QUALITY_MAX: Final = 100

_TOKEN_AXES: Final = ("input", "cached_input", "output", "cache_write", "reasoning")
EACH_AXES: Final = ("request", "image", "audio_second")
"""The axes that are counted apiece and not by the token."""
_KEYS: Final = {axis: f"{axis}_usd_per_million" for axis in _TOKEN_AXES} | {axis: f"{axis}_usd" for axis in EACH_AXES}
AXES: Final = (*_TOKEN_AXES, *EACH_AXES)
"""The names of ``Rates.axes``, in its order."""

_UPSTREAM = re.compile(r"[!-~]{1,256}", re.ASCII)
_SOURCE = re.compile(r"https?://[!-~]{1,2000}", re.ASCII)
_REASON = re.compile(r"[ -~]{1,300}", re.ASCII)
_REQUIRED: Final = frozenset({"provider", "model", "cost", "context", "max_output", "source", "time"})
_OPTIONAL: Final = frozenset(
    {"upstream_model", "kind", "abilities", "quality", "vouched", "rounded", "held", "history"}
)


class CatalogError(Exception):
    """A catalog file cannot be used, no part of it. ``place`` names the entry and ``field`` the key."""

    def __init__(self, place: str, field: str, detail: str) -> None:
        self.place = place
        self.field = field
        self.detail = detail
        super().__init__(f"{place}{'.' if place and field else ''}{field}: {detail}")


@dataclass(frozen=True, slots=True)
class Dated:
    """A price that was in force until a later one took its place; ``time`` is when it was last read."""

    time: UnixSeconds
    source: str
    cost: Rates


@dataclass(frozen=True, slots=True)
class Held:
    """A price that was read and not believed. ``cost`` is None when what was read is no price at all."""

    time: UnixSeconds
    reason: str
    cost: Rates | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """What one provider charges us for one model. ``cost`` is before markup; ``context``, ``max_output`` in tokens."""

    provider: str
    model: str
    upstream_model: str
    cost: Rates
    context: int
    max_output: int
    source: str
    time: UnixSeconds
    """When the price was last read from its source."""
    kind: ProviderKind | None = None
    """Where it differs from the provider's."""
    abilities: Ability = DEFAULT_ABILITIES
    quality: int = 0
    vouched: bool = False
    """Whether the operator answers for the price, so that it does not go stale."""
    rounded: tuple[str, ...] = ()
    """The axes whose price is finer than a pico-dollar and was rounded up to one."""
    held: Held | None = None
    history: tuple[Dated, ...] = ()
    """Newest first."""

    @property
    def key(self) -> tuple[str, str]:
        """What is unique in a catalog: provider and model."""
        return self.provider, self.model

    @property
    def free(self) -> bool:
        """Whether nothing is charged for tokens, which leaves a challenge nothing to quote."""
        return not self.cost.input and not self.cost.output


def parse_entries(data: bytes) -> tuple[Entry, ...]:
    """Read a catalog file's content, all of it or nothing.

    Raises:
        CatalogError: naming the entry and the field.
    """
    try:
        document = load_json(data)
    except BadPrice as error:
        raise CatalogError("file", "", str(error)) from None
    if not isinstance(document, dict):
        raise CatalogError("file", "", "is not a JSON object")
    _only(document, frozenset({"version", "listings"}), frozenset(), "")
    if document["version"] != VERSION or not isinstance(document["version"], Number):
        raise CatalogError("", "version", "is not 1, the one this program reads")
    listings = document["listings"]
    if not isinstance(listings, list) or len(listings) > ENTRIES_MAX:
        raise CatalogError("", "listings", f"is not an array of at most {ENTRIES_MAX}")
    entries: dict[tuple[str, str], Entry] = {}
    for index, value in enumerate(listings):
        entry = _entry(value, f"listings[{index}]")
        if entry.key in entries:
            raise CatalogError(f"listings[{index}]", "model", "is listed twice for its provider")
        entries[entry.key] = entry
    return tuple(entries.values())


def _entry(value: Any, place: str) -> Entry:
    if not isinstance(value, dict):
        raise CatalogError(place, "", "is not an object")
    _only(value, _REQUIRED, _OPTIONAL, place)
    model = _text(value, "model", MODEL_ID, place)
    entry = Entry(
        provider=_text(value, "provider", PROVIDER_NAME, place),
        model=model,
        upstream_model=_text(value, "upstream_model", _UPSTREAM, place) if "upstream_model" in value else model,
        cost=_cost(value["cost"], f"{place}.cost"),
        context=_whole(value, "context", 1, _TOKENS_MAX, place),
        max_output=_whole(value, "max_output", 1, _TOKENS_MAX, place),
        source=_text(value, "source", _SOURCE, place),
        time=_time(value, place),
        kind=_kind(value, place),
        abilities=_abilities(value, place),
        quality=_whole(value, "quality", 0, _QUALITY_MAX, place) if "quality" in value else 0,
        vouched=_flag(value, "vouched", place),
        rounded=_rounded(value, place),
        held=_held(value["held"], f"{place}.held") if "held" in value else None,
        history=_history(value, place),
    )
    if entry.free:
        raise CatalogError(place, "cost", "is zero for input and output: a free model cannot be quoted")
    return entry


def _cost(value: Any, place: str) -> Rates:
    if not isinstance(value, dict):
        raise CatalogError(place, "", "is not an object")
    required = frozenset({_KEYS["input"], _KEYS["output"]})
    _only(value, required, frozenset(_KEYS.values()) - required, place)
    found: dict[str, Pico] = {}
    for axis, key in _KEYS.items():
        if key not in value:
            continue
        text = value[key]
        if not isinstance(text, str) or isinstance(text, Number):
            raise CatalogError(place, key, 'is not text: decimals are written as "1.50"')
        try:
            found[axis] = parse_rate(text, field=key) if axis in _TOKEN_AXES else parse_each(text, field=key)
        except ChannelFault as fault:
            raise CatalogError(place, key, fault.detail) from None
    # Left out, a cached token costs what a fresh one does; Rates knows the rest.
    return Rates(**{"cached_input": found["input"], **found})


def _held(value: Any, place: str) -> Held:
    if not isinstance(value, dict):
        raise CatalogError(place, "", "is not an object")
    _only(value, frozenset({"time", "reason"}), frozenset({"cost"}), place)
    cost = _cost(value["cost"], f"{place}.cost") if "cost" in value else None
    return Held(_time(value, place), _text(value, "reason", _REASON, place), cost)


def _history(value: dict[str, Any], place: str) -> tuple[Dated, ...]:
    rows = value.get("history", [])
    if not isinstance(rows, list) or len(rows) > HISTORY_MAX:
        raise CatalogError(place, "history", f"is not an array of at most {HISTORY_MAX}")
    dated = []
    for index, row in enumerate(rows):
        here = f"{place}.history[{index}]"
        if not isinstance(row, dict):
            raise CatalogError(here, "", "is not an object")
        _only(row, frozenset({"time", "source", "cost"}), frozenset(), here)
        dated.append(Dated(_time(row, here), _text(row, "source", _SOURCE, here), _cost(row["cost"], f"{here}.cost")))
    return tuple(dated)


def _only(value: dict[str, Any], required: frozenset[str], optional: frozenset[str], place: str) -> None:
    for key in sorted(required):
        if key not in value:
            raise CatalogError(place, key, "is missing")
    for key in value:
        if key not in required | optional:
            shown = key if _REASON.fullmatch(key) else "a key"
            raise CatalogError(place, shown, "is not a known key")


def _text(value: dict[str, Any], key: str, pattern: re.Pattern[str], place: str) -> str:
    text = value[key]
    if not isinstance(text, str) or isinstance(text, Number) or pattern.fullmatch(text) is None:
        raise CatalogError(place, key, "is not text of the expected form")
    return text


def _whole(value: dict[str, Any], key: str, low: int, high: int, place: str) -> int:
    text = value[key]
    if isinstance(text, Number) and text.isdigit() and len(text) <= len(str(high)) and low <= int(text) <= high:
        return int(text)
    raise CatalogError(place, key, f"is not an integer from {low} to {high}")


def _flag(value: dict[str, Any], key: str, place: str) -> bool:
    flag = value.get(key, False)
    if not isinstance(flag, bool):
        raise CatalogError(place, key, "is not true or false")
    return flag


def _time(value: dict[str, Any], place: str) -> UnixSeconds:
    try:
        return UnixSeconds(parse_rfc3339(value["time"]) // 1000)
    except ChannelFault as fault:
        raise CatalogError(place, "time", fault.detail) from None


def _kind(value: dict[str, Any], place: str) -> ProviderKind | None:
    if "kind" not in value:
        return None
    try:
        return ProviderKind(value["kind"])
    except ValueError:
        raise CatalogError(place, "kind", "is not one of " + ", ".join(ProviderKind)) from None


def _abilities(value: dict[str, Any], place: str) -> Ability:
    if "abilities" not in value:
        return DEFAULT_ABILITIES
    try:
        return parse_abilities(value["abilities"])
    except ValueError as error:
        raise CatalogError(place, "abilities", str(error)) from None


def _rounded(value: dict[str, Any], place: str) -> tuple[str, ...]:
    names = value.get("rounded", [])
    if not isinstance(names, list) or any(name not in AXES for name in names) or len(set(names)) != len(names):
        raise CatalogError(place, "rounded", "is not a list of different axes")
    return tuple(names)


# ------------------------------------------------------------------------------------------------------------- writing


def format_entries(entries: Iterable[Entry]) -> bytes:
    """The content of a catalog file: sorted, one value a line, so that a price change is a one-line difference."""
    ordered = sorted(entries, key=lambda entry: entry.key)
    document = {"version": int(VERSION), "listings": [_row(entry) for entry in ordered]}
    return (json.dumps(document, indent=1) + "\n").encode()


def _row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"provider": entry.provider, "model": entry.model}
    if entry.upstream_model != entry.model:
        row["upstream_model"] = entry.upstream_model
    if entry.kind is not None:
        row["kind"] = entry.kind.value
    row["cost"] = cost_row(entry.cost)
    row |= {"context": entry.context, "max_output": entry.max_output, "abilities": ability_names(entry.abilities)}
    if entry.quality:
        row["quality"] = entry.quality
    row |= {"source": entry.source, "time": rfc3339(entry.time)}
    if entry.vouched:
        row["vouched"] = True
    if entry.rounded:
        row["rounded"] = list(entry.rounded)
    if entry.held is not None:
        row["held"] = {"time": rfc3339(entry.held.time), "reason": entry.held.reason}
        if entry.held.cost is not None:
            row["held"]["cost"] = cost_row(entry.held.cost)
    if entry.history:
        row["history"] = [
            {"time": rfc3339(dated.time), "source": dated.source, "cost": cost_row(dated.cost)}
            for dated in entry.history
        ]
    return row


def cost_row(cost: Rates) -> dict[str, str]:
    """Every axis that says more than its default, as decimal text under the key the file uses."""
    implied = {"cached_input": cost.input, "cache_write": cost.input, "reasoning": cost.output}
    values = dict(zip(AXES, cost.axes, strict=True))
    return {
        _KEYS[axis]: format_rate(values[axis]) if axis in _TOKEN_AXES else format_each(values[axis])
        for axis in AXES
        if axis in ("input", "output") or values[axis] != implied.get(axis, 0)
    }


def rfc3339(time: UnixSeconds) -> str:
    """A point in time as the file writes it."""
    return to_rfc3339(UnixMillis(time * 1000))


# --------------------------------------------------------------------------------------------------------------- files


def read_entries(path: Path, *, required: bool = False) -> tuple[Entry, ...]:
    """Read a catalog file; unless it is ``required``, one that is not there yet has no entries.

    Raises:
        CatalogError: when it is there and cannot be used.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not required:
            return ()
        raise CatalogError("file", "", f"cannot be read: {error.strerror}") from None
    if len(data) > FILE_BYTES_MAX:
        raise CatalogError("file", "", f"is larger than {FILE_BYTES_MAX} bytes")
    return parse_entries(data)


def write_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Replace a catalog file as a whole: whoever reads it sees the old one or the new one, after a power cut too.

    Raises:
        CatalogError: when the file would not be readable again; then it is not written.
        OSError: from the file system; the old file is still there.
    """
    data = format_entries(entries)
    parse_entries(data)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
