"""``/v1/chat/completions``: payers with a session credential here, those with an API key in :mod:`keyed`.

A request with a body asks for content; one without manages its channel. The body is judged before any money moves, so
a bad request loses nothing; the challenge is judged before the body buys anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from aiohttp import web

from channels.faults import ChannelFault, Reason
from channels.model import Account
from channels.units import Units
from channels.wire import accept_payment, sse
from channels.wire.challenge import Challenge
from channels.wire.credential import Envelope, decode_envelope
from channels.wire.headers import payment_credentials, serialize_challenge
from channels.wire.receipt import SessionReceipt
from mppnode.engine.chat import ChatEngine
from mppnode.engine.market import Caller
from mppnode.engine.paid import PaidChat
from mppnode.engine.record import Idempotence, Kept, Record
from mppnode.http import disclosure
from mppnode.http.answers import EVENTS, JSON, asked_of, body_of, idempotency_key, replayed, streamed, streams
from mppnode.http.keyed import KeyedChat, bearer_of
from mppnode.http.middleware import REFUSED, REQUEST_ID
from mppnode.http.problem import STATUS, error_body, problem_body, retry_headers
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault
from mppnode.kernel.requests import ChatLimits, ChatRequest, parse_chat
from mppnode.ledger.books import Books
from mppnode.observe.traces import TRACEPARENT
from mppnode.rails.base import Offer
from mppnode.rails.presented import Presented
from mppnode.rails.session import Opened, SessionRail
from mppnode.rails.tab import SessionTab

PATH: Final = "/v1/chat/completions"
ROUTE: Final = f"POST {PATH}"
EXPOSED: Final = ", ".join(
    ("WWW-Authenticate", "Payment-Receipt", "Payment-Session", "Payment-Session-Snapshot", *disclosure.HEADERS)
)
_PAYMENT_REQUIRED: Final = 402
_PROVEN: Final = frozenset(
    {Reason.INSUFFICIENT_BALANCE, Reason.CLOSE_BELOW_SPENT, Reason.CREDENTIAL_USED, Reason.VOUCHER_EXCEEDS_DEPOSIT}
)
"""Refusals that come only after the voucher's signature was verified: their 402 may show the channel's state."""


class ChatSurface:
    """Bytes to engine calls and back, for the chat route."""

    def __init__(
        self,
        *,
        engine: ChatEngine,
        rail: SessionRail,
        books: Books,
        keyed: KeyedChat,
        idempotence: Idempotence,
        clock: Clock,
        limits: ChatLimits,
        **_: object,
    ) -> None:
        self._engine = engine
        self._rail = rail
        self._books = books
        self._keyed = keyed
        self._idempotence = idempotence
        self._clock = clock
        self._limits = limits

    def routes(self) -> Sequence[web.RouteDef]:
        """The routes of this surface."""
        return [
            web.post(PATH, self.post),
            web.route("HEAD", PATH, self.post),
            web.options(PATH, self.options),
        ]

    async def options(self, _: web.Request) -> web.Response:
        """A browser's preflight; never charged."""
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Origin": "*",
                "Access-Control-Allow-Methods": "POST, HEAD, OPTIONS",
                "Access-Control-Allow-Headers": "Authorization, Content-Type, Accept-Payment, Payment-Authorization, "
                "Payment-Session, Idempotency-Key",
                "Access-Control-Expose-Headers": EXPOSED,
                "Access-Control-Max-Age": "600",
            },
        )

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Serve content, manage a channel, or say what either costs."""
        body = b"" if request.method == "HEAD" else await body_of(request)
        call = _Call(request, body)
        bearer = bearer_of(call.credentials)
        if bearer is not None and request.method != "HEAD":
            return await self._keyed.serve(request, body, bearer)
        try:
            return await self._serve(call)
        except ChannelFault as fault:
            return await self._refuse(call, fault)
        except NodeFault as fault:
            return self._fail(call, fault)

    async def _serve(self, call: _Call) -> web.StreamResponse:
        begun = await self._begin(call)
        if isinstance(begun, web.Response):
            return begun
        return await streamed(call.request, begun, _paid_headers(self._receipt(begun, tokens=None)))

    async def _begin(self, call: _Call) -> web.Response | PaidChat:
        """Everything but a stream, which is only begun.

        A function of its own, as :meth:`_read` is, so that a stream that waits for money does not keep the credential
        it was bought with in every form it ever had.
        """
        presented, chat, offer = self._read(call)
        if chat is None:
            return _managed(await self._rail.manage(presented))
        # Before the money: a payer whose quote is out of date keeps the channel they were about to open.
        route = self._engine.route(chat, Caller(payer=presented.payload.channel_id, bound=presented.quoted))
        call.opened = opened = await self._rail.admit(presented)
        record = await self._claim(call, opened.account)
        if isinstance(record, Kept):
            return self._again(record, presented, opened.account)
        purchase = self._rail.purchase(presented, opened.account, offer.unit.amount)
        run = await self._engine.start(
            purchase,
            chat,
            route,
            request_id=call.request_id,
            record=record,
            traceparent=call.request.headers.getall(TRACEPARENT, ()),
        )
        if chat.stream:
            call.presented = call.opened = call.offer = None  # from here on no answer shows them
            call.asked = b""
            return run
        answered = disclosure.of_answer(run)
        if record is not None:
            record.type, record.headers = JSON, answered
        body = await run.complete()
        headers = {**_paid_headers(self._receipt(run, tokens=run.tokens)), **answered, "Cache-Control": "private"}
        return web.Response(body=body, content_type=JSON, headers=headers)

    async def _claim(self, call: _Call, account: Account) -> Kept | Record | None:
        """The answer of an earlier request with this key, the right to make it, or None for a request without one."""
        name = idempotency_key(call.request)
        if name is None:
            return None
        return await self._idempotence.begin(f"channel:{account.id.hex()}", name, call.asked)

    def _again(self, kept: Kept, presented: Presented, account: Account) -> web.Response:
        """The kept answer, with the receipt of the channel as it is now: that only ever grows."""
        receipt = self._rail.receipt(presented, account)
        body = kept.body
        if kept.type == EVENTS:
            body = sse.without_needs(kept.body).removesuffix(sse.DONE) + sse.receipt_frame(receipt) + sse.DONE
        return replayed(kept, body, _paid_headers(receipt))

    def _receipt(self, run: PaidChat, *, tokens: int | None) -> SessionReceipt:
        tab = run.tab
        assert isinstance(tab, SessionTab)
        return tab.receipt(self._clock.now_millis(), tokens=tokens)

    def _read(self, call: _Call) -> tuple[Presented, ChatRequest | None, Offer]:
        """The credential, what it is to buy (None to manage its channel), and at what price."""
        tokens = payment_credentials(call.credentials)
        chat = parse_chat(call.body, limits=self._limits, stream=streams(call.request)) if call.body else None
        call.offer = offer = self._engine.offer(ROUTE, chat)
        if not tokens:
            raise ChannelFault(Reason.PAYMENT_REQUIRED, detail="this request is paid for; answer the challenge")
        # The reference server takes the first Payment credential too, and a client never sends two.
        envelope = decode_envelope(tokens[0])
        # A chat request always has a body, so a bodyless credential manages its channel, with a query or without: by
        # the reference server's rule a mid-stream voucher sent to a URL with a query would open a second stream.
        if chat is None or _asks_management(envelope):
            call.presented = presented = self._rail.read(envelope, None, peer=call.peer)
            return presented, None, offer
        self._engine.require_room()
        call.presented = presented = self._rail.read(envelope, offer, peer=call.peer)
        return presented, chat, offer

    # ---------------------------------------------------------------------------------------------------- refusals

    async def _refuse(self, call: _Call, fault: ChannelFault) -> web.Response:
        """A payment refusal: always with a fresh challenge, and without a receipt but for one case."""
        call.request[REFUSED] = fault.reason.value
        challenges = await self._fresh_challenges(call, fault)
        headers = {
            "Cache-Control": "no-store",
            "WWW-Authenticate": ", ".join(serialize_challenge(challenge) for challenge in challenges),
            "Access-Control-Allow-Origin": "*",
            "Access-Control-Expose-Headers": EXPOSED,
            **retry_headers(fault),
            **disclosure.of_offer(call.offer),
        }
        if STATUS[fault.reason] != _PAYMENT_REQUIRED:
            headers |= self._opened_receipt(call)
        body = problem_body(fault, challenge_id=challenges[0].id if challenges else None)
        return _answer(call, STATUS[fault.reason], body, "application/problem+json", headers)

    async def _fresh_challenges(self, call: _Call, fault: ChannelFault) -> list[Challenge]:
        offer = call.offer or self._engine.offer(ROUTE, None)
        snapshot = None
        account = await self._proven_account(call, fault)
        if account is not None:
            required = fault.numbers.get("required", account.spent + offer.unit.amount)
            snapshot = self._rail.snapshot(account, Units(required))
            if fault.reason is Reason.INSUFFICIENT_BALANCE:
                offer = offer.for_the_rest(Units(max(required - account.accepted, 0)))
        challenges = self._rail.challenges(offer, snapshot)
        wanted = call.request.headers.get("Accept-Payment")
        return accept_payment.choose(challenges, wanted, key=lambda c: (c.method, c.intent)) or challenges

    async def _proven_account(self, call: _Call, fault: ChannelFault) -> Account | None:
        if call.presented is None or fault.reason not in _PROVEN:
            return None
        return await self._books.load(call.presented.payload.channel_id)

    def _fail(self, call: _Call, fault: NodeFault) -> web.Response:
        call.request[REFUSED] = fault.reason.value
        headers = {
            **retry_headers(fault),
            **self._opened_receipt(call),
            **disclosure.of_offer(call.offer),
            **disclosure.of_fault(fault),
        }
        return _answer(call, STATUS[fault.reason], error_body(fault), "application/json", headers)

    def _opened_receipt(self, call: _Call) -> dict[str, str]:
        """The one receipt on an error: without it the client forgets the channel it has just opened and funded.

        A 402 needs none: its challenge carries the channel's snapshot.
        """
        if call.opened is None or call.opened.tx_hash is None or call.presented is None:
            return {}
        return _paid_headers(self._rail.receipt(call.presented, call.opened.account, call.opened.tx_hash))


class _Call:
    """What is known of one request so far; refusals show as much of it as they may."""

    __slots__ = ("asked", "body", "credentials", "offer", "opened", "peer", "presented", "request", "request_id")

    def __init__(self, request: web.Request, body: bytes) -> None:
        self.request = request
        self.body = body
        # Clients put the first credential into the advertised header and management ones into Authorization.
        headers = request.headers
        self.credentials = headers.getall("Authorization", []) + headers.getall("Payment-Authorization", [])
        self.peer = request.remote or ""
        self.request_id = request[REQUEST_ID]
        self.asked = b"" if not body else asked_of(request, body)
        self.offer: Offer | None = None
        self.presented: Presented | None = None
        self.opened: Opened | None = None


def _asks_management(envelope: Envelope) -> bool:
    """Whether a credential sent with a body is a close or top-up all the same; vouchers and opens buy content then."""
    payload = envelope.payload
    return isinstance(payload, dict) and payload.get("action") in ("close", "topUp")


def _managed(receipt: SessionReceipt) -> web.Response:
    return web.Response(status=204, headers={**_paid_headers(receipt), "Cache-Control": "private, no-store"})


def _paid_headers(receipt: SessionReceipt) -> dict[str, str]:
    return {
        "Payment-Receipt": receipt.encode(),
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Expose-Headers": EXPOSED,
    }


def _answer(call: _Call, status: int, body: bytes, kind: str, headers: Mapping[str, str]) -> web.Response:
    if call.request.method == "HEAD":
        return web.Response(status=status, headers=headers)
    return web.Response(status=status, body=body, content_type=kind, headers=headers)

