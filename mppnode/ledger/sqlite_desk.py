"""What the embedded store keeps beside accounts: lives, leads, intents, sponsored gas. Statements and nothing else.

The writing functions run in the writer's transaction, where they are serial with everything else; one that refuses
raises before it has written anything.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from channels.ids import ChannelId, Hash32
from channels.instants import UnixMillis
from channels.intent import Intent
from channels.model import NodeId
from channels.units import Units
from mppnode.ledger.base import GRACE_S, LEASE_S, Budget, Grant, IntentExists
from mppnode.ledger.rows import INTENT_COLUMNS, intent_row, padded, read_grant, read_intent
from mppnode.ledger.sponsoring import check_budget

LEASE_MS: Final = int(LEASE_S * 1000)
GRACE_MS: Final = int(GRACE_S * 1000)
HOUR_MS: Final = 3_600_000

# ------------------------------------------------------------------------------------------------------------ lives


def join(db: sqlite3.Connection, name: str, node: NodeId, now: UnixMillis) -> NodeId:
    """Begin ``node``, in the place of an earlier life of ``name``."""
    db.execute(
        "INSERT INTO node (id, name, lease_until) VALUES (?, ?, ?)"
        " ON CONFLICT (name) DO UPDATE SET id = excluded.id, lease_until = excluded.lease_until",
        (node, name, now + LEASE_MS),
    )
    return node


def beat(db: sqlite3.Connection, node: NodeId, now: UnixMillis) -> bool:
    """Extend a lease, unless the life is over."""
    return db.execute("UPDATE node SET lease_until = ? WHERE id = ?", (now + LEASE_MS, node)).rowcount == 1


def leave(db: sqlite3.Connection, node: NodeId) -> None:
    """End a life and what it leads."""
    db.execute("DELETE FROM node WHERE id = ?", (node,))
    db.execute("DELETE FROM leader WHERE node = ?", (node,))


def living(db: sqlite3.Connection, now: UnixMillis) -> frozenset[NodeId]:
    """Fence, then list."""
    db.execute("DELETE FROM node WHERE lease_until <= ?", (now - GRACE_MS,))
    return frozenset(NodeId(row[0]) for row in db.execute("SELECT id FROM node"))


def lead(db: sqlite3.Connection, job: str, node: NodeId, now: UnixMillis) -> bool:
    """Take or keep a job whose term has ended, whose leader has, or that is ours."""
    changed = db.execute(
        "INSERT INTO leader (job, node, until) VALUES (?, ?, ?)"
        " ON CONFLICT (job) DO UPDATE SET node = excluded.node, until = excluded.until"
        " WHERE leader.node = excluded.node OR leader.until <= ?"
        " OR NOT EXISTS (SELECT 1 FROM node WHERE node.id = leader.node)",
        (job, node, now + LEASE_MS, now),
    )
    return changed.rowcount == 1


# ---------------------------------------------------------------------------------------------------------- intents

_COLUMNS: Final = ", ".join(INTENT_COLUMNS)
_MARKS: Final = ", ".join("?" * len(INTENT_COLUMNS))
_CHANGES: Final = ", ".join(f"{name} = ?" for name in INTENT_COLUMNS)
_ACTIVE: Final = "state IN ('planned', 'signed', 'sent', 'mined')"  # as the partial index says it


def add_intent(db: sqlite3.Connection, intent: Intent) -> None:
    """Raises ``IntentExists``."""
    statement = f"INSERT INTO intent ({_COLUMNS}) VALUES ({_MARKS}) ON CONFLICT DO NOTHING"  # noqa: S608 - our own names
    if db.execute(statement, intent_row(intent)).rowcount != 1:
        raise IntentExists("the channel has an active intent")


def move_intent(db: sqlite3.Connection, before: Intent, after: Intent) -> bool:
    """Compare the version, then set."""
    statement = f"UPDATE intent SET {_CHANGES} WHERE id = ? AND version = ?"  # noqa: S608 - our own names
    return db.execute(statement, (*intent_row(after), before.id, before.version)).rowcount == 1


def intents(db: sqlite3.Connection, *, active: bool, channel: ChannelId | None, limit: int) -> list[Intent]:
    """The newest ``limit``, oldest of them first."""
    wanted = " AND ".join([_ACTIVE] * active + ["channel = ?"] * (channel is not None)) or "1"
    values = (limit,) if channel is None else (channel, limit)
    statement = f"SELECT {_COLUMNS} FROM intent WHERE {wanted} ORDER BY entry DESC LIMIT ?"  # noqa: S608 - our own names
    return [read_intent(row) for row in db.execute(statement, values)][::-1]


# -------------------------------------------------------------------------------------------------------- sponsoring


def grant(db: sqlite3.Connection, wanted: Grant, budget: Budget, now: UnixMillis) -> bool:
    """Raises ``BudgetSpent``; a repeat is recognised before that."""
    if db.execute("SELECT 1 FROM sponsored WHERE tx_hash = ?", (wanted.tx_hash,)).fetchone():
        return False
    check_budget(wanted, budget, _recent(db, now))
    db.execute(
        "INSERT INTO sponsored (tx_hash, sender, fee_max, valid_before, granted_at) VALUES (?, ?, ?, ?, ?)",
        (wanted.tx_hash, wanted.sender, padded(wanted.fee_max), wanted.valid_before, now),
    )
    return True


def promised(db: sqlite3.Connection, now: UnixMillis) -> Units:
    """Of the last hour."""
    return Units(sum(fee for _, fee in _recent(db, now)))


def _recent(db: sqlite3.Connection, now: UnixMillis) -> list[tuple[bytes, int]]:
    spent = db.execute(
        "SELECT sender, coalesce(fee, fee_max) FROM sponsored WHERE granted_at > ?", (now - HOUR_MS,)
    ).fetchall()
    return [(sender, int(fee)) for sender, fee in spent]


def settle_grant(db: sqlite3.Connection, tx_hash: Hash32, fee: Units) -> None:
    """Write what was paid."""
    db.execute("UPDATE sponsored SET fee = ? WHERE tx_hash = ?", (padded(fee), tx_hash))


def open_grants(db: sqlite3.Connection, limit: int) -> list[Grant]:
    """Unsettled grants, the oldest first."""
    rows = db.execute(
        "SELECT tx_hash, sender, fee_max, valid_before FROM sponsored WHERE fee IS NULL"
        " ORDER BY granted_at, tx_hash LIMIT ?",
        (limit,),
    )
    return [read_grant(row) for row in rows]

