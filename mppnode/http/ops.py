"""What machines ask a process: whether it is worth keeping, whether it wants work, and what it has counted.

Probes come from balancers and from strangers, as often as they like, so answering one costs a few microseconds: the
ledger is asked once a second by the node itself, and a probe reads what came of it and how old that is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from typing import Final

import orjson
from aiohttp import web

from channels.faults import ChannelFault
from mppnode.http.middleware import fault_boundary, stamp
from mppnode.kernel.clock import Clock
from mppnode.kernel.tasks import TaskOwner
from mppnode.observe.logs import Log

EVERY_S: Final = 1.0
"""Between two looks at the ledger, and two turns of the loop that are timed."""
SILENT_S: Final = 3.0
"""Without an answer of the ledger for so long no work is asked for; two lost looks are forgiven."""
LATE_S: Final = 2.0
"""An event loop that turns so late keeps payers waiting and is about to lose its lease, which lasts 10 s."""
SCRAPES_MAX: Final = 4
"""Scrapes that wait for their page, with two Prometheus servers and a person among them; others come again."""
_PROBE_BYTES: Final = 1_024  # probes have no body; aiohttp reads what is sent all the same
_HEADERS: Final = {"Cache-Control": "no-store"}

Exposition = Callable[[str], tuple[bytes, str]]
"""From an ``Accept`` header to a page of metrics and its content type; called in a thread."""


class Phase(StrEnum):
    """Where a process is in its life."""

    STARTING = "starting"
    OK = "ok"
    DRAINING = "draining"


class Check(StrEnum):
    """What a single check says; there are no others, and none of them has text from anywhere else."""

    OK = "ok"
    UNAVAILABLE = "unavailable"
    SILENT = "silent"
    """Asked, and no answer for :data:`SILENT_S`."""
    LOST = "lost"
    LATE = "late"


class Vitals:
    """How the process is: kept up to date by :meth:`keep`, told to whoever asks."""

    def __init__(
        self,
        *,
        ping: Callable[[], Awaitable[object]],
        lease: Callable[[], bool],
        chain: Callable[[], bool],
        providers: Callable[[], bool],
        owner: TaskOwner,
        clock: Clock,
    ) -> None:
        """``ping`` asks the ledger anything; the others: is the lease held, the chain seen, does anybody sell."""
        self._ping = ping
        self._lease = lease
        self._chain = chain
        self._providers = providers
        self._owner = owner
        self._clock = clock
        self.phase = Phase.STARTING
        self._answered_at: float | None = None
        self._failed = False
        self._looking = False
        self._turned_at = clock.monotonic()
        self._late_s = 0.0

    async def keep(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Time the loop and look at the ledger once a second, until cancelled."""
        while True:
            self._turned_at = self._clock.monotonic()
            await sleep(EVERY_S)
            self._late_s = self._clock.monotonic() - self._turned_at - EVERY_S
            if not self._looking:  # one at a time: a ledger that hangs must not collect questions
                self._owner.spawn(self.look(), name="look at the ledger")

    async def look(self) -> None:
        """Ask the ledger once and remember whether it answered."""
        self._looking = True
        try:
            await self._ping()
        except ChannelFault:
            self._failed = True
        else:
            self._failed, self._answered_at = False, self._clock.monotonic()
        finally:
            self._looking = False

    def alive(self) -> tuple[bool, Mapping[str, str]]:
        """Whether the process is worth keeping, and why not."""
        checks = {"loop": self._loop(), "lease": Check.OK if self._lease() else Check.LOST}
        return all(check is Check.OK for check in checks.values()), checks

    def ready(self) -> tuple[str, Mapping[str, str]]:
        """``ready``, ``degraded`` (some requests will fail, and would elsewhere too) or ``unready``, and why."""
        _, checks = self.alive()
        must = {"node": self.phase.value, "ledger": self._ledger(), **checks}
        may = {
            "chain": Check.OK if self._chain() else Check.UNAVAILABLE,
            "providers": Check.OK if self._providers() else Check.UNAVAILABLE,
        }
        status = "ready" if all(check == Check.OK for check in (*must.values(), *may.values())) else "degraded"
        if any(check != Check.OK for check in must.values()):
            status = "unready"
        return status, {**must, **may}

    @property
    def ledger_age_ms(self) -> int | None:
        """How long ago the ledger last answered, in milliseconds; None is never."""
        return None if self._answered_at is None else round((self._clock.monotonic() - self._answered_at) * 1000)

    def _ledger(self) -> Check:
        if self._failed:
            return Check.UNAVAILABLE
        age = self.ledger_age_ms
        return Check.SILENT if age is None or age > SILENT_S * 1000 else Check.OK

    def _loop(self) -> Check:
        # The wait that is still going on counts too, or a loop that was stuck would look well to its first probe.
        late = max(self._late_s, self._clock.monotonic() - self._turned_at - EVERY_S)
        return Check.LATE if late > LATE_S else Check.OK


