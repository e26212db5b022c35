"""Starts the reference client, next to its npm packages."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.interop.mppx.rig import ReferenceClient
from tests.interop.packages import node_modules, unavailable

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenario next to its packages: Node resolves imports from where a file is, and ignores NODE_PATH for modules."""
    if shutil.which("node") is None:
        unavailable("node is not installed")
    modules = node_modules("mppx")
    place = tmp_path_factory.mktemp("mppx")
    (place / "node_modules").symlink_to(modules, target_is_directory=True)
    return Path(shutil.copy(HERE / "scenario.mjs", place))


@pytest.fixture
async def payer(script: Path) -> AsyncIterator[ReferenceClient]:
    """The reference client in a process of its own."""
    async with ReferenceClient.running(script) as client:
        yield client
