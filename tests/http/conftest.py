"""The real application on loopback, with a manual clock: nothing happens by time unless a test says so."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator

import pytest

from mppnode.chain.rpc import RpcLimits
from tests.support.http_client import World, new_world


@pytest.fixture(autouse=True)
def _patient_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries towards the chain do not wait; how often they happen stays as it is."""
    quick = functools.partial(RpcLimits, read_delay_s=0.0, receipt_poll_s=0.0)
    monkeypatch.setattr("mppnode.parts.RpcLimits", quick)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A network whose node must not have made a mistake by the end of the test."""
    async with new_world() as world:
        yield world
        assert world.log.bugs == []