class OpsSurface:
    """``/healthz`` and ``/readyz``, and ``/metrics`` where there is something to show."""

    def __init__(self, vitals: Vitals, exposition: Exposition | None = None) -> None:
        self._vitals = vitals
        self._exposition = exposition
        self._rendering = asyncio.Lock()  # one page at a time: each takes tens of milliseconds of this machine
        self._waiting = 0

    def routes(self) -> Sequence[web.RouteDef]:
        """The routes of this surface; ``web.get`` answers HEAD too."""
        routes = [web.get("/healthz", self.healthz), web.get("/readyz", self.readyz)]
        if self._exposition is not None:
            routes.append(web.get("/metrics", self.metrics))
        return routes

    async def healthz(self, _: web.Request) -> web.Response:
        """200 while the process is worth keeping, else 503: start it again."""
        alive, checks = self._vitals.alive()
        return _answer({"status": "alive" if alive else "failing", "checks": checks}, good=alive)

    async def readyz(self, _: web.Request) -> web.Response:
        """200 when new work would be served, else 503: ask somebody else."""
        status, checks = self._vitals.ready()
        body = {"status": status, "checks": checks, "ledger_age_ms": self._vitals.ledger_age_ms}
        return _answer(body, good=status != "unready")

    async def metrics(self, request: web.Request) -> web.Response:
        """What the process has counted; 503 when too many ask at once."""
        if self._waiting > SCRAPES_MAX:
            return _answer({"status": "busy"}, good=False)
        self._waiting += 1
        try:
            body, kind = await self._page(request.headers.get("Accept", ""))
        finally:
            self._waiting -= 1
        return web.Response(body=body, headers={**_HEADERS, "Content-Type": kind})

    async def _page(self, accept: str) -> tuple[bytes, str]:
        assert self._exposition is not None
        await self._rendering.acquire()
        drawing = asyncio.get_running_loop().run_in_executor(None, self._exposition, accept)
        # When the thread is done, and not when the scraper is: one that hangs up at once, again and again, would have
        # a page drawn in every thread there is.
        drawing.add_done_callback(self._drawn)
        await asyncio.wait({drawing})
        return drawing.result()

    def _drawn(self, drawing: asyncio.Future[tuple[bytes, str]]) -> None:
        self._rendering.release()
        if not drawing.cancelled():
            drawing.exception()  # seen: there may be nobody left to tell


def ops_app(surface: OpsSurface, *, log: Log, entropy: Callable[[int], bytes]) -> web.Application:
    """The operators' application; whoever runs it binds it to ``[metrics]``'s host and port."""
    app = web.Application(middlewares=[fault_boundary(log, entropy)], client_max_size=_PROBE_BYTES)
    app.add_routes(surface.routes())
    app.on_response_prepare.append(stamp)
    return app


class OpsListener:
    """The operators' listener of a process that serves nothing else, such as a watchtower."""

    def __init__(self, app: web.Application) -> None:
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def start(self, host: str, port: int) -> str:
        """Listen; returns the URL, whose port the kernel may have chosen. Raises ``OSError``."""
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        return f"http://{host}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Close."""
        await self._runner.cleanup()


def _answer(body: Mapping[str, object], *, good: bool) -> web.Response:
    status = web.HTTPOk.status_code if good else web.HTTPServiceUnavailable.status_code
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/json", headers=_HEADERS)
