"""Trying providers in order until one has begun to answer: failover that nobody notices.

A provider counts as working when its first output is in memory, not when its headers are: a 200 with an error inside, a
web page, or nothing at all are ordinary ways to fail. Nothing has been sent to the caller until then, so the next
provider may be tried; after that a failure is the caller's to see.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import Attempt, NodeFault, NodeReason
from mppnode.kernel.listing import Listing
from mppnode.observe.traces import TRACEPARENT
from mppnode.providers.base import (
    Adapter,
    Call,
    Chunk,
    ChunkDecoder,
    Completion,
    Transport,
    UpstreamFault,
    UpstreamRequest,
    UpstreamResponse,
)

COMPLETION_BYTES_MAX: Final = 16 * 1024 * 1024
"""A buffered answer: some megabytes of text with log-probabilities, or a few generated pictures."""
_EARLY_CHUNKS_MAX: Final = 4_096
"""Events before the first output: a role and some pings are usual, and all of them are kept."""
_RETRY_AFTER_MAX_S: Final = 120  # what both OpenAI SDKs are willing to wait
_OK: Final = 200
_TOO_MANY: Final = 429
_QUICK_S: Final = 1.0  # a refusal that came sooner has cost the caller nothing it could notice
CALLERS_FAULT: Final = frozenset({400, 413, 422})
"""What another provider would refuse too, unless it takes longer contexts. Not 404: the names of models are ours."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a provider is, what it speaks, and its key, which is called for only when a request is built."""

    base_url: str
    api_key: Callable[[], str | None]
    adapter: Adapter


class Watch(Protocol):
    """Who learns how an attempt went; implemented over the router's picture of health."""

    def began(self, first_s: float) -> None:
        """The first output came after so many seconds."""
        ...

    def failed(self, kind: str, *, status: int | None, retry_after_s: float | None) -> None:
        """The attempt failed before any output."""
        ...

    def dropped(self) -> None:
        """The attempt was cut short by us or by the caller: it says nothing about the provider."""
        ...

    def ended(self, *, tokens: int, seconds: float) -> None:
        """The answer is complete: so many tokens, in so many seconds since the first."""
        ...

    def broke(self, kind: str) -> None:
        """The provider failed in the middle of its answer."""
        ...


class Opening:
    """Receives a stream until it is clear whether it is one, then gives what it has seen to who reads on."""

    __slots__ = ("_decoder", "_finished", "chunks", "response", "verdict")

    def __init__(self, response: UpstreamResponse, decoder: ChunkDecoder) -> None:
        self.response = response
        self.chunks: list[Chunk] = []
        self._decoder = decoder
        self._finished = False
        self.verdict: asyncio.Future[UpstreamFault | None] = asyncio.get_running_loop().create_future()

    def on_body(self, data: bytes) -> None:
        """Take one read of the upstream."""
        self._judge(self._decoder.feed(data))

    def on_end(self, error: UpstreamFault | None) -> None:
        """Learn that the upstream has sent everything, or broke."""
        if error is None:
            self._judge(self._decoder.end())
            # A provider may leave out its end marker, but not the reason why it stopped.
            error = None if self._finished else UpstreamFault("closed", detail="it ended without any output")
        self._decide(error)

    def _judge(self, chunks: list[Chunk]) -> None:
        self.chunks += chunks
        for chunk in chunks:
            if chunk.error is not None:
                self._decide(UpstreamFault("error", detail=chunk.error))
            elif chunk.tokens:
                self._decide(None)
            elif chunk.finished:
                self._finished = True
            elif chunk.done:
                # No output and no reason for it: an overloaded server's way to give up.
                self._decide(None if self._finished else UpstreamFault("error", detail="it answered nothing"))
        if len(self.chunks) > _EARLY_CHUNKS_MAX:
            self._decide(UpstreamFault("protocol", detail="it sent nothing but empty events"))

    def _decide(self, fault: UpstreamFault | None) -> None:
        if not self.verdict.done():
            # What follows waits in the socket: the caller is not yet there to set the pace.
            self.response.pause()
            self.verdict.set_result(fault)


@dataclass(slots=True)
class Answer:
    """A provider that works: a stream with its first output, or a whole answer."""

    listing: Listing
    response: UpstreamResponse
    decoder: ChunkDecoder | None
    early: Sequence[Chunk]
    """What came with the first output; whoever takes it empties it, or it would stay as long as the stream."""
    completion: Completion | None
    watch: Watch
    endpoint: Endpoint
    """As it was when the provider was asked: the configuration may name another by now, or none."""

    @property
    def runs_on(self) -> bool:
        """Whether the provider may go on generating, at our expense, when it is cut off."""
        return not self.endpoint.adapter.cancel_stops_billing


