"""The chat engine: price a request, reserve for it, find a provider that serves it, and settle its bill."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

from channels.faults import ChannelFault
from channels.units import Pico
from mppnode.engine.attempts import CALLERS_FAULT, Answer, Endpoint, Failover, refused_as_asked
from mppnode.engine.lookup import look_up
from mppnode.engine.market import STRANGER, Caller, Market, Quote, Route
from mppnode.engine.paid import PaidChat, stopping
from mppnode.engine.record import Record
from mppnode.engine.report import Reporter
from mppnode.engine.stream import Ending, StreamLimits
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Listing, ProviderKind
from mppnode.kernel.probe import Probe, unwatched
from mppnode.kernel.rates import Rates, price
from mppnode.kernel.requests import ChatRequest
from mppnode.kernel.tasks import TaskOwner
from mppnode.kernel.usage import Usage
from mppnode.metering.calibration import Calibration
from mppnode.metering.tally import Tally, TokenSource, prompt_tokens_charged, prompt_tokens_held
from mppnode.observe.logs import Level, Log
from mppnode.observe.metrics import Metrics
from mppnode.observe.traces import Trace, Tracer
from mppnode.providers.base import Call, Lookup, PriceCap, Transport, UpstreamFault
from mppnode.rails.base import Need, Offer, Purchase, Tab

_FIRST_WINDOW_TOKENS: Final = 64
_BASIS: Final = 10_000


class Counter(Protocol):
    """Counts tokens the way one model does."""

    def count(self, text: str) -> int:
        """Tokens of ``text``; called in a thread."""
        ...


class ChatEngine:
    """Serves chat requests against payment channels."""

    def __init__(
        self,
        *,
        market: Market,
        transport: Transport,
        owner: TaskOwner,
        clock: Clock,
        limits: StreamLimits,
        streams_max: int,
        log: Log,
        counters: Mapping[tuple[str, str], Counter],
        attempts_max: int = 3,
        probe: Probe = unwatched,
        metrics: Metrics | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """``attempts_max`` is how many providers a request may wait for in vain before it has failed."""
        self.probe = probe
        self.metrics = metrics if metrics is not None else Metrics.unseen(clock)
        self.reporter = Reporter(log, self.metrics, clock, tracer)
        self._attempts_max = attempts_max
        self._market = market
        self._transport = transport
        self._owner = owner
        self._clock = clock
        self._limits = limits
        self._streams_max = streams_max
        self._log = log
        self._counters = counters
        self._calibration = Calibration()
        self._runs: set[PaidChat] = set()
        self._stopping = self._ended = False

    @property
    def market(self) -> Market:
        """What is sold, and by whom."""
        return self._market

    def offer(self, route: str, chat: ChatRequest | None) -> Offer:
        """What a request is sold for at most; without one, what a usual request on this route is.

        Raises:
            NodeFault: ``UNKNOWN_MODEL``, or ``NO_PROVIDER`` when nobody could ever serve it as it is asked.
        """
        return self._market.offer(route, chat)

    def quote(self, chat: ChatRequest, caller: Caller = STRANGER) -> Quote:
        """What a request would be sold for now, by whom, and the most it could cost: what :meth:`start` would reserve.

        Raises:
            NodeFault: as :meth:`offer`.
        """
        route = self._market.route(chat, caller)
        return Quote(route, Pico(need_of(chat, route.bound, route.max_output).cap_pico))

    def stop(self) -> None:
        """Take no new requests; running ones go on."""
        self._stopping = True

    async def end_everything(self) -> None:
        """End what still runs, each request with its exact bill, and return when all are settled.

        Nothing begins any more.
        """
        self._stopping = self._ended = True
        # Not gathered: whoever loses patience must not cancel what is about to be settled.
        for run in tuple(self._runs):
            self._owner.spawn(run.supersede(Ending.NODE_STOPPED), name="end request")
        while self._runs:
            await asyncio.wait({run.over for run in self._runs})

    def restock(self, counters: Mapping[tuple[str, str], Counter], *, attempts_max: int) -> None:
        """Use other tokenizers and another patience from the next request on; the market is exchanged by itself."""
        self._counters = counters
        self._attempts_max = attempts_max

    def require_room(self) -> None:
        """Refuse before any money moves when the node could not serve. Raises ``OVERLOADED``, ``SHUTTING_DOWN``."""
        if self._stopping:
            raise stopping()
        if len(self._runs) >= self._streams_max:
            raise NodeFault(NodeReason.OVERLOADED, detail="too many live requests", retry_after_s=1)

    def route(self, chat: ChatRequest, caller: Caller) -> Route:
        """Decide who is to serve a request that is to be paid, before any money moves.

        Raises:
            ChannelFault: ``INVALID_CHALLENGE`` when prices have risen above what the challenge quoted.
            NodeFault: nobody could serve it.
        """
        try:
            route = self._market.route(chat, caller)
        except NodeFault as fault:
            self.reporter.unrouted(fault.excluded or {})
            raise
        self.reporter.routed(route)
        return route

    async def start(
        self,
        purchase: Purchase,
        chat: ChatRequest,
        route: Route,
        *,
        request_id: str,
        record: Record | None = None,
        traceparent: Sequence[str] = (),
    ) -> PaidChat:
        """Reserve for a request and find a provider that has begun to serve it; nothing has been charged on return.

        ``record`` keeps what is answered; it is ended or dropped, whatever happens. ``traceparent`` are the request's
        headers of that name.

        Raises:
            ChannelFault: the reservation was refused.
            NodeFault: it was refused, or nobody served it; the reservation is released.
        """
        try:
            trace = self.reporter.trace(traceparent)
            run = await self._admit(purchase, chat, route, request_id=request_id, record=record, trace=trace)
        except BaseException:
            if record is not None:
                self._owner.spawn(record.drop(), name="drop record")
            raise
        try:
            self._require_open()
            self.probe("connect.before")
            await run.connect(lambda: self._find(run, run.chat, route))
            self.probe("connect.after")
        except BaseException as error:
            # Also on cancellation: the hold must not outlive its request, so the owner ends it even if we are cut off.
            await run.abandon(_why(error))
            raise
        return run

    async def _admit(
        self,
        purchase: Purchase,
        chat: ChatRequest,
        route: Route,
        *,
        request_id: str,
        record: Record | None = None,
        trace: Trace | None = None,
    ) -> PaidChat:
        """Reserve for a request; a client that leaves meanwhile leaves no reservation behind.

        Cancelling the commit itself would not undo it: the hold would have no owner until the next restart.
        """

        async def reserve() -> PaidChat | ChannelFault | NodeFault:
            need = need_of(chat, route.bound, route.max_output)
            try:
                self._require_open()
                tab = await purchase.open(need, chat, request_id)
            except (ChannelFault, NodeFault) as fault:  # an answer, not a failed task
                self.reporter.refused(purchase.rail, fault)
                return fault
            able = _afforded(chat, need, tab)
            run = PaidChat(self, purchase, tab, able, route, request_id=request_id, record=record, trace=trace)
            self._runs.add(run)
            self.reporter.began(run)
            purchase.on_supersede(tab, run.supersede)
            return run

        task = self._owner.start(reserve(), name="reserve")
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.add_done_callback(self._release)
            raise
        outcome = task.result()
        if isinstance(outcome, (ChannelFault, NodeFault)):
            raise outcome
        return outcome

    def _require_open(self) -> None:
        # A request may have been in the middle of its admission when everything was ended.
        if self._ended:
            raise stopping()

    def _release(self, task: asyncio.Task[PaidChat | ChannelFault | NodeFault]) -> None:
        if not task.cancelled() and task.exception() is None and isinstance(run := task.result(), PaidChat):
            settled = run.settle(Pico(0), Ending.DISCONNECTED)
            run.releasing = self._owner.start(settled, name="release hold")

    async def _find(self, run: PaidChat, chat: ChatRequest, route: Route) -> Answer:
        """Try the providers of a route in order, until one has begun to answer."""
        failover = Failover(
            transport=self._transport,
            clock=self._clock,
            timeout_s=chat.timeout_ms / 1000,
            accepted=run.accepted,
            slow_max=self._attempts_max,
        )
        refused: list[NodeFault] = []
        waiting = list(route.chain)
        while waiting and not failover.exhausted:
            listing = waiting.pop(0)
            watch = self._market.watch(listing, streamed=chat.stream)
            if watch is None:  # another request is just now finding out whether this provider is back
                continue
            endpoint = route.endpoints[listing.provider]
            call = Call(
                chat,
                listing.upstream_model,
                endpoint.base_url,
                endpoint.api_key(),
                _tokens_of(chat, listing),
                _cap(listing),
                traceparent=_asking(run.trace, listing),
            )
            outcome = await failover.attempt(listing, endpoint, call, watch, left=len(waiting) + 1)
            run.attempts = len(failover.trail) + isinstance(outcome, Answer)
            if isinstance(outcome, UpstreamFault):
                self.reporter.tried(listing.provider, outcome.kind)
                if run.trace is not None:
                    run.trace.failing(outcome.kind, outcome.status, self._clock.monotonic())
            if isinstance(outcome, Answer):
                if not listing.rates.within(route.bound):
                    self.metrics.ceiling_breached()
                need = need_of(chat, listing.rates, listing.max_output)
                run.tab.narrow(
                    token_pico=need.token_pico, reserve_pico=need.reserve_pico, cap_pico=need.cap_pico
                )
                self._market.served(route, listing)
                if run.trace is not None and not run.trace.sampled:
                    run.trace = None  # it was for the headers of providers, and a stream may last for hours
                return outcome
            if isinstance(outcome, NodeFault):
                refused.append(outcome)
                if run.trace is not None:
                    run.trace.provider = ""  # it was not asked after all
            elif outcome.status in CALLERS_FAULT:
                waiting = [other for other in waiting if other.context > listing.context]
        # The caller's request is at fault only when nobody could be asked, now or once they work again.
        raise refused[0] if refused and len(refused) == route.able else failover.failure()

    # ------------------------------------------------------------------------------------------------------- bills

    def tally(self, chat: ChatRequest, listing: Listing, endpoint: Endpoint) -> Tally:
        """A fresh bill for a request that ``listing`` has taken."""
        tally = Tally(
            listing.rates,
            prompt_bytes=chat.prompt_bytes,
            completion_max=chat.completion_tokens_max,
            images=chat.images,
            audio_bytes=chat.audio_bytes,
            ratio=self._calibration.ratio(listing.provider, listing.upstream_model),
            running=endpoint.adapter.running_usage,
        )
        if (listing.provider, listing.model) in self._counters:
            tally.texts = []
        return tally

    async def count(self, listing: Listing, tally: Tally) -> None:
        """Count a complete answer with the model's own tokenizer, if there is one."""
        counter = self._counters.get((listing.provider, listing.model))
        if counter is None or tally.texts is None:
            return
        text = "".join(tally.texts)
        try:
            tally.counted = await asyncio.to_thread(counter.count, text)
        except Exception as error:  # noqa: BLE001 - somebody else's code: without its count there is the provider's
            self._log("usage.uncounted", level=Level.ERROR, model=listing.model, error=type(error).__name__)
            return
        if tally.report is not None and not tally.believes(tally.report):
            self._log(
                "usage.disputed",
                level=Level.WARNING,
                provider=listing.provider,
                model=listing.model,
                counted=tally.counted,
                reported=tally.report.completion,
            )

    def learn(self, listing: Listing, tally: Tally) -> None:
        """Learn from a complete answer how long this model's tokens are."""
        report = tally.report
        if report is not None and tally.source is TokenSource.REPORTED and not report.reasoning:
            self._calibration.learn(
                listing.provider, listing.upstream_model, text_bytes=tally.text_bytes, tokens=report.completion
            )

    def look_up(self, answer: Answer, tally: Tally) -> None:
        """Ask the provider, later and in the background, what a stream took that ended without its report."""
        generation = answer.response.headers.get("x-generation-id")
        endpoint = answer.endpoint
        if generation is None or not isinstance(endpoint.adapter, Lookup):
            return
        looking = look_up(
            generation, answer.listing, endpoint, transport=self._transport, counted=tally.tokens, log=self._log
        )
        self._owner.spawn(looking, name="look up generation")

    async def ended(self, run: PaidChat, total: Pico, ending: Ending) -> None:
        """Settle a request's bill and forget it."""
        settling = self._clock.monotonic()
        try:
            await run.tab.settle(total, run.facts(ending))
        finally:
            self._runs.discard(run)
            run.purchase.done(run.tab)
            # Not the total: the ledger may be away, or somebody else may have closed this bill at what was recorded.
            self.reporter.ended(run, run.tab.recorded, ending, settling)

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


