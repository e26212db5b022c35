"""What the doctor says of ledgers: files that are fresh, in use, too new or no database, and a real PostgreSQL."""

from __future__ import annotations

import sqlite3
from contextlib import asynccontextmanager

import asyncpg
import pytest

from channels.instants import UnixMillis
from mppnode.config.secrets import Secret
from mppnode.doctor import database
from mppnode.doctor.findings import Status
from mppnode.doctor.machine import Machine
from mppnode.kernel.clock import ManualClock, SystemClock
from mppnode.ledger.postgres import PostgresStore
from mppnode.ledger.sqlite import SqliteStore
from mppnode.ledger.sqlite_file import SCHEMA
from tests.cli.doctor_kit import Steps, config, look
from tests.support.postgres import PASSWORD, postgres_database, run_sql

LEDGERS = ("ledger", "ledger-disk", "ledger-sync")
DATABASES = ("database", "database-durability", "database-room", "database-direct", "database-clock", "database-replication")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def store(folder):
    return SqliteStore(folder / "ledger.sqlite", clock=SystemClock(), on_fatal=lambda _: None)


async def test_a_ledger_that_is_not_there_yet(tmp_path):
    """Its folder is enough, and is left as it was."""
    found = await look("ledger", config(tmp_path))
    assert found.status is Status.OK
    assert "is not there yet" in found.text
    assert files(tmp_path) == []
    missing = await look("ledger", config(tmp_path / "missing"))
    assert missing.status is Status.FAIL
    assert "node.ledger" in missing.remedy


async def test_a_ledger_in_use_and_after_it(tmp_path):
    """Looking leaves no file behind, neither beside a running node nor after it, and what it says is the same."""
    ledger = store(tmp_path)
    await ledger.start()
    before = files(tmp_path)
    found = await look("ledger", config(tmp_path))
    assert found.status is Status.OK
    assert f"schema {SCHEMA}," in found.text
    assert files(tmp_path) == before
    node = await ledger.join("still-writes")
    assert node in await ledger.living()
    await ledger.stop()
    before = files(tmp_path)
    assert await look("ledger", config(tmp_path)) == found
    assert files(tmp_path) == before


async def test_a_ledger_nobody_here_can_read(tmp_path):
    """A newer schema, another journal, and something that is no database are told apart."""
    path, what = tmp_path / "ledger.sqlite", config(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    newer = await look("ledger", what)
    assert newer.status is Status.FAIL
    assert f"schema {SCHEMA + 1} is newer" in newer.text
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA}")
    db.close()
    other = await look("ledger", what)
    assert other.status is Status.WARN
    assert "delete" in other.text
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA - 1}")
    db.close()
    assert "brings it up to date" in (await look("ledger", what)).text
    path.write_bytes(b"not a database" * 100)
    broken = await look("ledger", what)
    assert broken.status is Status.FAIL
    assert "restore" in broken.remedy
    path.write_bytes(b"")
    assert (await look("ledger", what)).status is Status.OK, "SQLite takes an empty file for a new database"


class Disk(Machine):
    """A machine with a disk of one kind and size."""

    kind, free = "ext4", 100 << 30

    def filesystem(self, path):
        return self.kind

    def free_bytes(self, path):
        return self.free


class Nfs(Disk):
    kind = "nfs4"


class Memory(Disk):
    kind = "tmpfs"


class Full(Disk):
    free = 10 << 20


class Tight(Disk):
    free = 2 << 30


@pytest.mark.parametrize(
    ("machine", "status"), [(Disk(), Status.OK), (Nfs(), Status.FAIL), (Full(), Status.FAIL), (Memory(), Status.WARN), (Tight(), Status.WARN)]
)
async def test_the_disk_below(tmp_path, machine, status):
    """A network's disk and a full one do not do; one that forgets and a tight one are warned of."""
    found = await look("ledger-disk", config(tmp_path), machine=machine)
    assert found.status is status
    assert f"{machine.kind}, {machine.free >> 20} MiB free" in found.text


