"""The Dockerfile's steps without an engine: each RUN executed in a folder of its own, and a node started from the result.

The build stage and the last one share one virtual environment that stands for the base image. What is different from an
engine: paths are moved under a folder, and pip may use its cache, because the registry is not what is tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
from aiohttp import web

from channels.ids import to_hex
from mppnode.cli.devnet import CHAIN_ID, PATH_USD, Devnet, DevnetOptions
from tests.deploy.files import ROOT, SECRETS_DIR, copied, dockerfile, health_command, make_secrets
from tests.support.http_client import chat
from tests.support.postgres import postgres_database

USER = 10001
PATIENCE_S = 60
MOVED = ("/wheels", "/opt/mppnode", "/var/lib/mppnode")


@dataclass
class Image:
    """What the Dockerfile made."""

    folder: Path
    base: Path
    """The environment that stands for the base image."""

    def at(self, path: str) -> Path:
        return self.folder / path.lstrip("/")

    def moved(self, text: str) -> str:
        for path in MOVED:
            text = text.replace(path, str(self.at(path)))
        return text

    def run(self, step: str) -> None:
        """One RUN: the shell, in the stage's directory, with the base image's programs first."""
        step = self.moved(step).replace("--no-cache-dir", "--disable-pip-version-check")
        if os.getuid() != 0:
            step = step.replace(f"-o {USER} -g {USER} ", "")
        environment = {"PATH": f"{self.base}/bin:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
        environment |= {name: value for name, value in os.environ.items() if name.lower().startswith(("pip_", "http", "ssl_", "no_proxy", "requests_"))}
        done = subprocess.run(["sh", "-c", step], cwd=self.at("/src"), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{step}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """Every step of both stages, in order."""
    folder = Path(tempfile.mkdtemp(prefix="mpp-image-", dir="/tmp"))
    folder.chmod(0o755)  # the node runs as somebody else
    try:
        subprocess.run([sys.executable, "-m", "venv", folder / "base"], check=True)
        made = Image(folder, folder / "base")
        made.at("/src").mkdir()
        for name in copied():
            source, target = ROOT / name, made.at("/src") / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            else:
                shutil.copy(source, target)
        made.at("/var/lib").mkdir(parents=True)
        for stage in dockerfile():
            for step in stage.all("RUN"):
                made.run(step)
        yield made
    finally:
        shutil.rmtree(folder)


def test_the_stages_are_what_the_steps_here_assume() -> None:
    """Both stages have one base, pinned to a minor version that the package supports; the last takes one directory."""
    build, last = dockerfile()
    assert build.base == last.base == "python:3.11-slim-bookworm"
    assert last.all("COPY") == [f"--from={build.name} /opt/mppnode /opt/mppnode"]
    assert not last.all("ADD") + build.all("ADD")
    assert last.one("USER") == f"{USER}:{USER}"
    assert last.one("STOPSIGNAL") == "SIGTERM"
    assert last.exec_form("ENTRYPOINT") == ["mppnode"]
    names = [name for name, _ in last.steps]
    assert names.index("RUN") < names.index("USER")  # what needs root is done before it is given up
    assert "PATH=/opt/mppnode/bin:" in last.one("ENV")


def test_the_wheel_has_exactly_the_programs_files(image: Image) -> None:
    """All that COPY takes of the two packages is in the wheel, and nothing else; all dependencies are wheels."""
    wheels = sorted(image.at("/wheels").iterdir())
    assert {path.suffix for path in wheels} == {".whl"}
    (ours,) = [path for path in wheels if path.name.startswith("mppnode-")]
    with zipfile.ZipFile(ours) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(image.at("/src")))
        for package in ("mppnode", "channels")
        for path in (image.at("/src") / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == expected
    assert "mppnode/ledger/sql" in {str(Path(name).parent) for name in inside}  # what is not Python goes too
    assert {path.name.split("-")[0].lower() for path in wheels} >= {"asyncpg", "stripe", "pyjwt", "cryptography", "uvloop"}


def test_no_installer_is_left(image: Image) -> None:
    """Neither the program's environment nor the base has pip, setuptools or wheel in the end."""
    for python in (image.at("/opt/mppnode") / "bin/python", image.base / "bin/python"):
        for module in ("pip", "setuptools", "wheel"):
            found = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
            assert found.returncode == 1, (python, module)
    assert not list((image.at("/opt/mppnode") / "bin").glob("pip*"))


def test_state_belongs_to_the_nodes_user_alone(image: Image) -> None:
    """The volume's directory has the user the image runs as, and nobody else can look into it."""
    found = image.at("/var/lib/mppnode").stat()
    assert stat.S_IMODE(found.st_mode) == 0o700
    assert found.st_uid == (USER if os.getuid() == 0 else os.getuid())


