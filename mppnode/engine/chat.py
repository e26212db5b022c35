"""One paid chat request, start to finish: price it, reserve for it, call the provider, deliver, charge, receipt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import orjson

from channels.faults import ChannelFault, Reason
from channels.model import Account
from channels.units import Pico
from channels.wire import sse
from channels.wire.receipt import SessionReceipt
from mppnode.engine import frames
from mppnode.engine.sink import Sink
from mppnode.engine.stream import Ending, PaidStream, StreamLimits
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import Attempt, NodeFault, NodeReason
from mppnode.kernel.probe import Probe, unwatched
from mppnode.kernel.requests import ChatRequest
from mppnode.kernel.tasks import TaskOwner
from mppnode.kernel.usage import Usage
from mppnode.metering.tally import Tally, prompt_tokens_charged, prompt_tokens_held
from mppnode.observe.logs import Log
from mppnode.pricing.book import Model, PriceBook, choose_unit, price
from mppnode.providers.base import ChunkDecoder, Transport, UpstreamFault, UpstreamResponse
from mppnode.providers.openai_compatible import (
    decode_completion,
    encode_request,
    generated_bytes,
)
from mppnode.rails.base import Offer
from mppnode.rails.live import LiveChannels
from mppnode.rails.presented import Presented
from mppnode.rails.session import Need, SessionRail
from mppnode.rails.tab import SessionTab

T = TypeVar("T")

_USUAL_PROMPT_TOKENS: Final = 512
_FIRST_WINDOW_TOKENS: Final = 64
_COMPLETION_BYTES_MAX: Final = 16 * 1024 * 1024
_BYTES_PER_TOKEN: Final = 6  # under-estimate of an unreported completion, as for prompts
_OK: Final = 200


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where a provider is and how to authenticate; the key is called for only when a request is built."""

    base_url: str
    api_key: Callable[[], str | None]
    decoder: Callable[[], ChunkDecoder]


class ChatEngine:
    """Serves chat requests against payment channels."""

    def __init__(
        self,
        *,
        book: PriceBook,
        default_model: str,
        upstreams: Mapping[str, Upstream],
        transport: Transport,
        rail: SessionRail,
        live: LiveChannels,
        owner: TaskOwner,
        clock: Clock,
        limits: StreamLimits,
        streams_max: int,
        log: Log,
        probe: Probe = unwatched,
    ) -> None:
        self.probe = probe
        self._book = book
        self._default = default_model
        self._upstreams = upstreams
        self._transport = transport
        self._rail = rail
        self._live = live
        self._owner = owner
        self._clock = clock
        self._limits = limits
        self._streams_max = streams_max
        self._log = log
        self._running = 0
        self._stopping = False

    def offer(self, route: str, model: str | None) -> Offer:
        """What a request for ``model`` is sold for; without one, what a usual request on this route is.

        Raises:
            NodeFault: ``UNKNOWN_MODEL``.
        """
        found = self._book.lookup(model if model is not None else self._default)
        unit = choose_unit(
            found.rates, usual_prompt_tokens=_USUAL_PROMPT_TOKENS, first_window_tokens=_FIRST_WINDOW_TOKENS
        )
        return Offer(route, found, unit)

    def stop(self) -> None:
        """Take no new requests; running ones go on."""
        self._stopping = True

    def require_room(self) -> None:
        """Refuse before any money moves when the node could not serve. Raises ``OVERLOADED``, ``SHUTTING_DOWN``."""
        if self._stopping:
            raise NodeFault(NodeReason.SHUTTING_DOWN, detail="the node is shutting down", retry_after_s=5)
        if self._running >= self._streams_max:
            raise NodeFault(NodeReason.OVERLOADED, detail="too many live requests", retry_after_s=1)

    async def start(self, presented: Presented, account: Account, chat: ChatRequest, offer: Offer) -> PaidChat:
        """Reserve for a request and get its provider's answer; nothing has been charged when this returns.

        Raises:
            ChannelFault: the reservation was refused.
            NodeFault: ``ALL_PROVIDERS_FAILED`` or ``PROVIDER_TIMEOUT``; the reservation is released.
        """
        run = await self._admit(presented, account, chat, offer)
        try:
            self.probe("connect.before")
            await run.connect(self._connect(chat, offer.model))
            self.probe("connect.after")
        except BaseException:
            # Also on cancellation: the hold must not outlive its request, so the owner ends it even if we are cut off.
            await run.abandon(Ending.UPSTREAM_FAILED)
            raise
        return run

    async def _admit(self, presented: Presented, account: Account, chat: ChatRequest, offer: Offer) -> PaidChat:
        """Reserve for a request; a client that leaves meanwhile leaves no reservation behind.

        Cancelling the commit itself would not undo it: the hold would have no owner until the next restart.
        """

        async def reserve() -> PaidChat | ChannelFault:
            need = _need(chat, offer.model)
            try:
                tab = await self._rail.open_tab(presented, account, need, offer.unit.amount)
            except ChannelFault as fault:  # an answer, not a failed task
                return fault
            decoder = self._upstreams[offer.model.provider].decoder()
            tally = Tally(offer.model.rates, prompt_bytes=chat.prompt_bytes, completion_max=chat.completion_tokens_max)
            run = PaidChat(self, tab, tally, chat, decoder)
            self._running += 1
            self._live.on_supersede(tab, run.supersede)
            return run

        task = self._owner.start(reserve(), name="reserve")
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.add_done_callback(self._release)
            raise
        outcome = task.result()
        if isinstance(outcome, ChannelFault):
            raise outcome
        return outcome

    def _release(self, task: asyncio.Task[PaidChat | ChannelFault]) -> None:
        if not task.cancelled() and task.exception() is None and isinstance(run := task.result(), PaidChat):
            settled = run.settle(Pico(0), Ending.DISCONNECTED)
            run.releasing = self._owner.start(settled, name="release hold")

    async def _connect(self, chat: ChatRequest, model: Model) -> UpstreamResponse:
        upstream = self._upstreams[model.provider]
        request = encode_request(
            chat,
            model=model.upstream_model,
            base_url=upstream.base_url,
            api_key=upstream.api_key(),
            max_tokens=min(chat.max_tokens, model.max_output),
        )
        try:
            async with asyncio.timeout(chat.timeout_ms / 1000):
                response = await self._transport.open(request)
        except TimeoutError:
            tried = (Attempt(model.provider, "timeout"),)
            raise NodeFault(NodeReason.PROVIDER_TIMEOUT, detail="the provider was too slow", attempts=tried) from None
        except UpstreamFault as fault:
            attempt = Attempt(model.provider, fault.kind, fault.status)
            raise _all_failed(attempt) from None
        if response.status != _OK:
            response.cancel()
            raise _all_failed(Attempt(model.provider, "status", response.status))
        return response

    async def ended(self, run: PaidChat, total: Pico, ending: Ending) -> None:
        """Settle a request's bill and forget it."""
        try:
            await run.tab.finish(total)
        finally:
            self._running -= 1
            self._rail.done(run.tab)
            account = run.tab.account
            self._log(
                "request.ended",
                channel="0x" + account.id.hex(),
                ending=ending.value,
                tokens=run.tally.tokens,
                stall_ms=run.stall_ms,
                charged_pico=int(total),
                spent=account.spent,
                accepted=account.accepted,
                version=account.version,
            )

    @property
    def stopping(self) -> bool:
        """Whether running requests may be cut off by the node itself."""
        return self._stopping

    @property
    def limits(self) -> StreamLimits:
        """How long streams wait."""
        return self._limits

    @property
    def clock(self) -> Clock:
        """The node's clock."""
        return self._clock

    @property
    def owner(self) -> TaskOwner:
        """Who owns the tasks of running requests."""
        return self._owner


