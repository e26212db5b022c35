"""Every kind of store under one name, and any number of stores on the same books, as several nodes have them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from channels.account import plan
from channels.model import Command, Outcome
from channels.policy import Policy
from channels.store import Step
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import ManualClock
from mppnode.ledger.base import Ledger
from mppnode.ledger.postgres import PostgresStore
from mppnode.ledger.sqlite import SqliteStore
from tests.support.builders import NOW, POLICY
from tests.support.postgres import postgres_database, run_sql

LEDGERS = ("sqlite", "sqlite-shared", "postgres")
SHARED = ("sqlite-shared", "postgres")
PATIENCE_S = 10
"""Only a store that has stopped answering makes a test wait this long."""


def never(error: BaseException) -> None:
    raise AssertionError(f"fatal: {error!r}")


def step(command: Command, policy: Policy = POLICY) -> Step[Outcome]:
    return lambda account: plan(account, command, now=NOW, policy=policy)


class Shop:
    """Opens stores on the same books; they are stopped when the test is over."""

    def __init__(self, kind: str, place: Path | Secret[str], exits: AsyncExitStack) -> None:
        self.kind = kind
        self.place = place
        self.clock = ManualClock()
        self._exits = exits

    def make(self, *, on_fatal: Callable[[BaseException], None] = never) -> Ledger:
        if isinstance(self.place, Path):
            shared = self.kind == "sqlite-shared"
            return SqliteStore(self.place, clock=self.clock, on_fatal=on_fatal, shared=shared)
        return PostgresStore(self.place, clock=self.clock, on_fatal=on_fatal)

    async def open(self, *, on_fatal: Callable[[BaseException], None] = never) -> Ledger:
        store = self.make(on_fatal=on_fatal)
        await store.start()
        self._exits.push_async_callback(store.stop)
        return store

    async def sql(self, statement: str) -> list[Any]:
        """What somebody with the database's own tools sees and does."""
        if isinstance(self.place, Secret):
            return await run_sql(self.place.reveal(), statement)
        connection = sqlite3.connect(self.place, isolation_level=None)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    def literal(self, value: bytes) -> str:
        """Bytes as this database's SQL writes them."""
        return f"'\\x{value.hex()}'" if self.kind == "postgres" else f"x'{value.hex()}'"

    async def explain(self, statement: str) -> str:
        """How the database would run a statement on a table too large to read."""
        if isinstance(self.place, Path):
            return str(await self.sql(f"EXPLAIN QUERY PLAN {statement}"))
        connection = await asyncpg.connect(self.place.reveal())
        try:
            await connection.execute("SET enable_seqscan = off")
            return str(await connection.fetch(f"EXPLAIN {statement}"))
        finally:
            await connection.close()

    async def pass_time(self, seconds: int) -> None:
        """Let the ledger's clock be this much later: our own clock, or the server's times that much earlier."""
        self.clock.advance(seconds)
        if self.kind == "postgres":
            for table, column in (("node", "lease_until"), ("leader", "until"), ("sponsored", "granted_at")):
                await self.sql(f"UPDATE {table} SET {column} = {column} - interval '{seconds} s'")


async def told(condition: Callable[[], bool]) -> None:
    """Wait until subscribers have made ``condition`` true."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def open_shop(kind: str, folder: Path) -> AsyncIterator[Shop]:
    """Empty books of one of LEDGERS."""
    async with AsyncExitStack() as around, AsyncExitStack() as exits:
        place: Path | Secret[str] = folder / "ledger.sqlite"
        if kind == "postgres":
            place = Secret(await around.enter_async_context(postgres_database()))
        yield Shop(kind, place, exits)
