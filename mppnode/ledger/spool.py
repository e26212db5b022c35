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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from channels.descriptor import Descriptor, Escrow
from channels.faults import ChannelFault
from channels.ids import ChannelId, parse_channel_id
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
            # Half a line may be in the file already; what is tried again must not continue it.
            first = lines[0] if lines[0].startswith("\n") else "\n" + lines[0]
            self._lines = [first, *lines[1:], *self._lines][-_LINES_MAX:]
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
    data = text.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while data:  # a full disk takes a part and says so only by the number
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SpoolError(Exception):
    """A spool holds a line that was not written by a node; the message names the file and the line."""


def _records(path: Path) -> Iterator[tuple[dict[str, Any], Spooled]]:
    """Each whole line as it is written and as what it means, in order."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut off by a crash or a full disk; the ledger has what it said
            try:
                escrow, descriptor = read_terms(record["terms"])
                voucher = Voucher(units(int(record["cumulative"])), bytes.fromhex(record["signature"]))
                channel = parse_channel_id("0x" + record["channel"], field="channel")
            except (ValueError, KeyError, TypeError, ChannelFault):
                raise SpoolError(f"{path}, line {number}: is not a voucher that a node has written") from None
            yield record, Spooled(channel, escrow, descriptor, (voucher,))


def read_spool(path: Path) -> dict[ChannelId, Spooled]:
    """Every channel of a spool with its vouchers, rising; a line a crash cut off is left out.

    Raises:
        OSError, SpoolError.
    """
    found: dict[ChannelId, Spooled] = {}
    rungs: dict[ChannelId, dict[int, Voucher]] = {}
    for _, spooled in _records(path):
        (voucher,) = spooled.vouchers
        found[spooled.channel] = spooled
        rungs.setdefault(spooled.channel, {})[voucher.cumulative] = voucher
    return {
        channel: replace(spooled, vouchers=tuple(rungs[channel][amount] for amount in sorted(rungs[channel])))
        for channel, spooled in found.items()
    }


def compact(path: Path) -> None:
    """Rewrite a spool with one line per channel, its highest voucher; all or nothing. Raises as :func:`read_spool`."""
    highest: dict[ChannelId, tuple[int, dict[str, Any]]] = {}
    for record, spooled in _records(path):
        amount = spooled.vouchers[0].cumulative
        if amount > highest.get(spooled.channel, (-1, {}))[0]:
            highest[spooled.channel] = (amount, record)
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    _append(fresh, "".join(json.dumps(record, separators=(",", ":")) + "\n" for _, record in highest.values()))
    fresh.replace(path)
