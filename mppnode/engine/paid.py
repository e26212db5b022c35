"""A running request: its bill, its provider, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson

from channels.faults import ChannelFault, Reason
from channels.units import Pico
from channels.wire import sse
from mppnode.engine import frames
from mppnode.engine.attempts import Answer
from mppnode.engine.record import Record
from mppnode.engine.sink import Sink
from mppnode.engine.stream import Ending, PaidStream
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Listing
from mppnode.kernel.requests import ChatRequest
from mppnode.kernel.tasks import end_of
from mppnode.kernel.usage import Usage
from mppnode.kernel.wishes import Wishes
from mppnode.metering.tally import Tally, TokenSource
from mppnode.observe.traces import Trace
from mppnode.providers.base import Completion, UpstreamFault, UpstreamResponse
from mppnode.rails.base import Facts, Purchase, Tab

if TYPE_CHECKING:
    from mppnode.engine.chat import ChatEngine
    from mppnode.engine.market import Route

T = TypeVar("T")

STOPPED_RETRY_S: Final = 5
"""What a caller is told to wait: behind a balancer it is sent to another node, alone a restart takes about as long."""
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
_NONE: Final = Wishes(models=())


class PaidChat:
    """One request, from its reservation to its receipt."""

    # Thousands of streams may wait for their payers at once, and these members would cost a kilobyte in a dict.
    __slots__ = (
        "__weakref__",
        "_engine",
        "_settled",
        "_settling",
        "_stream",
        "_superseded",
        "_waiting",
        "answer",
        "attempts",
        "begun",
        "chat",
        "cost",
        "decision",
        "endpoints",
        "first_at",
        "purchase",
        "record",
        "releasing",
        "request_id",
        "serving",
        "stalled_s",
        "starved_s",
        "strategy",
        "tab",
        "tally",
        "trace",
        "upstream",
    )

    def __init__(
        self,
        engine: ChatEngine,
        purchase: Purchase,
        tab: Tab,
        chat: ChatRequest,
        route: Route,
        *,
        request_id: str,
        record: Record | None,
        trace: Trace | None = None,
    ) -> None:
        self.request_id = request_id
        self.trace = trace
        """None when nothing is recorded of this request."""
        self.purchase = purchase
        self.tab = tab
        self.begun = engine.clock.monotonic()
        self.first_at: float | None = None
        """When the first output was there, on the same clock."""
        self.chat = chat
        self.strategy = route.strategy
        self.decision = route.decision
        self.endpoints = route.endpoints
        self.tally: Tally | None = None
        """The bill; None until a provider has taken the prompt."""
        self.answer: Answer | None = None
        self.attempts = 0
        self.upstream: UpstreamResponse | None = None
        self.serving = ""
        """The provider that has taken the prompt last."""
        self._engine = engine
        self._stream: PaidStream | None = None
        self._settling = False
        self._superseded: Ending | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self.releasing: asyncio.Task[None] | None = None
        self.starved_s = self.stalled_s = 0.0
        """Seconds its stream waited for money, and for a client that did not read."""
        self.cost = Pico(0)
        self.record = record
        # Not an Event: a kilobyte each, and thousands of streams may wait for their payers at once.
        self._settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def tokens(self) -> int:
        """Of prompt and answer, as far as this request has got."""
        if self.tally is None:
            return 0
        usage = self.tally.usage()
        return usage.prompt + usage.completion

    @property
    def delivered(self) -> int:
        """Output tokens its client has received as a stream."""
        return 0 if self._stream is None else self._stream.delivered_tokens

    @property
    def paused(self) -> bool:
        """Whether its stream ended while it waited for its payer."""
        return self._stream is not None and self._stream.paused_at_end

    @property
    def broke(self) -> UpstreamFault | None:
        """How its provider failed in the middle of the stream, if it did."""
        return None if self._stream is None else self._stream.error

    def facts(self, ending: Ending) -> Facts:
        """What became of this request."""
        tally, listing = self.tally, None if self.answer is None else self.answer.listing
        now, first = self._engine.clock.monotonic(), self.first_at
        return Facts(
            request=self.request_id,
            ending=ending.value,
            complete=ending is Ending.COMPLETE,
            stream=self.chat.stream,
            model=self.chat.model if listing is None else listing.model,
            provider="" if listing is None else listing.provider,
            strategy=self.strategy.value,
            attempts=self.attempts,
            usage=Usage() if tally is None else tally.usage(),
            token_source="" if tally is None else tally.source.value,
            first_ms=None if first is None else round((first - self.begun) * 1000),
            duration_ms=round((now - self.begun) * 1000),
        )

    def accepted(self, listing: Listing, response: UpstreamResponse | None) -> None:
        """Learn which provider has taken the prompt, and with None that it has failed after all."""
        self.upstream, self.serving = response, listing.provider
        endpoint = self.endpoints[listing.provider]
        self.tally = None if response is None else self._engine.tally(self.chat, listing, endpoint)

    async def connect(self, find: Callable[[], Awaitable[Answer]]) -> None:
        """Wait for a provider, unless the client leaves or a newer request takes the channel first.

        Raises:
            ChannelFault: ``HOLD_FENCED`` in the second case.
            NodeFault: as ``find``, or ``SHUTTING_DOWN``.
        """

        async def keep() -> None:
            # Kept here and not by the waiter, which may be cancelled in the very turn in which the provider answers.
            self.answer = await find()

        await self._interruptible(keep, "connect")
        self.first_at = self._engine.clock.monotonic()
        # A stream may last for an hour, or wait for its payer, and nobody needs its prompt any more.
        self.chat = replace(self.chat, messages=(), wishes=_NONE, raw=_NOTHING)

    async def _interruptible(self, work: Callable[[], Awaitable[T]], name: str) -> T:
        async def run() -> T | NodeFault:
            # Called here and not by the caller: a task that is cancelled before its first step would leave a coroutine.
            try:
                return await work()
            except NodeFault as fault:  # an answer, not a failed task
                return fault

        task: asyncio.Task[T | NodeFault] = self._engine.owner.start(run(), name=name)
        self._waiting = task
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            self._waiting = None
        if task.cancelled():
            if self._superseded is Ending.NODE_STOPPED:
                raise stopping()
            raise ChannelFault(Reason.HOLD_FENCED, detail="a newer request or a close took over this channel")
        outcome = task.result()
        if isinstance(outcome, NodeFault):
            raise outcome
        return outcome

    @property
    def over(self) -> asyncio.Future[None]:
        """Done when the bill is settled. To be waited for, not awaited: that would cancel it with its waiter."""
        return self._settled

    async def supersede(self, ending: Ending = Ending.SUPERSEDED) -> None:
        """End this request for a newer one, for a close or for the node's stop; returns when its bill is settled."""
        self._superseded = ending
        if self._stream is not None:
            self._stream.supersede(ending)
        elif self._waiting is not None:
            self._waiting.cancel()
        await asyncio.wait({self._settled})  # awaited itself, it would be cancelled with its waiter

    async def abandon(self, ending: Ending = Ending.DISCONNECTED) -> None:
        """Give a request up before anything was sent: what its provider has taken is the prompt, if it took that."""
        total = Pico(0)
        if self.answer is not None:
            self.answer.watch.dropped()
        if self.upstream is not None:
            self.upstream.cancel()
            self._engine.reporter.cancelled(self.serving)
            # Ended by us, or for a newer request, the caller is refused and pays nothing; nor for half an answer.
            if self._superseded is None and self.chat.stream:
                total, ending = self._forsaken(), Ending.DISCONNECTED
        release = self._engine.owner.start(self.settle(total, ending), name="release hold")
        await asyncio.wait({release})

    def _forsaken(self) -> Pico:
        """The bill of an accepted request whose client left before its first token: the prompt, which was read.

        Free, a dear prompt and a hang-up would cost the node at will. Cut off by the node's own stop it is the node's.
        """
        return Pico(0) if self._engine.stopping or self.tally is None else self.tally.prompt

    async def settle(self, total: Pico, ending: Ending) -> None:
        """Charge the final total, once."""
        self.cost = total
        self._settling = True
        try:
            await self._engine.ended(self, total, ending)
        finally:
            if not self._settled.done():
                self._settled.set_result(None)
            if self.record is not None:
                await self.record.drop()

    def _give_back(self) -> None:
        """After a mistake of ours: nothing stays held for a request that is over, and no more than arrived is owed."""
        if not self._settling:
            delivered = Pico(0) if self._stream is None else self._stream.final_total(Ending.UPSTREAM_FAILED)
            total = Pico(min(delivered, self.tab.cap_pico))
            self._engine.owner.spawn(self.settle(total, Ending.UPSTREAM_FAILED), name="release hold")

    # --------------------------------------------------------------------------------------------------- streaming

    async def stream(self, sink: Sink) -> None:
        """Deliver the response as events and end it with its receipt; survives the cancellation of its caller.

        Cancelling means that the client is gone: the upstream is closed and the bill settled all the same.
        """
        answer, tally = self.answer, self.tally
        assert answer is not None
        assert answer.decoder is not None
        assert tally is not None
        if self.record is not None:
            sink = self.record.through(sink)
        if self.decision is not None:
            sink.write(frames.routing_frame(self.decision))
        self._stream = PaidStream(
            upstream=answer.response,
            decoder=answer.decoder,
            tab=self.tab,
            tally=tally,
            sink=sink,
            limits=self._engine.limits,
            tokens_max=self.chat.completion_tokens_max,
            choices=self.chat.choices,
            hold_finish=self.chat.include_usage is None,
            early=answer.early,
            probe=self._engine.probe,
            metrics=self._engine.metrics,
        )
        answer.early = ()
        if self._superseded is not None:
            self._stream.supersede(self._superseded)
        task = self._engine.owner.start(self._deliver(self._stream, sink, answer, tally), name="stream")
        try:
            await end_of(task)
        except asyncio.CancelledError:
            self._stream.abandon()
            raise
        task.result()

    async def _deliver(self, stream: PaidStream, sink: Sink, answer: Answer, tally: Tally) -> None:
        begun = self._engine.clock.monotonic()
        try:
            ending = await stream.run()
            if ending is Ending.UPSTREAM_FAILED and stream.error is not None:
                answer.watch.broke(stream.error.kind)
                self._engine.reporter.tried(answer.listing.provider, stream.error.kind)
            else:
                self._engine.reporter.tried(answer.listing.provider)
                seconds = self._engine.clock.monotonic() - begun - stream.starved_s
                answer.watch.ended(tokens=tally.tokens, seconds=seconds)
            await self._finish(stream, sink, answer, tally, ending)
        except Exception:
            self._give_back()
            raise

    async def _finish(self, stream: PaidStream, sink: Sink, answer: Answer, tally: Tally, ending: Ending) -> None:
        if ending not in (Ending.DISCONNECTED, Ending.STALLED) and not await stream.drained():
            ending = Ending.STALLED
        self.starved_s, self.stalled_s = stream.starved_s, stream.stalled_s
        if stream.cancelled:
            self._engine.reporter.cancelled(answer.listing.provider)
        if ending is Ending.COMPLETE:
            await self._engine.count(answer.listing, tally)
        total = stream.final_total(ending)
        if ending is Ending.DISCONNECTED and not stream.delivered_tokens:
            total = self._forsaken()
        # A report beyond what was asked for is the provider's affair: nobody pays more than the request could cost.
        self.cost = Pico(min(total, self.tab.cap_pico))
        last = b"".join(self._last_frames(stream, ending, tally))
        if self.record is not None:
            # Cut off at its own limit an answer is whole to its caller, who would pay for another one.
            await self.record.end(last + sse.DONE, complete=ending in (Ending.COMPLETE, Ending.OVERRUN))
        await self.settle(self.cost, ending)
        if ending is Ending.COMPLETE:
            self._engine.learn(answer.listing, tally)
        if tally.report is None:
            self._engine.look_up(answer, tally)
        if not sink.gone():
            self._engine.probe("receipt.before")
            sink.write(last + self.tab.receipt_frame(self._engine.clock.now_millis(), self.tokens) + sse.DONE)
            self._engine.probe("receipt.after")
        elif ending is Ending.COMPLETE:
            self._engine.reporter.left_at_the_end()

    def _last_frames(self, stream: PaidStream, ending: Ending, tally: Tally) -> list[bytes]:
        first, held, last = stream.first_chunk, stream.finish, []
        match ending:
            case Ending.UPSTREAM_FAILED | Ending.REJECTED:
                last.append(frames.error_frame(first, "the provider failed before the response was complete"))
            case Ending.UNPAID | Ending.SUPERSEDED | Ending.CLOSED | Ending.OVERRUN | Ending.NODE_STOPPED:
                last.append(frames.finish_frame(first, ending.value))
            case Ending.COMPLETE | Ending.STALLED | Ending.DISCONNECTED:
                last += [held] if held else []
        usage = frames.usage_json(tally.usage(), self.cost)
        if self.chat.include_usage:
            last.append(frames.usage_frame(first, usage))
        elif self.chat.include_usage is None:
            # A caller who did not ask for a chunk without choices gets the usage on the last one that has them.
            last = [*last[:-1], frames.with_usage(last[-1], usage)] if last else [frames.usage_frame(first, usage)]
        return last

    # --------------------------------------------------------------------------------------------------- buffered

    async def complete(self) -> bytes:
        """The whole response as one JSON object with ``usage``, charged by its usage.

        Raises:
            ChannelFault: ``HOLD_FENCED`` when a close has ended the request meanwhile.
        """
        answer, tally = self.answer, self.tally
        assert answer is not None
        assert answer.completion is not None
        assert tally is not None
        completion = answer.completion
        # From here on nobody interrupts: cancelled while the charge commits, it would be billed and not delivered.
        settling = self._engine.owner.start(self._charge(answer, completion, tally), name="charge")
        await asyncio.wait({settling})
        return settling.result()

    async def _charge(self, answer: Answer, completion: Completion, tally: Tally) -> bytes:
        try:
            return await self._bill(answer, completion, tally)
        except Exception:
            self._give_back()
            raise

    async def _bill(self, answer: Answer, completion: Completion, tally: Tally) -> bytes:
        tally.count_whole(completion.text)
        tally.report = completion.usage
        answer.watch.ended(tokens=0, seconds=0.0)
        self._engine.reporter.tried(answer.listing.provider)
        await self._engine.count(answer.listing, tally)
        self.cost = Pico(min(tally.total(), self.tab.granted, self.tab.cap_pico))
        document = completion.document
        document["usage"] = frames.usage_json(tally.usage(), self.cost)
        if self.decision is not None:
            document["routing"] = dict(self.decision)
        body = orjson.dumps(document)
        if self.record is not None:
            await self.record.end(body, complete=True)
        await self.settle(self.cost, Ending.COMPLETE)
        if tally.source is TokenSource.REPORTED:
            self._engine.learn(answer.listing, tally)
        return body


def stopping() -> NodeFault:
    """The refusal of a node that is about to stop: nothing was charged, and another node may serve at once."""
    return NodeFault(NodeReason.SHUTTING_DOWN, detail="the node is shutting down", retry_after_s=STOPPED_RETRY_S)
