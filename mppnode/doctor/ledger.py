"""The ledger in a file: whether it can be used, and whether the disk keeps what it was told to keep."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from mppnode.doctor.findings import Case, Check, Finding, fail, ledger_file, ok, skip, warn
from mppnode.doctor.machine import aside, nearest
from mppnode.ledger.sqlite_file import SCHEMA, is_busy

_NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "9p", "fuse.sshfs", "fuse.s3fs"}
)
"""Where locks and syncs are not what SQLite needs. Source: sqlite.org, "How To Corrupt An SQLite Database", 2.1."""
_FLEETING: Final = frozenset({"tmpfs", "ramfs", "overlay"})
"""Gone with the machine's power, or with its container."""
_FREE_WARN: Final = 5 << 30
"""Bytes: a busy node writes some hundred megabytes a day."""
_FREE_FAIL: Final = 512 << 20
_SYNC_WARN_MS: Final = 20
"""Of one sync, which every batch of vouchers waits for: with more, payers notice."""
_SYNC_FAIL_MS: Final = 200
_HEADER_BYTES: Final = 100
_MAGIC: Final = b"SQLite format 3\x00"
_WAL: Final = "wal"
_READ_S: Final = 2.0
_NOT_OURS: Final = "the ledger is a PostgreSQL database: see database"


async def _ledger(case: Case, _: str) -> Finding:
    path = ledger_file(case.config)
    if path is None:
        return skip(_NOT_OURS)
    if not path.exists():
        return await _absent(case, path)
    try:
        version, journal = await aside(lambda: read_head(path))
    except sqlite3.Error as error:
        if is_busy(error):
            return warn("is held by somebody for longer than 2 s", "see which process has the file of node.ledger open")
        return fail("is no database we can read", "correct node.ledger, or restore a backup: mppnode restore")
    except OSError as error:
        return fail(f"cannot be read: {error.strerror}", "let the node's user own the file of node.ledger")
    size = path.stat().st_size >> 20
    if version > SCHEMA:
        return fail(
            f"its schema {version} is newer than this program's ({SCHEMA})", "install the mppnode that has written it"
        )
    if version < SCHEMA:
        return ok(f"schema {version} of {SCHEMA}, {size} MiB: the next start brings it up to date")
    if journal != _WAL:
        return warn(f"its journal mode is {journal}", "let nothing but mppnode open it: a start sets WAL")
    return ok(f"schema {version}, {size} MiB, journal mode {journal}; a node writes with synchronous=FULL")


async def _absent(case: Case, path: Path) -> Finding:
    machine = case.machine
    try:
        await aside(lambda: machine.sync_ms(path.parent, case.clock))
    except OSError as error:
        return fail(
            f"is not there, and its folder cannot be written: {error.strerror}",
            "let node.ledger name a file in a folder the node's user owns",
        )
    return ok("is not there yet: the first start makes it")


def read_head(path: Path) -> tuple[int, str]:
    """Schema version and journal mode of a ledger's file, which is not changed, nor is anything beside it.

    Raises:
        sqlite3.Error, OSError: the file cannot be read or is no database.
    """
    beside = [Path(f"{path}{suffix}") for suffix in ("-wal", "-shm")]
    if all(each.exists() for each in beside):  # in use, or left by a crash: what is committed is in the log as well
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_READ_S)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (journal,) = connection.execute("PRAGMA journal_mode").fetchone()
        finally:
            connection.close()
        return int(version), str(journal)
    # Even a read-only connection would leave the two files behind, owned by whoever has asked.
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    if not head:
        return 0, _WAL
    if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC):
        raise sqlite3.DatabaseError("not a database")
    # Source: sqlite.org, "Database File Format", 1.3: file format versions at 18, user version at 60.
    return int.from_bytes(head[60:64]), _WAL if head[18] == head[19] == 2 else "delete"  # noqa: PLR2004 - 2 is WAL


async def _disk(case: Case, _: str) -> Finding:
    path, machine = ledger_file(case.config), case.machine
    if path is None:
        return skip(_NOT_OURS)
    kind, free = await aside(lambda: (machine.filesystem(path), machine.free_bytes(path)))
    text = f"{kind or 'unknown filesystem'}, {free >> 20} MiB free"
    if kind in _NETWORK:
        return fail(text, "move node.ledger to a local disk: over a network its locks and syncs do not hold")
    if free < _FREE_FAIL:
        return fail(text, "make room on the disk of node.ledger: a full one stops the node")
    if kind in _FLEETING:
        return warn(text, "move node.ledger to a disk or volume that outlives this machine's restart")
    if free < _FREE_WARN:
        return warn(text, "make room on the disk of node.ledger")
    return ok(text)


async def _sync(case: Case, _: str) -> Finding:
    path, machine = ledger_file(case.config), case.machine
    if path is None:
        return skip(_NOT_OURS)
    folder = nearest(path.parent)
    try:
        took_ms = await aside(lambda: machine.sync_ms(folder, case.clock))
    except OSError as error:
        return fail(f"a file beside it cannot be written: {error.strerror}", "let the node's user own its folder")
    text = f"writing a page and syncing it takes {took_ms} ms"
    remedy = "put node.ledger on a faster disk (NVMe, no network volume), or use PostgreSQL"
    if took_ms > _SYNC_FAIL_MS:
        return fail(text, remedy)
    return warn(text, remedy) if took_ms > _SYNC_WARN_MS else ok(text)


CHECKS: Final = (
    Check("ledger", f"SQLite: the file is ours, its schema at most {SCHEMA}, its journal WAL", _ledger),
    Check(
        "ledger-disk",
        f"SQLite: no network filesystem (fail), none that goes with the machine (warn); {_FREE_WARN >> 30} GiB free"
        f" (warn), {_FREE_FAIL >> 20} MiB (fail)",
        _disk,
    ),
    Check(
        "ledger-sync",
        f"SQLite: a page is written and synced within {_SYNC_WARN_MS} ms (warn), {_SYNC_FAIL_MS} ms (fail)",
        _sync,
    ),
)
"""In the order of the report."""
