"""``[traces]``: what is read of it, and what is refused by its key."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mppnode.config.load import parse_config
from mppnode.config.section import Section
from mppnode.config.traces import TracesConfig, read_traces

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "mppnode.example.toml"
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


def test_the_example_shows_the_whole_table() -> None:
    """Uncommented, it loads with the whole file, has every key there is, and shows the defaults."""
    before, mark, after = EXAMPLE.read_text().partition("#   [traces]\n")
    table, _, rest = after.partition("\n\n")
    shown = "\n".join(line.removeprefix("#   ") for line in (mark + table).splitlines())
    environ = {
        "MPPNODE_CHALLENGE_SECRET": "c" * 40,
        "MPPNODE_PAYEE_KEY": "0x" + "22" * 32,
        "MY_VLLM_KEY": "k" * 20,
        "OTLP_AUTHORIZATION": ENVIRON["TOKEN"],
    }
    tree = tomllib.loads(f"{before}{shown}\n\n{rest}")
    found = parse_config(tree, environ, base=EXAMPLE.parent).traces
    assert set(tree["traces"]) == {field.name for field in fields(TracesConfig)}
    assert found is not None
    assert found.headers[0][1].reveal() == ENVIRON["TOKEN"]
    assert found == TracesConfig("http://127.0.0.1:4318", headers=found.headers)
    del tree["traces"]
    assert parse_config(tree, environ, base=EXAMPLE.parent).traces is None
