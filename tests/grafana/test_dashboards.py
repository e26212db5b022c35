"""The dashboards as files: Grafana's own schema, names that exist, units and words on every panel."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from mppnode.observe.metric_catalog import CATALOG, Kind, Spec
from tests.grafana.panels import BOARDS, document, notes, panels, queries
from tests.grafana.server import RULES

SUFFIXES = {Kind.COUNTER: ("",), Kind.GAUGE: ("",), Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
SAMPLES: dict[str, Spec] = {spec.name + suffix: spec for spec in CATALOG for suffix in SUFFIXES[spec.kind]}
SELECTOR = re.compile(r"((?:mppnode|process)_[a-z_]+)(?:\{([^}]*)\})?")
GROUPING = re.compile(r"\b(?:by|without) \(([^)]*)\)")
MATCHER = re.compile(r'([a-z_]+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
SCRAPED = {"job", "instance", "le"}
"""Labels Prometheus adds itself."""


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """What a document had and its typed copy has not."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, value in before.items():
            if name not in after:
                yield f"{path}.{name}"
            else:
                yield from lost(value, after[name], f"{path}.{name}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif before != after:
        yield f"{path}: {before!r} became {after!r}"


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_what_grafanas_schema_says(path: Path) -> None:
    """Read into the types Grafana generates from its schema and written again, nothing is lost or changed."""
    register_default_plugins()
    board = document(path)
    typed = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert list(lost(board, typed)) == []


def test_the_schema_knows_what_does_not_belong() -> None:
    """The check above sees a misspelt option, a panel's as well as the dashboard's."""
    register_default_plugins()
    board = document(BOARDS[0])
    board["titel"] = "x"
    board["panels"][0]["options"]["graphMood"] = "area"
    typed = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert set(lost(board, typed)) == {".titel", ".panels[0].options.graphMood"}


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_every_panel_can_be_read(path: Path) -> None:
    """Each has a title, a sentence, a unit, the provisioned source and a place of its own; rows are filled."""
    board, taken = document(path), set[tuple[int, int]]()
    assert board["uid"] == f"mppnode-{path.stem}"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert len({panel["title"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels(path):
        name = panel["title"]
        assert panel["description"].endswith("."), name
        assert len(panel["description"]) > 20, name
        assert panel["fieldConfig"]["defaults"]["unit"], name
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {panel["datasource"]["uid"]} == {"prometheus"}
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24, name
        assert not cells & taken, name
        taken |= cells


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_the_first_screen_tells(path: Path) -> None:
    """A dashboard begins with at most six numbers in one line, and fits into four screens."""
    first = [panel for panel in panels(path) if panel["gridPos"]["y"] == 0]
    assert {panel["type"] for panel in first} == {"stat"}
    assert sum(panel["gridPos"]["w"] for panel in first) == 24
    assert max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels(path)) <= 60


def expressions() -> list[str]:
    """Every expression there is, with where it stands."""
    rules = [match.group(1) for match in re.finditer(r"expr: (?:>-\n)?((?:.|\n      )*?)(?=\n        (?:for|labels):)", RULES.read_text())]
    return [query.expr for query in (*queries(), *notes())] + rules


def test_what_is_asked_for_exists() -> None:
    """Every metric, label and label's value in a dashboard or rule is one the node has; every counter is a rate."""
    seen = set[str]()
    for expr in expressions():
        for name, matchers in SELECTOR.findall(expr):
            assert name in SAMPLES, expr
            spec = SAMPLES[name]
            seen.add(spec.name)
            labels = {label.name: label.values for label in spec.labels}
            for label, _, wanted in MATCHER.findall(matchers):
                assert label in labels or label in SCRAPED, expr
                if labels.get(label):
                    assert set(wanted.split("|")) <= {*labels[label], "other", ""}, expr
            if spec.kind is not Kind.GAUGE:
                assert re.search(rf"(?:rate|increase)\(\s*{name}", expr), f"{name} is shown as a total in {expr}"
        known = {label.name for spec in (SAMPLES[name] for name, _ in SELECTOR.findall(expr)) for label in spec.labels}
        for grouping in GROUPING.findall(expr):
            assert set(grouping.replace(" ", "").split(",")) <= known | SCRAPED, expr
    unseen = {spec.name for spec in CATALOG} - seen
    assert unseen <= {
        "mppnode_requests_active",  # streams say more
        "mppnode_processes",
        "mppnode_metric_values_folded_total",
        "mppnode_metric_values_rejected_total",
    }, "a metric nobody looks at is a cost"
