"""The Stripe peer as a process of its own, so that a test can kill a node and Stripe still knows what it was told.

``python -m tests.support.stripe_process --port 0 --state peer.json`` prints its port. What the peer knows is written to the file after
each change, by rename, and read from it at start: the peer itself may be killed too. Tests tell its stories over HTTP, under
``/_peer/``, which Stripe's API does not have; :func:`peer_process` is their end of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from mppnode.kernel.clock import SystemClock
from tests.support.stripe_peer import Mishap, StripePeer

ROOT = Path(__file__).resolve().parents[2]
START_S = 20.0
STORIES = frozenset({
    "settle", "complete_checkout", "refund", "dispute", "close_dispute", "metered_price", "due", "over_threshold", "close_invoice", "retry_invoice",
})  # fmt: skip


def save(peer: StripePeer, path: Path) -> None:
    """Write all the peer knows."""
    kept = {
        "objects": peer.objects, "events": peer.events, "answers": peer.answers, "answered": peer.answered, "numbers": peer._numbers,
        "mishaps": [mishap.name for mishap in peer.mishaps],
    }
    half = path.with_suffix(".half")
    half.write_text(json.dumps(kept))
    os.replace(half, path)


def load(peer: StripePeer, path: Path) -> None:
    """Know again what was written."""
    kept = json.loads(path.read_text())
    peer.objects, peer.events, peer.answered, peer._numbers = kept["objects"], kept["events"], kept["answered"], kept["numbers"]
    peer.answers = {key: (print_of, status, body) for key, (print_of, status, body) in kept["answers"].items()}
    peer.mishaps = deque(Mishap[name] for name in kept["mishaps"])


class Served:
    """The peer's HTTP side in its own process."""

    def __init__(self, peer: StripePeer, path: Path | None) -> None:
        self.peer = peer
        self.path = path
        self.app = web.Application(client_max_size=1 << 20)
        self.app.router.add_get("/_peer/state", self.state)
        self.app.router.add_post("/_peer/{story}", self.tell)
        self.app.router.add_route("*", "/{path:.*}", self.api)

    def _save(self) -> None:
        if self.path is not None:
            save(self.peer, self.path)

    async def api(self, request: web.Request) -> web.StreamResponse:
        before = len(self.peer.mishaps)
        try:
            return await self.peer.handle(request)
        finally:
            # Whatever became of the answer: what a request did is on disk before its caller can learn of it.
            if request.method == "POST" or before != len(self.peer.mishaps):
                self._save()

    async def state(self, _: web.Request) -> web.Response:
        requests = [[seen.method, seen.path, seen.params, seen.key] for seen in self.peer.seen]
        return web.json_response({"objects": self.peer.objects, "events": self.peer.events, "requests": requests})

    async def tell(self, request: web.Request) -> web.Response:
        story, told = request.match_info["story"], await request.json()
        try:
            match story:
                case "mishaps":
                    self.peer.mishaps.extend(Mishap[name] for name in told["names"])
                    result: Any = len(self.peer.mishaps)
                case "deliver":
                    result = await self._deliver(**told)
                case _ if story in STORIES:
                    result = getattr(self.peer, story)(**told)
                case _:
                    return web.json_response({"error": f"no story {story}"}, status=404)
        except (AssertionError, KeyError, TypeError, aiohttp.ClientError) as error:
            return web.json_response({"error": repr(error)}, status=400)
        self._save()
        return web.json_response(result)

    async def _deliver(self, *, url: str, secret: str, ids: list[str] | None = None, times: int = 1) -> list[int]:
        by_id = {event["id"]: event for event in self.peer.events}
        events = None if ids is None else [by_id[ident] for ident in ids]
        async with aiohttp.ClientSession() as session:
            return await self.peer.deliver(session, url, secret, events, times=times)


async def serve(port: int, path: Path | None, *, with_parent: bool) -> None:
    """Answer until killed, or until standard input ends."""
    peer = StripePeer(clock=SystemClock())
    if path is not None and path.exists():
        load(peer, path)
    runner = web.AppRunner(Served(peer, path).app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    bound = runner.addresses[0][1]
    peer.base_url = f"http://127.0.0.1:{bound}"
    print(bound, flush=True)
    try:
        if not with_parent:
            await asyncio.Event().wait()
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await reader.read()
    finally:
        await runner.cleanup()


@dataclass
class PeerProcess:
    """A test's end of a peer in another process."""

    base_url: str
    process: asyncio.subprocess.Process
    session: aiohttp.ClientSession

    async def tell(self, story: str, **told: Any) -> Any:
        """Have something happen at Stripe: a story by name, ``deliver`` (url, secret, ids, times) or ``mishaps`` (names)."""
        async with self.session.post(f"{self.base_url}/_peer/{story}", json=told) as response:
            found = await response.json()
            assert response.status == 200, found
            return found

    async def state(self) -> dict[str, Any]:
        """All objects by id, all events and all requests."""
        async with self.session.get(f"{self.base_url}/_peer/state") as response:
            return dict(await response.json())

    async def of(self, kind: str) -> list[dict[str, Any]]:
        """All objects of one kind, oldest first."""
        return [item for item in (await self.state())["objects"].values() if item["object"] == kind]


@asynccontextmanager
async def peer_process(state: Path | None = None, port: int = 0) -> AsyncIterator[PeerProcess]:
    """A peer in a process of its own, which ends with this block, or with the test's process."""
    command = [sys.executable, "-m", "tests.support.stripe_process", "--port", str(port), "--with-parent", *(["--state", str(state)] if state else [])]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        bound = int(await asyncio.wait_for(process.stdout.readline(), START_S))
        async with aiohttp.ClientSession() as session:
            yield PeerProcess(f"http://127.0.0.1:{bound}", process, session)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]  # else its pipes are closed by the garbage collector, with a warning


def main() -> None:
    """Run one peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--with-parent", action="store_true", help="end when standard input does")
    given = parser.parse_args()
    asyncio.run(serve(given.port, given.state, with_parent=given.with_parent))


if __name__ == "__main__":
    main()
