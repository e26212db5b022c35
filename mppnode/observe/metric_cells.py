"""Where a process counts: plain numbers in dictionaries, exact where they are whole.

The client library's own counters are not used. They decide about several processes by an environment variable when they
are imported, read the machine's clock, take a lock per call, and add money up as floats. It renders what is here.

One thread counts, the event loop's. Any thread may take a snapshot: it copies each dictionary in one step of the
interpreter.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Final, TypeAlias

from mppnode.observe.metric_catalog import CATALOG, FOLDED, REJECTED, Kind, Merge, Spec
from mppnode.observe.metric_labels import Vocabulary

Number: TypeAlias = int | float
Labels: TypeAlias = tuple[str, ...]
Cells: TypeAlias = Mapping[str, Mapping[Labels, "Value"]]

_VALUE_MAX: Final = 10**24  # a million million dollars in pico: what is above is no number anybody meant


@dataclass(frozen=True, slots=True)
class Reading:
    """A gauge and when it was set, in Unix milliseconds."""

    value: Number
    at_ms: int


@dataclass(frozen=True, slots=True)
class Observed:
    """A histogram: how many fell into each bucket, the one without a bound last, and the sum of all."""

    counts: tuple[int, ...]
    total: float


Value: TypeAlias = int | float | Reading | Observed


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All values of a process, or of several, by metric and labels."""

    cells: Cells = field(default_factory=dict)

    def without_gauges(self) -> Snapshot:
        """What stays of a process that is dead."""
        lasting = {spec.name for spec in CATALOG if spec.kind is not Kind.GAUGE}
        return Snapshot({name: cells for name, cells in self.cells.items() if name in lasting})


def merged(parts: Iterable[Snapshot]) -> Snapshot:
    """The values of several processes as one, each metric by its own rule."""
    found: dict[str, dict[Labels, Value]] = {}
    rules = {spec.name: spec.merge for spec in CATALOG}
    for part in parts:
        for name, cells in part.cells.items():
            into = found.setdefault(name, {})
            for labels, value in cells.items():
                old = into.get(labels)
                into[labels] = value if old is None else _joined(rules[name], old, value)
    return Snapshot(found)


def _joined(rule: Merge, one: Value, other: Value) -> Value:
    if isinstance(one, Observed) and isinstance(other, Observed):
        counts = tuple(a + b for a, b in zip(one.counts, other.counts, strict=True))
        return Observed(counts, one.total + other.total)
    if isinstance(one, Reading) and isinstance(other, Reading):
        at_ms = max(one.at_ms, other.at_ms)
        match rule:
            case Merge.SUM:
                return Reading(one.value + other.value, at_ms)
            case Merge.MAX:
                return Reading(max(one.value, other.value), at_ms)
            case Merge.MIN:
                return Reading(min(one.value, other.value), at_ms)
            case Merge.RECENT:
                # Of two of one millisecond the larger, so that everybody who is scraped shows the same.
                return max(one, other, key=lambda reading: (reading.at_ms, reading.value))
    assert not isinstance(one, Reading | Observed)
    assert not isinstance(other, Reading | Observed)
    return one + other


class _Family:
    """What the three kinds have in common: labels that are folded into closed sets, off the usual way."""

    __slots__ = ("_board", "_spec")

    def __init__(self, spec: Spec, board: Board) -> None:
        self._spec = spec
        self._board = board

    def _folded(self, labels: Labels) -> Labels:
        """The labels a value is counted under. What is unknown is not remembered: strangers choose it."""
        fold = self._board.vocabulary.fold
        found = tuple(fold(label, value) for label, value in zip(self._spec.labels, labels, strict=True))
        if found != labels:
            self._board.folded()
        return found


    def _expected(self) -> Iterable[Labels]:
        """Every combination of labels that can be foreseen: with what the catalog names, and without ``other``."""
        names = self._board.vocabulary.names
        return product(*(label.values or names(label) for label in self._spec.labels))


class Counter(_Family):
    """Only rises."""

    __slots__ = ("cells",)

    def __init__(self, spec: Spec, board: Board) -> None:
        super().__init__(spec, board)
        self.cells: dict[Labels, Number] = {}
        self.foresee()

    def foresee(self) -> None:
        """Have every series that can be foreseen, at nothing: the first rise of one that was not there is not seen."""
        for labels in self._expected():
            self.cells.setdefault(labels, 0)

    def add(self, amount: Number, *labels: str) -> None:
        """Rise by ``amount``; a negative one is counted as a mistake and changes nothing."""
        if not 0 <= amount <= _VALUE_MAX:
            self._board.rejected()
            return
        cells = self.cells
        if labels in cells:
            cells[labels] += amount
        elif amount:
            labels = self._folded(labels)
            cells[labels] = cells.get(labels, 0) + amount

    def put(self, total: Number) -> None:
        """Set what something else has counted since this process began."""
        self.cells[()] = max(total, self.cells[()])

    def read(self) -> dict[Labels, Value]:
        """A copy."""
        return dict(self.cells)


