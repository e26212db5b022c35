"""Reads ``[log]``: how much is told, and how it is written."""

from __future__ import annotations

import re
from typing import Any, Final

from mppnode.config.schema import LogConfig, LogFormat
from mppnode.config.section import Section

LEVELS: Final = ("debug", "info", "warning", "error")
_ROOM: Final = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)


def read_log(section: Section) -> LogConfig:
    """The ``[log]`` table; problems are noted in the section."""

    def form(value: Any) -> LogFormat:
        try:
            return LogFormat(value)
        except ValueError:
            raise ValueError('must be "auto", "json" or "text"') from None

    rooms = section.section("levels", optional=True)
    for name in rooms.values:
        if _ROOM.fullmatch(name) is None:
            rooms.problem(name, "must be the first word of an event, such as channel")
    config = LogConfig(
        level=section.get("level", _level, "info", fallback="info"),
        format=section.get("format", form, LogFormat.AUTO, fallback=LogFormat.AUTO),
        levels=tuple((name, rooms.get(name, _level, fallback="info")) for name in rooms.values),
    )
    section.done()
    return config


def _level(value: Any) -> str:
    if value not in LEVELS:
        raise ValueError("must be one of " + ", ".join(LEVELS))
    return str(value)
