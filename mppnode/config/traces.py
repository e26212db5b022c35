"""Reads ``[traces]``: who is sent what became of requests, as OpenTelemetry spans."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from mppnode.config.secrets import Secret
from mppnode.config.section import Section, flag_of, text_of
from mppnode.config.urls import check_base_url

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)
_VALUE: Final = re.compile(r"[!-~](?:[ -~]{0,4094}[!-~])?", re.ASCII)
_HEADERS_MAX: Final = 16
_OURS: Final = frozenset(
    {"connection", "content-encoding", "content-length", "content-type", "host", "transfer-encoding", "user-agent"}
)


@dataclass(frozen=True, slots=True)
class TracesConfig:
    """``[traces]``."""

    endpoint: str
    """Of an OTLP receiver over HTTP, without ``/v1/traces``."""
    sample_permille: int = 1000
    """Of all traces, how many are recorded."""
    headers: tuple[tuple[str, Secret[str]], ...] = ()
    insecure: bool = False
    """Whether plain http to a host that is not a private address is meant."""


def read_traces(section: Section) -> TracesConfig:
    """The ``[traces]`` table; problems are noted in the section."""
    insecure = section.get("insecure", flag_of, default=False, fallback=False)

    def endpoint(value: Any) -> str:
        return check_base_url(text_of(value), insecure=insecure)

    config = TracesConfig(
        endpoint=section.get("endpoint", endpoint, fallback=""),
        sample_permille=section.whole("sample_permille", 0, 1000, 1000),
        headers=_headers(section.section("headers", optional=True)),
        insecure=insecure,
    )
    section.done()
    return config


def _headers(section: Section) -> tuple[tuple[str, Secret[str]], ...]:
    if len(section.values) > _HEADERS_MAX:
        section.problem("*", f"must be at most {_HEADERS_MAX} headers")
    found = []
    for name in section.values:
        if _NAME.fullmatch(name) is None or name in _OURS:
            section.problem(name, "must be the name of a header in lower case, and not one the node sets itself")
        value = section.secret(name, _value)
        if value is not None:
            found.append((name, value))
    return tuple(found)


def _value(text: str) -> Secret[str]:
    if _VALUE.fullmatch(text) is None:
        raise ValueError("must be visible ASCII of at most 4096 characters")
    return Secret(text)
