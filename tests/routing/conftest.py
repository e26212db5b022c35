"""The real application on loopback over scripted providers."""

from __future__ import annotations

import functools

import pytest

from mppnode.chain.rpc import RpcLimits


@pytest.fixture(autouse=True)
def _patient_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries towards the chain do not wait; how often they happen stays as it is."""
    quick = functools.partial(RpcLimits, read_delay_s=0.0, receipt_poll_s=0.0)
    monkeypatch.setattr("mppnode.parts.RpcLimits", quick)
