"""What the manuals tell a person at night is so: their commands parse, and their events, settings and pages exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mppnode.cli.main import _parser
from mppnode.observe.log_events import EVENTS
from tests.deploy.files import ROOT

MANUALS = [ROOT / "docs" / f"{name}.md" for name in ("runbooks", "operations", "production", "doctor")]
SPANS = {path.stem: re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)) for path in MANUALS}
BLOCKS = {path.stem: re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL) for path in MANUALS}
EXAMPLE = (ROOT / "docs/mppnode.example.toml").read_text()
KNOWN = {spec.name for spec in EVENTS}


def commands() -> list[tuple[str, str]]:
    """Every command of ours in the text and in code blocks; optional parts are left out, of choices the first is taken."""
    found = []
    for name, spans in SPANS.items():
        lines = [" ".join(span.split()) for span in spans]
        lines += [line.partition(" #")[0] for block in BLOCKS[name] for line in block.splitlines()]
        for line in lines:
            if line.startswith("mppnode ") and "..." not in line.replace("CHANNEL ...", ""):
                plain = re.sub(r"\[[^\]]*\]", "", line)
                plain = re.sub(r"\(([^|)]*)\|[^)]*\)", r"\1", plain).replace("CHANNEL ...", "CHANNEL")
                found.append((name, " ".join(plain.split())))
    return sorted(set(found))


def settings() -> set[str]:
    """Every ``table.key`` of the example, where every key is."""
    table, found = "", set[str]()
    for line in EXAMPLE.splitlines():
        if head := re.match(r"#?\s*\[\[?([a-z.]+)\]\]?", line):
            table = head[1]
            found.add(table)
        elif key := re.match(r"#?\s*([a-z][a-z0-9_]*) = ", line):
            found.add(f"{table}.{key[1]}")
    return found


@pytest.mark.parametrize(("manual", "command"), commands())
def test_a_command_can_be_typed(manual: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One with arguments parses as it stands; one that is only named exists."""
    words = shlex.split(command)[1:]
    if any(word.startswith("-") for word in words):
        _parser().parse_args(words)
        return
    with pytest.raises(SystemExit) as left:
        _parser().parse_args([*words, "--help"])
    assert left.value.code == 0, (manual, capsys.readouterr().err)


def test_there_are_commands_to_look_at() -> None:
    """The reader of the manuals finds them: an empty list would prove nothing."""
    assert {manual for manual, _ in commands()} == {"runbooks", "operations", "doctor"}
    assert len(commands()) > 30
    assert "treasury.settle_age_s" in settings()


@pytest.mark.parametrize("manual", sorted(SPANS))
def test_an_event_or_setting_it_names_exists(manual: str) -> None:
    """A dotted name in backticks is an event of the log or a key of the configuration."""
    known = KNOWN | settings()
    for span in SPANS[manual]:
        if re.fullmatch(r"[a-z]+\.[a-z][a-z_]+", span) and Path(span).suffix not in {".md", ".toml", ".conf", ".yml"}:
            assert span in known, f"{manual} names {span}"


def test_a_runbook_names_settings_that_exist() -> None:
    """Also by their last word alone."""
    keys = {setting.rpartition(".")[2] for setting in settings()}
    words = {span for span in SPANS["runbooks"] if re.fullmatch(r"[a-z]+_[a-z_]+", span)}
    assert words <= keys | {"invalid_signature", "voucher_exceeds_deposit"}, words - keys
