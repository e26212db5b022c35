"""The command a newcomer types first."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import uvloop

from mppnode.cli.demo import run_demo

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "mppnode.cli.main", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_summary_is_true_and_complete() -> None:
    """`demo --json` prints one object: a top-up, several vouchers, no stall, and books that agree to the unit."""
    result = run("demo", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = result.stdout.splitlines()
    summary = json.loads(line)
    assert summary["ok"]
    assert summary["books_agree"]
    assert summary["top_ups"] >= 1
    assert summary["vouchers"] >= 3
    assert summary["need_voucher_events"] >= 1
    assert summary["tokens"] == 480
    assert summary["stall_ms"] < 50
    assert summary["captured"] == summary["spent"] == summary["payer"]["paid"] == summary["chain"]["earned"] > 0
    assert summary["refunded"] + summary["captured"] == 6_000
    assert summary["spent"] <= summary["accepted"]


def test_it_works_without_a_terminal_and_says_so_in_words() -> None:
    """Piped, the demo prints no escape codes and ends with the three books."""
    result = run("demo")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\x1b" not in result.stdout
    assert "The three books agree." in result.stdout
    assert "voucher: up to" in result.stdout


def test_the_node_streams_on_uvloop_too(capsys: pytest.CaptureFixture[str]) -> None:
    """`serve` runs on uvloop, whose transports are not asyncio's by ancestry: the whole story must work there."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run_demo(as_json=True)) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 480


def test_help_is_instant_and_lists_the_commands() -> None:
    """`--help` names every command."""
    result = run("--help")
    assert result.returncode == 0
    for command in ("serve", "demo", "devnet", "pay"):
        assert command in result.stdout
