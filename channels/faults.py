"""Every reason a payment can be refused, in one enum, ordered by precedence.

When several reasons apply, the first in this order is the one reported; a reason is data, and only
``mppnode/http/problem.py`` knows which HTTP status it becomes.
"""

from __future__ import annotations

from enum import StrEnum, unique


@unique
class Reason(StrEnum):
    """Why a payment was refused. The order is the order of checks (protocol: challenge, proof, account, chain)."""

    # the credential as text
    PAYMENT_REQUIRED = "payment_required"
    MALFORMED_CREDENTIAL = "malformed_credential"
    AMBIGUOUS_CREDENTIAL = "ambiguous_credential"
    INVALID_CHALLENGE = "invalid_challenge"
    PAYMENT_EXPIRED = "payment_expired"
    INVALID_PAYLOAD = "invalid_payload"
    # what it proves
    DESCRIPTOR_MISMATCH = "descriptor_mismatch"
    SOURCE_MISMATCH = "source_mismatch"
    TRANSACTION_REJECTED = "transaction_rejected"
    INVALID_SIGNATURE = "invalid_signature"
    # the channel it names
    CHANNEL_NOT_FOUND = "channel_not_found"
    CHANNEL_FINALIZED = "channel_finalized"
    CHANNEL_BUSY = "channel_busy"
    RATE_LIMITED = "rate_limited"
    DEPOSIT_TOO_SMALL = "deposit_too_small"
    VOUCHER_EXCEEDS_DEPOSIT = "voucher_exceeds_deposit"
    VOUCHER_TOO_LOW = "voucher_too_low"
    VOUCHER_DELTA_TOO_SMALL = "voucher_delta_too_small"
    CLOSE_BELOW_SPENT = "close_below_spent"
    CREDENTIAL_USED = "credential_used"
    INSUFFICIENT_BALANCE = "insufficient_balance"
    HOLD_FENCED = "hold_fenced"
    EXPOSURE_LIMIT = "exposure_limit"
    # the world
    CHAIN_REJECTED = "chain_rejected"
    CHAIN_UNAVAILABLE = "chain_unavailable"
    CHAIN_OUTCOME_UNKNOWN = "chain_outcome_unknown"
    STORE_UNAVAILABLE = "store_unavailable"


class ChannelFault(Exception):
    """A refusal: a reason, the field it is about, and the numbers that clashed.

    Text from the peer never enters ``detail``: it is written by us, so it may be shown and logged as it is.
    """

    def __init__(
        self,
        reason: Reason,
        *,
        field: str | None = None,
        detail: str = "",
        **numbers: int,
    ) -> None:
        self.reason = reason
        self.field = field
        self.detail = detail
        self.numbers = numbers
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """One sentence for people, made only of our own words and integers."""
        subject = f"{self.field} {self.detail}".strip() if self.field else self.detail
        figures = ", ".join(f"{name}={value}" for name, value in self.numbers.items())
        text = subject or self.reason.replace("_", " ")
        return f"{text} ({figures})" if figures else text
