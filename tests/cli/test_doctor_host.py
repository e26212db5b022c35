"""What the doctor says of the machine: files, memory, event loop and ports."""

from __future__ import annotations

import asyncio
import resource
import socket
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from mppnode.cli.devnet import Devnet, DevnetOptions
from mppnode.config.accounts import AdminConfig
from mppnode.config.secrets import Secret
from mppnode.doctor.findings import Status
from mppnode.doctor.machine import Machine, aside
from tests.cli.doctor_kit import config, look, server

TOKEN = "admin-token-canary-0123456789abcdef"


class Box(Machine):
    """A machine with what it is said to have."""

    files: int | None = 4_256
    packages = True

    def open_files_max(self):
        return self.files

    def has(self, module):
        return self.packages


class Small(Box):
    files = 1_024


class Unlimited(Box):
    files = None


class Bare(Box):
    packages = False


@pytest.mark.parametrize(("machine", "status"), [(Box(), Status.OK), (Unlimited(), Status.OK), (Small(), Status.FAIL)])
async def test_open_files(machine, status):
    """A stream is two connections; the remedy has the number to set."""
    found = await look("files", config(), machine=machine)
    assert found.status is status
    assert status is Status.OK or "ulimit -n 4256" in found.remedy


def test_the_limit_of_this_process():
    """What is compared is the soft limit, which is the one that counts."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert Machine().open_files_max() == (None if soft == resource.RLIM_INFINITY else soft)


@pytest.mark.parametrize(
    ("available_mib", "limit", "status"),
    [(8_000, "max", Status.OK), (300, "max", Status.WARN), (100, "max", Status.FAIL), (8_000, str(100 << 20), Status.FAIL), (None, "max", Status.SKIP)],
)
async def test_memory(tmp_path, available_mib, limit, status):
    """What the kernel has left, or the container's limit where that is less, against what streams need."""
    if available_mib is not None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {available_mib << 10} kB\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    found = await look("memory", config(), machine=Machine(proc=tmp_path, cgroup=tmp_path))
    assert found.status is status
    assert status is Status.SKIP or "1 x 2000 streams need 262 MiB" in found.text


async def test_the_event_loop():
    """The fast one is installed, or a command says how."""
    assert (await look("event-loop", config())).status is Status.OK
    bare = await look("event-loop", config(), machine=Bare())
    assert (bare.status, bare.remedy) == (Status.FAIL, "pip install uvloop")


async def test_what_blocks_is_left_behind():
    """Work in a thread gives its result or its error, and one that never ends keeps nobody from going on."""
    assert await aside(lambda: 7) == 7
    with pytest.raises(OSError, match="gone"):
        await aside(lambda: (_ for _ in ()).throw(OSError("gone")))
    blocked, block = socket.socketpair()
    with blocked, block, pytest.raises(TimeoutError):
        await asyncio.wait_for(aside(lambda: blocked.recv(1)), 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_ports_that_are_free():
    """A free port can be bound, 0 is picked later, and an address of another machine cannot be had."""
    what = config(node={"port": free_port()}, admin=AdminConfig(Secret(TOKEN), port=0))
    assert (await look("port", what, "node")).status is Status.OK
    assert (await look("port", what, "admin")).status is Status.SKIP
    away = await look("port", config(node={"host": "192.0.2.1"}), "node")
    assert away.status is Status.FAIL
    assert "node.host" in away.remedy


async def test_ports_of_a_running_node():
    """A node on its own ports is as it should be, also behind the address that means all of them."""
    async with Devnet(DevnetOptions(admin=AdminConfig(Secret(TOKEN), port=0))) as net:
        ports = [urlsplit(url).port or 0 for url in (net.node.url, net.node.admin_url)]
        for host in ("127.0.0.1", "0.0.0.0"):
            what = config(node={"port": ports[0], "host": host}, admin=AdminConfig(Secret(TOKEN), port=ports[1]))
            for table in ("node", "admin"):
                found = await look("port", what, table)
                assert found.status is Status.OK
                assert "in use by a node" in found.text


async def test_ports_of_others():
    """A stranger on our port is a failure whatever it answers, and a node that is not healthy a warning."""
    node = {"X-Request-Id": "req_0123456789abcdef01234567"}
    for status, headers, expected in ((404, {}, Status.FAIL), (200, {}, Status.FAIL), (200, node, Status.OK), (503, node, Status.WARN)):

        async def answer(_: web.Request, status: int = status, headers: dict[str, str] = headers) -> web.Response:
            return web.Response(status=status, headers=headers)

        async with server(answer) as url:
            found = await look("port", config(node={"port": urlsplit(url).port}), "node")
        assert found.status is expected

    def hang_up(_, writer):
        writer.close()

    mute = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with mute:
        found = await look("port", config(node={"port": mute.sockets[0].getsockname()[1]}), "node")
    assert found.status is Status.FAIL
    assert "no node" in found.text


async def test_a_node_may_start_while_its_port_is_looked_at():
    """A bound socket that does not listen keeps nobody away."""
    port = free_port()
    with socket.socket() as looking:
        looking.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        looking.bind(("127.0.0.1", port))
        starting = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
        starting.close()
        await starting.wait_closed()
