"""How the tables get into a PostgreSQL database, and which ones this program understands."""

from __future__ import annotations

from importlib import resources
from typing import Final

from mppnode.config.secrets import Secret
from mppnode.ledger.base import LedgerError
from mppnode.ledger.postgres_link import TROUBLE, Connection, connect, describe

_SCRIPTS: Final = (("postgres_001",), ("accounts", "postgres_002"))
"""What brings a database to schema 1, 2, ..."""
SCHEMA: Final = len(_SCRIPTS)
_LOCK: Final = 0x6D70_706E  # "mppn": nodes that start together migrate one after the other
_STALE: Final = "DELETE FROM lane WHERE at < now() - interval '1 day'"  # of nodes that did not get to say goodbye


async def prepare(dsn: Secret[str]) -> None:
    """Bring the database to this program's schema.

    Raises:
        LedgerError: it cannot be reached, may not be changed by us, or has a newer schema.
    """
    connection = await connect(dsn)
    try:
        await _migrate(connection)
        await connection.execute(_STALE)
    except TROUBLE as error:
        raise LedgerError(f"cannot prepare {describe(dsn)}: {type(error).__name__}: {error}") from None
    finally:
        connection.terminate()


async def _migrate(connection: Connection) -> None:
    # The lock saves the second node an error and a restart, no more: tables and their version change in one
    # transaction, and creating a table twice fails.
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        await connection.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BIGINT NOT NULL)")
        found = await connection.fetchval("SELECT value FROM meta WHERE name = 'schema'") or 0
        if found > SCHEMA:
            raise LedgerError(f"the database's schema {found} is newer than this program's ({SCHEMA})")
        for version in range(found + 1, SCHEMA + 1):
            for name in _SCRIPTS[version - 1]:
                script = resources.files("mppnode.ledger").joinpath(f"sql/{name}.sql").read_text()
                await connection.execute(script)
        if found < SCHEMA:
            await connection.execute(
                "INSERT INTO meta (name, value) VALUES ('schema', $1)"
                " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                SCHEMA,
            )
