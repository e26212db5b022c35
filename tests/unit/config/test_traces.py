"""``[traces]``: what is read of it, and what is refused by its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mppnode.config.section import Section
from mppnode.config.traces import TracesConfig, read_traces

ENVIRON = {"TOKEN": "Bearer abcdefghijkl", "LINES": "a\nb", "LONG": "x" * 4097}


def read(**values: Any) -> tuple[TracesConfig, list[str]]:
    problems: list[str] = []
    return read_traces(Section(values, "traces", problems, ENVIRON, Path())), problems


def test_everything_is_read() -> None:
    """An endpoint loses its last slash; header values are secrets from elsewhere."""
    found, problems = read(
        endpoint="https://otlp.example.com/base/", sample_permille=5, headers={"authorization": {"env": "TOKEN"}}
    )
    assert problems == []
    assert (found.endpoint, found.sample_permille) == ("https://otlp.example.com/base", 5)
    ((name, value),) = found.headers
    assert (name, value.reveal()) == ("authorization", ENVIRON["TOKEN"])
    assert ENVIRON["TOKEN"] not in repr(found)


def test_only_an_endpoint_is_needed() -> None:
    """Everything is recorded unless less is asked for."""
    assert read(endpoint="http://127.0.0.1:4318") == (TracesConfig("http://127.0.0.1:4318"), [])


def test_a_name_over_plain_http_must_be_meant() -> None:
    """As for providers: a typing error must not send traces in the clear to somebody else's machine."""
    found, problems = read(endpoint="http://collector:4318", insecure=True)
    assert (found.endpoint, problems) == ("http://collector:4318", [])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({}, "traces.endpoint"),
        ({"endpoint": 4318}, "traces.endpoint"),
        ({"endpoint": "http://collector:4318"}, "traces.endpoint"),
        ({"endpoint": "http://169.254.169.254"}, "traces.endpoint"),
        ({"endpoint": "https://user:pw@otlp.example.com"}, "traces.endpoint"),
        ({"endpoint": "https://otlp.example.com/?key=1"}, "traces.endpoint"),
        ({"sample_permille": 1001}, "traces.sample_permille"),
        ({"sample_permille": -1}, "traces.sample_permille"),
        ({"sample_permille": True}, "traces.sample_permille"),
        ({"sample": 1}, "traces.sample"),
        ({"headers": {"authorization": "Bearer written-down"}}, "traces.headers.authorization"),
        ({"headers": {"authorization": {"env": "LINES"}}}, "traces.headers.authorization"),
        ({"headers": {"authorization": {"env": "LONG"}}}, "traces.headers.authorization"),
        ({"headers": {"authorization": {"env": "UNSET"}}}, "traces.headers.authorization"),
        ({"headers": {"Content-Type": {"env": "TOKEN"}}}, "traces.headers.Content-Type"),
        ({"headers": {"content-length": {"env": "TOKEN"}}}, "traces.headers.content-length"),
        ({"headers": {"a b": {"env": "TOKEN"}}}, "traces.headers.a b"),
        ({"headers": {f"h{n}": {"env": "TOKEN"} for n in range(17)}}, "traces.headers.*"),
    ],
)
def test_what_is_wrong_is_named_by_its_key(values: dict[str, Any], key: str) -> None:
    """One problem, at the key that has it, and never with the secret in it."""
    base = {"endpoint": "https://otlp.example.com"} if values and "endpoint" not in values else {}
    _, problems = read(**{**base, **values})
    (problem,) = problems
    assert problem.startswith(f"{key}: ")
    assert "written-down" not in problem
    assert ENVIRON["TOKEN"] not in problem
