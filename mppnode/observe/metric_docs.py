"""The table of all metrics for the operator's manual, so that it cannot say something else than the program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from mppnode.observe.metric_catalog import CATALOG, Kind, Merge, Spec

BEGIN: Final = "<!-- metrics: begin -->"
END: Final = "<!-- metrics: end -->"
_SHOWN_MAX: Final = 14  # values in a cell; a longer list is in the program's enumerations and in docs/api.md
_SEVERAL: Final = {
    Merge.SUM: "sum of the living",
    Merge.MAX: "highest of the living",
    Merge.MIN: "lowest of the living",
    Merge.RECENT: "set last by a living one",
}


def table() -> str:
    """One row per metric, in the order of the catalog, as Markdown."""
    rows = [
        "| metric | type | labels | several processes | what |",
        "|---|---|---|---|---|",
        *(_row(spec) for spec in CATALOG),
    ]
    return "\n".join(rows)


def with_table(text: str) -> str:
    """``text`` with the table between its two marks. Raises ``ValueError`` when it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the document has no place for the table")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def _row(spec: Spec) -> str:
    several = "sum of all" if spec.kind is not Kind.GAUGE else _SEVERAL[spec.merge]
    return f"| `{spec.name}` | {spec.kind} | {_labels(spec)} | {several} | {spec.help}{_bounds(spec)} |"


def _labels(spec: Spec) -> str:
    return "; ".join(f"`{label.name}`{_values(label.values)}" for label in spec.labels)


def _values(values: tuple[str, ...]) -> str:
    if not values:
        return ""
    more = f", and {len(values) - _SHOWN_MAX} more" if len(values) > _SHOWN_MAX else ""
    return f": {', '.join(values[:_SHOWN_MAX])}{more}"


def _bounds(spec: Spec) -> str:
    if not spec.bounds:
        return ""
    return f" Buckets: {', '.join(f'{bound:g}' for bound in spec.bounds)}."


def main(path: Path) -> None:
    """Write the table into the document at ``path``."""
    path.write_text(with_table(path.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