def identity(image: Image) -> dict[str, object]:
    """How to run as the image's user, where we may and where that user can reach the interpreter."""
    if os.getuid() != 0:
        return {}
    them: dict[str, object] = {"user": USER, "group": USER, "extra_groups": []}
    python = image.at("/opt/mppnode") / "bin/python"
    with contextlib.suppress(PermissionError):
        if subprocess.run([python, "-c", ""], check=False, cwd="/", **them).returncode == 0:  # type: ignore[call-overload]
            return them
    return {}


@asynccontextmanager
async def over_tcp(url: str) -> AsyncIterator[str]:
    """The test server listens on a socket in a directory the node's user may not enter: a TCP door to it."""
    parts = urlsplit(url)
    (folder,) = parse_qs(parts.query)["host"]

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432")
        await asyncio.gather(pump(reader, outer), pump(inner, writer))

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"postgresql://{parts.username}:{parts.password}@127.0.0.1:{port}{parts.path}"


def write_config(net: Devnet, folder: Path, image: Image, database: str) -> Path:
    """The compose file's configuration with this test's addresses, and its secrets beside it."""
    make_secrets(folder, database, net.payee_key)
    text = (ROOT / "docs/deploy/mppnode.toml").read_text()
    changes = {
        "https://rpc.example.com": net.chain_url,
        "chain_id = 4217": f"chain_id = {CHAIN_ID}",
        "0x20C000000000000000000000b9537d11c60E8b50": to_hex(PATH_USD),
        "http://10.0.0.5:8000": net.provider.url,
        'host = "0.0.0.0"': 'host = "127.0.0.1"',
        "port = 8402": "port = 0",
        "port = 8404": "port = 0",
        "/var/lib/mppnode": str(image.at("/var/lib/mppnode")),
        SECRETS_DIR: str(folder),
    }
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "mppnode.toml"
    path.write_text(text)
    return path


async def test_the_installed_program_serves_with_the_compose_configuration(image: Image) -> None:
    """As the image's user, with a read-only program, on PostgreSQL: it asks for payment, is healthy, and drains on SIGTERM."""
    program = image.at("/opt/mppnode") / "bin/mppnode"
    command = [str(program), *dockerfile()[-1].exec_form("CMD")]
    said = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    assert "serve" in said.stdout
    folder = image.folder / "etc"
    folder.mkdir()
    environment = {"PATH": f"{program.parent}:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    async with (
        postgres_database() as url,
        over_tcp(url) as database,
        Devnet(DevnetOptions(tokens_per_second=0.0)) as net,
        aiohttp.ClientSession() as http,
    ):
        config = write_config(net, folder, image, database)
        command[-1] = str(config)
        state = image.at("/var/lib/mppnode")
        who = identity(image)
        node = await asyncio.create_subprocess_exec(*command, env=environment, cwd=image.folder, stderr=asyncio.subprocess.PIPE, **who)  # type: ignore[arg-type]
        assert node.stderr is not None
        lines: list[str] = []
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not (lines and '"node.started"' in lines[-1]):
                    lines.append((await node.stderr.readline()).decode())
                    assert lines[-1], lines
            address = json.loads(lines[-1])["url"]
            async with http.get(f"{address}/v1/models") as response:
                assert [model["id"] for model in (await response.json())["data"]] == ["qwen/qwen3.5-9b"]
            async with http.post(f"{address}/v1/chat/completions", json=chat("qwen/qwen3.5-9b")) as response:
                assert response.status == 402
                assert 'realm="api.example.com"' in response.headers["WWW-Authenticate"]
            assert await health(image, address.rpartition(":")[2]) == 0
        finally:
            node.send_signal(signal.SIGTERM)
            rest = await node.stderr.read()
            status = await node.wait()
    assert status == 0, rest
    assert b"node.stopped" in rest
    if who:
        assert {path.stat().st_uid for path in state.iterdir()} <= {USER}


async def health(image: Image, port: str) -> int:
    """The exit status of the image's health check against a port."""
    command = [word.replace("8402", port) for word in health_command()]
    assert any(port in word for word in command), shlex.join(command)
    python = image.at("/opt/mppnode") / "bin" / command[0]
    process = await asyncio.create_subprocess_exec(python, *command[1:], stderr=asyncio.subprocess.DEVNULL)
    return await process.wait()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
async def test_the_health_check_believes_200_alone(image: Image, status: int, healthy: bool) -> None:
    """It asks /healthz on the node's port; any other answer, and none, is unhealthy."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=status)

    app = web.Application()
    app.router.add_get("/{any:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = str(runner.addresses[0][1])
    try:
        assert (await health(image, port) == 0) is healthy
    finally:
        await runner.cleanup()
    assert asked == ["/healthz"]
    assert await health(image, port) != 0  # nobody listens any more
