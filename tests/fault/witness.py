"""Stands between payers and a node and writes down what really left it: every token, and every promise it made.

It counts bytes off the socket, below any client that might lose a buffer when a connection breaks. Its address stays
the same while nodes behind it die and are replaced.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from channels.ids import ChannelId
from channels.wire import receipt as receipts
from channels.wire import sse
from channels.wire.receipt import SessionReceipt

_TOKEN = b'"delta":{"content":"'
_LAST = b'"finish_reason":"'


@dataclass
class Received:
    """What one channel's payer has got and was told. Units, except that tokens and streams are counts."""

    tokens: int = 0
    streams: int = 0
    whole: int = 0
    """Responses that came to their last chunk: those are charged by the provider's report."""
    accepted: int = 0
    spent: int = 0

    def hear(self, receipt: SessionReceipt) -> None:
        self.accepted = max(self.accepted, receipt.accepted)
        self.spent = max(self.spent, receipt.spent)


class Witness:
    """A relay in front of whichever node is alive.

    ``on_news`` is told, at the moment it arrives, how many bytes and how many promises this node has sent so far.
    """

    def __init__(self) -> None:
        self.channels: defaultdict[ChannelId, Received] = defaultdict(Received)
        self.target = ("127.0.0.1", 1)
        self.url = ""
        self.passed = 0
        self.promises = 0
        self.on_news: Callable[[int, int], None] = lambda passed, promises: None
        self.open: set[_NodeSide] = set()
        self._quiet = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(lambda: _PayerSide(self), "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    def point_at(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.target, self.passed, self.promises = (host, int(port)), 0, 0

    async def quiet(self) -> None:
        """Wait until every byte a dead node had sent has been counted."""
        while self.open:
            self._quiet.clear()
            await self._quiet.wait()

    def took(self, size: int) -> None:
        self.passed += size
        self.on_news(self.passed, self.promises)

    def lost(self, side: _NodeSide) -> None:
        self.open.discard(side)
        self._quiet.set()


class _PayerSide(asyncio.Protocol):
    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._early: list[bytes] = []
        self._node: _NodeSide | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        try:
            loop = asyncio.get_running_loop()
            _, node = await loop.create_connection(lambda: _NodeSide(self._witness, self), *self._witness.target)
        except OSError:
            self.transport.abort()
            return
        for data in self._early:
            node.transport.write(data)
        self._node = node

    def data_received(self, data: bytes) -> None:
        if self._node is None:
            self._early.append(data)
        else:
            self._node.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        # Not closed: what a dead node had sent is still in the kernel, and it was sent to this payer.
        if self._node is not None and not self._node.transport.is_closing():
            self._node.transport.write_eof()


class _NodeSide(asyncio.Protocol):
    """Reads HTTP answers line by line; only frames that arrived whole count, as only those can be used."""

    def __init__(self, witness: Witness, payer: _PayerSide) -> None:
        self._witness = witness
        self._payer = payer
        self._tail = b""
        self._paid = False
        self._channel: Received | None = None
        self._first = True
        self._event = b""
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._witness.open.add(self)

    def data_received(self, data: bytes) -> None:
        *lines, self._tail = (self._tail + data).split(b"\n")
        for line in lines:
            self._line(line)
        self._payer.transport.write(data)
        self._witness.took(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._witness.lost(self)
        self._payer.transport.close()

    def _line(self, line: bytes) -> None:
        name, _, value = line.partition(b": ")
        if (start := line.find(b"HTTP/1.1 ")) >= 0:  # perhaps behind the body before it, which ends without a newline
            self._paid, self._channel, self._first = line[start + 9 : start + 10] == b"2", None, True
        elif name == b"Payment-Receipt" and self._paid:
            receipt = receipts.decode(value.strip().decode())
            self._channel = self._witness.channels[receipt.channel_id]
            self._channel.hear(receipt)
            self._witness.promises += 1
        elif name == b"event":
            self._event = value
        elif name == b"data":
            self._data = value
        elif not line:
            self._dispatch()

    def _dispatch(self) -> None:
        if self._channel is not None and self._event == sse.RECEIPT_EVENT.encode():
            self._channel.hear(sse.parse_receipt_event(self._data.decode()))
        elif self._channel is not None and not self._event and _LAST in self._data:
            self._channel.whole += 1
        elif self._channel is not None and not self._event and _TOKEN in self._data:
            self._channel.tokens += 1
            self._channel.streams += self._first
            self._first = False
        self._event = self._data = b""
