"""One paid stream: upstream bytes in, paid-for frames out.

``on_body`` runs inside the upstream's ``data_received``. Everything there is synchronous: cut the read into events,
count, compare with the durable hold, hand the covered prefix to the client in one write. What is not covered waits in
memory while the upstream is not read, so the backlog is at most one read. Timers exist only while something waits.

A chunk counts as delivered when its last byte has left this process; only delivered chunks are ever folded into the
ledger, so a client that stops reading is not charged for what it never got. Waiting until the client's buffer is empty
would be simpler and is wrong: whoever reads a little slower than we write, and resets at the end, would read for free.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from channels.faults import Reason
from channels.units import Pico
from channels.wire import sse
from mppnode.engine import frames
from mppnode.engine.sink import Sink
from mppnode.kernel.probe import Probe, unwatched
from mppnode.metering.tally import Tally
from mppnode.observe.metric_labels import PauseEnd
from mppnode.observe.metrics import Metrics
from mppnode.providers.base import Chunk, ChunkDecoder, UpstreamFault, UpstreamResponse
from mppnode.rails.base import Tab

_HIGH_WATER: Final = 16 * 1024  # unsent bytes per client before its upstream is paused (reliability: section 2.9)
_DRAIN_POLL_S: Final = 0.005


class Ending(StrEnum):
    """How a stream ended, for the log and the last frames."""

    COMPLETE = "complete"
    OVERRUN = "overrun"
    """The provider went on past ``max_tokens``; the caller pays for no more than it asked for."""
    UPSTREAM_FAILED = "upstream_failed"
    UNPAID = "unpaid"
    SUPERSEDED = "superseded"
    CLOSED = "closed"
    STALLED = "stalled"
    DISCONNECTED = "disconnected"
    REJECTED = "rejected"
    """Every provider that was asked found fault with the request itself."""
    NODE_STOPPED = "node_stopped"
    """It outlasted the time a node that stops leaves to what runs."""


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How long a stream waits for others, in seconds."""

    voucher_wait_s: float = 60.0
    """For the payer's next voucher (session draft: about 60 s)."""
    stall_s: float = 15.0
    """For a client that does not read."""
    total_s: float = 3_600.0
    """For a whole stream: a provider that drips for ever holds a connection, a channel and a place for ever."""
    heartbeat_s: float = 15.0
    """Between comment lines while nothing else is sent, so that idle proxies and dead peers show."""


