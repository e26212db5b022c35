"""The ledger in PostgreSQL: what it promises on a commit, whether there is room, and who stands between."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from mppnode.config.secrets import Secret
from mppnode.doctor.findings import Case, Check, Finding, fail, ok, skip, warn
from mppnode.ledger.base import LedgerError

if TYPE_CHECKING:
    from mppnode.ledger.postgres_link import Connection

_OLDEST: Final = 14
"""Before it, no supported release of PostgreSQL. Source: postgresql.org, "Versioning Policy"."""
_MAJOR: Final = 10_000
_NODE_CONNECTIONS: Final = 12
"""Of one process: four lanes, four tills, desk, reader and the listener, and one more while it migrates."""
_CLOCK_WARN_MS: Final = 2_000
_CLOCK_FAIL_MS: Final = 30_000  # what docs/operations.md allows clocks to differ
_LAG_WARN_S: Final = 30
_SWITCHES: Final = ("fsync", "full_page_writes")
_KEY: Final = "node.ledger"


def _on_database(look: Callable[[Case, Connection], Awaitable[Finding]]) -> Callable[[Case, str], Awaitable[Finding]]:
    async def looked(case: Case, _: str) -> Finding:
        where = case.config.node.ledger
        if not isinstance(where, Secret):
            return skip("the ledger is a SQLite file: see ledger")
        try:
            from mppnode.ledger.postgres_link import TROUBLE
        except ModuleNotFoundError:
            return fail("the extra is not installed", "pip install 'mppnode[postgres]'")
        try:
            async with connected(where) as connection:
                return await look(case, connection)
        except LedgerError as error:
            return fail(str(error), f"correct the URL {_KEY} names, or let the server admit this machine")
        except TROUBLE as error:
            return fail(f"a question was refused: {type(error).__name__}", "let the node's role read its tables")

    return looked


@asynccontextmanager
async def connected(where: Secret[str]) -> AsyncIterator[Connection]:
    """A connection that is given back. Raises ``LedgerError``."""
    from mppnode.ledger.postgres_link import connect

    connection = await connect(where)
    try:
        yield connection
    finally:
        connection.terminate()  # at once: a server that hangs must not hold the report


async def _database(_: Case, db: Connection) -> Finding:
    from mppnode.ledger.postgres_schema import SCHEMA

    number = int(await db.fetchval("SHOW server_version_num"))
    there = await db.fetchval("SELECT to_regclass('meta') IS NOT NULL")
    found = await db.fetchval("SELECT value FROM meta WHERE name = 'schema'") if there else None
    text = f"PostgreSQL {number // _MAJOR}.{number % _MAJOR}, " + (
        "no tables yet: the first start makes them" if found is None else f"schema {found}"
    )
    if found is not None and found > SCHEMA:
        return fail(f"{text}, newer than this program's ({SCHEMA})", "install the mppnode that has written it")
    if await db.fetchval("SELECT pg_is_in_recovery()"):
        return fail(f"{text}; it is a standby and takes no writes", f"let {_KEY} name the primary")
    if number // _MAJOR < _OLDEST:
        return warn(text, f"upgrade to PostgreSQL {_OLDEST} or later: this release gets no repairs")
    return ok(text)


async def _durability(_: Case, db: Connection) -> Finding:
    # Ours may differ from what the node runs with: it sets synchronous_commit itself for each transaction.
    settings = {name: str(await db.fetchval(f"SHOW {name}")) for name in (*_SWITCHES, "synchronous_commit")}
    text = ", ".join(f"{name}={value}" for name, value in settings.items())
    off = [name for name in _SWITCHES if settings[name] != "on"]
    if off:
        return fail(text, f"set {' and '.join(off)} = on in postgresql.conf: a power cut would break the books")
    if settings["synchronous_commit"] == "off":
        return warn(text, "set synchronous_commit = on; the node asks for it by itself, other programs here do not")
    return ok(text)


async def _room(case: Case, db: Connection) -> Finding:
    most = int(await db.fetchval("SHOW max_connections"))
    kept = int(await db.fetchval("SHOW superuser_reserved_connections"))
    used = await db.fetchval(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND application_name <> 'mppnode' AND pid <> pg_backend_pid()"
    )
    need = case.config.node.workers * _NODE_CONNECTIONS
    free = most - kept - int(used)
    text = f"{free} of {most} connections for nodes; this one needs {need}"
    if free < need:
        return fail(text, f"raise max_connections of the server to {most - free + need} or more, or lower node.workers")
    if free < 2 * need:
        return warn(text, "raise max_connections: during a restart old and new processes overlap")
    return ok(text)


async def _direct(case: Case, first: Connection) -> Finding:
    where = case.config.node.ledger
    assert isinstance(where, Secret)
    async with connected(where) as second:
        if await is_pooled(first, second):
            return fail(
                "a pooler in transaction mode stands between: notifications and takeovers are lost there",
                f"let the URL {_KEY} names lead to the server itself, or to a pooler in session mode",
            )
    return ok("a direct connection: one session stays with one server process")


async def is_pooled(first: Connection, second: Connection) -> bool:
    """Whether two connections are handed server processes by turns, as a pooler in transaction mode does."""
    import asyncpg

    ask = "SELECT pg_backend_pid()"
    try:
        before = await first.fetchval(ask)
        # While the second is inside a transaction, it keeps the process it was given: ours, or ours must be another.
        async with second.transaction(readonly=True):
            other, after = await second.fetchval(ask), await first.fetchval(ask)
    except (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError):
        return True  # what one process has prepared, another was asked for
    return bool(before != after or other in {before, after})


async def _clock(case: Case, db: Connection) -> Finding:
    before = case.clock.now_millis()
    theirs = int(await db.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"))
    after = case.clock.now_millis()
    # Between the two nobody knows when it was read, so only what lies outside counts.
    apart_ms = max(before - theirs, theirs - after, 0)
    text = f"{apart_ms} ms from ours"
    remedy = "synchronise the clocks of this machine and the server: timedatectl set-ntp true"
    if apart_ms > _CLOCK_FAIL_MS:
        return fail(text, remedy)
    return warn(text, remedy) if apart_ms > _CLOCK_WARN_MS else ok(text)


async def _replication(_: Case, db: Connection) -> Finding:
    wanted = str(await db.fetchval("SHOW synchronous_standby_names"))
    rows: list[Any] = await db.fetch(
        "SELECT coalesce(sync_state, '') AS mode, coalesce(extract(epoch FROM replay_lag), 0)::int AS lag"
        " FROM pg_stat_replication"
    )
    firm = sum(row["mode"] in {"sync", "quorum"} for row in rows)
    lag = max((row["lag"] for row in rows), default=0)
    text = f"{len(rows)} standbys, {firm} of them synchronous, the slowest {lag} s behind"
    if wanted and not firm:
        return fail(text, "bring the synchronous standby back: every commit waits for it (synchronous_standby_names)")
    if not firm:
        return warn(text, "set up a synchronous standby (synchronous_standby_names): without one, what a failover loses"
                    " is your loss")
    return warn(text, "see why that standby is behind") if lag > _LAG_WARN_S else ok(text)


CHECKS: Final = (
    Check(
        "database",
        f"PostgreSQL: {_OLDEST} or later, no standby, its schema not newer than the program's",
        _on_database(_database),
    ),
    Check(
        "database-durability",
        "PostgreSQL: `fsync` and `full_page_writes` are on (fail), `synchronous_commit` too (warn)",
        _on_database(_durability),
    ),
    Check(
        "database-room",
        f"PostgreSQL: `max_connections` has {_NODE_CONNECTIONS} for each process (fail), and twice that (warn)",
        _on_database(_room),
    ),
    Check("database-direct", "PostgreSQL: no pooler in transaction mode stands between", _on_database(_direct)),
    Check(
        "database-clock",
        f"PostgreSQL: its clock is within {_CLOCK_WARN_MS // 1000} s of ours (warn), {_CLOCK_FAIL_MS // 1000} s (fail)",
        _on_database(_clock),
    ),
    Check(
        "database-replication",
        f"PostgreSQL: a synchronous standby is there, and none is {_LAG_WARN_S} s behind (warn); the one that is asked"
        " for is there (fail)",
        _on_database(_replication),
    ),
)
"""In the order of the report."""
