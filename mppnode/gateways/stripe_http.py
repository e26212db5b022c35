"""How the ``stripe`` package's requests travel: over the node's own aiohttp session, with bounds and one kind of fault.

The package's own aiohttp client is not used: it reads answers without a limit and outside its error handling, follows
redirects, sleeps and draws random numbers by itself, and reports on the machine it runs on. Its async requests are kept
(no threads: a slow Stripe must not fill the pool others share), its errors are not: an answer other than success is
made a :class:`StripeFault` here, so that no body of Stripe's reaches an exception or a log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

import aiohttp
import stripe

from mppnode.gateways.stripe_faults import StripeFault, StripeFaultKind, safe_code, safe_payment
from mppnode.kernel.faults import NodeFault
from mppnode.kernel.strict_input import parse_object
from mppnode.observe.logs import Level, Log

REPLAYED: Final = "Idempotent-Replayed"
"""The header with which Stripe says that an answer is the saved one of an earlier request with the same key."""
DUPLICATE_METER_EVENT: Final = "duplicate_meter_event"
# Seen with and without the code; a duplicate that is taken for a mistake would stop an outbox for good.
_DUPLICATE_TEXT: Final = "An event already exists with identifier"
_SHOULD_RETRY: Final = "Stripe-Should-Retry"
_KEPT: Final = ("Request-Id", REPLAYED)
# Machine, operating system and timings of earlier calls: nothing Stripe needs to do what it is asked.
_UNSENT: Final = frozenset({"x-stripe-client-user-agent", "x-stripe-client-telemetry"})
_OK: Final = range(200, 300)
_TOO_MANY: Final = 429
_CONFLICT: Final = 409
_BROKEN: Final = 500


@dataclass(frozen=True)
class StripeLimits:
    """Bounds of one call; the JSON ones are of one answer."""

    timeout_s: float = 20.0  # a card network answers within ten, and a customer waits no longer
    connect_s: float = 5.0
    attempts: int = 3
    delay_ms: int = 500  # before the second attempt; it doubles after each
    body_bytes: int = 4 << 20  # a page of 100 PaymentIntents is half a megabyte
    depth: int = 64
    keys: int = 200_000
    pages: int = 100  # of 100 objects: a period with more must be asked for in parts


class StripeHttp(stripe.HTTPClient):
    """Sends one request until it has an answer or may not be sent again. Raises :class:`StripeFault`, only that."""

    name: ClassVar[str] = "mppnode"

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        limits: StripeLimits,
        below: Callable[[int], int],
        sleep: Callable[[float], Awaitable[None]],
        log: Log,
        on_call: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``on_call`` hears how each attempt ended: ``ok``, or the kind of its fault."""
        super().__init__()
        self._on_call = on_call
        self._session = session
        self._limits = limits
        self._below = below
        self._sleep = sleep
        self._log = log
        self._timeout = aiohttp.ClientTimeout(total=limits.timeout_s, sock_connect=limits.connect_s)

    async def request_with_retries_async(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        post_data: Any = None,
        max_network_retries: int | None = None,  # noqa: ARG002 - the package's; ours is in the limits
        *,
        _usage: list[str] | None = None,
    ) -> tuple[bytes, int, Mapping[str, str]]:
        sent = {name: value for name, value in headers.items() if name.lower() not in _UNSENT}
        writes = method != "get"
        maybe_done = False
        attempt = 1
        while True:
            fault, again, answer = await self._attempt(method, url, sent, post_data)
            self._on_call("ok" if fault is None else fault.kind.value)
            if answer is not None:
                return answer
            assert fault is not None
            maybe_done = maybe_done or (writes and fault.kind is StripeFaultKind.OUTCOME_UNKNOWN)
            again = again and attempt < self._limits.attempts
            self._log(
                "stripe_call_failed",
                level=Level.WARNING,
                call=f"{method} {urlsplit(url).path}",
                kind=str(fault.kind),
                code=fault.code,
                attempt=attempt,
                again=again,
            )
            if not again:
                # An earlier attempt may have been carried out although this one did not even arrive.
                if maybe_done and fault.kind in {StripeFaultKind.UNREACHABLE, StripeFaultKind.REFUSED}:
                    fault = StripeFault(StripeFaultKind.OUTCOME_UNKNOWN, fault.code)
                raise fault
            delay_ms = self._limits.delay_ms << (attempt - 1)
            await self._sleep((delay_ms + self._below(delay_ms + 1)) / 1000)
            attempt += 1

    async def _attempt(
        self, method: str, url: str, headers: Mapping[str, str], data: Any
    ) -> tuple[StripeFault | None, bool, tuple[bytes, int, Mapping[str, str]] | None]:
        """One request: a fault and whether another attempt makes sense, or an answer."""
        lost = StripeFaultKind.UNREACHABLE if method == "get" else StripeFaultKind.OUTCOME_UNKNOWN
        try:
            async with self._session.request(
                method, url, headers=headers, data=data, timeout=self._timeout, allow_redirects=False
            ) as response:
                body = await self._read(response)
                status, found = response.status, response.headers
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return StripeFault(StripeFaultKind.UNREACHABLE, "no_connection"), True, None
        except (aiohttp.ClientError, TimeoutError, OSError):
            return StripeFault(lost, "no_answer"), True, None
        parsed = self._parse(body)
        if status in _OK:
            if parsed is None:
                # With the same key the same answer would come: there is nothing to gain by asking now.
                return StripeFault(lost, "unreadable_answer"), False, None
            return None, False, (body or b"", status, {name: found[name] for name in _KEPT if name in found})
        return (*_refusal(status, parsed, found.get(_SHOULD_RETRY), lost), None)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes | None:
        """The body, or ``None`` when it is larger than any answer should be."""
        parts: list[bytes] = []
        size = 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > self._limits.body_bytes:
                response.close()
                return None
            parts.append(part)
        return b"".join(parts)

    def _parse(self, body: bytes | None) -> dict[str, Any] | None:
        if body is None:
            return None
        try:
            return parse_object(body, limits=self._limits)
        except NodeFault:
            return None

    async def close_async(self) -> None:
        """Nothing: the session belongs to whoever made it."""

    def sleep_async(self, secs: float) -> Awaitable[None]:
        return self._sleep(secs)