class PaidChat:
    """A running request: its bill, its provider, and how it ends."""

    def __init__(
        self, engine: ChatEngine, tab: SessionTab, tally: Tally, chat: ChatRequest, decoder: ChunkDecoder
    ) -> None:
        self.tab = tab
        self.tally = tally
        self.upstream: UpstreamResponse | None = None
        self._engine = engine
        self._chat = chat
        self._decoder = decoder
        self._stream: PaidStream | None = None
        self._superseded = False
        self._waiting: asyncio.Task[Any] | None = None
        self.releasing: asyncio.Task[None] | None = None
        self.stall_ms = 0
        # Not an Event: a kilobyte each, and thousands of streams may wait for their payers at once.
        self._settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def receipt(self, *, final: bool = False) -> SessionReceipt:
        """The receipt as of the last committed state; a final one counts this request's tokens."""
        usage = self.tally.usage()
        tokens = usage.prompt + usage.completion if final else None
        return self.tab.receipt(self._engine.clock.now_millis(), tokens=tokens)

    async def connect(self, connecting: Coroutine[Any, Any, UpstreamResponse]) -> None:
        """Wait for the provider, unless the client leaves or a newer request takes the channel first.

        Raises:
            ChannelFault: ``HOLD_FENCED`` in the second case.
        """

        async def keep() -> None:
            # Kept here and not by the waiter, which may be cancelled in the very turn in which the provider answers.
            self.upstream = await connecting

        await self._interruptible(keep(), "connect")

    async def _interruptible(self, work: Coroutine[Any, Any, T], name: str) -> T:
        async def run() -> T | NodeFault:
            try:
                return await work
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
            raise ChannelFault(Reason.HOLD_FENCED, detail="a newer request or a close took over this channel")
        outcome = task.result()
        if isinstance(outcome, NodeFault):
            raise outcome
        return outcome

    async def supersede(self) -> None:
        """End this request for a newer one or for a close, and return when its bill is settled."""
        self._superseded = True
        if self._stream is not None:
            self._stream.supersede()
        elif self._waiting is not None:
            self._waiting.cancel()
        await asyncio.wait({self._settled})  # awaited itself, it would be cancelled with its waiter

    async def abandon(self, ending: Ending = Ending.DISCONNECTED) -> None:
        """Give a request up before anything was sent: what its provider has taken is the prompt, if it took that."""
        total = Pico(0)
        if self.upstream is not None:
            self.upstream.cancel()
            if not self._superseded:  # ended by us, or for a newer request: the caller is refused and pays nothing
                total, ending = self._forsaken(), Ending.DISCONNECTED
        release = self._engine.owner.start(self.settle(total, ending), name="release hold")
        await asyncio.wait({release})

    def _forsaken(self) -> Pico:
        """The bill of an accepted request whose client left before its first token: the prompt, which was read.

        Free, a dear prompt and a hang-up would cost the node at will. Cut off by the node's own stop it is the node's.
        """
        return Pico(0) if self._engine.stopping else self.tally.prompt

    async def settle(self, total: Pico, ending: Ending) -> None:
        """Charge the final total, once."""
        try:
            await self._engine.ended(self, total, ending)
        finally:
            if not self._settled.done():
                self._settled.set_result(None)

    # --------------------------------------------------------------------------------------------------- streaming

    async def stream(self, sink: Sink) -> None:
        """Deliver the response as events and end it with its receipt; survives the cancellation of its caller.

        Cancelling means that the client is gone: the upstream is closed and the bill settled all the same.
        """
        assert self.upstream is not None
        self._stream = PaidStream(
            upstream=self.upstream,
            decoder=self._decoder,
            tab=self.tab,
            tally=self.tally,
            sink=sink,
            limits=self._engine.limits,
            tokens_max=self._chat.completion_tokens_max,
            probe=self._engine.probe,
        )
        if self._superseded:
            self._stream.supersede()
        task = self._engine.owner.start(self._deliver(self._stream, sink), name="stream")
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            self._stream.abandon()
            raise
        task.result()

    async def _deliver(self, stream: PaidStream, sink: Sink) -> None:
        ending = await stream.run()
        if ending not in (Ending.DISCONNECTED, Ending.STALLED) and not await stream.drained():
            ending = Ending.STALLED
        self.stall_ms = round(stream.starved_s * 1000)
        total = stream.final_total(ending)
        if ending is Ending.DISCONNECTED and not stream.delivered_tokens:
            total = self._forsaken()
        # A report beyond what was asked for is the provider's affair: nobody pays more than the request could cost.
        await self.settle(Pico(min(total, self.tab.cap_pico)), ending)
        if not sink.gone():
            self._engine.probe("receipt.before")
            sink.write(b"".join(self._last_frames(stream, ending)))
            self._engine.probe("receipt.after")

    def _last_frames(self, stream: PaidStream, ending: Ending) -> list[bytes]:
        first, last = stream.first_chunk, []
        match ending:
            case Ending.UPSTREAM_FAILED:
                last.append(frames.error_frame(first, "the provider failed before the response was complete"))
            case Ending.UNPAID | Ending.SUPERSEDED | Ending.CLOSED | Ending.OVERRUN:
                last.append(frames.finish_frame(first, ending.value))
            case Ending.COMPLETE | Ending.STALLED | Ending.DISCONNECTED:
                pass
        if not (ending is Ending.COMPLETE and stream.usage_sent):
            last.append(frames.usage_frame(first, self.tally.usage()))
        return [*last, sse.receipt_frame(self.receipt(final=True)), sse.DONE]

    # --------------------------------------------------------------------------------------------------- buffered

    async def complete(self) -> tuple[bytes, SessionReceipt]:
        """The whole response as one JSON object with ``usage``, charged by its usage.

        Raises:
            NodeFault: ``ALL_PROVIDERS_FAILED`` or ``PROVIDER_TIMEOUT``; nothing was charged.
        """
        return await self._interruptible(self._complete(), "completion")

    async def _complete(self) -> tuple[bytes, SessionReceipt]:
        total, ending = Pico(0), Ending.UPSTREAM_FAILED
        try:
            document = await self._read()
            # From here on nobody interrupts: cancelled while the charge commits, it would be billed and not delivered.
            self._waiting = None
            total, ending = Pico(min(self.tally.total(), self.tab.granted)), Ending.COMPLETE
        finally:
            if ending is not Ending.COMPLETE and self.upstream is not None:
                self.upstream.cancel()
            await self.settle(total, ending)
        document["usage"] = document.get("usage") or frames.usage_json(self.tally.usage())
        return orjson.dumps(document), self.receipt(final=True)

    async def _read(self) -> dict[str, Any]:
        assert self.upstream is not None
        try:
            async with asyncio.timeout(self._chat.timeout_ms / 1000):
                document, usage = decode_completion(await self.upstream.read(_COMPLETION_BYTES_MAX))
        except TimeoutError:
            raise NodeFault(NodeReason.PROVIDER_TIMEOUT, detail="the provider was too slow") from None
        except UpstreamFault as fault:
            raise NodeFault(NodeReason.ALL_PROVIDERS_FAILED, detail=f"the provider failed: {fault.kind}") from None
        choices = document.get("choices")
        if not isinstance(choices, list) or not choices:
            raise NodeFault(NodeReason.ALL_PROVIDERS_FAILED, detail="the provider answered without choices")
        counted = max(1, generated_bytes(choices) // _BYTES_PER_TOKEN)
        self.tally.tokens = min(counted, self._chat.completion_tokens_max)
        if usage is not None and self.tally.believes(usage):
            self.tally.report = usage
        else:
            document.pop("usage", None)
        return document


def _need(chat: ChatRequest, model: Model) -> Need:
    """What to reserve: the prompt over-estimated, and one token or everything, for a stream or a buffered answer."""
    rates, token = model.rates, max(model.rates.output, 1)
    prompt = price(Usage(prompt=prompt_tokens_held(chat.prompt_bytes)), rates)
    charged = price(Usage(prompt=prompt_tokens_charged(chat.prompt_bytes)), rates)
    whole = max(prompt + min(chat.max_tokens, model.max_output) * chat.choices * rates.output, 1)
    if not chat.stream:
        return Need(Pico(whole), Pico(whole), reserve_pico=0, token_pico=token, cap_pico=whole, stream=False)
    floor = prompt + chat.choices * token
    want = min(prompt + _FIRST_WINDOW_TOKENS * token, max(whole, floor))
    cap = max(whole, floor)
    return Need(
        Pico(floor), Pico(want), reserve_pico=prompt - charged, token_pico=token, cap_pico=cap, stream=True
    )


def _all_failed(attempt: Attempt) -> NodeFault:
    return NodeFault(NodeReason.ALL_PROVIDERS_FAILED, detail="every provider failed", attempts=(attempt,))

