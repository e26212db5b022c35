"""Refusals that are not about payment. Like ``ChannelFault``: a reason, the field, and words of our own."""

from __future__ import annotations

from enum import StrEnum, unique


@unique
class NodeReason(StrEnum):
    """Why a request was refused, in order of precedence."""

    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    BODY_TOO_LARGE = "body_too_large"
    INVALID_JSON = "invalid_json"
    INVALID_FIELD = "invalid_field"
    UNKNOWN_MODEL = "unknown_model"
    NO_PROVIDER = "no_provider"
    ALL_PROVIDERS_FAILED = "all_providers_failed"
    PROVIDER_TIMEOUT = "provider_timeout"
    OVERLOADED = "overloaded"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal"


class NodeFault(Exception):
    """A refusal by the node. ``detail`` is written by us, so it may be shown and logged as it is."""

    def __init__(self, reason: NodeReason, *, field: str | None = None, detail: str = "") -> None:
        self.reason = reason
        self.field = field
        self.detail = detail
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """One sentence for people."""
        text = f"{self.field} {self.detail}".strip() if self.field else self.detail
        return text or self.reason.replace("_", " ")
