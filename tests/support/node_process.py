"""A node in a process of its own, made to be killed.

The child imports everything, says ``ready`` and waits; told to go it starts a node on the given ledger and prints the
node's URL. So the slow part of a start, the imports, is over before the process it replaces is dead. It ends with its
parent: when its standard input closes.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from channels.descriptor import SessionProtocol
from channels.units import Pico, Units
from mppnode.app import Node, World
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
)
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import SystemClock
from mppnode.observe.logs import quiet

ROOT = Path(__file__).resolve().parents[2]
INPUT_PICO, OUTPUT_PICO = 500_000, 10_000_000
"""Half a unit for a prompt token, ten units for an output token."""
WINDOW_UNITS = 2_000
"""The most one hold may cover beyond what was delivered: what a killed node may lose per stream."""


@dataclass(frozen=True)
class Spec:
    """What a child must know; everything else is fixed here."""

    ledger: str
    chain_url: str
    provider_url: str
    key: str

    def config(self) -> Config:
        return Config(
            node=NodeConfig("127.0.0.1", (Secret(self.key.encode()),), Path(self.ledger), port=0),
            chain=ChainConfig(self.chain_url, CHAIN_ID, PATH_USD, Secret(bytes.fromhex(self.key)), PATH_USD, V1_ESCROW),
            session=SessionConfig(
                protocols=(SessionProtocol.V2,),
                min_deposit=Units(1_000),
                suggested_deposit=Units(2_000_000),
                window_units_max=WINDOW_UNITS,
                chain_ttl_s=0,
            ),
            limits=LimitsConfig(drain_s=2),
            providers=(ProviderConfig("dev", f"{self.provider_url}/v1"),),
            models=(
                ModelConfig(
                    "dev/story", "dev", "dev/story", Pico(INPUT_PICO), Pico(INPUT_PICO), Pico(OUTPUT_PICO), 128_000, 100_000
                ),
            ),
            log=LogConfig(),
        )


class NodeProcess:
    """The parent's handle on one child."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.url = ""

    @classmethod
    async def spawn(cls, spec: Spec) -> NodeProcess:
        """Start a child that imports and waits."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.node_process",
            json.dumps(asdict(spec)),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        return cls(process)

    async def go(self) -> str:
        """Let the child start its node; returns the node's URL once it listens."""
        assert self._process.stdin is not None
        assert await self._line() == "ready"
        self._process.stdin.write(b"go\n")
        self.url = await self._line()
        assert self.url.startswith("http://"), "the node did not start; its error is above"
        return self.url

    async def _line(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()

    def kill(self) -> None:
        """SIGKILL: no handler, no flush, no goodbye."""
        if self._process.returncode is None:
            self._process.kill()

    async def gone(self) -> None:
        """Wait until the process is no more."""
        await self._process.communicate()


async def _serve(spec: Spec) -> None:
    print("ready", flush=True)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    if not await reader.readline():
        return
    node = Node(spec.config(), World(SystemClock(), os.urandom, quiet, _die))
    await node.start()
    print(node.url, flush=True)
    await reader.read()
    await node.stop()


def _die(error: BaseException) -> None:
    print(f"the ledger failed: {error!r}", file=sys.stderr, flush=True)
    os._exit(3)


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(spec))


if __name__ == "__main__":
    main()