async def test_where_a_path_is_mounted(tmp_path):
    """The deepest mount that holds a path says its type, the last of several on one place, with escaped names."""
    (tmp_path / "self").mkdir()
    place = tmp_path / "two words" / "deep"
    place.mkdir(parents=True)
    escaped = str(place.parent).replace(" ", "\\040")
    lines = [
        "1 0 8:1 / / rw - ext4 /dev/a rw",
        f"2 1 8:2 / {escaped} rw shared:1 - xfs /dev/b rw",
        f"3 2 8:3 / {escaped} rw - nfs4 server:/x rw",
        "4 1 8:4 / /elsewhere rw - tmpfs none rw",
        "torn line",
    ]
    (tmp_path / "self" / "mountinfo").write_text("\n".join(lines))
    machine = Machine(proc=tmp_path)
    assert machine.filesystem(place / "not" / "there") == "nfs4"
    assert machine.filesystem(tmp_path) == "ext4"
    assert Machine(proc=tmp_path / "none").filesystem(tmp_path) is None


@pytest.mark.parametrize(("step_s", "status"), [(0.004, Status.OK), (0.05, Status.WARN), (0.3, Status.FAIL)])
async def test_how_long_a_sync_takes(tmp_path, step_s, status):
    """The median of eight, in milliseconds; the file is gone."""
    found = await look("ledger-sync", config(tmp_path), clock=Steps(step_s))
    assert found.status is status
    assert f"takes {round(step_s * 1000)} ms" in found.text
    assert files(tmp_path) == []


async def test_each_kind_of_ledger_has_its_own_checks(tmp_path):
    """What does not apply is skipped, with the name of what does."""
    for name in DATABASES:
        assert (await look(name, config(tmp_path))).status is Status.SKIP
    for name in LEDGERS:
        assert (await look(name, config(node={"ledger": Secret("postgresql://x")}))).status is Status.SKIP


# ---------------------------------------------------------------------------------------------------------- PostgreSQL


class Says:
    """A connection that answers some questions otherwise, as servers do that a test cannot have."""

    def __init__(self, connection, answers):
        self._connection, self._answers = connection, answers

    async def fetchval(self, question, *values):
        for part, answer in self._answers.items():
            if part in question:
                return answer
        return await self._connection.fetchval(question, *values)

    async def fetch(self, question, *values):
        return self._answers["rows"] if "rows" in self._answers else await self._connection.fetch(question, *values)

    def __getattr__(self, name):
        return getattr(self._connection, name)


@pytest.fixture
async def dsn():
    async with postgres_database() as url:
        yield url


@pytest.fixture
def saying(monkeypatch):
    """Let the server say other things."""
    real = database.connected

    def say(**answers):
        @asynccontextmanager
        async def connected(where):
            async with real(where) as connection:
                yield Says(connection, answers)

        monkeypatch.setattr(database, "connected", connected)

    return say


def on(dsn, **node):
    return config(node={"ledger": Secret(dsn), **node})


async def test_a_database_before_and_after_the_first_start(dsn):
    """Its release and schema are told, nothing is made by looking, and a newer schema is a failure."""
    fresh = await look("database", on(dsn))
    assert fresh.status is Status.OK
    assert "no tables yet" in fresh.text
    assert await run_sql(dsn, "SELECT to_regclass('meta')") == [(None,)]
    ledger = PostgresStore(Secret(dsn), clock=SystemClock(), on_fatal=lambda _: None)
    await ledger.start()
    found = await look("database", on(dsn))
    await ledger.stop()
    assert found.status is Status.OK
    assert "schema" in found.text
    await run_sql(dsn, "UPDATE meta SET value = 99 WHERE name = 'schema'")
    newer = await look("database", on(dsn))
    assert newer.status is Status.FAIL
    assert "schema 99, newer" in newer.text


async def test_a_database_that_is_old_or_a_standby(dsn, saying):
    """A release without repairs is a warning; a standby takes no writes."""
    saying(server_version_num="130004")
    old = await look("database", on(dsn))
    assert old.status is Status.WARN
    assert "PostgreSQL 13.4" in old.text
    saying(pg_is_in_recovery=True)
    standby = await look("database", on(dsn))
    assert standby.status is Status.FAIL
    assert "primary" in standby.remedy


