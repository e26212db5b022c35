"""What a finished request looks like as a trace: the request, its reservation, every provider asked, its settling.

Names and attributes follow OpenTelemetry's conventions for generative AI; what they have no word for is ``mppnode.*``.
Nothing is in a span that is not in the request's log line, and less: no account, no key, no channel, no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from channels.units import Pico
from mppnode.engine.stream import Ending
from mppnode.kernel.clock import Clock
from mppnode.observe.traces import Role, Span, Trace, attempt_number

if TYPE_CHECKING:
    from mppnode.engine.paid import PaidChat

_RESERVATION, _STREAMING, _SETTLING = 1, 2, 3
_NAME_MAX: Final = 256  # characters of a model's name: the caller may have written it
_OURS: Final = frozenset({Ending.UPSTREAM_FAILED, Ending.NODE_STOPPED})
"""Endings that are the node's fault or its providers'; of the others the caller is the cause, or knows it."""


def spans_of(
    run: PaidChat, trace: Trace, *, total: Pico, ending: Ending, word: str, settling: float, clock: Clock
) -> list[Span]:
    """The spans of a request that has just ended, its own first.

    ``word`` is its ending as the log has it; ``settling`` is when its bill was given to the ledger (monotonic).
    """
    return _Telling(run, trace, settling, clock).spans(total, ending, word)


class _Telling:
    def __init__(self, run: PaidChat, trace: Trace, settling: float, clock: Clock) -> None:
        self._run = run
        self._trace = trace
        self._settling = settling
        self._now = clock.monotonic()
        self._now_ns = clock.now_millis() * 1_000_000
        self._ids = trace.ids

    def spans(self, total: Pico, ending: Ending, word: str) -> list[Span]:
        run, begun = self._run, self._trace.begun
        spans = [self._whole(total, ending, word), self._child("reservation", _RESERVATION, begun, run.begun)]
        spans += self._attempts()
        if run.chat.stream and run.answer is not None and run.first_at is not None:
            spans.append(self._child("streaming", _STREAMING, run.first_at, self._settling, self._streamed()))
        spans.append(self._child("settling", _SETTLING, self._settling, self._now))
        return spans

    def _at(self, moment: float) -> int:
        return self._now_ns - round((self._now - moment) * 1e9)

    def _whole(self, total: Pico, ending: Ending, word: str) -> Span:
        run, (trace_id, span_id, parent_id) = self._run, self._ids
        asked = run.chat.model[:_NAME_MAX]
        attributes: dict[str, str | int | bool] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": asked,
            "mppnode.request_id": run.request_id,
            "mppnode.rail": run.purchase.rail,
            "mppnode.ending": word,
            "mppnode.cost_pico": int(total),
            "mppnode.attempts": run.attempts,
            "mppnode.strategy": run.strategy.value,
        }
        if run.answer is not None:
            attributes["gen_ai.response.model"] = run.answer.listing.model
            attributes["gen_ai.provider.name"] = run.answer.listing.provider
        if run.tally is not None:
            usage = run.tally.usage()
            attributes["gen_ai.usage.input_tokens"] = usage.prompt
            attributes["gen_ai.usage.output_tokens"] = usage.completion
        if ending in _OURS:
            attributes["error.type"] = word
        return Span(
            f"chat {asked}",
            Role.SERVER,
            trace_id,
            span_id,
            parent_id,
            self._at(self._trace.begun),
            self._at(self._now),
            attributes,
            () if run.first_at is None else (("first_token", self._at(run.first_at)),),
            failed=ending in _OURS,
            remote=True,
        )

    def _attempts(self) -> list[Span]:
        run, begun = self._run, self._run.begun
        spans: list[Span] = []
        # Asked one after the other without a pause: where one ends the next begins.
        for failed in self._trace.failed:
            spans.append(
                self._attempt(
                    len(spans), failed.provider, begun, failed.at, result=failed.kind, status=failed.status
                )
            )
            begun = failed.at
        if run.answer is not None:
            result = "ok" if run.broke is None else run.broke.kind
            spans.append(self._attempt(len(spans), run.answer.listing.provider, begun, self._settling, result=result))
        elif self._trace.provider:
            spans.append(self._attempt(len(spans), self._trace.provider, begun, self._settling, result="cancelled"))
        return spans

    def _attempt(
        self, index: int, provider: str, begun: float, ended: float, *, result: str, status: int | None = None
    ) -> Span:
        attributes: dict[str, str | int | bool] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": provider,
            "mppnode.result": result,
        }
        failed = result not in ("ok", "cancelled")
        if status is not None:
            attributes["http.response.status_code"] = status
        if failed:
            attributes["error.type"] = result
        number = attempt_number(index)
        return self._child(f"attempt {provider}", number, begun, ended, attributes, role=Role.CLIENT, failed=failed)

    def _streamed(self) -> dict[str, str | int | bool]:
        run = self._run
        return {
            "mppnode.delivered_tokens": run.delivered,
            "mppnode.starved_ms": round(run.starved_s * 1000),
            "mppnode.stalled_ms": round(run.stalled_s * 1000),
        }

    def _child(
        self,
        name: str,
        number: int,
        begun: float,
        ended: float,
        attributes: Mapping[str, str | int | bool] | None = None,
        *,
        role: Role = Role.INTERNAL,
        failed: bool = False,
    ) -> Span:
        return Span(
            name,
            role,
            self._ids[0],
            self._trace.child(number),
            self._ids[1],
            self._at(begun),
            self._at(ended),
            attributes or {},
            failed=failed,
        )