def _why(error: BaseException) -> Ending:
    """How a request ended whose provider had not begun to answer."""
    if isinstance(error, asyncio.CancelledError):
        return Ending.DISCONNECTED
    if isinstance(error, NodeFault) and error.reason is NodeReason.SHUTTING_DOWN:
        return Ending.NODE_STOPPED
    if refused_as_asked(error):
        return Ending.REJECTED
    return Ending.SUPERSEDED if isinstance(error, ChannelFault) else Ending.UPSTREAM_FAILED


def need_of(chat: ChatRequest, rates: Rates, max_output: int) -> Need:
    """What to reserve at ``rates``: the prompt over-estimated, and one token or everything, streamed or buffered."""
    token = max(rates.output_max, 1)
    # The dearest kind of token: nobody knows before the report what a cache has read or written.
    held = prompt_tokens_held(chat.prompt_bytes, images=chat.images, audio_bytes=chat.audio_bytes)
    apart = rates.request + chat.images * rates.image
    prompt = held * rates.input_max + apart
    charged = price(Usage(prompt=prompt_tokens_charged(chat.prompt_bytes), images=chat.images), rates)
    whole = max(prompt + min(chat.max_tokens, max_output) * chat.choices * rates.output_max, 1)
    if not chat.stream:
        return Need(
            Pico(whole), Pico(whole), reserve_pico=0, token_pico=token, cap_pico=whole, stream=False, prompt_pico=prompt
        )
    floor = prompt + chat.choices * token
    want = min(prompt + _FIRST_WINDOW_TOKENS * token, max(whole, floor))
    return Need(
        Pico(floor),
        Pico(want),
        reserve_pico=max(prompt - charged, 0),
        token_pico=token,
        cap_pico=max(whole, floor),
        stream=True,
        prompt_pico=prompt,
    )


