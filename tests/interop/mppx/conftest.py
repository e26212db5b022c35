"""Finds the reference client's npm packages, or says why its tests cannot run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.interop.mppx.rig import ReferenceClient

HERE = Path(__file__).parent
INSTALL = ("npm", "ci", "--legacy-peer-deps", "--ignore-scripts", "--no-audit", "--no-fund")
INSTALL_S = 240


def unavailable(reason: str) -> None:
    """Skip, or fail where the tests are required."""
    if os.environ.get("REQUIRE_INTEROP") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def node_modules() -> Path:
    """The folder with the packages, installed into ``tests/interop`` when nobody names another one."""
    named = os.environ.get("MPPNODE_NODE_MODULES")
    modules = Path(named) if named else HERE.parent / "node_modules"
    if not (modules / "mppx").is_dir() and not named:
        if shutil.which("npm") is None:
            unavailable("npm is not installed")
        done = subprocess.run(INSTALL, cwd=HERE.parent, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        if done.returncode != 0:
            unavailable(f"{' '.join(INSTALL)} failed in {HERE.parent}: {done.stderr[-300:]}")
    if not (modules / "mppx").is_dir():
        unavailable(f"there is no npm package mppx in {modules}")
    return modules.resolve()


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenario next to its packages: Node resolves imports from where a file is, and ignores NODE_PATH for modules."""
    if shutil.which("node") is None:
        unavailable("node is not installed")
    modules = node_modules()
    place = tmp_path_factory.mktemp("mppx")
    (place / "node_modules").symlink_to(modules, target_is_directory=True)
    return Path(shutil.copy(HERE / "scenario.mjs", place))


@pytest.fixture
async def payer(script: Path) -> AsyncIterator[ReferenceClient]:
    """The reference client in a process of its own."""
    async with ReferenceClient.running(script) as client:
        yield client
