"""Metrics as text: the Prometheus format 0.0.4, or OpenMetrics 1.0 for who asks for it.

Rendering takes tens of milliseconds when every series is there: do it in a thread, or streams wait for a scrape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

TEXT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""prometheus.io/docs/instrumenting/exposition_formats, basic info of the text-based format."""
OPENMETRICS_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
BODY_BYTES_MAX: Final = 4 << 20
"""Ten times the largest page of the budgeted series; Prometheus scrapers set limits of about this size."""
_ACCEPT_MAX: Final = 1_024  # characters; Prometheus sends about 300
_OPENMETRICS: Final = "application/openmetrics-text"
_OPENMETRICS_VERSIONS: Final = ("", "0.0.1", "1.0.0")
_WEIGHT_MAX: Final = 1_000
_TEXT: Final = ("text/plain", "text/*", "*/*")


class PageTooLarge(Exception):
    """Something registered more series than a page may have."""


@dataclass(frozen=True, slots=True)
class Page:
    """One answer to a scrape."""

    content_type: str
    body: bytes


def render(registry: CollectorRegistry, accept: str = "") -> Page:
    """All metrics of ``registry`` in the format an ``Accept`` header prefers; in doubt 0.0.4, which everybody reads.

    Raises:
        PageTooLarge: above ``BODY_BYTES_MAX``.
    """
    if prefers_openmetrics(accept):
        page = Page(OPENMETRICS_TYPE, generate_openmetrics(registry))  # type: ignore[no-untyped-call]
    else:
        page = Page(TEXT_TYPE, generate_latest(registry))
    if len(page.body) > BODY_BYTES_MAX:
        raise PageTooLarge(f"the metrics take {len(page.body)} bytes")
    return page


def prefers_openmetrics(accept: str) -> bool:
    """Whether an ``Accept`` header wants OpenMetrics at least as much as plain text (RFC 9110, section 12.5.1).

    The client library takes the first name it knows, whatever its weight: a scraper that says ``q=0`` gets it too.
    """
    best_open = best_text = 0
    for item in accept[:_ACCEPT_MAX].lower().split(","):
        kind, *rest = (part.strip() for part in item.split(";"))
        named = dict(part.partition("=")[::2] for part in rest)
        weight = _per_mille(named.get("q", "1"))
        if kind == _OPENMETRICS and named.get("version", "").strip('"') in _OPENMETRICS_VERSIONS:
            best_open = max(best_open, weight)
        elif kind in _TEXT:
            best_text = max(best_text, weight)
    return best_open > 0 and best_open >= best_text


def _per_mille(text: str) -> int:
    """A weight of RFC 9110, in thousandths; nothing for what is none."""
    whole, _, fraction = text.partition(".")
    if whole not in ("0", "1") or len(fraction) > 3 or not (fraction + "0").isdecimal() or not fraction.isascii():  # noqa: PLR2004
        return 0
    weight = int(whole) * 1000 + int(fraction.ljust(3, "0"))
    return weight if weight <= _WEIGHT_MAX else 0
