"""Accounts as PostgreSQL rows: the statements that read and write many of them at once.

A batch costs three round trips beside its COMMIT: begin, lock and read, write. Columns that did not change travel as
NULL and stay as they are, so a renewal does not rewrite ten kilobytes of ladder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from channels.ids import ChannelId
from channels.instants import UnixMillis
from channels.model import Account
from mppnode.ledger.batch import Batch, Change, Found, Rows
from mppnode.ledger.postgres_link import Again, Connection, Mark
from mppnode.ledger.rows import COLUMNS, BrokenRow, account_columns, checked_account, terms_column, write_journal

_AMOUNTS: Final = frozenset({"deposit", "settled", "accepted", "spent", "owed_pico", "held_pico"})


def _read(name: str) -> str:
    return f"c.{name}::text" if name in _AMOUNTS else f"c.{name}"


def _parameters(names: Sequence[str], first: int) -> str:
    """``$3::text[], $4::bigint[] ...``: one array per column. Amounts travel as text and are numbers in the row."""
    kinds = {"id": "bytea", "version": "bigint", "active_at": "bigint", "live": "smallint", "before": "bigint"}
    return ", ".join(f"${number}::{kinds.get(name, 'text')}[]" for number, name in enumerate(names, first))


def _value(name: str) -> str:
    return f"u.{name}::numeric" if name in _AMOUNTS else f"u.{name}"


_STATE: Final = ("terms", *(name for name in COLUMNS if name != "version"))
_WHOLE: Final = ", ".join(f"{_read(name)} AS {name}" for name in _STATE)
SELECT: Final = f"SELECT c.id, c.soft, c.version, {_WHOLE} FROM channel AS c"  # noqa: S608 - our own names, as below
"""Whole rows of ``channel AS c``."""

_NEEDED: Final = ", ".join(
    f"CASE WHEN c.version = k.version THEN NULL ELSE {_read(name)} END AS {name}" for name in _STATE
)
_KNOWN: Final = (
    f"SELECT c.id, c.soft, c.version, {_NEEDED}"  # noqa: S608
    " FROM unnest($1::bytea[], $2::bigint[]) AS k (id, version) JOIN channel AS c ON c.id = k.id"
)
_LOCKED: Final = f"{_KNOWN} ORDER BY c.id FOR UPDATE OF c"
# In the order of ids, as every node locks them: two nodes with channels in common wait for each other, and never both.

_NEWER: Final = (
    f"{SELECT} JOIN unnest($1::bytea[], $2::bigint[]) AS k (id, version) ON c.id = k.id WHERE c.version > k.version"
)
_INSERT: Final = (
    f"INSERT INTO channel (id, terms, {', '.join(COLUMNS)}, soft)"  # noqa: S608
    f" SELECT u.id, u.terms, {', '.join(_value(name) for name in COLUMNS)}, $1"
    f" FROM unnest({_parameters(('id', 'terms', *COLUMNS), 2)}) AS u (id, terms, {', '.join(COLUMNS)})"
    " ON CONFLICT (id) DO NOTHING"
)
_CHANGES: Final = ", ".join(f"{name} = coalesce({_value(name)}, c.{name})" for name in COLUMNS)
_WRITE: Final = (
    f"WITH changed AS (UPDATE channel AS c SET {_CHANGES}, soft = $1"  # noqa: S608
    f" FROM unnest({_parameters(('id', 'before', *COLUMNS), 10)}) AS u (id, before, {', '.join(COLUMNS)})"
    " WHERE c.id = u.id AND c.version = u.before RETURNING 1),"
    " hardened AS (UPDATE channel SET soft = 0 WHERE id = ANY($2::bytea[])),"
    " written AS (INSERT INTO journal (channel, entry, at_ms, kind, body) SELECT j.channel, j.entry, $3, j.kind, j.body"
    " FROM unnest($4::bytea[], $5::bigint[], $6::text[], $7::text[]) AS j (channel, entry, kind, body)),"
    " marked AS (INSERT INTO lane (id, batch, at) VALUES ($8, $9, now())"
    " ON CONFLICT (id) DO UPDATE SET batch = excluded.batch, at = excluded.at)"
    " SELECT count(*) FROM changed"
)


def found_in(row: Mapping[str, Any]) -> Found:
    """What a whole row holds."""
    try:
        return checked_account(row["id"], row["terms"], row), bool(row["soft"])
    except BrokenRow as error:
        return error, bool(row["soft"])


async def read_rows(
    connection: Connection, channels: Sequence[ChannelId], rows: Rows, *, lock: bool
) -> dict[ChannelId, Account | BrokenRow]:
    """The accounts of these channels, perhaps locked; rows whose version is known are not read again."""
    known = [rows.get(channel) for channel in channels]
    versions = [0 if account is None else account.version for account in known]
    found: dict[ChannelId, Account | BrokenRow] = {}
    for row in await connection.fetch(_LOCKED if lock else _KNOWN, channels, versions):
        channel = ChannelId(row["id"])
        account: Account | BrokenRow | None = rows.get(channel)
        if account is None or row["terms"] is not None:
            account, soft = found_in(row)
            if isinstance(account, Account):
                rows.read(account, soft=soft)
        found[channel] = account
    return found


async def read_newer(connection: Connection, known: Mapping[ChannelId, int]) -> list[Found]:
    """Those of these channels that are newer than the known version."""
    return [found_in(row) for row in await connection.fetch(_NEWER, list(known), list(known.values()))]


async def write_batch(connection: Connection, batch: Batch, mark: Mark, at: UnixMillis) -> bool:
    """Write what a batch decided; False when that is nothing.

    Raises:
        Again: another node opened a channel at the same moment.
    """
    if not batch.changes and not batch.harden:
        return False
    opened = [change for change in batch.changes.values() if change.before is None]
    moved = [change for change in batch.changes.values() if change.before is not None]
    if opened:
        await _insert(connection, opened, soft=not batch.firm)
    entries = [
        (channel, change.account.version - len(change.events) + 1 + i, *entry)
        for channel, change in batch.changes.items()
        for i, entry in enumerate(write_journal(change.events, change.before))
    ]
    columns = [account_columns(change.account, change.before) for change in moved]
    changed = await connection.fetchval(
        _WRITE,
        int(not batch.firm),
        batch.harden,
        at,
        *([entry[i] for entry in entries] for i in range(4)),
        mark.lane,
        mark.number,
        [change.account.id for change in moved],
        [change.before.version for change in moved if change.before is not None],
        *([column.get(name) for column in columns] for name in COLUMNS),
    )
    assert changed == len(moved), "a row is not the one that was read"
    return True


async def _insert(connection: Connection, opened: Sequence[Change], *, soft: bool) -> None:
    opened = sorted(opened, key=lambda change: change.account.id)  # unique indexes wait too: in everybody's order
    columns = [account_columns(change.account, None) for change in opened]
    done = await connection.execute(
        _INSERT,
        int(soft),
        [change.account.id for change in opened],
        [terms_column(change.account) for change in opened],
        *([column[name] for column in columns] for name in COLUMNS),
    )
    if done != f"INSERT 0 {len(opened)}":
        raise Again
