"""Lint and types are tests: one command tells everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_ruff_is_clean() -> None:
    """Every rule of the configuration holds everywhere."""
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_mypy_strict_is_clean(tmp_path: Path) -> None:
    """The library and the node type-check under --strict."""
    run = subprocess.run(
        [sys.executable, "-m", "mypy", f"--cache-dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("module", ["channels.account", "channels.payer.session", "mppnode.payer.client", "mppnode.cli.main", "mppnode.app"])
def test_modules_import_alone(module: str) -> None:
    """Each entry point imports in a fresh interpreter with warnings as errors."""
    run = subprocess.run([sys.executable, "-W", "error", "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr


def test_the_hot_path_pulls_in_no_heavy_package() -> None:
    """Starting a node imports no web3 and nothing of its kind: they cost seconds and megabytes."""
    code = "import sys, mppnode.app; print([m for m in ('web3', 'eth_account', 'pytempo', 'eth_abi', 'hypothesis') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.stdout.strip() == "[]"
