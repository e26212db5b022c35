"""Reads ``[metrics]``: the listener for operators and their machines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mppnode.config.section import Section

_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,253}", re.ASCII)


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """``[metrics]``: where ``/metrics``, ``/healthz`` and ``/readyz`` are served without a token."""

    host: str = "127.0.0.1"
    port: int = 8404
    folder: Path | None = None
    """Where workers leave what they have counted for each other, and a node for itself after a restart."""


def read_metrics(section: Section) -> MetricsConfig:
    """The ``[metrics]`` table; problems are noted in the section."""
    base = MetricsConfig()
    config = MetricsConfig(
        host=section.text("host", _HOST, base.host, base.host),
        port=section.whole("port", 0, 65_535, base.port),
        folder=section.get("folder", lambda value: section.base / _path(value), None, fallback=None),
    )
    section.done()
    return config


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a path")
    return value
