"""Finds the npm packages of the interop lanes, installs them once when nobody names a folder, or says why it cannot."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

HERE = Path(__file__).parent
INSTALL = ("npm", "ci", "--legacy-peer-deps", "--ignore-scripts", "--no-audit", "--no-fund")
INSTALL_S = 240


def unavailable(reason: str) -> NoReturn:
    """Skip, or fail where the lane is required."""
    if os.environ.get("REQUIRE_INTEROP") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def node_modules(needed: str) -> Path:
    """The folder that holds the npm package ``needed`` (a glob), installed into ``tests/interop`` if need be."""
    named = os.environ.get("MPPNODE_NODE_MODULES")
    modules = Path(named) if named else HERE / "node_modules"
    if not named:
        with (HERE / ".install.lock").open("w") as lock:  # test workers run side by side
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not any(modules.glob(needed)):
                _install()
    if not any(modules.glob(needed)):
        unavailable(f"there is no npm package {needed} in {modules}")
    return modules.resolve()


def _install() -> None:
    if shutil.which("npm") is None:
        unavailable("npm is not installed")
    done = subprocess.run(INSTALL, cwd=HERE, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    if done.returncode != 0:
        unavailable(f"{' '.join(INSTALL)} failed in {HERE}: {done.stderr[-300:]}")
