"""What the engine needs from a client's connection; ``http`` implements it over aiohttp."""

from __future__ import annotations

from typing import Protocol


class Sink(Protocol):
    """The byte side of one streaming response."""

    def write(self, frames: bytes) -> None:
        """Hand complete SSE frames to the transport in one write."""
        ...

    def buffered(self) -> int:
        """Bytes that have not left this process yet; zero means the kernel has everything."""
        ...

    def gone(self) -> bool:
        """Whether the client's connection is closed or closing."""
        ...
