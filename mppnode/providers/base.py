"""What the engine knows of a provider: bytes that arrive, chunks they become, and one kind of fault.

Three seams. A :class:`Transport` moves bytes and knows no JSON; a :class:`ChunkDecoder` knows JSON and no sockets; the
engine is the :class:`Sink` between them. The sink is called from inside the socket's own callback on purpose: an async
iterator would cost a wake-up of a task per token, which is most of what a relay's CPU goes to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from mppnode.kernel.requests import ChatRequest
from mppnode.kernel.usage import Usage

FaultKind = Literal["connect", "timeout", "protocol", "closed", "status", "error"]
"""``connect``: never reached. ``timeout``: too slow. ``protocol``: sent what we cannot read. ``closed``: hung up early.
``status``: answered with a status that is not success. ``error``: answered 200 and reported a failure inside."""


class UpstreamFault(Exception):
    """A provider failed us. ``detail`` is always our own words: an upstream's text may quote its key or the prompt."""

    def __init__(
        self, kind: FaultKind, *, detail: str = "", status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        self.kind: FaultKind = kind
        self.detail = detail
        self.status = status
        self.retry_after_s = retry_after_s
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """One line for logs and for the list of attempts in an error answer."""
        text = f"{self.kind}: {self.detail}" if self.detail else self.kind
        return text if self.status is None else f"{text} (status {self.status})"


@dataclass(slots=True)
class Chunk:
    """One server-sent event of a stream, ready to forward.

    Not frozen: a frozen dataclass assigns through ``object.__setattr__``, and this is built once per token.
    """

    frame: bytes = b""
    """``data: {...}`` plus a blank line, one line of JSON; empty when there is nothing to forward."""
    tokens: int = 0
    """Choices that carry output in this event: the least number of output tokens it can be."""
    usage: Usage | None = None
    """The provider's cumulative report, when the event carries a plausible one."""
    finished: bool = False
    """Whether a choice has ended with this event."""
    error: str | None = None
    """A fixed word of ours when the provider broke off or reported a failure inside its stream."""
    done: bool = False
    """Whether this is the provider's end marker."""
    reported: bool = False
    """Whether ``frame`` says anything about usage, plausible or not: the node writes its own report instead."""
    text: str = ""
    """The generated output of the event joined: answer, reasoning, refusal, tool names and arguments; for counting."""


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """One HTTP request to a provider. Its text form shows neither headers (they hold the key) nor body (the prompt)."""

    method: str
    url: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    body: bytes = field(repr=False)


class Sink(Protocol):
    """Receives one response. Called synchronously from the socket's callback: neither method may raise or block."""

    def on_body(self, data: bytes) -> None:
        """Take the body bytes of one read; never empty."""
        ...

    def on_end(self, error: UpstreamFault | None) -> None:
        """Learn that no more bytes follow; called exactly once, unless the response was cancelled."""
        ...


class UpstreamResponse(Protocol):
    """A response whose headers have arrived and whose body is still on its way."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers with names in lower case."""
        ...

    def attach(self, sink: Sink) -> None:
        """Send the body to ``sink`` from now on; what nobody has had yet is delivered before this returns.

        A sink attached later takes over from the one before; one attached after the end is told of the end.
        """
        ...

    def pause(self) -> None:
        """Stop reading from the provider; a read already in progress may still be delivered."""
        ...

    def resume(self) -> None:
        """Read from the provider again."""
        ...

    def cancel(self) -> None:
        """Close the connection at once; the sink hears nothing more. Harmless when the response has ended."""
        ...

    async def read(self, limit: int) -> bytes:
        """Return the whole body, of at most ``limit`` bytes; instead of :meth:`attach`.

        Raises:
            UpstreamFault: ``protocol`` when the body is longer, otherwise what ended the response early.
        """
        ...


class Transport(Protocol):
    """Opens HTTP exchanges with providers."""

    async def open(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send ``request`` and return when the response's headers are in, whatever the status.

        Raises:
            UpstreamFault: ``connect``, ``timeout``, ``protocol`` or ``closed``.
        """
        ...

    async def close(self) -> None:
        """Close every connection; responses that are still open end with ``closed``."""
        ...


class ChunkDecoder(Protocol):
    """Cuts a provider's byte stream into chunks; the result does not depend on how the bytes were split."""

    def feed(self, data: bytes) -> list[Chunk]:
        """Return the chunks that ``data`` completes.

        A broken stream is a last chunk with an ``error``: an exception would lose the whole chunks of the same read.
        """
        ...

    def end(self) -> list[Chunk]:
        """Return what the provider left unfinished when it closed: an event that lacked only its blank line."""
        ...


@dataclass(frozen=True, slots=True)
class PriceCap:
    """The most a provider may charge us, in pico-dollars per token of prompt and of completion."""

    prompt: int
    completion: int


@dataclass(frozen=True, slots=True)
class Call:
    """One request as a provider is to get it. Neither the prompt nor the key shows in its text form."""

    chat: ChatRequest = field(repr=False)
    model: str
    """The provider's own name of the model."""
    base_url: str
    api_key: str | None = field(repr=False)
    max_tokens: int
    """Of each choice; what the node reserved for, whatever the caller wrote."""
    cap: PriceCap | None = None
    """For providers that choose prices themselves and can be told a limit."""
    traceparent: str | None = None
    """What makes the provider's trace a part of the request's, as W3C Trace Context writes it; None is not sent."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer in the OpenAI shape, the provider's usage report if it can be true, and what was generated."""

    document: dict[str, Any] = field(repr=False)
    usage: Usage | None
    text: str = field(repr=False)


class Adapter(Protocol):
    """One provider API as pure code: our request in its words, its answers in ours."""

    @property
    def running_usage(self) -> bool:
        """Whether usage comes with every event of a stream, cumulative so far, and not only at the end."""
        ...

    @property
    def cancel_stops_billing(self) -> bool:
        """Whether the provider is known to stop generating, and charging us, when the connection is closed."""
        ...

    def encode(self, call: Call) -> UpstreamRequest:
        """The provider's request.

        Raises:
            NodeFault: ``INVALID_FIELD`` for what this provider cannot be asked.
        """
        ...

    def decoder(self) -> ChunkDecoder:
        """A fresh decoder for one stream; its frames are OpenAI chunks whatever the provider sends."""
        ...

    def decode(self, body: bytes) -> Completion:
        """A whole answer.

        Raises:
            UpstreamFault: ``protocol`` when it is not one, ``error`` when it reports a failure.
        """
        ...


@runtime_checkable
class Lookup(Protocol):
    """A provider that can be asked afterwards what a request took: for streams that died before their report."""

    def encode_lookup(self, generation: str, *, base_url: str, api_key: str | None) -> UpstreamRequest:
        """The request for one generation's record."""
        ...

    def decode_lookup(self, body: bytes) -> Usage | None:
        """The counts of the record, or None when it is not ready or cannot be true."""
        ...