def _afforded(chat: ChatRequest, need: Need, tab: Tab) -> ChatRequest:
    """The request with as long an answer as its hold pays for, where that hold is all there will be."""
    if tab.windowed or tab.granted >= need.cap_pico:
        return chat
    tokens = (tab.granted - need.prompt_pico) // (need.token_pico * chat.choices)
    return replace(chat, max_tokens=max(tokens, 1))  # not its caller's limit: a provider may still shorten it


def _asking(trace: Trace | None, listing: Listing) -> str | None:
    """Note who is asked next; returns the header that makes their trace a part of this one, if they are ours.

    Others learn nothing about who asked what when: the ids would join what a payer does at several of them.
    """
    if trace is None:
        return None
    trace.provider = listing.provider
    return trace.header() if listing.kind is ProviderKind.NATIVE else None


def _tokens_of(chat: ChatRequest, listing: Listing) -> int:
    """The limit a provider is given: what was asked for, or else what surely fits beside the prompt."""
    limit = min(chat.max_tokens, listing.max_output)
    if chat.limited:
        return limit
    held = prompt_tokens_held(chat.prompt_bytes, images=chat.images, audio_bytes=chat.audio_bytes)
    return max(min(limit, listing.context - held), 1)


def _cap(listing: Listing) -> PriceCap:
    """What a provider that sets prices by the request may charge us: what we earn, without our own share."""
    share = _BASIS + listing.markup_bps
    return PriceCap(listing.rates.input * _BASIS // share, listing.rates.output * _BASIS // share)
