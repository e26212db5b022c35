"""All checks, and their table for the manual: ``python -m mppnode.doctor.registry docs/doctor.md`` writes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from mppnode.doctor import chain, database, host, ledger, providers, settings, stripe

CHECKS: Final = (
    *settings.CHECKS,
    *chain.CHECKS,
    *providers.CHECKS,
    *ledger.CHECKS,
    *database.CHECKS,
    *stripe.CHECKS,
    *host.CHECKS,
)
"""In the order of the report."""
BEGIN: Final = "<!-- checks: begin -->"
END: Final = "<!-- checks: end -->"


def table() -> str:
    """One row per check as Markdown."""
    rows = [f"| `{each.name}` | {each.what} |" for each in CHECKS]
    return "\n".join(["| check | what must hold |", "|---|---|", *rows])


def with_table(text: str) -> str:
    """``text`` with the table between its two marks. Raises ``ValueError`` when it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the document has no place for the table")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main(path: Path) -> None:
    """Write the table into a manual."""
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
