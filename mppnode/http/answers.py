"""What every way of paying shares of reading a chat request and answering it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from aiohttp import web

from channels.faults import ChannelFault
from mppnode.engine.paid import PaidChat
from mppnode.engine.record import HEADER, Kept
from mppnode.http import disclosure
from mppnode.http.sse import HEADERS as STREAM_HEADERS
from mppnode.http.sse import EventStream, small_send_buffer
from mppnode.kernel.faults import NodeFault, NodeReason

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
_BODY_S: Final = 30.0  # for a whole body (reliability: section 2.9)


def streams(request: web.Request) -> bool:
    """Whether a caller who does not say gets a stream: everybody but one who accepts JSON and nothing else.

    The OpenAI SDKs do that. Left out, ``stream`` means false to them, and they could not read what they got.
    """
    return request.headers.get("Accept", "").strip().lower() != "application/json"


async def body_of(request: web.Request) -> bytes:
    """The body, within its size (aiohttp's ``client_max_size``) and its time."""
    if "Content-Encoding" in request.headers:
        # A kilobyte can unpack to a gigabyte, and no OpenAI client compresses requests.
        raise NodeFault(NodeReason.UNSUPPORTED_MEDIA_TYPE, field="Content-Encoding", detail="is not accepted")
    try:
        async with asyncio.timeout(_BODY_S):
            return await request.read()
    except TimeoutError:
        raise NodeFault(NodeReason.INVALID_FIELD, field="body", detail="did not arrive in time") from None


def idempotency_key(request: web.Request) -> str | None:
    """The ``Idempotency-Key`` of a request, if it has one. Raises ``INVALID_FIELD`` when it has several."""
    values = request.headers.getall(HEADER, [])
    if len(values) > 1:
        raise NodeFault(NodeReason.INVALID_FIELD, field=HEADER, detail="is given more than once")
    return values[0] if values else None


def asked_of(request: web.Request, body: bytes) -> bytes:
    """What two requests with one ``Idempotency-Key`` must have in common: path, kind of answer, and body."""
    return b"\n".join((request.path.encode(), b"stream" if streams(request) else b"whole", body))


def replayed(kept: Kept, body: bytes, more: Mapping[str, str]) -> web.Response:
    """An answer that was given before; nothing is charged for it again."""
    stream = STREAM_HEADERS if kept.type == EVENTS else {"Content-Type": JSON, "Cache-Control": "private"}
    headers = {**kept.headers, **stream, **more, "Idempotent-Replayed": "true"}
    return web.Response(body=body, headers=headers)


async def streamed(request: web.Request, run: PaidChat, headers: Mapping[str, str]) -> web.StreamResponse:
    """Deliver a begun request as events."""
    small_send_buffer(request.transport)
    answered = disclosure.of_answer(run)
    if run.record is not None:
        run.record.type, run.record.headers = EVENTS, answered
    sink = EventStream(request, {**headers, **answered})
    del headers, answered  # a stream may wait for money for long, and thousands of them keep what is not let go
    try:
        response = await sink.open()
    except BaseException:
        await run.abandon()
        raise
    try:
        await run.stream(sink)
    except (ChannelFault, NodeFault):
        # The status line has gone: an error answer now would be read as part of the stream. Break it off instead.
        sink.abort()
    except Exception:
        sink.abort()  # the boundary's 500 would be read as part of the stream, or waited behind for ever
        raise
    await sink.close()
    return response
