"""A streaming response over aiohttp, written the cheap way.

aiohttp prepares the response and ends it; the frames in between go to the transport directly, one chunk-size line and
one write per upstream read. ``StreamResponse.write`` would be a coroutine per token. Only public attributes are used:
``prepare``, ``write`` (once, which also flushes the headers), ``write_eof`` and ``request.transport``.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final, cast

from aiohttp import HttpVersion11, web

HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "private, no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx would hold tokens back until its buffer is full
}
_SEND_BUFFER: Final = 16 * 1024  # kernel bytes per client: with the default 2.7 MB counted as delivered to nobody


class EventStream:
    """Implements :class:`mppnode.engine.sink.Sink` for one request."""

    def __init__(self, request: web.Request, headers: dict[str, str]) -> None:
        self._request = request
        self._response = web.StreamResponse(headers={**HEADERS, **headers})
        self._chunked = request.version >= HttpVersion11
        self._transport: asyncio.WriteTransport | None = None

    async def open(self) -> web.StreamResponse:
        """Send the headers."""
        response = self._response
        if self._chunked:
            response.enable_chunked_encoding()
        else:
            response.force_close()
        await response.prepare(self._request)
        await response.write(b": stream\n\n")
        response.headers.clear()  # they are sent: kept, they would be kilobytes of every stream that waits for money
        # A cast, not isinstance: uvloop's transports have the methods of asyncio.WriteTransport, not its ancestry.
        self._transport = cast("asyncio.WriteTransport | None", self._request.transport)
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=0)
        return response

    def write(self, frames: bytes) -> None:
        """See :class:`Sink`."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(b"%x\r\n%b\r\n" % (len(frames), frames) if self._chunked else frames)

    def buffered(self) -> int:
        """See :class:`Sink`."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def gone(self) -> bool:
        """See :class:`Sink`."""
        return self._transport is None or self._transport.is_closing()

    def abort(self) -> None:
        """Close the connection without ending the body, so that the client cannot take it for complete."""
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """End the body."""
        if not self.gone():
            await self._response.write_eof()


def small_send_buffer(transport: asyncio.BaseTransport | None) -> None:
    """Shrink a client's kernel buffer, so that "written" stays close to "received"."""
    if transport is None:
        return
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
