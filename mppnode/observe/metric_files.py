"""Several processes of one node on one machine: each writes what it has counted, and whoever is scraped adds up.

The client library has a mode for this, which an environment variable switches on before its first import, for every
metric of the program at once. Here a folder is passed in:

* A process owns a slot: a number, with a lock file it holds until it dies, however it dies. Nobody waits for a lock;
  holding it only says "alive". Process ids would say it too, until one is given out again.
* It writes ``N.json`` under another name and renames it, so a reader finds the old whole or the new whole. It is not
  synced: the files must outlive a process, not the machine.
* Counters and histograms of a file count for ever, its gauges while its process lives. Whoever takes a free slot goes
  on from the numbers it finds there, so there are never more files than there were processes at once, and a restart
  takes nothing back.
* A scrape writes its own process's numbers before it shows them. What was seen once is in a file: a process that is
  killed the moment after cannot make a counter fall.

A child that is forked and not exec'd would inherit the lock and keep a dead parent alive; this node forks none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Final

from mppnode.observe.metric_catalog import CATALOG, Kind, Spec
from mppnode.observe.metric_cells import Labels, Observed, Reading, Snapshot, Value, merged
from mppnode.observe.metric_labels import Vocabulary

SLOTS_MAX: Final = 256
"""Processes of one node at once: several times the cores of a large machine."""
FILE_BYTES_MAX: Final = 4 << 20
"""Of one snapshot: thirty times one with all the series there can be."""
_DIGITS_MAX: Final = len(str(SLOTS_MAX))
_FORMAT: Final = 1
_NUMBERS: Final = (int, float)


class SlotsTaken(OSError):
    """Every slot of the folder is held by a living process, which means that something starts far too many."""


class SharedFolder:
    """One process's place among those that count together. Every method may be called from any thread."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        """Take a slot of ``folder``, which is made if need be, and go on from what its last owner counted.

        Raises:
            OSError: the folder cannot be written to.
            SlotsTaken: see there.
        """
        self._folder = folder
        self._vocabulary = vocabulary
        self._turn = Lock()
        self.failures = 0
        """Snapshots that could not be written."""
        self.unreadable = 0
        """Files of other processes that the last :meth:`exchange` could not read."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.slot, self._held = self._claim()
        self._base = Snapshot()
        try:
            # Unreadable after a crash of the machine: these counters begin again, as Prometheus expects of a reset.
            with contextlib.suppress(OSError, ValueError):
                self._base = self._load(self.slot).without_gauges()
            self._write(self._base)  # the last owner's gauges are gone before anybody can take them for ours
        except BaseException:
            os.close(self._held)
            raise

    def _claim(self) -> tuple[int, int]:
        for slot in range(SLOTS_MAX):
            held = os.open(self._lock_of(slot), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(held)
            else:
                return slot, held
        raise SlotsTaken(f"{self._folder} has {SLOTS_MAX} living owners")

    def exchange(self, take: Callable[[], Snapshot]) -> Snapshot:
        """Write what this process has counted (``take``), and add up what all have.

        It is taken in turns, so a slower call never puts an older snapshot over a newer one.
        """
        with self._turn:
            own = merged((self._base, take()))
            try:
                self._write(own)
            except OSError:
                self.failures += 1  # the numbers are shown all the same: an operator of a full disk needs them
            return merged(self._everybodys(own))

    def flush(self, take: Callable[[], Snapshot]) -> None:
        """Write what this process has counted; call it every second or so, that a killed one loses little."""
        with self._turn:
            try:
                self._write(merged((self._base, take())))
            except OSError:
                self.failures += 1

    def close(self, take: Callable[[], Snapshot]) -> None:
        """Write for the last time and give the slot away; gauges vanish with it."""
        self.flush(take)
        os.close(self._held)

    def _everybodys(self, own: Snapshot) -> list[Snapshot]:
        """All snapshots in the order of their slots, whoever asks. Sums of floats depend on the order, and a counter
        that two processes show with different last bits falls every time the other one is scraped.
        """
        found = []
        unreadable = 0
        numbers = (path.stem for path in self._folder.glob("*.json"))
        slots = {int(number) for number in numbers if number.isdecimal() and len(number) <= _DIGITS_MAX}
        for slot in sorted({*slots, self.slot}):
            if slot == self.slot:
                found.append(own)
                continue
            try:
                alive = self._is_held(slot)
                part = self._load(slot)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                unreadable += 1
            else:
                found.append(part if alive else part.without_gauges())
        self.unreadable = unreadable
        return found

    def _is_held(self, slot: int) -> bool:
        """Whether a living process owns ``slot``. Asked with a shared lock: two that ask do not see each other."""
        asked = os.open(self._lock_of(slot), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(asked, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(asked)
        return False

    def _load(self, slot: int) -> Snapshot:
        with self._file_of(slot).open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise ValueError("the snapshot is too large")
        return decode(data, self._vocabulary)

    def _write(self, snapshot: Snapshot) -> None:
        draft = self._folder / f"{self.slot}.tmp"
        draft.write_bytes(encode(snapshot))
        draft.replace(self._file_of(self.slot))

    def _file_of(self, slot: int) -> Path:
        return self._folder / f"{slot}.json"

    def _lock_of(self, slot: int) -> Path:
        return self._folder / f"{slot}.lock"


def encode(snapshot: Snapshot) -> bytes:
    """A snapshot as JSON. The standard library's, as it alone writes integers of any size, and money needs it."""
    metrics = {
        name: [[labels, *_parts(value)] for labels, value in cells.items()] for name, cells in snapshot.cells.items()
    }
    return json.dumps({"format": _FORMAT, "metrics": metrics}, separators=(",", ":"), allow_nan=False).encode()


def _parts(value: Value) -> tuple[object, ...]:
    match value:
        case Reading():
            return value.value, value.at_ms
        case Observed():
            return value.counts, value.total
        case _:
            return (value,)


def decode(data: bytes, vocabulary: Vocabulary) -> Snapshot:
    """Read a snapshot another process has written. Metrics of another version of the node are left out.

    Names of models are taken over while there is room for them: a process that has read its catalog again knows them
    earlier than its siblings do.

    Raises:
        ValueError: it is none.
    """
    tree = json.loads(data)
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT or not isinstance(tree.get("metrics"), dict):
        raise ValueError("not a snapshot of this format")
    specs = {spec.name: spec for spec in CATALOG}
    parts = []
    for name, rows in tree["metrics"].items():
        if (spec := specs.get(name)) is not None:
            parts += [Snapshot({name: row}) for row in _rows(spec, rows, vocabulary)]
    return merged(parts)  # rows that are "other" only here fall together


def _rows(spec: Spec, rows: Any, vocabulary: Vocabulary) -> list[Mapping[Labels, Value]]:
    found: list[Mapping[Labels, Value]] = []
    if not isinstance(rows, list):
        raise ValueError(f"{spec.name} is no list")  # noqa: TRY004 - one kind of refusal for one file
    for row in rows:
        if not isinstance(row, list) or not row or not isinstance(row[0], list):
            raise ValueError(f"{spec.name} has a row without labels")
        labels, *parts = row
        if len(labels) != len(spec.labels):
            return []
        if not all(isinstance(label, str) for label in labels):
            raise ValueError(f"{spec.name} has a label that is no text")
        value = _value(spec, parts)
        if value is None:
            return []
        folded = tuple(vocabulary.admit(label, text) for label, text in zip(spec.labels, labels, strict=True))
        found.append({folded: value})
    return found


def _value(spec: Spec, parts: list[Any]) -> Value | None:
    """The value of a row; None for one of a version with other buckets."""
    match spec.kind, parts:
        case Kind.COUNTER, [int() | float() as count] if _countable(count):
            return count
        case Kind.GAUGE, [int() | float() as value, int() as at_ms] if _countable(abs(value)) and at_ms >= 0:
            return Reading(value, at_ms)
        case Kind.HISTOGRAM, [list() as counts, int() | float() as total] if _countable(total):
            if not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError(f"{spec.name} has a bucket that is no count")
            return Observed(tuple(counts), float(total)) if len(counts) == len(spec.bounds) + 1 else None
        case _:
            raise ValueError(f"{spec.name} has a value that is none")


def _countable(value: object) -> bool:
    return type(value) in _NUMBERS and isinstance(value, _NUMBERS) and 0 <= value < float("inf")