async def test_what_a_commit_promises(dsn, saying):
    """A database set to forget is a warning, a server that does not sync a failure."""
    assert (await look("database-durability", on(dsn))).status is Status.OK
    (name,) = (await run_sql(dsn, "SELECT current_database()::text"))[0]
    await run_sql(dsn, f"ALTER DATABASE {name} SET synchronous_commit TO off")
    relaxed = await look("database-durability", on(dsn))
    assert relaxed.status is Status.WARN
    assert "synchronous_commit=off" in relaxed.text
    saying(full_page_writes="off")
    found = await look("database-durability", on(dsn))
    assert found.status is Status.FAIL
    assert found.remedy.startswith("set full_page_writes = on")


@pytest.mark.parametrize(("workers", "status"), [(1, Status.OK), (5, Status.WARN), (64, Status.FAIL)])
async def test_room_for_every_worker(dsn, workers, status):
    """A process needs a dozen connections, and twice that while it is replaced."""
    found = await look("database-room", on(dsn, workers=workers))
    assert found.status is status
    assert f"needs {workers * 12}" in found.text


async def test_a_direct_connection_and_a_pooler(dsn, monkeypatch):
    """Two sessions that are handed one server process by turns have a pooler between."""
    assert (await look("database-direct", on(dsn))).status is Status.OK
    async with database.connected(Secret(dsn)) as only:

        @asynccontextmanager
        async def handed_round(_):
            yield only

        monkeypatch.setattr(database, "connected", handed_round)
        found = await look("database-direct", on(dsn))
        assert found.status is Status.FAIL
        assert "pooler in transaction mode" in found.text

        class PreparedElsewhere(Says):
            async def fetchval(self, *_):
                raise asyncpg.InvalidSQLStatementNameError

        assert await database.is_pooled(PreparedElsewhere(only, {}), only)


class Late(SystemClock):
    """Five seconds behind."""

    def now_millis(self):
        return UnixMillis(super().now_millis() - 5_000)


async def test_two_clocks(dsn):
    """Ours and the database's may differ by a little, a lot, or by years."""
    for clock, status in ((SystemClock(), Status.OK), (Late(), Status.WARN), (ManualClock(), Status.FAIL)):
        found = await look("database-clock", on(dsn), clock=clock)
        assert found.status is status
        assert status is Status.OK or "timedatectl" in found.remedy


async def test_standbys(dsn, saying):
    """None is a warning, an asked-for one that is away a failure, one that is late a warning."""
    none = await look("database-replication", on(dsn))
    assert none.status is Status.WARN
    assert "0 standbys" in none.text
    saying(synchronous_standby_names="FIRST 1 (b)")
    away = await look("database-replication", on(dsn))
    assert away.status is Status.FAIL
    saying(rows=[{"mode": "sync", "lag": 0}, {"mode": "async", "lag": 2}])
    well = await look("database-replication", on(dsn))
    assert (well.status, well.text) == (Status.OK, "2 standbys, 1 of them synchronous, the slowest 2 s behind")
    saying(rows=[{"mode": "quorum", "lag": 90}])
    assert (await look("database-replication", on(dsn))).status is Status.WARN


async def test_a_database_that_does_not_let_us_in(dsn):
    """The line says where it is and what is wrong, and has no password."""
    found = await look("database", on(dsn.replace(PASSWORD, "wrong-password-canary")))
    assert found.status is Status.FAIL
    assert "password authentication failed" in found.text
    assert "canary" not in found.text
    gone = await look("database-clock", on("postgresql://mpp:canary@127.0.0.1:1/x"))
    assert gone.status is Status.FAIL
    assert "127.0.0.1:1" in gone.text
    assert "canary" not in gone.text


async def test_a_node_needs_as_many_connections_as_the_check_says(dsn):
    """The number the manual tells is what a running ledger opens, and one to migrate with."""
    ledger = PostgresStore(Secret(dsn), clock=SystemClock(), on_fatal=lambda _: None)
    await ledger.start()
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'mppnode'"
    seen = 0
    while seen < database._NODE_CONNECTIONS - 1:  # the listener connects by itself
        ((seen,),) = await run_sql(dsn, count)
    await ledger.stop()
    assert seen == database._NODE_CONNECTIONS - 1
