"""``mppnode serve`` and ``mppnode devnet``: run until told to stop, then drain."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from pathlib import Path

from channels.faults import ChannelFault
from mppnode.app import Node, World, WrongChain
from mppnode.config.load import ConfigError, environment, load_config
from mppnode.config.schema import Config, LogFormat
from mppnode.kernel.clock import SystemClock
from mppnode.ledger.sqlite import InstanceLocked
from mppnode.observe.logs import Level, make_log

_BAD_CONFIG = 2
_FAILED = 1


def serve(path: Path) -> int:
    """Run a node from a configuration file; every problem in the file is printed before anything starts."""
    try:
        config = load_config(path, environment())
    except ConfigError as error:
        for problem in error.problems:
            print(f"{path}: {problem}", file=sys.stderr)
        return _BAD_CONFIG
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config))


async def _serve(config: Config) -> int:
    clock = SystemClock()
    log = make_log(
        clock=clock, level=Level[config.log.level.upper()], as_json=config.log.format is LogFormat.JSON
    )
    stop, fatal = _stop_signal(), list[BaseException]()

    def on_fatal(error: BaseException) -> None:
        # The ledger cannot be written: nothing may be promised any more. Holds are released at the next start.
        log("ledger.failed", level=Level.ERROR, error=type(error).__name__)
        fatal.append(error)
        stop.set()

    node = Node(config, World(clock, os.urandom, log, on_fatal))
    try:
        await node.start()
    except (WrongChain, InstanceLocked, ChannelFault, OSError, sqlite3.Error) as error:
        print(f"mppnode: cannot start: {error}", file=sys.stderr)
        return _FAILED
    await stop.wait()
    await node.stop()
    return _FAILED if fatal else 0


async def run_devnet(*, port: int, tokens_per_second: float) -> int:
    """Run a development network until interrupted, after printing what to type next."""
    from mppnode.cli.devnet import Devnet, DevnetOptions

    stop = _stop_signal()
    options = DevnetOptions(node_port=port, tokens_per_second=tokens_per_second)
    log = make_log(clock=SystemClock(), level=Level.INFO, as_json=False)
    async with Devnet(options, log=log) as net:
        print(net.describe(), flush=True)
        await stop.wait()
    return 0


def _stop_signal() -> asyncio.Event:
    """Set by SIGTERM or SIGINT; a second one interrupts the drain."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop
