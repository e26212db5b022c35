"""A second copy of the payers' signatures, for the day the ledger itself is lost.

The ledger makes a voucher durable before it is answered. The spool is written right after, on another disk if the
operator is wise: one line per accepted voucher, enough by itself to open the account again. A backup of the ledger
from an hour ago and the spool give back every voucher of that hour; what was consumed in it, only the chain knows.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from channels.descriptor import Descriptor, Escrow
from channels.ids import ChannelId
from channels.model import Account, Voucher
from channels.units import units
from mppnode.ledger.rows import read_terms, terms_column

FLUSH_S: Final = 0.2
"""Between two writes: what a crash of machine and ledger together can lose."""
_COMPACT_BYTES: Final = 64 * 1024 * 1024  # at the start: some 120,000 lines, rewritten as one per channel
_LINES_MAX: Final = 100_000  # waiting while the disk does not answer; beyond it the oldest would cost memory for ever


@dataclass(frozen=True, slots=True)
class Spooled:
    """The highest voucher of one channel, and what its account is made of."""

    channel: ChannelId
    escrow: Escrow
    descriptor: Descriptor
    vouchers: tuple[Voucher, ...]


class Spool:
    """Appends accepted vouchers to one file."""

    def __init__(self, path: Path, *, on_error: Callable[[OSError], None]) -> None:
        self._path = path
        self._on_error = on_error
        self._lines: list[str] = []
        self._known: dict[ChannelId, int] = {}

    def start(self) -> None:
        """Create the file, or shorten one that has grown long. Raises ``OSError``."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and self._path.stat().st_size > _COMPACT_BYTES:
            compact(self._path)
        self._path.touch(mode=0o600)

    def on_commit(self, account: Account) -> None:
        """Note the voucher of a committed account, if it is news."""
        if self._known.get(account.id, -1) >= account.accepted:
            return
        self._known[account.id] = account.accepted
        if len(self._lines) < _LINES_MAX:
            self._lines.append(_line(account.id, terms_column(account), account.ladder[-1]))

    async def keep(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Write until cancelled."""
        while True:
            await sleep(FLUSH_S)
            await self.flush()

    async def flush(self) -> None:
        """Write and sync what is waiting; a disk that fails is reported, and the lines are tried again."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(None, _append, self._path, "".join(lines))
        except OSError as error:
            self._lines = [*lines, *self._lines][-_LINES_MAX:]
            self._on_error(error)


def _line(channel: ChannelId, terms: str, voucher: Voucher) -> str:
    record = {
        "channel": channel.hex(),
        "terms": json.loads(terms),
        "cumulative": str(voucher.cumulative),
        "signature": voucher.signature.hex(),
    }
    return json.dumps(record, separators=(",", ":")) + "\n"


def _append(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a crash; the ledger has what it said
            if isinstance(record, dict):
                yield record


def read_spool(path: Path) -> dict[ChannelId, Spooled]:
    """Every channel of a spool with its vouchers, rising; a line a crash cut off is left out. Raises ``OSError``."""
    terms: dict[ChannelId, tuple[Escrow, Descriptor]] = {}
    vouchers: dict[ChannelId, dict[int, Voucher]] = {}
    for record in _records(path):
        channel = ChannelId(bytes.fromhex(record["channel"]))
        terms[channel] = read_terms(record["terms"])
        voucher = Voucher(units(int(record["cumulative"])), bytes.fromhex(record["signature"]))
        vouchers.setdefault(channel, {})[voucher.cumulative] = voucher
    return {
        channel: Spooled(channel, *terms[channel], tuple(rungs[amount] for amount in sorted(rungs)))
        for channel, rungs in vouchers.items()
    }


def compact(path: Path) -> None:
    """Rewrite a spool with one line per channel, its highest voucher; all or nothing. Raises ``OSError``."""
    highest: dict[str, dict[str, Any]] = {}
    for record in _records(path):
        known = highest.get(record["channel"])
        if known is None or int(known["cumulative"]) < int(record["cumulative"]):
            highest[record["channel"]] = record
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    _append(fresh, "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in highest.values()))
    fresh.replace(path)