class PaidStream:
    """Moves one response from an upstream to a client, inside what has been paid for."""

    # Thousands of streams may wait for their payers at once, and this many members cost a kilobyte in a dict.
    __slots__ = (
        "_behind",
        "_decoder",
        "_drained_pico",
        "_drained_tokens",
        "_early",
        "_ending",
        "_hold_finish",
        "_limits",
        "_loop",
        "_metrics",
        "_over_at",
        "_paused",
        "_pending",
        "_probe",
        "_seen_pico",
        "_silent_since",
        "_sink",
        "_stalled_since",
        "_starved_since",
        "_tab",
        "_tally",
        "_timer",
        "_timer_at",
        "_tokens_max",
        "_unfinished",
        "_unpaid_since",
        "_unsent",
        "_upstream",
        "_upstream_ended",
        "_written_bytes",
        "_written_pico",
        "cancelled",
        "error",
        "finish",
        "first_chunk",
        "paused_at_end",
        "stalled_s",
        "starved_s",
    )

    def __init__(
        self,
        *,
        upstream: UpstreamResponse,
        decoder: ChunkDecoder,
        tab: Tab,
        tally: Tally,
        sink: Sink,
        limits: StreamLimits,
        tokens_max: int,
        choices: int = 1,
        hold_finish: bool = False,
        early: Sequence[Chunk] = (),
        probe: Probe = unwatched,
        metrics: Metrics,
    ) -> None:
        """``early`` is what ``decoder`` has already made of the upstream's first reads; ``hold_finish`` keeps the last
        chunk with a finish reason for the caller of :meth:`run` to send.
        """
        self._probe = probe
        self._metrics = metrics
        self._tokens_max = tokens_max
        self._hold_finish = hold_finish
        self._unfinished = choices
        self._upstream = upstream
        self._decoder = decoder
        self._tab = tab
        self._tally = tally
        self._sink = sink
        self._limits = limits
        self._pending: deque[Chunk] = deque(early)
        self._early = bool(early)
        self._paused = False
        self._behind = False
        self._upstream_ended = False
        self._written_pico = 0
        self._written_bytes = 0
        self._unsent: list[tuple[int, int, int]] = []  # per write not yet out: bytes, pico and tokens up to its end
        self._drained_pico = 0
        self._drained_tokens = 0
        self._seen_pico = 0
        self._silent_since = 0.0
        self._over_at = 0.0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._starved_since: float | None = None
        self._unpaid_since: float | None = None
        self._stalled_since: float | None = None
        self._ending: asyncio.Future[Ending] = self._loop.create_future()
        self.first_chunk: bytes | None = None
        self.error: UpstreamFault | None = None
        self.finish = b""
        """The provider's last chunk with a finish reason, not yet sent."""
        self.starved_s = 0.0
        """Waited for money, in seconds."""
        self.stalled_s = 0.0
        """Waited for a client that did not read, in seconds."""
        self.paused_at_end = False
        """Whether it ended while it waited for its payer."""
        self.cancelled = False
        """Whether the provider was cut off."""

    # ------------------------------------------------------------------------------------------------- life cycle

    async def run(self) -> Ending:
        """Stream until an ending, with the upstream released; the caller then finishes the tab."""
        self._silent_since = self._loop.time()
        self._over_at = self._silent_since + self._limits.total_s
        self._tab.on_change = self._pump
        self._tab.delivered = self._delivered
        self._upstream.attach(self)
        if self._early:
            self._pump()
        if not self._paused:
            self._upstream.resume()
        self._schedule()
        try:
            return await self._ending
        finally:
            self._tab.on_change = _nothing
            if self._timer is not None:
                self._timer.cancel()
            if not self._upstream_ended:
                self._upstream.cancel()
                self.cancelled = True
            self._end_waits()

    def final_total(self, ending: Ending) -> Pico:
        """The exact price of what the client received, in pico."""
        if ending is Ending.COMPLETE and not self._sink.gone() and self._sink.buffered() == 0:
            return self._tally.total()
        self._delivered()
        return Pico(self._drained_pico)

    async def drained(self) -> bool:
        """Wait until the client has taken everything, or give up after the stall limit."""
        deadline = self._loop.time() + self._limits.stall_s
        while self._sink.buffered() and not self._sink.gone():
            if self._loop.time() >= deadline:
                return False
            await asyncio.sleep(_DRAIN_POLL_S)
        return not self._sink.gone()

    # ---------------------------------------------------------------------------------------------- upstream side

    def on_body(self, data: bytes) -> None:
        """Take one read of the upstream."""
        self._pending.extend(self._decoder.feed(data))
        self._pump()

    def on_end(self, error: UpstreamFault | None) -> None:
        """Learn that the upstream has sent everything, or broke."""
        self._upstream_ended = True
        if error is not None:
            self.error = error
        else:
            self._pending.extend(self._decoder.end())
        self._pump()

    def _fail(self, fault: UpstreamFault) -> None:
        self.error = fault
        self._end(Ending.UPSTREAM_FAILED)

    # ------------------------------------------------------------------------------------------------ the hot path

    def _pump(self) -> None:
        if self._ending.done():
            return
        # Before anything else is written: what the client has taken is owed even if it leaves in the next moment.
        # Asking only when a hold is renewed would give every reader its first window for nothing.
        self._delivered()
        pending, tally, tab = self._pending, self._tally, self._tab
        ready: list[bytes] = []
        finished = overrun = self._behind = False
        while pending:
            chunk = pending[0]
            if chunk.error is not None:
                pending.clear()
                self.error = UpstreamFault("error", detail="the provider reported an error in its stream")
                break
            if chunk.done:
                finished = True
                pending.clear()
                break
            if chunk.tokens:
                tokens = tally.after(chunk)
                if tokens > self._tokens_max:
                    pending.clear()
                    overrun = True
                    break
                total = tally.price_at(tokens)
                if not self._covered(total):
                    break
                tally.take(chunk, tokens)
                self._written_pico = total
            pending.popleft()
            frame = chunk.frame
            if chunk.reported or chunk.finished or chunk.usage is not None:
                frame = self._special(chunk)
            if frame:
                ready.append(frame)
        if self.first_chunk is None and (ready or self.finish):
            self.first_chunk = ready[0] if ready else self.finish
        need = tab.ask()
        if need is not None:
            self._probe("need_voucher.before")
            ready.append(
                sse.need_voucher_frame(
                    need.channel, required=need.required, accepted=need.accepted, deposit=need.deposit
                )
            )
        if ready:
            self._probe("write.before")
            self._write(b"".join(ready) if len(ready) > 1 else ready[0])
            self._probe("write.after" if need is None else "need_voucher.after")
            self._silent_since = self._loop.time()
        if overrun:
            self._end(Ending.OVERRUN)
        self._settle(finished=finished)

    def _covered(self, total: int) -> bool:
        """Whether one more chunk may be written: it is paid for, and the client keeps up."""
        # Without the second half the hold would grow with what the client has not taken, and would bound no loss.
        self._behind = total - self._drained_pico > self._tab.window_pico_max and self._sink.buffered() > 0
        return not self._behind and self._tab.cover(total)

    def _write(self, data: bytes) -> None:
        # The sink may add framing and then reports more unsent than was written here: a chunk counts late, never early.
        self._sink.write(data)
        self._written_bytes += len(data)
        self._unsent.append((self._written_bytes, self._written_pico, self._tally.tokens))

    def _special(self, chunk: Chunk) -> bytes:
        """What is sent for a chunk that reports usage or ends a choice."""
        if chunk.usage is not None:
            self._tally.report = chunk.usage
        self._unfinished -= chunk.finished
        frame = chunk.frame
        if chunk.reported:
            # The node writes the usage itself, with its price, once it is final.
            frame = frames.without_usage(frame) if chunk.tokens or chunk.finished else b""
        return self._hold_back(frame, chunk.tokens) if chunk.finished and self._hold_finish else frame

    def _hold_back(self, frame: bytes, tokens: int) -> bytes:
        """Keep the last finish until the usage that will ride on it is known; give what can be sent already."""
        earlier = self.finish
        if tokens:
            # Held back, what was counted would not have been sent when a client leaves.
            content, frame = frames.split_finish(frame)
            earlier += content
        self.finish = frame
        return earlier

    def _settle(self, *, finished: bool) -> None:
        """Decide what happens after a pump: end, pause, resume, or wait for the next read."""
        if self._ending.done():
            return
        if finished:
            self._end(Ending.COMPLETE)
        elif self._sink.gone():
            self._end(Ending.DISCONNECTED)
        elif self.error is not None and not self._pending:
            self._end(Ending.UPSTREAM_FAILED)
        elif self._pending and self._tab.ended is not None:
            superseded = self._tab.ended.reason is Reason.HOLD_FENCED
            self._end(Ending.SUPERSEDED if superseded else Ending.CLOSED)
        elif self._upstream_ended and not self._pending and self._unfinished <= 0:
            self._end(Ending.COMPLETE)  # every choice said why it stopped; only the end marker is missing
        elif self._upstream_ended and not self._pending:
            self._fail(UpstreamFault("closed", detail="the provider ended its stream without finishing it"))
        else:
            self._flow()

    def _flow(self) -> None:
        """Match the upstream's pace to money and to the client's reading; never a timer per token."""
        self._delivered()  # noted now: at a disconnect it is too late to ask, and what was read would be free
        full = self._sink.buffered() > _HIGH_WATER
        stalled = full or self._behind
        starved = bool(self._pending) and not stalled
        now = self._loop.time()
        if self._starved_since is not None and not starved:
            self.starved_s += now - self._starved_since
        self._starved_since = (self._starved_since or now) if starved else None
        # A slow ledger starves a stream too; only when it has answered is it the payer whose patience is measured.
        unpaid = starved and self._tab.starved
        if unpaid and self._unpaid_since is None:
            self._metrics.pause_began()
            self._unpaid_since = now
        elif not unpaid and self._unpaid_since is not None:
            self._metrics.pause(now - self._unpaid_since, PauseEnd.PAID)
            self._unpaid_since = None
        moved, self._seen_pico = self._drained_pico > self._seen_pico, self._drained_pico
        fresh = self._stalled_since is None or (moved and not full)  # slow is not stalled
        if self._stalled_since is not None and (fresh or not stalled):
            self.stalled_s += now - self._stalled_since
        self._stalled_since = (now if fresh else self._stalled_since) if stalled else None
        if (starved or stalled) != self._paused and not self._upstream_ended:
            self._paused = not self._paused
            (self._upstream.pause if self._paused else self._upstream.resume)()
        if starved or stalled:
            self._schedule()

    def _end_waits(self) -> None:
        """Count what it was waiting for when it ended."""
        now = self._loop.time()
        if self._stalled_since is not None:
            self.stalled_s += now - self._stalled_since
        if self._unpaid_since is not None:
            self.paused_at_end = True
            unpaid = self._ending.done() and not self._ending.cancelled() and self._ending.result() is Ending.UNPAID
            self._metrics.pause(now - self._unpaid_since, PauseEnd.UNPAID if unpaid else PauseEnd.GONE)
        self._stalled_since = self._unpaid_since = None

    def _delivered(self) -> int:
        """Pico of what has left this process."""
        if not self._unsent or self._sink.gone():
            return self._drained_pico
        unsent, left, gone = self._unsent, self._sink.buffered(), 0
        sent = self._written_bytes - left
        while gone < len(unsent) and unsent[gone][0] <= sent:
            gone += 1
        if gone:
            _, self._drained_pico, self._drained_tokens = unsent[gone - 1]
            del unsent[:gone]
        return self._drained_pico

    @property
    def delivered_tokens(self) -> int:
        """Output tokens the client has received, by our own count."""
        return self._drained_tokens

    # ----------------------------------------------------------------------------------------------------- timers

    def _schedule(self) -> None:
        """Keep one timer, at the earliest moment something may be due; it reschedules itself lazily."""
        limits = self._limits
        due = min(self._silent_since + limits.heartbeat_s, self._over_at)
        if self._unpaid_since is not None:
            due = min(due, self._unpaid_since + limits.voucher_wait_s)
        if self._stalled_since is not None:
            due = min(due, self._loop.time() + _DRAIN_POLL_S)
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        self._timer_at = due
        self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now, limits = self._loop.time(), self._limits
        if self._ending.done():
            return
        if self._sink.gone():
            self._end(Ending.DISCONNECTED)
        elif now >= self._over_at:
            self._fail(UpstreamFault("timeout", detail="the stream took longer than any may"))
        elif self._stalled_since is not None and now - self._stalled_since >= limits.stall_s:
            self._end(Ending.STALLED)
        elif self._unpaid_since is not None and now - self._unpaid_since >= limits.voucher_wait_s:
            self._end(Ending.UNPAID)
        else:
            if now - self._silent_since >= limits.heartbeat_s and self._sink.buffered() == 0:
                self._write(b": waiting\n\n")
                self._silent_since = now
            if self._stalled_since is not None:
                self._pump()
            self._schedule()

    def _end(self, ending: Ending) -> None:
        if not self._ending.done():
            self._delivered()
            self._ending.set_result(ending)

    def abandon(self) -> None:
        """The client is gone: end now."""
        self._end(Ending.DISCONNECTED)

    def supersede(self, ending: Ending = Ending.SUPERSEDED) -> None:
        """A newer request takes the channel, or the node stops: end after what has been written."""
        self._end(ending)


def _nothing() -> None:
    """Take the place of ``_pump`` once the stream has ended."""
