"""Problem types (RFC 9457) for every reason a payment is refused, without statuses: only the HTTP layer knows those.

Several reasons share a type, because payers act on the registered types and would not know finer ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from channels.faults import Reason

TYPE_BASE: Final = "https://paymentauth.org/problems/"


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem type: the end of its URI and its fixed title."""

    slug: str
    title: str

    @property
    def type_uri(self) -> str:
        """The ``type`` member of the problem document."""
        return TYPE_BASE + self.slug


_VERIFICATION = Problem("verification-failed", "Payment Verification Failed")
_MALFORMED = Problem("malformed-credential", "Malformed Credential")
_INTERNAL = Problem("internal-payment-error", "Internal Payment Error")
_REQUEST = Problem("bad-request", "Bad Request")

PROBLEMS: Final[Mapping[Reason, Problem]] = MappingProxyType(
    {
        Reason.PAYMENT_REQUIRED: Problem("payment-required", "Payment Required"),
        Reason.MALFORMED_CREDENTIAL: _MALFORMED,
        Reason.AMBIGUOUS_CREDENTIAL: _MALFORMED,
        Reason.INVALID_CHALLENGE: Problem("invalid-challenge", "Invalid Challenge"),
        Reason.PAYMENT_EXPIRED: Problem("payment-expired", "Payment Expired"),
        Reason.INVALID_PAYLOAD: Problem("invalid-payload", "Invalid Payload"),
        Reason.DESCRIPTOR_MISMATCH: _VERIFICATION,
        Reason.SOURCE_MISMATCH: _VERIFICATION,
        Reason.TRANSACTION_REJECTED: _VERIFICATION,
        Reason.INVALID_SIGNATURE: Problem("session/invalid-signature", "Invalid Signature"),
        Reason.CHANNEL_NOT_FOUND: Problem("session/channel-not-found", "Channel Not Found"),
        Reason.CHANNEL_FINALIZED: Problem("session/channel-finalized", "Channel Finalized"),
        Reason.CHANNEL_BUSY: _VERIFICATION,
        Reason.RATE_LIMITED: _REQUEST,
        Reason.DEPOSIT_TOO_SMALL: _VERIFICATION,
        Reason.VOUCHER_EXCEEDS_DEPOSIT: Problem("session/amount-exceeds-deposit", "Amount Exceeds Deposit"),
        Reason.VOUCHER_TOO_LOW: _VERIFICATION,
        Reason.VOUCHER_DELTA_TOO_SMALL: Problem("session/delta-too-small", "Voucher Delta Too Small"),
        Reason.CLOSE_BELOW_SPENT: _VERIFICATION,
        Reason.CREDENTIAL_USED: _VERIFICATION,
        Reason.INSUFFICIENT_BALANCE: Problem("session/insufficient-balance", "Insufficient Balance"),
        Reason.HOLD_FENCED: _INTERNAL,
        Reason.EXPOSURE_LIMIT: _INTERNAL,
        Reason.CHAIN_REJECTED: _VERIFICATION,
        Reason.CHAIN_UNAVAILABLE: _INTERNAL,
        Reason.CHAIN_OUTCOME_UNKNOWN: _INTERNAL,
        Reason.STORE_UNAVAILABLE: _INTERNAL,
    }
)
"""Total over :class:`Reason`; a test fails when a reason is added without a row."""
