"""Nodes in processes of their own, made to be killed.

A nursery imports everything once and forks a child per node, so that a node is up some milliseconds after it was asked
for and three thousand kills fit into minutes. Each child keeps a socket to the parent: it sends its URL and the points it
passes, and its end, however sudden, is the end of the socket. A child ends with its parent: when the socket closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from channels.descriptor import SessionProtocol
from channels.units import Pico, Units
from mppnode.app import Node
from mppnode.cli.devnet import CHAIN_ID, PATH_USD, V1_ESCROW
from mppnode.config.schema import (
    ChainConfig,
    Config,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    NodeConfig,
    ProviderConfig,
    SessionConfig,
    TreasuryConfig,
)
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import SystemClock
from mppnode.observe.logs import quiet
from mppnode.parts import World

ROOT = Path(__file__).resolve().parents[2]
INPUT_PICO, OUTPUT_PICO = 500_000, 10_000_000
"""Half a unit for a prompt token, ten units for an output token."""
WINDOW_UNITS = 2_000
"""The most one hold may cover beyond what was delivered: what a killed node may lose per stream."""


@dataclass(frozen=True)
class Spec:
    """What a child must know; everything else is fixed here."""

    ledger: str
    """A path, or the URL of a PostgreSQL database."""
    chain_url: str
    provider_url: str
    key: str
    name: str = "node"
    deposit: int = 2_000_000
    """Units a payer is told to lock."""
    crash: str = ""
    """``POINT:N``: end by SIGKILL when the point is passed for the N-th time."""
    drain_s: int = 2
    report: bool = False
    """Whether to tell the parent each point when it is first passed."""

    def config(self) -> Config:
        where = Secret(self.ledger) if "://" in self.ledger else Path(self.ledger)
        return Config(
            node=NodeConfig("127.0.0.1", (Secret(self.key.encode()),), where, port=0, name=self.name),
            chain=ChainConfig(self.chain_url, CHAIN_ID, PATH_USD, Secret(bytes.fromhex(self.key)), PATH_USD, V1_ESCROW),
            session=SessionConfig(
                protocols=(SessionProtocol.V2,),
                min_deposit=Units(1_000),
                suggested_deposit=Units(self.deposit),
                window_units_max=WINDOW_UNITS,
                chain_ttl_s=0,
            ),
            limits=LimitsConfig(drain_s=self.drain_s),
            providers=(ProviderConfig("dev", f"{self.provider_url}/v1"),),
            models=(
                ModelConfig(
                    "dev/story", "dev", "dev/story", Pico(INPUT_PICO), Pico(INPUT_PICO), Pico(OUTPUT_PICO), 128_000, 100_000
                ),
            ),
            log=LogConfig(),
            # Every start of a node settles what is worth more than a fee: the kills must meet settlements too.
            treasury=TreasuryConfig(settle_fees=1),
        )


@dataclass
class NodeProcess:
    """The parent's handle on one child."""

    spec: Spec
    pid: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    url: str = ""
    points: set[str] = field(default_factory=set)
    dead: bool = False

    async def go(self) -> str:
        """Let the child start its node; returns the node's URL once it listens, or nothing when it died before that."""
        self.writer.write(b"go\n")
        while not self.url and (line := await self._line()):
            if line.startswith("http://"):
                self.url = line
        return self.url

    async def _line(self) -> str:
        try:
            line = (await self.reader.readline()).decode().strip()
        except ConnectionError:
            line = ""
        if line.startswith("point "):
            self.points.add(line.removeprefix("point "))
        self.dead = self.dead or not line
        return line

    def kill(self) -> None:
        """SIGKILL: no handler, no flush, no goodbye."""
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Any signal, to a child that is still there: a pid of the dead may be somebody else's by now."""
        if not self.dead and not self.reader.at_eof():
            with contextlib.suppress(ProcessLookupError):  # it died a moment ago and its socket's end is on the way
                os.kill(self.pid, number)

    async def stop(self) -> None:
        """Ask the node to drain and end, and wait for it."""
        if not self.dead:
            self.writer.write(b"stop\n")
        await self.gone()

    async def gone(self) -> None:
        """Wait until the process is no more."""
        while await self._line():
            pass
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class Nursery:
    """Forks nodes on request."""

    def __init__(self) -> None:
        self._born: dict[int, asyncio.Future[tuple[int, asyncio.StreamReader, asyncio.StreamWriter]]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._nodes: list[NodeProcess] = []

    async def start(self, folder: str) -> None:
        path = f"{folder}/nursery.sock"
        self._server = await asyncio.start_unix_server(self._welcome, path)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.node_process", path, cwd=ROOT, stdin=asyncio.subprocess.PIPE
        )

    async def stop(self) -> None:
        """End every child that is left, then the nursery."""
        assert self._process is not None
        for node in self._nodes:
            node.kill()
            await node.gone()
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        self._server.close()
        await self._server.wait_closed()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, pid = map(int, (await reader.readline()).split())
        self._born.pop(number).set_result((pid, reader, writer))

    async def spawn(self, spec: Spec) -> NodeProcess:
        """A child that waits to be told to go."""
        assert self._process is not None
        assert self._process.stdin is not None
        number = len(self._born) + id(spec)
        future: asyncio.Future[tuple[int, asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.get_running_loop().create_future()
        self._born[number] = future
        self._process.stdin.write(json.dumps({"number": number, "spec": asdict(spec)}).encode() + b"\n")
        pid, reader, writer = await future
        node = NodeProcess(spec, pid, reader, writer)
        self._nodes.append(node)
        return node


@asynccontextmanager
async def nursery() -> AsyncIterator[Nursery]:
    """A nursery for the length of a test."""
    made = Nursery()
    with tempfile.TemporaryDirectory() as folder:
        await made.start(folder)
        try:
            yield made
        finally:
            await made.stop()


# ------------------------------------------------------------------------------------------------------ in the children


def _prober(spec: Spec, tell: Callable[[str], None]) -> Callable[[str], None]:
    point, _, count = spec.crash.partition(":")
    passed: Counter[str] = Counter()

    def probe(name: str) -> None:
        passed[name] += 1
        if spec.report and passed[name] == 1:
            tell(f"point {name}")
        if name == point and passed[name] == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    return probe


async def _serve(spec: Spec, link: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=link)

    def tell(line: str) -> None:
        link.sendall(f"{line}\n".encode())  # at once: the process may be dead before the loop turns

    if not await reader.readline():
        return
    link.setblocking(True)
    node = Node(spec.config(), World(SystemClock(), os.urandom, quiet, _die, _prober(spec, tell)))
    await node.start()
    tell(node.url)
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    asked = asyncio.ensure_future(reader.readline())
    asked.add_done_callback(lambda _: told.set())
    await told.wait()
    await node.stop()
    asked.cancel()
    writer.close()


def _die(error: BaseException) -> None:
    print(f"the ledger failed: {error!r}", file=sys.stderr, flush=True)
    os._exit(3)


def _child(number: int, spec: Spec, path: str) -> None:
    import uvloop

    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.connect(path)
    link.sendall(f"{number} {os.getpid()}\n".encode())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(spec, link))


def main() -> None:
    """The nursery: one fork per line on standard input, until it ends."""
    import asyncpg  # noqa: F401 - imported once, here, and not in every child
    import uvloop  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        wanted = json.loads(line)
        if os.fork() == 0:
            sys.stdin.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            status = 1
            try:
                _child(wanted["number"], Spec(**wanted["spec"]), sys.argv[1])
                status = 0
            finally:
                os._exit(status)


def spec_with(spec: Spec, **changes: object) -> Spec:
    """The same node with something changed."""
    return replace(spec, **changes)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
