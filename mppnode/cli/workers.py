"""``mppnode serve --workers N``: one supervisor, N nodes on one port and one ledger.

Each worker is a whole node with a life of its own in the ledger, named after its number; the kernel spreads connections
over them (SO_REUSEPORT). A worker that dies is started again under its name, which fences what its earlier life held.
With SQLite the supervisor holds the file's instance lock for all of them, so no other node can come between; the
workers themselves take turns on the file. With PostgreSQL they are nodes like any others.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from mppnode.cli.orders import RELOAD, Orders
from mppnode.config.schema import Config
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger.sqlite import InstanceLock, InstanceLocked
from mppnode.observe.logs import Level, Log

_BAD_CONFIG: Final = 2
_FAILED: Final = 1
_RESTART_S: Final = (0.2, 1.0, 5.0)  # ever slower: a worker that dies at once would burn a core otherwise
_STEADY_S: Final = 30.0  # a worker that lived so long is restarted quickly again


def worker_config(config: Config, index: int, workers: int, port: int, folder: Path | None = None) -> Config:
    """The configuration of one worker: its own name in the ledger, the common port, the common folder of counts."""
    node = replace(config.node, name=f"{config.node.name}-{index}", workers=workers, port=port)
    metrics = None if config.metrics is None else replace(config.metrics, folder=folder or config.metrics.folder)
    return replace(config, node=node, metrics=metrics)


def reserve_port(host: str, port: int) -> socket.socket:
    """Bind without listening: keeps strangers off the port, or picks a free one, while the workers share it.

    Raises:
        OSError: the address is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
    except BaseException:
        held.close()
        raise
    return held


async def supervise(path: Path, config: Config, orders: Orders, log: Log) -> int:
    """Run the workers until told to stop, pass orders on to them; returns the exit status.

    Raises:
        InstanceLocked, OSError: another node has the ledger, or the port.
    """
    with contextlib.ExitStack() as held:
        if isinstance(config.node.ledger, Path):
            held.enter_context(InstanceLock(config.node.ledger))
        port = held.enter_context(reserve_port(config.node.host, config.node.port)).getsockname()[1]
        owner = TaskOwner(lambda name, error: log("worker.failed", level=Level.ERROR, task=name, error=repr(error)))
        count, place = config.node.workers, f"{config.node.workers}@{port}"
        if config.metrics is not None and config.metrics.folder is None:
            # A folder of the supervisor's life: a worker that is started again goes on from what its slot counted.
            place = f"{place}:{held.enter_context(TemporaryDirectory(prefix='mppnode-metrics-'))}"
        workers = [_Worker(path, index, place, stop=orders.stop, log=log) for index in range(count)]
        tasks = [owner.start(worker.keep(), name=f"worker {worker.index}") for worker in workers]
        log("workers.started", url=f"http://{config.node.host}:{port}", workers=count)
        passing = owner.start(_pass_reloads_on(orders, workers), name="pass reloads on")
        orders.when_hurried(lambda: _tell_again(workers))
        ends = await asyncio.gather(*tasks)
        passing.cancel()
    return max(ends)


async def _pass_reloads_on(orders: Orders, workers: list[_Worker]) -> None:
    while True:
        await orders.reload.wait()
        orders.reload.clear()
        for worker in workers:
            worker.reload()


def _tell_again(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.terminate()


class _Worker:
    """One worker process after another under one name."""

    def __init__(self, path: Path, index: int, place: str, *, stop: asyncio.Event, log: Log) -> None:
        self.index = index
        serve = (sys.executable, "-m", "mppnode.cli.main", "serve", "--config", str(path))
        self._command = (*serve, "--worker", f"{index}/{place}")
        self._stop = stop
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._behind = False

    async def keep(self) -> int:
        """Start the worker, and start it again whenever it dies, until told to stop; returns the last exit status."""
        deaths = 0
        while True:
            started = asyncio.get_running_loop().time()
            # Its standard input is the leash: when this supervisor is gone, however it went, the worker reads its end.
            process = await asyncio.create_subprocess_exec(*self._command, stdin=asyncio.subprocess.PIPE)
            self._process = process
            if self._behind:
                self._behind = False
                self.reload()
            status = await self._until_end(process)
            if self._stop.is_set() or status == _BAD_CONFIG:
                self._stop.set()
                return abs(status)
            lived = asyncio.get_running_loop().time() - started
            deaths = 0 if lived >= _STEADY_S else min(deaths + 1, len(_RESTART_S) - 1)
            self._log("worker.died", level=Level.ERROR, worker=self.index, status=status)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _RESTART_S[deaths])
                return _FAILED

    def reload(self) -> None:
        """Have the worker read the configuration again, as soon as it is up."""
        if self._process is None or self._process.stdin is None or self._process.returncode is not None:
            self._behind = True  # it is being started, and may have read the file already
        else:
            self._process.stdin.write(RELOAD)

    def terminate(self) -> None:
        """Tell the worker to stop, and told before, to hurry."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)

    async def _until_end(self, process: asyncio.subprocess.Process) -> int:
        ended, told = asyncio.ensure_future(process.wait()), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({ended, told}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                self.terminate()
            return await ended
        finally:
            told.cancel()


def read_worker(text: str) -> tuple[int, int, int, Path | None]:
    """``INDEX/WORKERS@PORT`` or ``INDEX/WORKERS@PORT:FOLDER``, as the supervisor writes it. Raises ``ValueError``."""
    index, _, rest = text.partition("/")
    workers, _, place = rest.partition("@")
    port, _, folder = place.partition(":")
    return int(index), int(workers), int(port), Path(folder) if folder else None


__all__ = ["InstanceLocked", "read_worker", "reserve_port", "supervise", "worker_config"]
