"""``/v1/chat/completions`` for customers with an API key or a token: what stock OpenAI SDKs send and expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from aiohttp import web

from channels.faults import ChannelFault, Reason
from channels.wire.headers import payment_credentials
from mppnode.accounts.directory import Admission, Directory
from mppnode.engine.chat import ChatEngine
from mppnode.engine.market import Caller
from mppnode.engine.paid import PaidChat
from mppnode.engine.record import Idempotence, Kept
from mppnode.http import disclosure
from mppnode.http.answers import JSON, asked_of, idempotency_key, replayed, streamed, streams
from mppnode.http.middleware import REFUSED, REQUEST_ID
from mppnode.http.problem import STATUS, error_body, openai_error_body, retry_headers
from mppnode.kernel.faults import NodeFault
from mppnode.kernel.requests import ChatLimits, parse_chat
from mppnode.observe.traces import TRACEPARENT
from mppnode.rails.credit import CreditRail
from mppnode.rails.credit_tab import CreditTab

TRUST: Final = "X-Trust"
_SCHEME: Final = "bearer"
_RATE_HEADERS: Final = ("requests", "tokens")
EXPOSED: Final = ", ".join(
    (
        *disclosure.HEADERS,
        "Retry-After",
        "Idempotent-Replayed",
        *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in _RATE_HEADERS),
    )
)
_OPEN: Final = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": EXPOSED}


def bearer_of(credentials: Sequence[str]) -> str | None:
    """The bearer of a request that shows one and no payment credential: who pays by channel pays by channel."""
    if payment_credentials(credentials):
        return None
    for value in credentials:
        scheme, _, token = value.strip().partition(" ")
        if scheme.lower() == _SCHEME:
            return token.strip()
    return None


def caller_of(admission: Admission) -> Caller:
    """What the router may know of a bearer: its account's conversations, and what its key and account want."""
    wants = admission.access.preferences
    return Caller(
        payer=admission.account.id.encode(),
        defaults=wants,
        pools=tuple(who.model_pool for who in wants if who.model_pool is not None),
        optimize=next((who.optimize for who in wants if who.optimize is not None), None),
    )


class KeyedChat:
    """Bytes to engine calls and back, for callers with a bearer."""

    def __init__(
        self,
        *,
        engine: ChatEngine,
        rail: CreditRail,
        directory: Directory,
        idempotence: Idempotence,
        limits: ChatLimits,
    ) -> None:
        self._engine = engine
        self._rail = rail
        self._directory = directory
        self._idempotence = idempotence
        self._limits = limits

    async def serve(self, request: web.Request, body: bytes, bearer: str) -> web.StreamResponse:
        """Serve one request, or say why not in OpenAI's words."""
        try:
            return await self._serve(request, body, bearer)
        except NodeFault as fault:
            request[REFUSED] = fault.reason.value
            more = {**disclosure.of_fault(fault), **_challenge(fault)}
            return _refused(STATUS[fault.reason], error_body(fault), {**retry_headers(fault), **more})
        except ChannelFault as fault:  # the ledger is away: an outage is never told as an unknown key or as no credit
            if fault.reason is Reason.HOLD_FENCED:  # by the end of this process's life in the ledger, not by the caller
                fault = ChannelFault(Reason.STORE_UNAVAILABLE, detail="the node had to give this request up; ask again")
            request[REFUSED] = fault.reason.value
            return _refused(STATUS[fault.reason], openai_error_body(fault), retry_headers(fault))

    async def _serve(self, request: web.Request, body: bytes, bearer: str) -> web.StreamResponse:
        begun = await self._begin(request, body, bearer)
        if isinstance(begun, web.Response):
            return begun
        return await streamed(request, begun, _headers_of(begun))

    async def _begin(self, request: web.Request, body: bytes, bearer: str) -> web.Response | PaidChat:
        """Everything but a stream, which is only begun: a function of its own, so that a stream keeps no prompt."""
        # Whoever asks is settled first: strangers learn nothing about models, prices or what a body should look like.
        admission = await self._directory.admit(bearer, request.headers.getall(TRUST, []))
        chat = parse_chat(body, limits=self._limits, stream=streams(request))
        self._engine.require_room()
        route = self._engine.route(chat, caller_of(admission))
        record = None
        name = idempotency_key(request)
        if name is not None:
            record = await self._idempotence.begin(f"account:{admission.account.id}", name, asked_of(request, body))
        if isinstance(record, Kept):
            # Nothing is reserved for it, so nothing else would notice that its bearer has been shut out meanwhile.
            await self._directory.admit(bearer, request.headers.getall(TRUST, []), fresh=True)
            return replayed(record, record.body, _OPEN)
        purchase = self._rail.purchase(admission)
        run = await self._engine.start(
            purchase,
            chat,
            route,
            request_id=request[REQUEST_ID],
            record=record,
            traceparent=request.headers.getall(TRACEPARENT, ()),
        )
        if chat.stream:
            return run
        answered = disclosure.of_answer(run)
        if record is not None:
            record.type, record.headers = JSON, answered
        whole = await run.complete()
        headers = {**_headers_of(run), **answered, "Cache-Control": "private"}
        return web.Response(body=whole, content_type=JSON, headers=headers)


def _headers_of(run: PaidChat) -> dict[str, str]:
    tab = run.tab
    assert isinstance(tab, CreditTab)
    return {**_OPEN, **tab.headers}


def _challenge(fault: NodeFault) -> dict[str, str]:
    """RFC 9110, section 11.6.1: a 401 says which credentials would do."""
    return {"WWW-Authenticate": "Bearer"} if STATUS[fault.reason] == web.HTTPUnauthorized.status_code else {}


def _refused(status: int, body: bytes, headers: Mapping[str, str]) -> web.Response:
    return web.Response(
        status=status, body=body, content_type=JSON, headers={"Cache-Control": "no-store", **_OPEN, **headers}
    )
