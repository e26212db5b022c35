"""``shop`` opens stores; a test names the kinds it is for with ``pytest.mark.parametrize("shop", ..., indirect=True)``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.store.shops import Shop, open_shop


@pytest.fixture
async def shop(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Shop]:
    async with open_shop(request.param, tmp_path) as shop:
        yield shop
