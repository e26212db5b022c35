"""A database fails over to a standby that lacks the last commits: what was answered to a payer is brought back."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import asyncpg

from mppnode.ledger.base import LEASE_S
from tests.fault.crash_world import Auditor, Payer, world
from tests.support.node_process import nursery
from tests.support.postgres import postgres_database, run_sql

TOKENS = 24_000
"""Eight seconds and five vouchers: long enough to lose one in the middle."""


NEWER = "DELETE FROM journal WHERE NOT EXISTS (SELECT 1 FROM standby_journal s WHERE s.channel = journal.channel AND s.entry = journal.entry)"


async def promote(dsn: str, older: str) -> None:
    """What a failover looks like from the nodes: connections break, and who answers then has an older state.

    The tables are locked first, so that nobody sees the older state through a connection to the old primary.
    """
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE channel, journal, meta IN ACCESS EXCLUSIVE MODE")
            await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
            for statement in (older, NEWER, "UPDATE meta SET value = value + 1 WHERE name = 'generation'"):
                await connection.execute(statement)
    finally:
        await connection.close()


async def replicate(dsn: str) -> None:
    """What the standby has: channel and journal as of one moment."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            for table in ("channel", "journal"):
                await connection.execute(f"CREATE TABLE standby_{table} AS SELECT * FROM {table}")
    finally:
        await connection.close()


async def test_vouchers_lost_by_a_failover_are_submitted_again() -> None:
    """D5: the new primary knows an older voucher than the node has answered; the node brings the newer one back."""
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(postgres_database())
        net = await stack.enter_async_context(world(dsn, 5, 1, tokens_per_second=3_000.0))
        nodes = await stack.enter_async_context(nursery())
        node = await nodes.spawn(replace(net.spec, name="survivor"))
        net.witness.point_at(await node.go())
        payer = Payer(net.client(net.keys[0]))
        streaming = asyncio.ensure_future(payer.stream(net.chat, TOKENS))

        async def accepted() -> int:
            books = await net.ledger()
            return max((account.accepted for account in books.values()), default=0)

        async with asyncio.timeout(20):
            while not await accepted():
                await asyncio.sleep(0.05)
            columns = [row[0] for row in await run_sql(dsn, "SELECT column_name FROM information_schema.columns WHERE table_name = 'channel'")]
            await replicate(dsn)
            old = await accepted()
            while await accepted() <= old:
                await asyncio.sleep(0.05)
            answered = max(got.accepted for got in net.witness.channels.values())
            changes = ", ".join(f"{name} = s.{name}" for name in columns if name != "id")
            await promote(dsn, f"UPDATE channel SET {changes} FROM standby_channel s WHERE channel.id = s.id")
            while await accepted() < answered:
                await asyncio.sleep(0.05)
        async with asyncio.timeout(LEASE_S + 60):
            await streaming
        # Without a synchronous standby charges are lost too, and with them numbers that were shown; never to the payer's cost.
        auditor = Auditor(net.witness)
        for account in (await net.ledger()).values():
            assert account.accepted >= net.witness.channels[account.id].accepted
            assert account.owed_pico <= auditor.price(account.id), "nobody pays for what did not arrive"
