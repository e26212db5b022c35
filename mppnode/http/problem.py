"""The one table from reasons to HTTP statuses, and the one body shape for every refusal.

Payment refusals are RFC 9457 problems with the types of the payment drafts; they also carry OpenAI's ``error`` member,
because that is what SDKs show. Everything else is an OpenAI error alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import orjson

from channels.faults import ChannelFault, Reason
from channels.units import Pico
from channels.wire.problems import PROBLEMS
from mppnode.engine.attempts import refused_as_asked
from mppnode.http.disclosure import cents
from mppnode.kernel.faults import NodeFault, NodeReason

STATUS: Final[Mapping[Reason | NodeReason, int]] = MappingProxyType(
    {
        Reason.PAYMENT_REQUIRED: 402,
        Reason.MALFORMED_CREDENTIAL: 402,
        Reason.AMBIGUOUS_CREDENTIAL: 400,
        Reason.INVALID_CHALLENGE: 402,
        Reason.PAYMENT_EXPIRED: 402,
        Reason.INVALID_PAYLOAD: 402,
        Reason.DESCRIPTOR_MISMATCH: 402,
        Reason.SOURCE_MISMATCH: 402,
        Reason.TRANSACTION_REJECTED: 402,
        Reason.INVALID_SIGNATURE: 402,
        # 410 makes the reference client forget a stored channel and open another one
        Reason.CHANNEL_NOT_FOUND: 410,
        Reason.CHANNEL_FINALIZED: 410,
        Reason.CHANNEL_BUSY: 409,
        Reason.RATE_LIMITED: 429,
        Reason.DEPOSIT_TOO_SMALL: 402,
        Reason.VOUCHER_EXCEEDS_DEPOSIT: 402,
        Reason.VOUCHER_TOO_LOW: 402,
        Reason.VOUCHER_DELTA_TOO_SMALL: 402,
        Reason.CLOSE_BELOW_SPENT: 402,
        Reason.CREDENTIAL_USED: 402,
        Reason.INSUFFICIENT_BALANCE: 402,
        Reason.HOLD_FENCED: 409,
        Reason.EXPOSURE_LIMIT: 503,
        Reason.CHAIN_REJECTED: 402,
        # never 402 where money may have moved: the client would pay again
        Reason.CHAIN_UNAVAILABLE: 503,
        Reason.CHAIN_OUTCOME_UNKNOWN: 503,
        Reason.STORE_UNAVAILABLE: 503,
        NodeReason.NOT_FOUND: 404,
        NodeReason.METHOD_NOT_ALLOWED: 405,
        NodeReason.UNSUPPORTED_MEDIA_TYPE: 415,
        NodeReason.BODY_TOO_LARGE: 413,
        NodeReason.INVALID_JSON: 400,
        NodeReason.INVALID_FIELD: 400,
        NodeReason.UNKNOWN_MODEL: 404,
        NodeReason.INVALID_KEY: 401,
        NodeReason.KEY_REVOKED: 403,
        NodeReason.KEY_ROTATED: 401,
        NodeReason.KEY_EXPIRED: 401,
        NodeReason.INVALID_TOKEN: 401,
        NodeReason.TOKEN_EXPIRED: 401,
        # an outage of whoever vouches for the caller is never told as an unknown caller
        NodeReason.IDENTITY_UNAVAILABLE: 503,
        NodeReason.BILLING_UNAVAILABLE: 503,
        NodeReason.ACCOUNT_FORBIDDEN: 403,
        NodeReason.ACCOUNT_SUSPENDED: 403,
        NodeReason.MODEL_FORBIDDEN: 403,
        NodeReason.LIMIT_REACHED: 429,
        # never 402, which asks for money: paying more does not raise a cap the customer has set
        NodeReason.CAP_REACHED: 403,
        NodeReason.CREDIT_TOO_LOW: 402,
        NodeReason.REQUEST_RUNNING: 409,
        NodeReason.OTHER_REQUEST: 422,
        NodeReason.CONFLICT: 409,
        NodeReason.SHUTTING_DOWN: 503,
        NodeReason.OVERLOADED: 503,
        NodeReason.NO_PROVIDER: 503,
        NodeReason.PROVIDERS_BUSY: 429,
        NodeReason.PROVIDER_TIMEOUT: 504,
        NodeReason.ALL_PROVIDERS_FAILED: 502,
        NodeReason.INTERNAL: 500,
    }
)

_RETRY_AFTER_S: Final[Mapping[Reason | NodeReason, int]] = MappingProxyType(
    {
        Reason.RATE_LIMITED: 1,
        Reason.CHAIN_UNAVAILABLE: 2,
        Reason.CHAIN_OUTCOME_UNKNOWN: 5,
        Reason.STORE_UNAVAILABLE: 2,
        Reason.EXPOSURE_LIMIT: 10,
        NodeReason.IDENTITY_UNAVAILABLE: 5,
        NodeReason.BILLING_UNAVAILABLE: 5,
    }
)
_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {400: "invalid_request_error", 402: "payment_required", 404: "not_found_error", 429: "rate_limit_error"}
)
_SERVER_ERROR: Final = 500


def retry_headers(fault: ChannelFault | NodeFault) -> dict[str, str]:
    """When to come back, in the headers both OpenAI SDKs read; and for refusals a retry cannot mend, not to."""
    after = _RETRY_AFTER_S.get(fault.reason)
    if isinstance(fault, NodeFault) and fault.retry_after_s is not None:
        after = fault.retry_after_s
    more = dict(fault.headers) if isinstance(fault, NodeFault) else {}
    if after is not None:
        return {"Retry-After": str(after), "retry-after-ms": str(after * 1000), **more}
    final = STATUS[fault.reason] < _SERVER_ERROR or refused_as_asked(fault)
    return {"x-should-retry": "false", **more} if final else more


def openai_error(fault: ChannelFault | NodeFault) -> dict[str, object]:
    """The ``error`` member OpenAI clients expect."""
    status = STATUS[fault.reason]
    error: dict[str, object] = {
        "message": fault.message,
        "type": _TYPES.get(status, "invalid_request_error" if status < _SERVER_ERROR else "server_error"),
        "param": fault.field,
        "code": fault.reason.value,
    }
    if isinstance(fault, NodeFault) and fault.attempts:
        error["attempts"] = [
            {"provider": attempt.provider, "kind": attempt.kind, "status": attempt.status} for attempt in fault.attempts
        ]
    if isinstance(fault, NodeFault) and fault.excluded:
        error["excluded_by"] = dict(fault.excluded)
    if isinstance(fault, NodeFault) and fault.more is not None:
        error |= fault.more
    if isinstance(fault, NodeFault) and fault.lowest is not None:
        paid_in, paid_out = (cents(Pico(rate)) for rate in fault.lowest)
        error["lowest_price"] = {"input_cents_per_million": paid_in, "output_cents_per_million": paid_out}
    return error


def error_body(fault: NodeFault) -> bytes:
    """The body of a refusal that is not about payment."""
    return openai_error_body(fault)


def openai_error_body(fault: ChannelFault | NodeFault) -> bytes:
    """A refusal as OpenAI's SDKs read it, and nothing else: for callers who do not pay by challenge."""
    return orjson.dumps({"error": openai_error(fault)})


def problem_body(fault: ChannelFault, *, challenge_id: str | None) -> bytes:
    """The problem document of a payment refusal. Source: RFC 9457; draft-httpauth-payment, problem types."""
    problem = PROBLEMS[fault.reason]
    body: dict[str, object] = {
        "type": problem.type_uri,
        "title": problem.title,
        "status": STATUS[fault.reason],
        "detail": fault.message,
    }
    if challenge_id is not None:
        body["challengeId"] = challenge_id
    if fault.field is not None:
        body["field"] = fault.field
    if fault.numbers:
        body["details"] = {name: str(value) for name, value in fault.numbers.items()}
    body["error"] = openai_error(fault)
    return orjson.dumps(body)