def _refusal(
    status: int, parsed: dict[str, Any] | None, should_retry: str | None, lost: StripeFaultKind
) -> tuple[StripeFault, bool]:
    """What an answer that is not success means, and whether to ask again. Source: docs.stripe.com/api/errors."""
    error = (parsed or {}).get("error")
    error = error if isinstance(error, dict) else {}
    code = safe_code(error.get("code")) or safe_code(error.get("type")) or f"http_{status}"
    if str(error.get("message")).startswith(_DUPLICATE_TEXT):
        code = DUPLICATE_METER_EVENT
    again = status in {_CONFLICT, _TOO_MANY} or status >= _BROKEN
    if should_retry in {"true", "false"}:
        again = should_retry == "true"
    match status:
        case 401 | 403:
            kind = StripeFaultKind.REFUSED
        case 402:
            kind = StripeFaultKind.DECLINED
        case 429:
            kind = StripeFaultKind.UNREACHABLE
        case 409:
            kind = lost  # the same key is at work in another request
        case _ if status in range(400, _BROKEN):
            kind = StripeFaultKind.INVALID
        case _:
            kind = lost
    if kind is not StripeFaultKind.DECLINED:
        return StripeFault(kind, code), again
    intent = error.get("payment_intent")
    return StripeFault(
        kind,
        code,
        decline_code=safe_code(error.get("decline_code")),
        payment=safe_payment(intent.get("id")) if isinstance(intent, dict) else None,
    ), again
