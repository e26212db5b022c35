"""What is told about requests, in one place: the log line of each, what the metrics count of them, and their traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from channels.faults import ChannelFault
from channels.units import Pico
from mppnode.engine.stream import Ending
from mppnode.engine.traced import spans_of
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault
from mppnode.observe.logs import Level, Log
from mppnode.observe.metric_labels import Asked, DisconnectPhase
from mppnode.observe.metric_labels import Ending as Label
from mppnode.observe.metrics import Metrics
from mppnode.observe.traces import Trace, Tracer

if TYPE_CHECKING:
    from mppnode.engine.market import Route
    from mppnode.engine.paid import PaidChat

_OK: Final = "ok"


class Reporter:
    """Tells operators what became of requests; nothing here decides anything, and nothing is told per token."""

    def __init__(self, log: Log, metrics: Metrics, clock: Clock, tracer: Tracer | None = None) -> None:
        self._log = log
        self._tracer = tracer
        self._metrics = metrics
        self._clock = clock

    def trace(self, traceparent: Sequence[str]) -> Trace | None:
        """What a request that begins with these headers keeps of its trace; None when there are no traces."""
        return None if self._tracer is None else self._tracer.begin(traceparent, self._clock.monotonic())

    def routed(self, route: Route) -> None:
        """A route was decided for a request that is to be paid."""
        models = len(route.wish.models)
        asked = Asked.AUTO if route.decision is not None else Asked.NAMED if models == 1 else Asked.SEVERAL
        self._metrics.routed(route.strategy.value, asked.value, route.excluded)

    def unrouted(self, excluded: Mapping[str, int]) -> None:
        """Nobody could serve a request: who was left out, by reason."""
        self._metrics.left_out(excluded)

    def refused(self, rail: str, fault: ChannelFault | NodeFault) -> None:
        """A reservation was refused."""
        limit = fault.limit if isinstance(fault, NodeFault) else None
        self._log("hold.refused", level=Level.DEBUG, rail=rail, reason=fault.reason.value, limit=limit)
        self._metrics.hold_refused(rail, fault.reason.value)
        if isinstance(fault, NodeFault) and fault.limit is not None:
            self._metrics.limit_reached(fault.limit)

    def began(self, run: PaidChat) -> None:
        """A request has its reservation; :meth:`ended` follows, whatever happens."""
        self._metrics.request_began(run.purchase.rail, stream=run.chat.stream)

    def tried(self, provider: str, result: str = _OK) -> None:
        """A provider was called: ``ok``, or the kind of its fault."""
        self._metrics.provider_attempt(provider, result)

    def cancelled(self, provider: str) -> None:
        """A provider's answer was broken off by us."""
        self._metrics.upstream_cancelled(provider)

    def left_at_the_end(self) -> None:
        """A client had everything but its receipt when it went away."""
        self._metrics.disconnected(DisconnectPhase.AFTER_OUTPUT.value)

    def ended(self, run: PaidChat, total: Pico, ending: Ending, settling: float) -> None:
        """A request has ended, with this bill, which was given to the ledger at ``settling`` (monotonic)."""
        self._count(run, total, ending)
        self._tell(run, total, ending)
        if self._tracer is not None and run.trace is not None and run.trace.sampled:
            self._trace(run, run.trace, total, ending, settling)

    def _trace(self, run: PaidChat, trace: Trace, total: Pico, ending: Ending, settling: float) -> None:
        assert self._tracer is not None
        word = _ending(run, ending)
        try:
            self._tracer.take(
                spans_of(run, trace, total=total, ending=ending, word=word, settling=settling, clock=self._clock)
            )
        except Exception:  # noqa: BLE001 - the bill is settled: a mistake here would cost its payer the receipt
            self._log("traces.lost", level=Level.ERROR, why="mistake", status=None)

    def _tell(self, run: PaidChat, total: Pico, ending: Ending) -> None:
        tally, answer = run.tally, run.answer
        self._log(
            "request.ended",
            request=run.request_id,
            rail=run.purchase.rail,
            ending=_ending(run, ending),
            model=None if answer is None else answer.listing.model,
            provider=None if answer is None else answer.listing.provider,
            strategy=run.strategy.value,
            attempts=run.attempts,
            tokens=0 if tally is None else tally.tokens,
            token_source=None if tally is None else tally.source.value,
            runs_on=ending is not Ending.COMPLETE and answer is not None and answer.runs_on,
            first_ms=None if run.first_at is None else round((run.first_at - run.begun) * 1000),
            total_ms=round((self._clock.monotonic() - run.begun) * 1000),
            stall_ms=round(run.starved_s * 1000),
            charged_pico=int(total),
            **run.tab.logged(),  # type: ignore[arg-type]  # its fields; none is a level
        )

    def _count(self, run: PaidChat, total: Pico, ending: Ending) -> None:
        tally, listing = run.tally, None if run.answer is None else run.answer.listing
        now = self._clock.monotonic()
        usage = None if tally is None or not total else tally.usage()
        self._metrics.request_ended(
            run.purchase.rail,
            _ending(run, ending),
            stream=run.chat.stream,
            model=run.chat.model if listing is None else listing.model,
            provider=None if listing is None else listing.provider,
            cost_pico=int(total),
            prompt_tokens=0 if usage is None else usage.prompt,
            cached_tokens=0 if usage is None else usage.cached_prompt,
            completion_tokens=0 if usage is None else usage.completion,
            reasoning_tokens=0 if usage is None else usage.reasoning,
            # Who is cut off is billed by our own count, of necessity: that says nothing about its provider.
            source=tally.source.value if tally and usage and ending is Ending.COMPLETE else None,
            attempts=run.attempts,
            total_s=now - run.begun,
            first_s=None if run.first_at is None else run.first_at - run.begun,
            gap_s=_gap(run, now),
            stalled_s=run.stalled_s,
        )
        if ending is Ending.DISCONNECTED:
            self._metrics.disconnected(_phase(run).value)
        if total > run.tab.cap_pico:
            self._metrics.ceiling_breached()


def _ending(run: PaidChat, ending: Ending) -> str:
    # The engine needs no word for it: whether anybody answered is what an operator asks first.
    nobody = run.answer is None and ending is Ending.UPSTREAM_FAILED
    return Label.FAILED.value if nobody else ending.value


def _gap(run: PaidChat, now: float) -> float | None:
    """Seconds between two tokens, without the time the stream waited for money or for its reader."""
    if run.first_at is None or run.tally is None or not run.chat.stream or run.tally.tokens < 2:  # noqa: PLR2004
        return None
    return max(now - run.first_at - run.starved_s - run.stalled_s, 0.0) / (run.tally.tokens - 1)


def _phase(run: PaidChat) -> DisconnectPhase:
    if run.first_at is None or run.delivered == 0:
        return DisconnectPhase.BEFORE_OUTPUT
    return DisconnectPhase.PAUSED if run.paused else DisconnectPhase.STREAMING
