"""A real PostgreSQL server for tests: one per test process, started when the first test asks for it.

The binaries are looked for in ``MPPNODE_POSTGRES_BIN``, on the PATH and under /usr/lib/postgresql. Without them a test is
skipped, or fails when ``REQUIRE_POSTGRES=1`` says that skipping is not an answer. The server listens on a Unix socket
in its own directory alone, syncs its log like a real one, and asks for a password so that a leaked one can be found. A
shell holding a pipe from us removes server and directory when we are gone, however we went.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import asyncpg
import pytest

PASSWORD = "open-sesame-" + secrets.token_hex(8)
SETTINGS = {
    "listen_addresses": "''",
    "shared_buffers": "16MB",
    "max_connections": "100",
    "fsync": "on",
    "synchronous_commit": "on",
    "max_wal_size": "256MB",
    "autovacuum": "off",
    "logging_collector": "off",
}


def _binaries() -> Path | None:
    named = os.environ.get("MPPNODE_POSTGRES_BIN")
    on_path = shutil.which("initdb")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name.split(".")[0]))
    places = [Path(named)] if named else [*([Path(on_path).parent] if on_path else []), *reversed(installed)]
    return next((place for place in places if (place / "initdb").exists()), None)


def _user() -> str | None:
    """Whom the server runs as: it refuses root."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in known)


class PostgresServer:
    """One server in a temporary directory."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._user = _user()
        self.directory = Path(tempfile.mkdtemp(prefix="mpp-pg-", dir="/tmp"))  # short: it becomes a socket's name
        self._data = self.directory / "data"
        self._numbers = itertools.count()
        password_file = self.directory / "password"
        password_file.write_text(PASSWORD)
        if self._user is not None:
            owner = pwd.getpwnam(self._user)
            for path in (self.directory, password_file):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        # Reads until we are gone, then tidies up. Started first: nothing may be left behind, whatever goes wrong.
        stop = f"'{binaries}/pg_ctl' -D '{self._data}' -m immediate stop"
        farewell = f"cat >/dev/null; {stop} >/dev/null 2>&1; rm -rf '{self.directory}'"
        self._undertaker = self._popen(["sh", "-c", farewell], stdin=subprocess.PIPE, start_new_session=True)
        self._run("initdb", "-U", "mpp", "-A", "scram-sha-256", f"--pwfile={password_file}", "-E", "UTF8", "--locale=C", "--no-sync", "-D", str(self._data))
        self.start()

    def _popen(self, command: Sequence[str], **more: Any) -> subprocess.Popen[bytes]:
        if self._user is not None:
            more |= {"user": self._user, "extra_groups": []}
        return subprocess.Popen(command, cwd=self.directory, **more)

    def _run(self, program: str, *arguments: str) -> None:
        log = self.directory / "out"
        with log.open("ab") as out:  # a file: a pipe would stay open as long as the server lives
            process = self._popen([str(self._binaries / program), *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            status = process.wait()
        assert status == 0, f"{program} failed:\n{log.read_text()}"

    def start(self) -> None:
        """Start, or start again after :meth:`crash`; returns when it answers."""
        options = " ".join(f"-c {name}={value}" for name, value in SETTINGS.items())
        self._run("pg_ctl", "-D", str(self._data), "-w", "-s", "-l", str(self.directory / "log"), "-o", f"-k {self.directory} {options}", "start")

    def crash(self) -> None:
        """End every server process at once, as a power cut would; what was not synced may be gone."""
        self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "-s", "stop")

    def stop(self) -> None:
        """For good."""
        assert self._undertaker.stdin is not None
        self._undertaker.stdin.close()
        self._undertaker.wait()

    def dsn(self, database: str, *, socket: Path | None = None) -> str:
        """The URL of a database, perhaps through a relay that listens in another directory."""
        return f"postgresql://mpp:{PASSWORD}@/{database}?host={quote(str(socket or self.directory))}"

    @asynccontextmanager
    async def database(self) -> AsyncIterator[str]:
        """An empty database for one test; the URL of it."""
        name = f"t{next(self._numbers)}"
        await self._as_admin(f"CREATE DATABASE {name}")
        try:
            yield self.dsn(name)
        finally:
            await self._as_admin(f"DROP DATABASE {name} WITH (FORCE)")

    async def _as_admin(self, statement: str) -> None:
        connection = await asyncpg.connect(self.dsn("postgres"))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


class Relay:
    """Stands between stores and the server, and cuts a connection at the message it is told to.

    ``cut(n)`` breaks the connection of the n-th message from now, before the server has it or, ``after`` its effect,
    when the server has answered and the answer has not arrived.
    """

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self.directory = Path(tempfile.mkdtemp(prefix="mpp-relay-", dir="/tmp"))
        self.messages = 0
        self.passing = asyncio.Event()
        """Cleared, nothing passes in either direction, and nobody is told: a network that swallows."""
        self.passing.set()
        self._cut_at = 0
        self._after = False
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self, number: int, *, after: bool) -> None:
        self.messages, self._cut_at, self._after = 0, number, after

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            server_reader, server_writer = await asyncio.open_unix_connection(self._server.directory / ".s.PGSQL.5432")
        except OSError:  # it is down
            writer.transport.abort()
            return
        answers = asyncio.ensure_future(self._answers(server_reader, writer))
        try:
            while data := await reader.read(1 << 16):
                await self.passing.wait()
                self.messages += 1
                cut = self.messages == self._cut_at
                if cut and not self._after:
                    return
                if cut:
                    answers.cancel()
                server_writer.write(data)
                if cut:
                    await _ready(server_reader)
                    return
        except (OSError, asyncio.CancelledError):
            return
        finally:
            answers.cancel()
            server_writer.transport.abort()
            writer.transport.abort()
            self._tasks.discard(task)

    async def _answers(self, server: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await server.read(1 << 16):
                await self.passing.wait()
                writer.write(data)
        writer.transport.abort()

    async def __aenter__(self) -> Self:
        self._listening = await asyncio.start_unix_server(self._serve, self.directory / ".s.PGSQL.5432")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listening.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shutil.rmtree(self.directory)


async def _ready(server: asyncio.StreamReader) -> None:
    """Read until the server is ready for the next message, or gone."""
    tail = b""
    while data := await server.read(1 << 16):
        tail = (tail + data)[-6:]
        if tail[:5] == b"Z\0\0\0\5":
            return


async def run_sql(dsn: str, statement: str, *values: object) -> list[Any]:
    """Run one statement as somebody else; the rows it gives."""
    connection = await asyncpg.connect(dsn)
    try:
        return [tuple(row) for row in await connection.fetch(statement, *values)]
    finally:
        await connection.close()


async def cut_connections(dsn: str) -> None:
    """Let the server end every connection to this database but ours."""
    await run_sql(dsn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")


_SERVERS: list[PostgresServer] = []


def postgres_server() -> PostgresServer:
    """The server of this test process; the test is skipped, or fails, when there can be none."""
    if not _SERVERS:
        binaries = _binaries()
        if binaries is None:
            reason = "PostgreSQL is not installed: no initdb in MPPNODE_POSTGRES_BIN, on the PATH or in /usr/lib/postgresql"
            if os.environ.get("REQUIRE_POSTGRES") == "1":
                pytest.fail(reason)
            pytest.skip(reason)
        server = PostgresServer(binaries)
        atexit.register(server.stop)
        _SERVERS.append(server)
    return _SERVERS[0]


@asynccontextmanager
async def postgres_database() -> AsyncIterator[str]:
    """``async with postgres_database() as dsn``: an empty database that is gone afterwards."""
    async with postgres_server().database() as dsn:
        yield dsn
