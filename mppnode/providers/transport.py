"""An HTTP/1.1 client made for reading streams: one parser callback per read, no task and no timer per token.

``data_received`` parses, joins the body bytes of the read and hands them to the sink in the same call. A general
client costs about 9 us more per token here, for a stream reader, a task wake-up and a coroutine per chunk. What this
client leaves out on purpose: redirects (the key would follow them), cookies, proxies, compression, pipelining.

One timer per connection checks silence and puts itself off while bytes arrive.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast
from urllib.parse import urlsplit

import httptools

from mppnode.providers.addresses import public_address
from mppnode.providers.base import Sink, UpstreamFault, UpstreamRequest

_INFORMATIONAL_MAX: Final = 8
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)  # RFC 9110 token
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e\t]*", re.ASCII)
_OWN_HEADERS: Final = frozenset({"host", "content-length", "accept-encoding", "transfer-encoding", "connection"})
_PADDING_FACTOR: Final = 16  # bytes of HTTP framing per body byte: one-byte chunks need 5
_SWITCHING: Final = 101
_FIRST_FINAL: Final = 200


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Bounds of the upstream side: seconds, bytes, counts."""

    connect_s: float = 10.0
    first_byte_s: float = 60.0
    """From the request to the first body byte: providers send headers early and think afterwards."""
    idle_s: float = 30.0
    """Between reads of a body. Time in which we ourselves do not read is not counted."""
    keep_s: float = 15.0
    """How long an unused connection is kept. Common servers close theirs after 60 s or more; ours must be first."""
    connections_per_origin: int = 2048
    """The node's own limit of live streams: a queue here would only hide that the node is full."""
    kept_per_origin: int = 128
    header_bytes: int = 64 * 1024
    early_bytes: int = 256 * 1024
    """Body kept before a sink is attached; reading pauses above it."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection goes."""

    secure: bool
    host: str
    port: int


def split_url(url: str) -> tuple[Origin, str, str]:
    """The origin of an ``http(s)`` URL, its ``Host`` header and its request target.

    Raises:
        ValueError: for another scheme, credentials in the URL, a fragment, or characters a request line cannot hold.
    """
    if not url.isascii() or any(char <= " " or char == "\x7f" for char in url):
        raise ValueError("a provider URL has characters that do not belong in one")
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or parts.fragment:
        raise ValueError("a provider URL is http or https, with a host, without user or fragment")
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Origin(secure, parts.hostname, port), parts.netloc, target


def encode_head(request: UpstreamRequest, host: str, target: str) -> bytes:
    """The request line and headers.

    Raises:
        ValueError: when a header would end early or collide with one this client writes itself.
    """
    if _HEADER_NAME.fullmatch(request.method) is None:
        raise ValueError("a request method has characters that do not belong in one")
    lines = [
        f"{request.method} {target} HTTP/1.1",
        f"Host: {host}",
        f"Content-Length: {len(request.body)}",
        "Accept-Encoding: identity",
    ]
    for name, value in request.headers:
        if _HEADER_NAME.fullmatch(name) is None or _HEADER_VALUE.fullmatch(value) is None:
            raise ValueError("a request header has characters that do not belong in one")
        if name.lower() in _OWN_HEADERS:
            raise ValueError("a request header is one that the transport writes")
        lines.append(f"{name}: {value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


class Response:
    """One response, from its request to its last byte; ``mppnode.providers.base.UpstreamResponse`` in shape."""

    __slots__ = ("_connection", "_early", "_ended", "_error", "_sink", "head", "headers", "status")

    def __init__(self, connection: _Connection, head: asyncio.Future[None]) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.head = head
        self._connection: _Connection | None = connection
        self._sink: Sink | None = None
        self._early = bytearray()
        self._ended = False
        self._error: UpstreamFault | None = None

    def attach(self, sink: Sink) -> None:
        """Deliver what has arrived, inside this call, and everything that follows, inside the read it came with.

        A second sink takes the place of the first and gets what that one has not.
        """
        self._sink = sink
        if self._early:
            early, self._early = bytes(self._early), bytearray()
            sink.on_body(early)
        if self._ended:
            if self._sink is not None:  # on_body may have cancelled
                self._sink = None
                sink.on_end(self._error)
        elif self._connection is not None:
            self._connection.drained()

    def pause(self) -> None:
        """Stop reading. Bytes of a read already under way may still come."""
        if self._connection is not None:
            self._connection.set_paused(True)

    def resume(self) -> None:
        """Read again; the idle limit starts anew."""
        if self._connection is not None:
            self._connection.set_paused(False)

    def cancel(self) -> None:
        """Close the connection now, which is how a provider learns to stop generating; no callback follows."""
        self._sink = None
        self._early.clear()
        self._ended = True
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    async def read(self, limit: int) -> bytes:
        """The whole body of at most ``limit`` bytes.

        Raises:
            UpstreamFault: ``protocol`` when it is larger, or what broke the response.
        """
        collector = _Collector(self, limit)
        self.attach(collector)
        try:
            return await collector.whole
        finally:
            _look_at(collector.whole)
            if not self._ended:
                self.cancel()

    # ------------------------------------------------------------------------------------------ for the connection

    def take(self, data: bytes, limit: int) -> bool:
        """Pass a read on, or keep it; whether reading should pause."""
        if self._sink is not None:
            self._sink.on_body(data)
            return False
        if not self._ended:
            self._early += data
        return len(self._early) > limit

    def finish(self, error: UpstreamFault | None) -> None:
        """End the response, once: to whoever waits for the head, else to the sink, else to the sink to come."""
        if self._ended:
            return
        self._ended, self._error, self._connection = True, error, None
        if not self.head.done():
            self.head.set_exception(error or UpstreamFault("protocol", detail="the provider sent no response"))
            return
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.on_end(error)


def _look_at(future: asyncio.Future[Any]) -> None:
    """Mark a failure as seen: when a waiter is cancelled in the same turn, nobody else will look at it."""
    if future.done() and not future.cancelled():
        future.exception()


class _Collector:
    """Gathers a whole body."""

    def __init__(self, response: Response, limit: int) -> None:
        self.whole: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._response = response
        self._limit = limit
        self._body = bytearray()

    def on_body(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > self._limit:
            self._response.cancel()
            self._settle(UpstreamFault("protocol", detail=f"the answer is larger than {self._limit} bytes"))

    def on_end(self, error: UpstreamFault | None) -> None:
        self._settle(error)

    def _settle(self, error: UpstreamFault | None) -> None:
        if self.whole.done():
            return
        if error is not None:
            self.whole.set_exception(error)
        else:
            self.whole.set_result(bytes(self._body))


class _Connection(asyncio.Protocol):
    """One TCP connection: one request at a time, parsed as it arrives."""

    def __init__(self, pool: _Pool, limits: TransportLimits) -> None:
        self._pool = pool
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._response: Response | None = None
        self._paused = False  # what the reader asked for
        self._held = False  # early bytes are waiting for a sink
        self._stopped = False  # what the transport was told
        self._timer: asyncio.TimerHandle | None = None
        self._quiet_since = 0.0
        self._quiet_max = limits.keep_s
        self.used = False
        self.heard = False  # a byte of the present response has come
        self._reset()

    def _reset(self) -> None:
        self._parts: list[bytes] = []
        self._fields: dict[str, str] = {}
        self._head_done = self._complete = self._keep = self._by_close = False
        self._violation: str | None = None
        self._informational = self._head_bytes = self._received = self._delivered = 0

    # ------------------------------------------------------------------------------------------------- life of it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._pool.open.add(self)  # here and not after connecting: the loss of a connection may come in between
        # Not an isinstance check: uvloop's transports have the shape of asyncio.Transport but are no subclass of it.
        self._transport = cast("asyncio.Transport", transport)  # both loops set TCP_NODELAY by themselves

    def send(self, head: bytes, body: bytes) -> Response:
        """Start an exchange; the head of the response arrives in ``Response.head``."""
        assert self._transport is not None
        assert self._response is None
        self._reset()
        self.heard = False
        self._parser = httptools.HttpResponseParser(self)
        self._response = response = Response(self, self._loop.create_future())
        if self._transport.is_closing():
            self._fail(UpstreamFault("closed", detail="the provider closed the connection early"))
            return response
        self._transport.write(head + body)
        self._watch(self._limits.first_byte_s)
        return response

    def usable(self) -> bool:
        """Whether a kept connection may carry another request."""
        return self._transport is not None and not self._transport.is_closing() and self._response is None

    def abandon(self) -> None:
        """Close at once."""
        self._response = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()

    def shut(self) -> None:
        """Close at once, and let :meth:`connection_lost` tell whoever is reading."""
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.lost(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        response, self._response = self._response, None
        if response is None:
            return
        if self._by_close and exc is None and self._violation is None:
            response.finish(None)
        else:
            response.finish(UpstreamFault("closed", detail="the provider closed the connection early"))

    # ------------------------------------------------------------------------------------------------ the hot path

    def data_received(self, data: bytes) -> None:
        response, parser = self._response, self._parser
        if response is None or parser is None:
            self.abandon()  # bytes nobody asked for: the next response could be mistaken for them
            return
        self.heard = True
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # siblings, not parent and child
            self._violation = self._violation or "the provider did not speak HTTP/1.1"
        self._received += len(data)
        if self._parts:
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts = []
            self._delivered += len(body)
            self._quiet_since = self._loop.time()
            if self._quiet_max != self._limits.idle_s:
                self._watch(self._limits.idle_s)
            if response.take(body, self._limits.early_bytes):
                self._held = True
                self._apply_flow()
            if self._response is not response:
                return  # the sink cancelled
        self._after_read(response)

    def _after_read(self, response: Response) -> None:
        padding = self._received - self._delivered
        if self._violation is None and padding > self._limits.header_bytes + _PADDING_FACTOR * self._delivered:
            self._violation = "the provider sent more framing than content"
        if self._violation is not None:
            self._fail(UpstreamFault("protocol", detail=self._violation))
        elif self._complete:
            self._response, self._parser = None, None
            if self._keep:
                self._release()
            else:
                self.abandon()
            response.finish(None)

    def _fail(self, fault: UpstreamFault) -> None:
        response = self._response
        self.abandon()
        if response is not None:
            response.finish(fault)

    def _release(self) -> None:
        self._paused = self._held = False
        self._apply_flow()  # a paused transport would not notice that the provider hangs up
        self.used = True
        self._watch(self._limits.keep_s)
        self._pool.keep(self)

    # -------------------------------------------------------------------------------------------- parser callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_done:
            return  # a trailer: bounded as padding, never read
        if self._head_bytes > self._limits.header_bytes:
            self._violation = "the provider sent more header bytes than allowed"
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self._fields[key] = f"{self._fields[key]}, {text}" if key in self._fields else text

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        response = self._response
        status = self._parser.get_status_code()
        if self._complete or response is None:
            self._violation = "the provider answered more than it was asked"
        elif status == _SWITCHING:
            self._violation = "the provider wants another protocol"
        elif status < _FIRST_FINAL:
            self._informational += 1
            self._fields = {}
            if self._informational > _INFORMATIONAL_MAX:
                self._violation = "the provider sent too many interim answers"
        elif self._fields.get("content-encoding", "identity").lower() != "identity":
            self._violation = "the provider compressed its answer although asked not to"
        elif self._violation is None:
            self._head_done = True
            framed = "content-length" in self._fields or "transfer-encoding" in self._fields
            self._by_close = not framed
            response.status, response.headers = status, self._fields
            if not response.head.done():
                response.head.set_result(None)

    def on_body(self, body: bytes) -> None:
        if self._violation is None:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._head_done:
            self._complete = True
            self._keep = self._parser.should_keep_alive()

    def on_message_begin(self) -> None:
        if self._complete:
            # Bytes after the end would be read as the answer to the next caller's request.
            self._violation = "the provider answered more than it was asked"

    # --------------------------------------------------------------------------------------------- flow and silence

    def set_paused(self, paused: bool) -> None:  # noqa: FBT001  # named at both call sites
        """Follow the reader's pace."""
        self._paused = paused
        self._apply_flow()

    def drained(self) -> None:
        """A sink has taken the early bytes."""
        self._held = False
        self._apply_flow()

    def _apply_flow(self) -> None:
        stop = self._paused or self._held
        if stop == self._stopped or self._transport is None or self._transport.is_closing():
            return
        self._stopped = stop
        if stop:
            self._transport.pause_reading()
        else:
            self._quiet_since = self._loop.time()
            self._transport.resume_reading()

    def _watch(self, quiet_max: float) -> None:
        """Start counting silence against a new limit."""
        if self._timer is not None:
            self._timer.cancel()
        self._quiet_since = self._loop.time()
        self._quiet_max = quiet_max
        self._timer = self._loop.call_later(quiet_max, self._check_silence)

    def _check_silence(self) -> None:
        now = self._loop.time()
        due = (now if self._stopped else self._quiet_since) + self._quiet_max
        if due > now:
            self._timer = self._loop.call_at(due, self._check_silence)
            return
        self._timer = None
        started = self._delivered or self._head_done
        detail = "the provider went silent" if started else "the provider did not answer in time"
        self._fail(UpstreamFault("timeout", detail=detail))


class _Pool:
    """The connections of one origin."""

    def __init__(self, limits: TransportLimits) -> None:
        self._limits = limits
        self._kept: list[_Connection] = []
        self.open: set[_Connection] = set()
        self.connecting = 0
        self.emptied: asyncio.Future[None] | None = None

    def take(self) -> _Connection | None:
        """The kept connection used last: it is the least likely to have been closed meanwhile."""
        while self._kept:
            connection = self._kept.pop()
            if connection.usable():
                return connection
        return None

    def full(self) -> bool:
        return len(self.open) + self.connecting >= self._limits.connections_per_origin

    def keep(self, connection: _Connection) -> None:
        if len(self._kept) < self._limits.kept_per_origin and self.emptied is None:
            self._kept.append(connection)
        else:
            connection.abandon()

    def lost(self, connection: _Connection) -> None:
        self.open.discard(connection)
        if connection in self._kept:
            self._kept.remove(connection)
        if self.emptied is not None and not self.open and not self.emptied.done():
            self.emptied.set_result(None)


class Transport:
    """Sends requests to providers over kept connections. One per node, closed with :meth:`close`."""

    def __init__(
        self,
        limits: TransportLimits | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        public: frozenset[str] = frozenset(),
    ) -> None:
        """``public`` are the hosts that must not lead into a private network, whatever their names resolve to."""
        self._public = public
        self._limits = limits or TransportLimits()
        self._tls = tls
        self._pools: dict[Origin, _Pool] = {}
        self._closed = False

    def guard(self, public: frozenset[str], *, freed: frozenset[str] = frozenset()) -> None:
        """Keep these hosts out of private networks too; of those from before, all but the ``freed``.

        Not only these: a request that began before a provider was taken out may still turn to it.
        """
        self._public = (self._public - freed) | public

    async def open(self, request: UpstreamRequest) -> Response:
        """Send ``request`` and return once the headers of its response are in, whatever its status.

        A kept connection that the provider closes before it says a word is replaced once: it had most likely been
        closed before the request reached it.

        Raises:
            UpstreamFault: ``connect``, ``timeout``, ``closed`` or ``protocol``.
            ValueError: when the URL or a header is not fit to send.

        Source: RFC 9112.
        """
        origin, host, target = split_url(request.url)
        head = encode_head(request, host, target)
        pool = self._pools.setdefault(origin, _Pool(self._limits))
        connection = pool.take() or await self._connect(origin, pool)
        try:
            return await self._exchange(connection, head, request.body)
        except UpstreamFault as fault:
            if fault.kind != "closed" or not connection.used or connection.heard:
                raise
        return await self._exchange(await self._connect(origin, pool), head, request.body)

    async def _exchange(self, connection: _Connection, head: bytes, body: bytes) -> Response:
        response = connection.send(head, body)
        try:
            await response.head
        except asyncio.CancelledError:
            response.cancel()
            _look_at(response.head)
            raise
        return response

    async def _connect(self, origin: Origin, pool: _Pool) -> _Connection:
        self._refuse_if_closed()
        if pool.full():
            raise UpstreamFault("connect", detail="every connection to this provider is in use")
        if origin.secure and self._tls is None:
            self._tls = ssl.create_default_context()
        loop = asyncio.get_running_loop()
        pool.connecting += 1
        try:
            async with asyncio.timeout(self._limits.connect_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(pool, self._limits),
                    await public_address(origin.host, origin.port) if origin.host in self._public else origin.host,
                    origin.port,
                    ssl=self._tls if origin.secure else None,
                    server_hostname=origin.host if origin.secure else None,
                )
        except TimeoutError as error:
            raise UpstreamFault("connect", detail="the provider did not accept a connection in time") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: a host name that DNS cannot hold
            raise UpstreamFault("connect", detail="the provider cannot be reached") from error
        finally:
            pool.connecting -= 1
        try:
            self._refuse_if_closed()
        except UpstreamFault:
            connection.abandon()
            raise
        return connection

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise UpstreamFault("connect", detail="the node is stopping")

    async def close(self) -> None:
        """Close every connection and wait until they are gone; live responses end with ``closed``."""
        self._closed = True
        loop = asyncio.get_running_loop()
        waits = []
        for pool in self._pools.values():
            if pool.open:
                pool.emptied = loop.create_future()
                waits.append(pool.emptied)
            for connection in tuple(pool.open):
                connection.shut()
        for wait in waits:
            await wait
