"""What the program logs is what the operator's manual says: every event, with its fields, and nothing else."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from mppnode.kernel.version import VERSION
from mppnode.observe.log_events import EVENTS, with_table
from mppnode.observe.log_values import NOT_SECRET, sounds_secret

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for path in ROOT.glob("mppnode/**/*.py") if path.name != "metrics.py")
KNOWN = {spec.name: spec for spec in EVENTS}
LOGS = {"log", "_log"}
AS_A_WHOLE = {"request.ended", "billing.unpaid", "request.refused"}
"""Events with fields that come as one mapping: whose bill it is, or what a refusal is known to be."""


def calls() -> list[tuple[str, ast.Call]]:
    """Every call of a log in the program."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                if name in LOGS and "section" not in ast.unparse(node.args[0]):
                    found.append((where, node))
    return found


CALLS = calls()


def events_of(call: ast.Call) -> list[str]:
    """The names a call can have: constants, or a choice between constants."""
    first = call.args[0]
    choices = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
    assert all(isinstance(each, ast.Constant) for each in choices), ast.unparse(call)
    return [str(each.value) for each in choices if isinstance(each, ast.Constant)]


@pytest.mark.parametrize(("where", "call"), CALLS, ids=[where for where, _ in CALLS])
def test_a_call_of_the_log_uses_a_known_event_and_its_fields(where: str, call: ast.Call) -> None:
    """No event and no field is written that the manual does not have."""
    for event in events_of(call):
        assert event in KNOWN, f"{where} writes {event}"
        for keyword in call.keywords:
            if keyword.arg is None:
                assert event in AS_A_WHOLE, f"{where} gives {event} a mapping"
            elif keyword.arg != "level":
                assert keyword.arg in KNOWN[event].fields, f"{where} gives {event} a field {keyword.arg}"


def test_every_known_event_is_written_somewhere() -> None:
    """The manual has no event that nobody writes, and none twice."""
    written = {event for _, call in CALLS for event in events_of(call)} | {"log.dropped"}
    assert written == set(KNOWN)
    assert len(KNOWN) == len(EVENTS)


def test_every_field_of_a_known_event_is_written_somewhere() -> None:
    """The manual has no field that nobody writes, but for those that come as a mapping."""
    given: dict[str, set[str]] = {name: set() for name in KNOWN}
    for _, call in CALLS:
        for event in events_of(call):
            given[event] |= {keyword.arg for keyword in call.keywords if keyword.arg} - {"level"}
    for name, fields in given.items():
        if name not in AS_A_WHOLE and name != "log.dropped":
            assert set(KNOWN[name].fields) == fields, name


def test_the_manual_has_every_event_as_it_is() -> None:
    """docs/logs.md is what ``python -m mppnode.observe.log_events docs/logs.md`` writes."""
    text = (ROOT / "docs/logs.md").read_text(encoding="utf-8")
    assert with_table(text) == text


def test_fields_that_sound_secret_are_few_and_known() -> None:
    """A field whose name sounds like a secret's shows no text, so none is used but the id of an API key."""
    sounding = {(spec.name, name) for spec in EVENTS for name in spec.fields if sounds_secret(name)}
    assert sounding == {("request.ended", "key")}
    assert {"token_source"} == NOT_SECRET


def test_the_version_in_the_log_is_the_packages() -> None:
    """``node.started`` tells the version that was built."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
