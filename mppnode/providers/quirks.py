"""In what a provider differs from others that speak the same API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Quirks:
    """Settings of an adapter; the defaults are those of an unknown OpenAI-compatible server.

    How cached tokens are reported is no setting: the names in use do not collide, so all of them are read everywhere.
    """

    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The one name under which the provider obeys a token limit."""
    include_usage: bool = True
    """Whether a stream reports usage only when asked to; some providers always do and refuse the option."""
    continuous_usage: bool = False
    """Whether usage can be had with every event (vLLM ``stream_options.continuous_usage_stats``)."""
    reasoning_added: bool = False
    """Whether reasoning tokens are reported beside ``completion_tokens`` and not inside them (xAI)."""
    cancel_stops_billing: bool = False
    """Whether closing the connection is known to stop generation and charges."""
    auth: Literal["bearer", "api-key"] = "bearer"
    """The header of the key: ``Authorization: Bearer``, or ``api-key`` as Azure wants it."""
