"""Sends spans to an OpenTelemetry receiver (OTLP over HTTP), from a thread of its own. Needs the extra ``otel``.

The SDK queues, batches and encodes; its provider and its HTTP exporter are left out on purpose. Both let environment
variables decide (``OTEL_SDK_DISABLED``, ``OTEL_EXPORTER_OTLP_HEADERS``, a proxy, a certificate), and the exporter's own
complaints, with what a receiver answers, go to standard error between the node's lines.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import urllib3
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from mppnode.config.traces import TracesConfig
from mppnode.kernel.version import VERSION
from mppnode.observe.logs import Level, Log
from mppnode.observe.traces import Role, Span

QUEUE_MAX: Final = 4_096
"""Spans that wait: about a kilobyte each, and a thousand requests. What does not fit is dropped and counted."""
BATCH_MAX: Final = 512
_EVERY_MS: Final = 2_000
_SEND_S: Final = 5.0  # for one batch; what comes meanwhile waits in the queue
CLOSE_S: Final = 2.0
"""What a node that stops waits for its last spans to be sent."""
_OK: Final = range(200, 300)
_SCOPE: Final = InstrumentationScope("mppnode", VERSION)
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_KINDS: Final[Mapping[Role, SpanKind]] = MappingProxyType(
    {Role.SERVER: SpanKind.SERVER, Role.CLIENT: SpanKind.CLIENT, Role.INTERNAL: SpanKind.INTERNAL}
)
_UNSET: Final = Status(StatusCode.UNSET)
_ERROR: Final = Status(StatusCode.ERROR)


class OtelTraces:
    """The way of spans out of one node. Construct it in the node's loop, and :meth:`close` it."""

    def __init__(self, config: TracesConfig, *, node: str, log: Log, close_s: float = CLOSE_S) -> None:
        """``node`` is the name of this process among those that share a ledger."""
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._close_s = close_s
        self._exporter = _Exporter(config, self._heard)
        # Not Resource.create, which adds what the environment says.
        self._resource = Resource(
            {"service.name": "mppnode", "service.version": VERSION, "service.instance.id": node}
        )
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=QUEUE_MAX,
            schedule_delay_millis=_EVERY_MS,
            max_export_batch_size=BATCH_MAX,
            export_timeout_millis=_SEND_S * 1000,
            meter_provider=NoOpMeterProvider(),
        )
        self._taken = self._lost = 0
        self._away = False

    def take(self, spans: Sequence[Span]) -> None:
        """Send these soon, or drop and count them when too many wait already; never waits and never raises."""
        if self.waiting + len(spans) > QUEUE_MAX:
            self._lose(len(spans), "queue", None)
            return
        self._taken += len(spans)
        for span in spans:
            self._processor.on_end(_readable(span, self._resource))

    @property
    def waiting(self) -> int:
        """Spans not yet sent or given up."""
        return self._taken - self._exporter.done

    def flush(self) -> None:
        """Send everything now; waits for the receiver, so not for the loop's own thread."""
        self._processor.force_flush()

    async def close(self) -> None:
        """Send what waits, for at most two seconds, and end; harmless when called again."""
        over: asyncio.Future[None] = self._loop.create_future()

        def end() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
            self._tell(lambda: _finish(over))

        # Not a thread of the pool: a process that ends waits for those, and this one may wait for a dead receiver.
        threading.Thread(target=end, name="traces end", daemon=True).start()
        await asyncio.wait({over}, timeout=self._close_s)
        self._exporter.shutdown()
        if self.waiting:
            self._lose(self.waiting, "stopped", None)

    def _tell(self, what: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:  # the loop has ended before the receiver answered
            return

    def _heard(self, spans: int, why: str | None, status: int | None) -> None:
        """Called in the exporter's thread, after every batch."""
        self._tell(lambda: self._flow() if why is None else self._lose(spans, why, status))

    def _lose(self, spans: int, why: str, status: int | None) -> None:
        self._lost += spans
        if not self._away:
            self._away = True
            self._log("traces.lost", level=Level.WARNING, why=why, status=status)

    def _flow(self) -> None:
        if self._away:
            self._log("traces.resumed", lost=self._lost)
            self._away, self._lost = False, 0


class _Exporter(SpanExporter):
    """One batch, one POST. Source: OTLP 1.x, section OTLP/HTTP."""

    def __init__(self, config: TracesConfig, heard: Callable[[int, str | None, int | None], None]) -> None:
        self._url = f"{config.endpoint}/v1/traces"
        self._headers = {
            **{name: value.reveal() for name, value in config.headers},
            "content-type": "application/x-protobuf",
            "user-agent": f"mppnode/{VERSION}",
        }
        self._http = urllib3.PoolManager(num_pools=1, maxsize=1)
        self._heard = heard
        self._ended = False
        self.done = 0
        """Spans sent or given up; written by the exporting thread alone."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        why: str | None = "stopped"
        status = None
        if not self._ended:
            try:
                why, status = self._send(encode_spans(spans).SerializeToString())
            except Exception:  # noqa: BLE001 - somebody else's code: its mistakes cost spans and nothing more
                why = "encoding"
        self.done += len(spans)
        self._heard(len(spans), why, status)
        return SpanExportResult.SUCCESS if why is None else SpanExportResult.FAILURE

    def _send(self, body: bytes) -> tuple[str | None, int | None]:
        try:
            answer = self._http.request(
                "POST",
                self._url,
                body=body,
                headers=self._headers,
                timeout=urllib3.Timeout(total=_SEND_S),
                retries=False,  # nor redirects: the headers may hold a token, which is for this host
                preload_content=False,  # what it says is not read: it may be endless, and there is nobody to tell
            )
        except urllib3.exceptions.NewConnectionError:  # which is a timeout to urllib3, in name alone
            return "unreachable", None
        except urllib3.exceptions.TimeoutError:
            return "timeout", None
        except (urllib3.exceptions.HTTPError, OSError):
            return "unreachable", None
        status = answer.status
        answer.close()
        return (None if status in _OK else "status"), status

    def shutdown(self) -> None:
        self._ended = True
        self._http.clear()

    def force_flush(self, timeout_millis: int = 0) -> bool:  # noqa: ARG002 - as SpanExporter's
        return True


def _finish(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)


def _readable(span: Span, resource: Resource) -> ReadableSpan:
    """A span as the SDK's encoder reads it."""
    return ReadableSpan(
        span.name,
        context=SpanContext(span.trace_id, span.span_id, is_remote=False, trace_flags=_SAMPLED),
        parent=SpanContext(span.trace_id, span.parent_id, is_remote=span.remote, trace_flags=_SAMPLED)
        if span.parent_id
        else None,
        resource=resource,
        attributes=span.attributes,
        events=[Event(name, timestamp=at) for name, at in span.events],
        kind=_KINDS[span.role],
        status=_ERROR if span.failed else _UNSET,
        start_time=span.begun_ns,
        end_time=span.ended_ns,
        instrumentation_scope=_SCOPE,
    )
