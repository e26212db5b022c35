"""The machine: files, memory, event loop, ports."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import socket
from ipaddress import ip_address
from typing import Final

import aiohttp

from mppnode.config.schema import Config
from mppnode.doctor.findings import Case, Check, Finding, fail, ok, skip, warn
from mppnode.doctor.machine import aside

_FILES_PER_STREAM: Final = 2
"""The caller's connection and the provider's."""
_FILES_APART: Final = 256
"""Ledger, chain, databases, idle connections of clients."""
_STREAM_BYTES: Final = 32 * 1024
"""What a running stream holds."""
_NODE_BYTES: Final = 200 << 20
"""Of one process with nothing to do, with room for a catalog."""
_REQUEST_ID = re.compile(r"req_[0-9a-f]{24}", re.ASCII)
_TAKEN: Final = frozenset({errno.EADDRINUSE})


async def _files(case: Case, _: str) -> Finding:
    most, streams = await aside(case.machine.open_files_max), case.config.limits.streams_max
    need = streams * _FILES_PER_STREAM + _FILES_APART
    if most is None:
        return ok("no limit in this shell")
    text = f"{most} open files in this shell; {streams} streams need {need}"
    if most < need:
        return fail(text, f"raise the limit (ulimit -n {need}; LimitNOFILE={need} in a systemd unit), or lower"
                    " limits.streams_max")
    return ok(text)


async def _memory(case: Case, _: str) -> Finding:
    found, config = await aside(case.machine.memory_bytes), case.config
    if found is None:
        return skip("the kernel does not tell")
    workers, streams = config.node.workers, config.limits.streams_max
    need = workers * (streams * _STREAM_BYTES + _NODE_BYTES)
    text = f"{found >> 20} MiB can be had; {workers} x {streams} streams need {need >> 20} MiB"
    remedy = "lower limits.streams_max or node.workers, or give the machine more memory"
    if found < need:
        return fail(text, remedy)
    return warn(text, remedy) if found < 2 * need else ok(text)


async def _loop(case: Case, _: str) -> Finding:
    if not case.machine.has("uvloop"):
        return fail("uvloop is not installed", "pip install uvloop")
    return ok("uvloop")


def _listeners(config: Config) -> dict[str, tuple[str, int]]:
    found = {"node": (config.node.host, config.node.port)}
    if config.admin is not None:
        found["admin"] = (config.admin.host, config.admin.port)
    if config.metrics is not None:
        found["metrics"] = (config.metrics.host, config.metrics.port)
    return found


async def _port(case: Case, table: str) -> Finding:
    host, port = _listeners(case.config)[table]
    if port == 0:
        return skip("0: the system picks a free one")
    try:
        await asyncio.to_thread(_try_bind, host, port)
    except OSError as error:
        if error.errno not in _TAKEN:
            return fail(f"{host}:{port} cannot be had: {error.strerror}", f"correct {table}.host or {table}.port")
        return await _occupant(case, table, host, port)
    return ok(f"{host}:{port} is free")


def _try_bind(host: str, port: int) -> None:
    """Bind without listening, and let go. A node that starts at this moment is not kept from it: both reuse addresses.

    Raises:
        OSError: the address is taken, is not this machine's, or may not be used.
    """
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with contextlib.closing(socket.socket(family, kind, proto)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


async def _occupant(case: Case, table: str, host: str, port: int) -> Finding:
    try:
        async with case.http.get(f"http://{_reachable(host)}:{port}/healthz", allow_redirects=False) as response:
            status, stamp = response.status, response.headers.get("X-Request-Id", "")
    except (aiohttp.ClientError, TimeoutError, ValueError):
        status, stamp = 0, ""
    # Not the status: many a program answers 200 to this, and the admin listener refuses it. Every answer of a node has
    # a request id of its making.
    if _REQUEST_ID.fullmatch(stamp) is None:
        return fail(
            f"{host}:{port} is in use by something that is no node", f"stop it, or choose another {table}.port"
        )
    if status == 503:  # noqa: PLR2004 - Service Unavailable
        return warn(f"{host}:{port} is in use by a node that is not healthy", "read its log, and restart it")
    return ok(f"{host}:{port} is in use by a node that answers")


def _reachable(host: str) -> str:
    """How to connect to what listens on ``host``."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"  # noqa: PLR2004 - IPv4
    return host if address.version == 4 else f"[{host}]"  # noqa: PLR2004 - IPv4


def _tables(config: Config) -> tuple[str, ...]:
    return tuple(_listeners(config))


CHECKS: Final = (
    Check(
        "files",
        f"the limit of open files covers `limits.streams_max` x {_FILES_PER_STREAM} + {_FILES_APART}",
        _files,
    ),
    Check(
        "memory",
        f"memory covers `node.workers` x (`limits.streams_max` x {_STREAM_BYTES >> 10} KiB + {_NODE_BYTES >> 20} MiB)"
        " (fail), and twice that (warn)",
        _memory,
    ),
    Check("event-loop", "uvloop is installed", _loop),
    Check("port", "each listener's port is free, or in use by a node whose `/healthz` is well", _port, _tables),
)
"""In the order of the report."""