class Gauge(_Family):
    """Goes up and down, or is set."""

    __slots__ = ("cells",)

    def __init__(self, spec: Spec, board: Board) -> None:
        super().__init__(spec, board)
        self.cells: dict[Labels, Reading] = {}

    def put(self, value: Number, *labels: str) -> None:
        """Set it."""
        if not -_VALUE_MAX <= value <= _VALUE_MAX:
            self._board.rejected()
            return
        if labels not in self.cells:
            labels = self._folded(labels)
        self.cells[labels] = Reading(value, self._board.now_ms())

    def replace(self, values: Mapping[str, Number], worse: Callable[[Number, Number], Number]) -> None:
        """Have a value for each of these names and for no other; ``other`` is the worse one of those it stands for.

        Names of our own catalog that are beyond the vocabulary's room are no strangers, and not counted as folded.
        """
        (label,), fold, at_ms = self._spec.labels, self._board.vocabulary.fold, self._board.now_ms()
        found: dict[str, Number] = {}
        for name, value in values.items():
            named = fold(label, name)
            found[named] = value if named not in found else worse(found[named], value)
        self.cells = {(name,): Reading(value, at_ms) for name, value in found.items()}

    def clear(self) -> None:
        """Have no value any more, until it is set again."""
        self.cells.clear()

    def move(self, by: int, *labels: str) -> None:
        """Raise or lower what counts things that are there now; never below nothing."""
        if labels not in self.cells:
            labels = self._folded(labels)
        old = self.cells.get(labels)
        self.cells[labels] = Reading(max((old.value if old is not None else 0) + by, 0), 0)

    def read(self) -> dict[Labels, Value]:
        """A copy."""
        return dict(self.cells)


class Histogram(_Family):
    """Counts observations by size."""

    __slots__ = ("_bounds", "cells")

    def __init__(self, spec: Spec, board: Board) -> None:
        super().__init__(spec, board)
        self._bounds = spec.bounds
        self.cells: dict[Labels, list[Number]] = {}
        """One number per bucket, and the sum."""
        self.foresee()

    def foresee(self) -> None:
        """See :meth:`Counter.foresee`."""
        for labels in self._expected():
            if labels not in self.cells:
                self.cells[labels] = self._empty()

    def _empty(self) -> list[Number]:
        return [0] * (len(self._bounds) + 2)

    def see(self, value: float, *labels: str) -> None:
        """Count one observation."""
        if not 0 <= value <= _VALUE_MAX:
            self._board.rejected()
            return
        cell = self.cells.get(labels)
        if cell is None:
            labels = self._folded(labels)
            cell = self.cells.setdefault(labels, self._empty())
        cell[bisect_left(self._bounds, value)] += 1
        cell[-1] += value

    def read(self) -> dict[Labels, Value]:
        """A copy."""
        found: dict[Labels, Value] = {}
        for labels, cell in list(self.cells.items()):
            *counts, total = cell[:]
            found[labels] = Observed(tuple(int(count) for count in counts), float(total))
        return found


class Board:
    """All cells of one process."""

    def __init__(self, vocabulary: Vocabulary, now_ms: Callable[[], int]) -> None:
        self.vocabulary = vocabulary
        self.now_ms = now_ms
        self._families: dict[str, Counter | Gauge | Histogram] = {}
        self._folds = self.counter(FOLDED)
        self._rejects = self.counter(REJECTED)

    def counter(self, spec: Spec) -> Counter:
        """The cells of a counter."""
        assert spec.kind is Kind.COUNTER
        family = Counter(spec, self)
        self._families[spec.name] = family
        return family

    def gauge(self, spec: Spec) -> Gauge:
        """The cells of a gauge."""
        assert spec.kind is Kind.GAUGE
        family = Gauge(spec, self)
        self._families[spec.name] = family
        return family

    def histogram(self, spec: Spec) -> Histogram:
        """The cells of a histogram."""
        assert spec.kind is Kind.HISTOGRAM
        family = Histogram(spec, self)
        self._families[spec.name] = family
        return family

    def foresee(self) -> None:
        """Have every series of names that have become known."""
        for family in self._families.values():
            if not isinstance(family, Gauge):
                family.foresee()

    def folded(self) -> None:
        """Count a value that is counted as ``other``."""
        self._folds.cells[()] += 1

    def rejected(self) -> None:
        """Count a value that cannot be counted."""
        self._rejects.cells[()] += 1

    def names(self) -> frozenset[str]:
        """The metrics that have cells."""
        return frozenset(self._families)

    def snapshot(self) -> Snapshot:
        """All values now."""
        return Snapshot({name: family.read() for name, family in self._families.items()})
