"""What the PostgreSQL store keeps beside accounts: lives, leads, intents, sponsored gas. Statements and nothing else.

Every function runs inside a transaction of :class:`Link`, so it may run again from the start; times are the server's.
"""

from __future__ import annotations

from typing import Any, Final

from channels.ids import ChannelId, Hash32
from channels.intent import Intent
from channels.model import NodeId
from channels.units import Units
from mppnode.ledger.base import GRACE_S, LEASE_S, Budget, Grant, IntentExists
from mppnode.ledger.postgres_link import Connection
from mppnode.ledger.rows import INTENT_COLUMNS, intent_row, padded, read_grant, read_intent
from mppnode.ledger.sponsoring import check_budget

_SECONDS: Final = "::float8 * interval '1 second'"

# ------------------------------------------------------------------------------------------------------------ lives


async def join(db: Connection, name: str, node: NodeId) -> NodeId:
    """Begin ``node``, in the place of an earlier life of ``name``."""
    await db.execute(
        f"INSERT INTO node (id, name, lease_until) VALUES ($1, $2, now() + $3{_SECONDS})"  # noqa: S608 - our own words
        " ON CONFLICT (name) DO UPDATE SET id = excluded.id, lease_until = excluded.lease_until",
        node,
        name,
        LEASE_S,
    )
    return node


async def beat(db: Connection, node: NodeId) -> bool:
    """Extend a lease, unless the life is over."""
    statement = f"UPDATE node SET lease_until = now() + $2{_SECONDS} WHERE id = $1"  # noqa: S608
    return bool(await db.execute(statement, node, LEASE_S) == "UPDATE 1")


async def leave(db: Connection, node: NodeId) -> None:
    """End a life and what it leads."""
    await db.execute("DELETE FROM node WHERE id = $1", node)
    await db.execute("DELETE FROM leader WHERE node = $1", node)


async def living(db: Connection) -> frozenset[NodeId]:
    """Fence and list in one statement.

    Not "the rows that look alive": a lease extended at this moment is not fenced by the DELETE, so it must be listed.
    """
    rows = await db.fetch(
        f"WITH fenced AS (DELETE FROM node WHERE lease_until <= now() - $1{_SECONDS} RETURNING id)"  # noqa: S608
        " SELECT id FROM node WHERE id NOT IN (SELECT id FROM fenced)",
        GRACE_S,
    )
    return frozenset(NodeId(row["id"]) for row in rows)


async def lead(db: Connection, job: str, node: NodeId) -> bool:
    """Take or keep a job whose term has ended, whose leader has, or that is ours."""
    done = await db.execute(
        f"INSERT INTO leader (job, node, until) VALUES ($1, $2, now() + $3{_SECONDS})"  # noqa: S608
        " ON CONFLICT (job) DO UPDATE SET node = excluded.node, until = excluded.until"
        " WHERE leader.node = excluded.node OR leader.until <= now()"
        " OR NOT EXISTS (SELECT 1 FROM node WHERE node.id = leader.node)",
        job,
        node,
        LEASE_S,
    )
    return bool(done == "INSERT 0 1")


# ---------------------------------------------------------------------------------------------------------- intents

_WIDE: Final = frozenset({"amount", "deadline", "block"})  # NUMERIC, and text on the way
_COLUMNS: Final = ", ".join(INTENT_COLUMNS)
_READ: Final = ", ".join(f"{name}::text AS {name}" if name in _WIDE else name for name in INTENT_COLUMNS)
_VALUES: Final = [f"${i}::text::numeric" if name in _WIDE else f"${i}" for i, name in enumerate(INTENT_COLUMNS, 1)]
_CHANGES: Final = ", ".join(f"{name} = {value}" for name, value in zip(INTENT_COLUMNS, _VALUES, strict=True))
_ACTIVE: Final = "state IN ('planned', 'signed', 'sent', 'mined')"  # as the partial index says it


async def add_intent(db: Connection, intent: Intent) -> None:
    """Raises ``IntentExists``."""
    statement = f"INSERT INTO intent ({_COLUMNS}) VALUES ({', '.join(_VALUES)}) ON CONFLICT DO NOTHING"  # noqa: S608
    if await db.execute(statement, *intent_row(intent)) != "INSERT 0 1":
        raise IntentExists("the channel has an active intent")


async def move_intent(db: Connection, before: Intent, after: Intent) -> bool:
    """Compare the version, then set."""
    last = len(INTENT_COLUMNS)
    statement = f"UPDATE intent SET {_CHANGES} WHERE id = ${last + 1} AND version = ${last + 2}"  # noqa: S608
    return bool(await db.execute(statement, *intent_row(after), before.id, before.version) == "UPDATE 1")


async def intents(db: Connection, *, active: bool, channel: ChannelId | None, limit: int) -> list[Intent]:
    """The newest ``limit``, oldest of them first."""
    wanted = [_ACTIVE] * active + ["channel = $2"] * (channel is not None)
    values: tuple[Any, ...] = (limit,) if channel is None else (limit, channel)
    statement = (
        f"SELECT {_READ} FROM intent WHERE {' AND '.join(wanted) or 'true'}"  # noqa: S608
        " ORDER BY entry DESC LIMIT $1"
    )
    return [read_intent(tuple(row.values())) for row in await db.fetch(statement, *values)][::-1]


# -------------------------------------------------------------------------------------------------------- sponsoring


async def grant(db: Connection, wanted: Grant, budget: Budget) -> bool:
    """Raises ``BudgetSpent``; a repeat is recognised before that."""
    # The budget is one for all nodes: whoever adds to it waits for the one before, and then sees what that one added.
    await db.fetch("SELECT value FROM meta WHERE name = 'sponsoring' FOR UPDATE")
    if await db.fetchval("SELECT 1 FROM sponsored WHERE tx_hash = $1", wanted.tx_hash):
        return False
    check_budget(wanted, budget, await _recent(db))
    await db.execute(
        "INSERT INTO sponsored (tx_hash, sender, fee_max, valid_before, granted_at)"
        " VALUES ($1, $2, $3::text::numeric, $4, now())",
        wanted.tx_hash,
        wanted.sender,
        padded(wanted.fee_max),
        wanted.valid_before,
    )
    return True


async def promised(db: Connection) -> Units:
    """Of the last hour."""
    return Units(sum(fee for _, fee in await _recent(db)))


async def _recent(db: Connection) -> list[tuple[bytes, int]]:
    spent = await db.fetch(
        "SELECT sender, coalesce(fee, fee_max)::text AS fee FROM sponsored"
        " WHERE granted_at > now() - interval '1 hour'"
    )
    return [(row["sender"], int(row["fee"])) for row in spent]


async def settle_grant(db: Connection, tx_hash: Hash32, fee: Units) -> None:
    """Write what was paid."""
    await db.execute("UPDATE sponsored SET fee = $2::text::numeric WHERE tx_hash = $1", tx_hash, padded(fee))


async def open_grants(db: Connection, limit: int) -> list[Grant]:
    """Unsettled grants, the oldest first."""
    rows = await db.fetch(
        "SELECT tx_hash, sender, fee_max::text, valid_before FROM sponsored WHERE fee IS NULL"
        " ORDER BY granted_at, tx_hash LIMIT $1",
        limit,
    )
    return [read_grant(tuple(row.values())) for row in rows]
