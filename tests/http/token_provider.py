"""A provider in a process of its own: answers anything with 90 tokens at once and then ten a second, for ever.

Run by path; it prints its port. Beside a node in one process its connections would count as the node's memory.
"""

from __future__ import annotations

import asyncio
import json
import sys

_CHUNK = {"id": "x", "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]}
_EVENT = b"data: " + json.dumps(_CHUNK).encode() + b"\n\n"
_FRAME = b"%x\r\n" % len(_EVENT) + _EVENT + b"\r\n"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_AT_ONCE = 90
_PACE_S = 0.1


class Provider(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(_HEAD + _FRAME * _AT_ONCE)
        self.speak()

    def speak(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_FRAME)
            asyncio.get_running_loop().call_later(_PACE_S, self.speak)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Provider, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent is gone


if __name__ == "__main__":
    asyncio.run(main())
