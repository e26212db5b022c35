"""The dashboards that ship, as tests read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.grafana.server import GRAFANA

BOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
VARIABLES = {"$__rate_interval": "10m", "$__range": "1m", "$__interval": "5s"}
"""What Grafana puts in; a window longer than any test, so that what happened at its beginning still counts."""


@dataclass(frozen=True)
class Query:
    """One expression of one panel."""

    board: str
    panel: str
    expr: str

    def __str__(self) -> str:
        return f"{self.board} / {self.panel}: {self.expr}"

    @property
    def filled(self) -> str:
        """The expression with Grafana's variables put in."""
        text = self.expr
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        assert "$" not in text, f"{self} uses a variable nobody fills"
        return text


def document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def panels(path: Path) -> list[dict[str, Any]]:
    """The panels of a dashboard that show something; rows are headings."""
    return [panel for panel in document(path)["panels"] if panel["type"] != "row"]


def queries() -> Iterator[Query]:
    """Every expression of every panel."""
    for path in BOARDS:
        for panel in panels(path):
            for target in panel["targets"]:
                yield Query(path.stem, panel["title"], target["expr"])


def notes() -> Iterator[Query]:
    """The expressions of annotations: they mark events, and an event may not have happened."""
    for path in BOARDS:
        for note in document(path)["annotations"]["list"]:
            if "expr" in note:
                yield Query(path.stem, note["name"], note["expr"])
