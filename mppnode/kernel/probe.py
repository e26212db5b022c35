"""Named moments of a node's life, so that a test can end the process at exactly one of them.

Every write to disk, every byte to the chain and every frame to a client has a point before and a point after it. In
production nobody listens; the call costs tens of nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Probe: TypeAlias = Callable[[str], None]
"""Told the name of the point that was reached; what it does there is its own affair."""


def unwatched(point: str) -> None:
    """Stand in for a probe: nobody listens."""