class Failover:
    """Tries the providers of one request, in order, within one deadline.

    What is rationed is the caller's patience. Whoever refuses at once (nobody listens, 429, 500, a web page) has used
    none of it, so the next one is tried, however many there are: with every refusal counted, three dead providers would
    hide a working one. Only ``slow_max`` may be waited for, and each of them gets its share of the time that is left.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        clock: Clock,
        timeout_s: float,
        accepted: Callable[[Listing, UpstreamResponse | None], None],
        slow_max: int = 1,
    ) -> None:
        """``accepted`` hears which provider has taken the prompt, and with None that it has failed after all.

        Cancelled, it stays accepted: the prompt has been read, whoever ended this.
        """
        self._transport = transport
        self._clock = clock
        self._deadline = clock.monotonic() + timeout_s
        self._accepted = accepted
        self._slow_left = slow_max
        self._retry_after_s: list[float] = []
        self.trail: list[Attempt] = []

    async def attempt(
        self, listing: Listing, endpoint: Endpoint, call: Call, watch: Watch, *, left: int
    ) -> Answer | UpstreamFault | NodeFault:
        """One provider, of ``left`` that may yet be tried; its fault when it failed.

        A NodeFault is what this provider cannot be asked: nothing was sent, and nothing is held against it.
        """
        try:
            request = endpoint.adapter.encode(call)
        except NodeFault as refusal:
            watch.dropped()
            return refusal
        if call.traceparent is not None:
            request = replace(request, headers=(*request.headers, (TRACEPARENT, call.traceparent)))
        begun = self._clock.monotonic()
        remaining = max(self._deadline - begun, 0.001)
        # A buffered answer is silent until it is complete: a share would cut off a slow provider, not a dead one.
        patience = remaining / max(min(left, self._slow_left), 1) if call.chat.stream else remaining
        try:
            async with asyncio.timeout(patience):
                answer = await self._answer(listing, endpoint, call, request, watch)
        except TimeoutError:
            fault = UpstreamFault("timeout", detail="the provider was too slow")
        except UpstreamFault as found:
            fault = found
        except BaseException:
            watch.dropped()
            raise
        else:
            watch.began(self._clock.monotonic() - begun)
            return answer
        self._accepted(listing, None)
        if fault.kind == "timeout" or self._clock.monotonic() - begun >= _QUICK_S:
            self._slow_left -= 1
        self._note(listing, fault, watch)
        return fault

    @property
    def exhausted(self) -> bool:
        """Whether the caller has waited long enough."""
        return self._slow_left <= 0 or self._clock.monotonic() >= self._deadline

    def failure(self) -> NodeFault:
        """Everything that could be tried has failed."""
        trail = tuple(self.trail)
        if not trail:
            # Decided on a moment ago, and avoided by now: other requests have found out meanwhile.
            return NodeFault(
                NodeReason.NO_PROVIDER, detail="every provider of this model has just failed", retry_after_s=1
            )
        if all(attempt.status == _TOO_MANY for attempt in trail):
            wait = min(self._retry_after_s, default=1.0)
            return NodeFault(
                NodeReason.PROVIDERS_BUSY,
                detail="every provider asks us to wait",
                retry_after_s=max(1, min(-int(-wait // 1), _RETRY_AFTER_MAX_S)),
                attempts=trail,
            )
        if all(attempt.kind == "timeout" for attempt in trail):
            return NodeFault(NodeReason.PROVIDER_TIMEOUT, detail="every provider was too slow", attempts=trail)
        return NodeFault(NodeReason.ALL_PROVIDERS_FAILED, detail="every provider failed", attempts=trail)

    def _note(self, listing: Listing, fault: UpstreamFault, watch: Watch) -> None:
        self.trail.append(Attempt(listing.provider, fault.kind, fault.status))
        if fault.retry_after_s is not None:
            self._retry_after_s.append(fault.retry_after_s)
        if fault.status in CALLERS_FAULT:
            watch.dropped()
        else:
            watch.failed(fault.kind, status=fault.status, retry_after_s=fault.retry_after_s)

    async def _answer(
        self, listing: Listing, endpoint: Endpoint, call: Call, request: UpstreamRequest, watch: Watch
    ) -> Answer:
        response = await self._transport.open(request)
        try:
            if response.status != _OK:
                raise UpstreamFault("status", status=response.status, retry_after_s=retry_after(response))
            self._accepted(listing, response)
            if call.chat.stream:
                return await self._first_output(listing, endpoint, response, watch)
            completion = endpoint.adapter.decode(await response.read(COMPLETION_BYTES_MAX))
            if _says_nothing(completion):
                raise UpstreamFault("error", detail="it answered nothing")
            return Answer(listing, response, None, (), completion, watch, endpoint)
        except BaseException:
            response.cancel()
            raise

    async def _first_output(
        self, listing: Listing, endpoint: Endpoint, response: UpstreamResponse, watch: Watch
    ) -> Answer:
        decoder = endpoint.adapter.decoder()
        opening = Opening(response, decoder)
        response.attach(opening)
        fault = await opening.verdict
        if fault is not None:
            raise fault
        return Answer(listing, response, decoder, opening.chunks, None, watch, endpoint)


def _says_nothing(completion: Completion) -> bool:
    """Whether an answer has neither output nor a reason for having none: nobody pays for that, here or in a stream."""
    choices = completion.document.get("choices") or ()
    return not completion.text and not any(choice.get("finish_reason") for choice in choices)


def refused_as_asked(fault: BaseException) -> bool:
    """Whether providers have found the request itself at fault: sent again, it would be again."""
    attempts = fault.attempts if isinstance(fault, NodeFault) else ()
    return bool(attempts) and all(attempt.status in CALLERS_FAULT for attempt in attempts)


def retry_after(response: UpstreamResponse) -> float | None:
    """Seconds a provider asks us to wait, if it says so in seconds. Source: RFC 9110, Retry-After."""
    text = response.headers.get("retry-after", "")
    if not text.isascii() or not text.isdigit() or len(text) > 6:  # noqa: PLR2004 - eleven days
        return None
    return float(text)
