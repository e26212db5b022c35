"""Refusals and failures that are not about payment; those are ``channels.faults``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum, unique


@unique
class NodeReason(StrEnum):
    """Why a request was not served. The order is the order in which a request meets these checks."""

    # what was asked
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    BODY_TOO_LARGE = "body_too_large"
    INVALID_JSON = "invalid_json"
    INVALID_FIELD = "invalid_field"
    UNKNOWN_MODEL = "unknown_model"
    # who asks, and what they may
    INVALID_KEY = "invalid_api_key"
    KEY_REVOKED = "api_key_revoked"
    KEY_ROTATED = "api_key_rotated"
    KEY_EXPIRED = "api_key_expired"
    INVALID_TOKEN = "invalid_token"  # noqa: S105 - a reason
    TOKEN_EXPIRED = "token_expired"  # noqa: S105 - a reason
    IDENTITY_UNAVAILABLE = "identity_unavailable"
    BILLING_UNAVAILABLE = "billing_unavailable"
    ACCOUNT_FORBIDDEN = "account_forbidden"
    ACCOUNT_SUSPENDED = "account_suspended"
    MODEL_FORBIDDEN = "model_forbidden"
    LIMIT_REACHED = "limit_reached"
    CAP_REACHED = "cap_reached"
    CREDIT_TOO_LOW = "insufficient_credit"
    REQUEST_RUNNING = "request_in_progress"
    OTHER_REQUEST = "idempotency_mismatch"
    CONFLICT = "conflict"
    # whether we can take it now
    SHUTTING_DOWN = "shutting_down"
    OVERLOADED = "overloaded"
    NO_PROVIDER = "no_provider"
    # what became of it
    PROVIDERS_BUSY = "providers_busy"
    PROVIDER_TIMEOUT = "provider_timeout"
    ALL_PROVIDERS_FAILED = "all_providers_failed"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One provider that was tried and what it did, in our own words: never its error text, which may hold keys."""

    provider: str
    kind: str
    status: int | None = None


class NodeFault(Exception):
    """A refusal: a reason, the field it is about, and what was tried.

    ``excluded`` counts the providers that were not tried, by reason; ``lowest`` is the cheapest input and output price
    that only a ceiling kept out, in pico-dollars per token. Text from a peer never enters ``detail``: it is written by
    us, so it may be shown and logged as it is.
    """

    def __init__(
        self,
        reason: NodeReason,
        *,
        field: str | None = None,
        detail: str = "",
        retry_after_s: int | None = None,
        attempts: tuple[Attempt, ...] = (),
        excluded: Mapping[str, int] | None = None,
        lowest: tuple[int, int] | None = None,
        more: Mapping[str, str | int | None] | None = None,
        limit: str | None = None,
    ) -> None:
        self.reason = reason
        self.field = field
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.attempts = attempts
        self.excluded = excluded
        self.lowest = lowest
        self.more = more
        self.limit = limit
        """Which limit was reached, for metrics."""
        self.headers: Mapping[str, str] = {}
        """Headers the answer carries beside those every refusal has."""
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """One sentence for people, made only of our own words."""
        subject = f"{self.field} {self.detail}".strip() if self.field else self.detail
        return subject or self.reason.replace("_", " ")
