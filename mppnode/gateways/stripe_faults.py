"""The one way a call to Stripe fails. Nothing Stripe wrote is repeated but codes of a fixed alphabet."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any, Final

_CODE: Final = re.compile(r"[a-z0-9_]{1,64}", re.ASCII)
_OBJECT: Final = re.compile(r"pi_[A-Za-z0-9_]{1,250}", re.ASCII)


class StripeFaultKind(StrEnum):
    """What the caller may conclude, and so what it may do next."""

    UNREACHABLE = "unreachable"
    """Nothing was done. Try again later, with the same key."""
    REFUSED = "refused"
    """Stripe does not accept this node's key, or not for this. An operator must look."""
    DECLINED = "declined"
    """The bank said no. Asking again with the same key answers the same."""
    INVALID = "invalid"
    """Stripe does not take the request as it is. Repeating it cannot help."""
    OUTCOME_UNKNOWN = "outcome_unknown"
    """It may have been done. Repeat with the same key within a day, or list what is there; never use a new key."""


class StripeFault(Exception):
    """A call to Stripe did not end well; ``kind`` says what that means for the money."""

    def __init__(
        self,
        kind: StripeFaultKind,
        code: str,
        *,
        decline_code: str | None = None,
        payment: str | None = None,
    ) -> None:
        super().__init__(f"Stripe: {kind} ({code}{f', {decline_code}' if decline_code else ''})")
        self.kind = kind
        self.code = code
        self.decline_code = decline_code
        self.payment = payment
        """The PaymentIntent that failed, where Stripe names it."""


def safe_code(value: Any) -> str | None:
    """``value`` if it is a code as Stripe writes them; error texts can hold e-mail addresses and ends of keys."""
    return value if isinstance(value, str) and _CODE.fullmatch(value) else None


def safe_payment(value: Any) -> str | None:
    """``value`` if it is the id of a PaymentIntent."""
    return value if isinstance(value, str) and _OBJECT.fullmatch(value) else None
