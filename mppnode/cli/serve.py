"""``mppnode serve``, ``watchtower`` and ``devnet``: run until told to stop, then drain."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from channels.faults import ChannelFault
from mppnode.app import Node
from mppnode.cli.orders import Orders
from mppnode.config.load import ConfigError, environment, load_config
from mppnode.config.schema import Config, LogFormat
from mppnode.kernel.clock import SystemClock
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger.base import LedgerError
from mppnode.ledger.sqlite import InstanceLocked
from mppnode.observe.logs import Level, Log, NodeLog, is_terminal, make_log, wants_colour
from mppnode.parts import World, WrongChain
from mppnode.reload import UNUSABLE, Reloader
from mppnode.watchtower import Watchtower

_BAD_CONFIG = 2
_FAILED = 1
CANNOT_START = (WrongChain, InstanceLocked, LedgerError, ChannelFault, OSError, sqlite3.Error, *UNUSABLE)


def serve(path: Path, *, workers: int | None = None, worker: str | None = None) -> int:
    """Run a node from a configuration file; every problem in the file is printed before anything starts."""
    config = read_config(path)
    if config is None:
        return _BAD_CONFIG
    if worker is not None:
        from mppnode.cli.workers import read_worker, worker_config

        place = read_worker(worker)
        return run(_run(config, Node, path, lambda found: worker_config(found, *place), leashed=True))

    def manned(found: Config) -> Config:
        return replace(found, node=replace(found.node, workers=workers or found.node.workers))

    if manned(config).node.workers > 1:
        return run(_supervise(path, manned(config)))
    return run(_run(config, Node, path, manned))


def watchtower(path: Path) -> int:
    """Run the treasury alone: it settles and closes, and serves nobody."""
    config = read_config(path)
    return _BAD_CONFIG if config is None else run(_run(config, Watchtower, path, lambda found: found))


def read_config(path: Path) -> Config | None:
    """The configuration, or None after its problems have been printed."""
    try:
        return load_config(path, environment())
    except ConfigError as error:
        for problem in error.problems:
            print(f"{path}: {problem}", file=sys.stderr)
        return None


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run a command on the fast event loop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def log_of(config: Config, *, worker: bool = False) -> NodeLog:
    """The log a configuration asks for; a worker's lines have its number, which ends its name."""
    chosen, environ = config.log, environment()
    as_text = chosen.format is LogFormat.TEXT or (
        chosen.format is LogFormat.AUTO and is_terminal(sys.stderr, environ)
    )
    return make_log(
        clock=SystemClock(),
        level=Level[chosen.level.upper()],
        as_json=not as_text,
        colour=wants_colour(sys.stderr, environ),
        levels={room: Level[level.upper()] for room, level in chosen.levels},
        always={"worker": int(config.node.name.rpartition("-")[2])} if worker else None,
    )


class _Service(Protocol):
    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    def hurry(self) -> None: ...


async def _run(
    config: Config,
    make: Callable[[Config, World], _Service],
    path: Path,
    mine: Callable[[Config], Config],
    *,
    leashed: bool = False,
) -> int:
    """Run a service until it is told to stop or its ledger fails; the exit status says which.

    ``mine`` makes what a file says into this process's configuration, now and whenever the file is read again.
    """
    config = mine(config)
    log, orders, fatal = log_of(config, worker=leashed), Orders(), list[BaseException]()
    if leashed:
        await orders.follow_supervisor()

    def on_fatal(error: BaseException) -> None:
        # The ledger cannot be written: nothing may be promised any more. Holds are released at the next start.
        log("ledger.failed", level=Level.ERROR, error=type(error).__name__)
        fatal.append(error)
        orders.stop.set()

    service = make(config, World(SystemClock(), os.urandom, log, on_fatal))
    try:
        runs = await _started(service, orders)
    except CANNOT_START as error:
        log.close()
        print(f"mppnode: cannot start: {error}", file=sys.stderr)
        return _FAILED
    if runs:
        await _until_told(orders, service, config, log, lambda: mine(load_config(path, environment())))
        orders.when_hurried(service.hurry)
        await service.stop()
    log.close()
    if fatal:
        print(f"mppnode: stopped because the ledger failed: {fatal[0]}", file=sys.stderr)
    return _FAILED if fatal else 0


async def _started(service: _Service, orders: Orders) -> bool:
    """Start a service; False when the order to stop came first: a chain that is silent is waited for half a minute."""
    owner = TaskOwner(lambda _name, _error: None)  # what went wrong is for the caller
    starting, told = owner.start(service.start(), name="start"), owner.start(orders.stop.wait(), name="stop")
    await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
    # Like a crash at the same place, from which the next start recovers; but what was opened is closed.
    await owner.drain(deadline_s=0)
    if starting.cancelled():
        return False
    starting.result()
    return True


async def _until_told(
    orders: Orders, service: _Service, config: Config, log: Log, load: Callable[[], Config]
) -> None:
    """Reload as often as asked, until the order to stop."""
    node = service if isinstance(service, Node) else None
    owner = TaskOwner(lambda name, error: log("task.failed", level=Level.ERROR, task=name, error=type(error).__name__))
    owner.spawn(Reloader(config, load=load, service=node, log=log, asked=orders.reload).keep(), name="reload")
    await orders.stop.wait()
    await owner.drain(deadline_s=0)


async def _supervise(path: Path, config: Config) -> int:
    from mppnode.cli.workers import supervise

    log = log_of(config)
    try:
        return await supervise(path, config, Orders(), log)
    except CANNOT_START as error:
        print(f"mppnode: cannot start: {error}", file=sys.stderr)
        return _FAILED
    finally:
        log.close()


async def run_devnet(*, port: int, tokens_per_second: float, listen: str | None = None, chain_port: int = 0) -> int:
    """Run a development network until interrupted, after printing what to type next; ports of 0 are picked."""
    from mppnode.cli.devnet import Devnet, DevnetOptions

    orders = Orders()  # a hang-up reloads nothing here: the network has no file
    options = DevnetOptions(
        listen=listen, node_port=port, chain_port=chain_port, tokens_per_second=tokens_per_second
    )
    log = make_log(clock=SystemClock(), level=Level.INFO, as_json=False)
    async with Devnet(options, log=log) as net:
        print(net.describe(await net.new_customer()), flush=True)
        await orders.stop.wait()
    log.close()
    return 0
