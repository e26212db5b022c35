"""The upstream HTTP client, against servers that behave and servers that do not, on real loopback sockets."""

import asyncio
import contextlib
import gc

import pytest

from mppnode.providers.base import UpstreamFault, UpstreamRequest
from mppnode.providers.transport import Transport, TransportLimits, encode_head, split_url

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Upstream:
    """A server whose every connection runs one script; tests hold its pen."""

    def __init__(self, script):
        self.script = script
        self.connections = 0
        self.requests = []
        self.lost = asyncio.Event()
        self._tasks = set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1/chat/completions"
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.server.wait_closed()

    async def _serve(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        self.connections += 1
        try:
            await self.script(self, reader, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client is gone, or the test is over
        finally:
            self.lost.set()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def request(self, reader):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        self.requests.append((head, await reader.readexactly(length)))


def says(*answers, then="close"):
    """Answer each request of a connection with the next bytes; afterwards close or wait for the client to go."""

    async def script(up, reader, writer):
        for answer in answers:
            await up.request(reader)
            writer.write(answer)
            await writer.drain()
        if then == "wait":
            await reader.read()

    return script


class Recorder:
    def __init__(self):
        self.reads, self.ends = [], []
        self.ended = asyncio.Event()
        self.grown = asyncio.Event()
        self.hook = lambda data: None

    def on_body(self, data):
        self.reads.append(data)
        self.grown.set()
        self.hook(data)

    def on_end(self, error):
        self.ends.append(error)
        self.ended.set()

    @property
    def body(self):
        return b"".join(self.reads)

    async def until(self, length):
        while len(self.body) < length:
            self.grown.clear()
            await asyncio.wait_for(self.grown.wait(), 5)


def post(url, body=b"{}"):
    return UpstreamRequest("POST", url, (("Authorization", "Bearer sk-canary"),), body)


@pytest.fixture
async def transport():
    made = Transport(TransportLimits())
    yield made
    await asyncio.wait_for(made.close(), 5)


async def fault_of(awaitable):
    with pytest.raises(UpstreamFault) as caught:
        await asyncio.wait_for(awaitable, 5)
    return caught.value


async def test_a_response_arrives_whole(transport):
    """Status, headers and body come back; the request carries its length, its body and no compression offer."""
    async with Upstream(says(OK)) as up:
        response = await transport.open(post(up.url, b'{"a":1}'))
        assert (response.status, response.headers["content-length"]) == (200, "2")
        assert await response.read(10) == b"hi"
    head, body = up.requests[0]
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAccept-Encoding: identity\r\n" in head
    assert body == b'{"a":1}'


async def test_one_read_is_one_call_and_the_end_is_told_once(transport):
    """Chunks that arrive together reach the sink in one call, and the end exactly once."""
    gate = asyncio.Event()

    async def script(up, reader, writer):
        await up.request(reader)
        writer.write(CHUNKED)
        await gate.wait()
        writer.write(chunk(b"one") + chunk(b"two") + chunk(b"three"))
        await writer.drain()
        await reader.readexactly(0)
        await gate2.wait()
        writer.write(b"0\r\n\r\n")

    gate2 = asyncio.Event()
    async with Upstream(script) as up:
        response = await transport.open(post(up.url))
        sink = Recorder()
        response.attach(sink)
        gate.set()
        await sink.until(11)
        assert sink.reads == [b"onetwothree"]
        assert sink.ends == []
        gate2.set()
        await asyncio.wait_for(sink.ended.wait(), 5)
    assert sink.ends == [None]


async def test_connections_are_reused(transport):
    """A second request goes over the connection of the first."""
    async with Upstream(says(OK, OK, then="wait")) as up:
        for _ in range(2):
            assert await (await transport.open(post(up.url))).read(10) == b"hi"
        assert up.connections == 1


async def test_connection_close_is_obeyed(transport):
    """A response that announces the close of its connection is not followed by another request on it."""
    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi"
    async with Upstream(says(closing, then="wait")) as up:
        for _ in range(2):
            assert await (await transport.open(post(up.url))).read(10) == b"hi"
        assert up.connections == 2


async def test_a_stale_connection_is_replaced_once(transport):
    """A kept connection that closes without a word is replaced; the caller notices nothing."""
    first = True

    async def script(up, reader, writer):
        nonlocal first
        await up.request(reader)
        writer.write(OK)
        if first:
            first = False
            await up.request(reader)  # and hang up on it
        else:
            await reader.read()

    async with Upstream(script) as up:
        for _ in range(2):
            assert await (await transport.open(post(up.url))).read(10) == b"hi"
        assert (up.connections, len(up.requests)) == (2, 3)


async def test_a_fresh_connection_is_not_retried(transport):
    """A provider that hangs up on a new connection may have worked on the request, so it is not sent again."""
    async with Upstream(says(b"")) as up:
        fault = await fault_of(transport.open(post(up.url)))
        assert (fault.kind, up.connections) == ("closed", 1)


async def test_a_kept_connection_that_answered_is_not_retried(transport):
    """Once a byte of the answer has come the request was received, so it is not repeated."""
    async with Upstream(says(OK, b"HTTP/1.1 2")) as up:
        await (await transport.open(post(up.url))).read(10)
        fault = await fault_of(transport.open(post(up.url)))
        assert (fault.kind, up.connections) == ("closed", 1)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Le", "closed"),
        (b"garbage\r\n\r\n", "protocol"),
        (b"SSH-2.0-OpenSSH_9\r\n", "protocol"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "protocol"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK, "protocol"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000, "protocol"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: aaaaaaaaaa\r\n" * 10_000 + b"\r\n", "protocol"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 20 + OK, "protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc", "protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nhi", "protocol"),
    ],
    ids=["mid-headers", "garbage", "ssh", "upgrade", "bare-upgrade", "long-header", "many-headers", "interim", "both", "two", "gzip"],
)
async def test_broken_heads_are_refused(transport, answer, kind):
    """A head that is not one HTTP/1.1 response to our request is a fault in words of ours."""
    async with Upstream(says(answer)) as up:
        fault = await fault_of(transport.open(post(up.url)))
    assert fault.kind == kind
    assert "sk-canary" not in str(fault)


@pytest.mark.parametrize(
    ("rest", "body", "kind"),
    [
        (chunk(b"whole"), b"whole", "closed"),
        (chunk(b"whole") + b"zz\r\n", b"whole", "protocol"),
        (chunk(b"whole") + b"5\r\ntoolong\r\n", b"wholetoolo", "protocol"),
        (chunk(b"whole") + b"5;" + b"x" * 200_000, b"whole", "protocol"),
    ],
    ids=["early-eof", "bad-size", "bad-end", "endless-extension"],
)
async def test_broken_bodies_deliver_what_was_whole_and_then_fail(transport, rest, body, kind):
    """Bytes before the break reach the sink, then one end with the fault."""
    async with Upstream(says(CHUNKED + rest)) as up:
        response = await transport.open(post(up.url))
        sink = Recorder()
        response.attach(sink)
        await asyncio.wait_for(sink.ended.wait(), 5)
    assert sink.body == body
    assert [error.kind for error in sink.ends] == [kind]


async def test_a_short_content_length_body_is_an_early_end(transport):
    """Fewer bytes than announced is a fault, not an answer."""
    async with Upstream(says(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhi")) as up:
        response = await transport.open(post(up.url))
        assert (await fault_of(response.read(100))).kind == "closed"


async def test_a_body_without_length_ends_with_its_connection(transport):
    """HTTP/1.0 style bodies are whole when the provider closes."""
    async with Upstream(says(b"HTTP/1.0 200 OK\r\n\r\nall of it")) as up:
        assert await (await transport.open(post(up.url))).read(100) == b"all of it"


async def test_interim_answers_are_skipped(transport):
    """A 100 Continue before the answer is not the answer."""
    async with Upstream(says(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)) as up:
        response = await transport.open(post(up.url))
        assert (response.status, await response.read(10)) == (200, b"hi")


async def test_redirects_are_not_followed(transport):
    """A 302 is an answer like any other: the key never travels to where it points."""
    async with Upstream(says(OK)) as other:
        away = b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % other.url.encode()
        async with Upstream(says(away)) as up:
            response = await transport.open(post(up.url))
            assert (response.status, await response.read(10)) == (302, b"")
        assert other.connections == 0


async def test_an_answer_nobody_asked_for_never_reaches_the_next_request(transport):
    """Bytes after an answer's end poison the connection, not the following caller's answer."""
    forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
    async with Upstream(says(OK + forged, then="wait")) as up:
        first = await transport.open(post(up.url))
        with contextlib.suppress(UpstreamFault):
            await first.read(10)
        second = await transport.open(post(up.url))
        with contextlib.suppress(UpstreamFault):
            assert await second.read(10) == b"hi"
        assert up.connections == 2


async def test_a_late_forged_answer_closes_a_kept_connection(transport):
    """The same, when the extra bytes come after the connection went back to the pool."""
    go, sent = asyncio.Event(), asyncio.Event()

    async def script(up, reader, writer):
        await up.request(reader)
        writer.write(OK)
        if up.connections == 1:
            await go.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
        assert await reader.read() == b"" or up.connections > 1
        sent.set()

    async with Upstream(script) as up:
        assert await (await transport.open(post(up.url))).read(10) == b"hi"
        go.set()
        await asyncio.wait_for(sent.wait(), 5)
        assert await (await transport.open(post(up.url))).read(10) == b"hi"
        assert up.connections == 2


async def test_early_bytes_wait_for_the_sink(transport):
    """What arrives before a sink is attached is kept, in order, and reading stops when it grows too large."""
    limits = TransportLimits(early_bytes=1000)
    small = Transport(limits)
    payload = b"x" * 8_000_000  # far beyond what two socket buffers hold
    sent = asyncio.Event()

    async def script(up, reader, writer):
        await up.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(payload) + payload)
        await writer.drain()
        sent.set()
        await reader.read()

    async with Upstream(script) as up:
        response = await small.open(post(up.url))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not sent.is_set()
        assert await asyncio.wait_for(response.read(len(payload)), 5) == payload
        await small.close()


async def test_pausing_stops_the_provider_and_resuming_goes_on(transport):
    """A paused response takes nothing more from the socket, and loses nothing."""
    total, sent = 8_000_000, asyncio.Event()

    async def script(up, reader, writer):
        await up.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        for _ in range(8):
            writer.write(b"y" * 1_000_000)
            await writer.drain()
        sent.set()
        await reader.read()

    async with Upstream(script) as up:
        response = await transport.open(post(up.url))
        sink = Recorder()
        sink.hook = lambda _: response.pause()
        response.attach(sink)
        await sink.until(1)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(sink.reads) == 1
        assert not sent.is_set()
        sink.hook = lambda _: None
        response.resume()
        await asyncio.wait_for(sink.ended.wait(), 5)
        assert (len(sink.body), sink.ends) == (total, [None])


async def test_a_connection_that_ends_paused_is_usable_again(transport):
    """Pausing inside the last read does not leave a deaf connection in the pool."""
    attached = asyncio.Event()

    async def script(up, reader, writer):
        await up.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        await attached.wait()
        writer.write(b"hi")
        await up.request(reader)
        writer.write(OK)
        await reader.read()

    async with Upstream(script) as up:
        first = await transport.open(post(up.url))
        sink = Recorder()
        sink.hook = lambda _: first.pause()
        first.attach(sink)
        attached.set()
        await asyncio.wait_for(sink.ended.wait(), 5)
        second = await asyncio.wait_for(transport.open(post(up.url)), 5)
        assert await second.read(10) == b"hi"
        assert up.connections == 1


async def test_cancel_hangs_up_and_nothing_follows(transport):
    """Cancelling closes the provider's connection at once and the sink hears no more, not even an end."""

    async def script(up, reader, writer):
        await up.request(reader)
        writer.write(CHUNKED + chunk(b"one"))
        await reader.read()

    async with Upstream(script) as up:
        response = await transport.open(post(up.url))
        sink = Recorder()
        sink.hook = lambda _: response.cancel()
        response.attach(sink)
        await asyncio.wait_for(up.lost.wait(), 5)
        assert (sink.reads, sink.ends) == ([b"one"], [])
        response.cancel()
        response.resume()
        response.pause()


async def test_a_cancelled_caller_hangs_up(transport):
    """A caller that gives up before the headers leaves no request running at the provider."""
    seen = asyncio.Event()

    async def script(up, reader, writer):
        await up.request(reader)
        seen.set()
        await reader.read()

    async with Upstream(script) as up:
        task = asyncio.ensure_future(transport.open(post(up.url)))
        await asyncio.wait_for(seen.wait(), 5)
        task.cancel()
        await asyncio.wait_for(up.lost.wait(), 5)
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_an_answer_over_the_limit_is_cut_off(transport):
    """``read`` takes exactly its limit and refuses one byte more, closing the connection."""
    more = CHUNKED + chunk(b"hi")
    async with Upstream(says(OK, more, then="wait")) as up:
        assert await (await transport.open(post(up.url))).read(2) == b"hi"
        assert (await fault_of((await transport.open(post(up.url))).read(1))).kind == "protocol"
        await asyncio.wait_for(up.lost.wait(), 5)


async def silent(up, reader, writer):
    await up.request(reader)
    await reader.read()


async def half(up, reader, writer):
    await up.request(reader)
    writer.write(CHUNKED + chunk(b"one"))
    await reader.read()


async def test_silence_before_the_headers_is_a_timeout():
    """A provider that takes the request and says nothing is given up, and its connection closed."""
    transport = Transport(TransportLimits(first_byte_s=0.02))
    async with Upstream(silent) as up:
        assert (await fault_of(transport.open(post(up.url)))).kind == "timeout"
        await asyncio.wait_for(up.lost.wait(), 5)
    await transport.close()


async def test_silence_inside_a_body_is_a_timeout_and_paused_time_is_not():
    """The idle limit ends a stalled body; while we do not read ourselves it does not run."""
    transport = Transport(TransportLimits(idle_s=0.02))
    async with Upstream(half) as up:
        response = await transport.open(post(up.url))
        sink = Recorder()
        response.attach(sink)
        await sink.until(3)
        response.pause()
        await asyncio.sleep(0.08)  # four idle limits
        assert sink.ends == []
        response.resume()
        await asyncio.wait_for(sink.ended.wait(), 5)
        assert [error.kind for error in sink.ends] == ["timeout"]
    await transport.close()


async def test_a_kept_connection_is_given_up_after_a_while():
    """An unused connection is closed by us, before its server would close it under a request."""
    transport = Transport(TransportLimits(keep_s=0.02))
    async with Upstream(says(OK, then="wait")) as up:
        await (await transport.open(post(up.url))).read(10)
        await asyncio.wait_for(up.lost.wait(), 5)
        await (await transport.open(post(up.url))).read(10)
        assert up.connections == 2
    await transport.close()


async def test_a_full_pool_refuses_instead_of_queueing():
    """One request more than the limit fails at once, and the place is free again afterwards."""
    transport = Transport(TransportLimits(connections_per_origin=1))
    async with Upstream(half) as up:
        first = await transport.open(post(up.url))
        assert (await fault_of(transport.open(post(up.url)))).kind == "connect"
        first.cancel()
        await asyncio.wait_for(up.lost.wait(), 5)
        (await transport.open(post(up.url))).cancel()
    await transport.close()


async def test_a_port_nobody_listens_on_is_a_connect_fault(transport):
    """A refused connection is told apart from a failed answer."""
    async with Upstream(silent) as up:
        url = up.url
    assert (await fault_of(transport.open(post(url)))).kind == "connect"


async def test_a_host_that_is_no_name_is_a_connect_fault(transport):
    """A host with an empty label never reaches a socket, and fails like any provider that cannot be reached."""
    assert (await fault_of(transport.open(post("http://a..b/v1/chat/completions")))).kind == "connect"


async def test_plain_text_on_a_tls_port_is_a_connect_fault(transport):
    """A handshake that fails is a fault of ours to handle, not an exception of the TLS library."""

    async def script(up, reader, writer):
        writer.write(b"220 not a handshake\r\n")
        await reader.read()

    async with Upstream(script) as up:
        fault = await fault_of(transport.open(post(up.url.replace("http://", "https://"))))
        assert fault.kind == "connect"


async def test_close_ends_what_is_running():
    """Closing the transport ends live responses with ``closed`` and refuses new ones."""
    transport = Transport()
    async with Upstream(half) as up:
        response = await transport.open(post(up.url))
        sink = Recorder()
        response.attach(sink)
        await asyncio.wait_for(transport.close(), 5)
        assert [error.kind for error in sink.ends] == ["closed"]
        assert (await fault_of(transport.open(post(up.url)))).kind == "connect"
    gc.collect()


async def test_an_end_before_attach_is_told_at_attach(transport):
    """A response that ended unwatched tells its sink everything, once, when one comes."""
    async with Upstream(says(OK)) as up:
        response = await transport.open(post(up.url))
        await asyncio.wait_for(up.lost.wait(), 5)
        sink = Recorder()
        response.attach(sink)
        await asyncio.wait_for(sink.ended.wait(), 5)
        assert (sink.body, sink.ends) == (b"hi", [None])


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/",
        "http:///x",
        "http://user:pw@h/",
        "http://h/#f",
        "http://h/ x",
        "http://h/\r\nX: y",
        "http://h:99999/",
        "http://hé/",
    ],
)
def test_urls_that_do_not_belong_in_a_request_line_are_refused(url):
    """A URL cannot carry credentials, other schemes, or anything that ends the request line early."""
    with pytest.raises(ValueError):
        split_url(url)


@pytest.mark.parametrize(
    "header",
    [("X", "a\r\nY: b"), ("X", "a\nb"), ("X\r\n", "a"), ("X ", "a"), ("X", "é"), ("Content-Length", "5"), ("HOST", "h")],
)
def test_headers_cannot_be_split_or_contradicted(header):
    """A header with a line end, or one the transport writes itself, is refused before a byte is sent."""
    with pytest.raises(ValueError):
        encode_head(UpstreamRequest("POST", "http://h/", (header,), b""), "h", "/")


def test_a_request_does_not_show_its_key():
    """Neither the key nor the prompt appears in the text form of a request."""
    assert "canary" not in repr(post("http://h/", b"canary-prompt"))
