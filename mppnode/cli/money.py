"""``mppnode channels``, ``reconcile``, ``backup`` and ``restore``: the operator's hands on the money.

Results go to standard output, one line or one JSON object each; progress and problems go to standard error. Everything
that would move money or change the books can be asked with ``--dry-run`` first.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeAlias

from channels.faults import ChannelFault
from channels.ids import parse_channel_id, to_hex
from channels.model import Account, Phase
from channels.units import Units, format_decimal
from mppnode.cli.serve import CANNOT_START, read_config, run
from mppnode.config.schema import Config
from mppnode.kernel.clock import SystemClock
from mppnode.ledger.base import Which
from mppnode.ledger.spool import SpoolError, read_spool
from mppnode.observe.logs import quiet
from mppnode.parts import World
from mppnode.treasury.reconcile import Reconciler
from mppnode.treasury.restore import Restorer
from mppnode.watchtower import Watchtower

_BAD: Final = 2
_FAILED: Final = 1
_SAY_EVERY: Final = 200  # channels between two lines of progress


_Work: TypeAlias = Callable[[Watchtower, Config, argparse.Namespace], Awaitable[int]]


class _Refused(Exception):
    """The command cannot be carried out; the message is for the operator."""


def channels(options: argparse.Namespace) -> int:
    """List, show, settle or close channels."""
    work = {"list": _list, "show": _show, "settle": _settle, "close": _close}[options.action]
    return _with_tower(options, work)


def reconcile(options: argparse.Namespace) -> int:
    """Compare journal, accounts, transactions and chain; the exit status is 1 if anything differs."""
    return _with_tower(options, _reconcile)


def restore(options: argparse.Namespace) -> int:
    """Bring a restored backup up to date from the voucher spool and the chain."""
    return _with_tower(options, _restore, beside=False)


def backup(options: argparse.Namespace) -> int:
    """Copy a SQLite ledger while it is in use; a PostgreSQL one is dumped with its own tools."""
    config = read_config(options.config)
    if config is None:
        return _BAD
    if not isinstance(config.node.ledger, Path):
        print("mppnode: this ledger is a PostgreSQL database: use pg_dump or its continuous archive", file=sys.stderr)
        return _BAD
    target: Path = options.to
    if target.exists():
        print(f"mppnode: {target} exists already", file=sys.stderr)
        return _BAD
    try:
        _copy(config.node.ledger, target)
    except (sqlite3.Error, OSError) as error:
        print(f"mppnode: the backup failed: {error}", file=sys.stderr)
        return _FAILED
    print(target)
    return 0


def _copy(source: Path, target: Path) -> None:
    # SQLite's own backup: a plain copy of the file would miss what is still in its write-ahead log.
    part = target.with_name(target.name + ".part")
    try:
        _copy_to(source, part)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    part.replace(target)


def _copy_to(source: Path, part: Path) -> None:
    reading = sqlite3.connect(f"file:{source}?mode=ro", uri=True)
    writing = sqlite3.connect(part)
    try:
        reading.backup(writing, pages=256, sleep=0.01)
        (verdict,) = writing.execute("PRAGMA integrity_check").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"the copy is not whole: {verdict}")
    finally:
        writing.close()
        reading.close()
    with part.open("rb+") as copy:
        os.fsync(copy.fileno())


# ------------------------------------------------------------------------------------------------------------ plumbing


def _with_tower(options: argparse.Namespace, work: _Work, *, beside: bool = True) -> int:
    config = read_config(options.config)
    return _BAD if config is None else run(_open_and(config, options, work, beside=beside))


async def _open_and(config: Config, options: argparse.Namespace, work: _Work, *, beside: bool) -> int:
    fatal: list[BaseException] = []
    world = World(SystemClock(), os.urandom, quiet, fatal.append)
    # A name of its own, so that no node and no other operator is fenced; beside a running node the file is shared.
    tower = Watchtower(config, world, name=f"operator-{os.getpid()}", beside=beside)
    try:
        await tower.open()
    except CANNOT_START as error:
        print(f"mppnode: {error}", file=sys.stderr)
        return _FAILED
    try:
        return await work(tower, config, options)
    except _Refused as refused:
        print(f"mppnode: {refused}", file=sys.stderr)
        return _BAD
    except (ChannelFault, SpoolError, OSError) as error:
        print(f"mppnode: {error}", file=sys.stderr)
        return _FAILED
    finally:
        await tower.stop()


def _put(options: argparse.Namespace, record: dict[str, Any], text: str) -> None:
    print(json.dumps(record) if options.json else text, flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _usd(amount: int) -> str:
    return format_decimal(Units(amount))


def _record(account: Account) -> dict[str, Any]:
    return {
        "channel": to_hex(account.id),
        "protocol": account.escrow.protocol.value,
        "phase": account.phase.value,
        "payer": to_hex(account.descriptor.payer),
        "deposit": str(account.chain.deposit),
        "accepted": str(account.accepted),
        "spent": str(account.spent),
        "settled": str(account.chain.settled),
        "unsettled": str(0 if account.phase is Phase.CLOSED else account.unsettled),
        "settleable": str(account.settleable),
        "holds": len(account.holds),
        "close_requested_at": account.chain.close_requested_at,
        "active_at": account.active_at or None,
    }


def _line(account: Account) -> str:
    unsettled = 0 if account.phase is Phase.CLOSED else account.unsettled
    return (
        f"{to_hex(account.id)}  {account.phase:<9}  accepted {_usd(account.accepted):>12}  spent "
        f"{_usd(account.spent):>12}  unsettled {_usd(unsettled):>12}  deposit {_usd(account.chain.deposit):>12}"
    )


# ------------------------------------------------------------------------------------------------------------ channels


async def _list(tower: Watchtower, _: Config, options: argparse.Namespace) -> int:
    which = Which.ALL if options.all else Which.NOT_CLOSED
    after, count = None, 0
    while page := await tower.ledger.page(which, after=after):
        after = page[-1].id
        for account in page:
            if options.phase is None or account.phase.value == options.phase:
                count += 1
                _put(options, _record(account), _line(account))
    if not options.json:
        _say(f"{count} channels")
    return 0


async def _show(tower: Watchtower, _: Config, options: argparse.Namespace) -> int:
    account = await _account(tower, options.channel[0])
    intents = await tower.ledger.intents(active=False, channel=account.id)
    record = _record(account) | {
        "ladder": [str(rung.cumulative) for rung in account.ladder],
        "live": [
            {"hold": name, "owner": hold.owner, "stream": hold.stream, "granted_pico": str(hold.granted)}
            for name, hold in account.holds.items()
        ],
        "intents": [
            {
                "kind": intent.kind.value,
                "state": intent.state.value,
                "amount": str(intent.amount),
                "attempt": intent.attempt,
                "tx": None if intent.tx_hash is None else to_hex(intent.tx_hash),
                "updated_at": intent.updated_at,
            }
            for intent in intents
        ],
    }
    _put(options, record, "\n".join(f"{name:>18}  {json.dumps(value)}" for name, value in record.items()))
    return 0


async def _settle(tower: Watchtower, _: Config, options: argparse.Namespace) -> int:
    return await _each(tower, options, "settle", _settle_one)


async def _close(tower: Watchtower, _: Config, options: argparse.Namespace) -> int:
    return await _each(tower, options, "close", _close_one)


async def _each(
    tower: Watchtower,
    options: argparse.Namespace,
    verb: str,
    one: Callable[[Watchtower, Account], Awaitable[Account]],
) -> int:
    failed = 0
    wanted = await _wanted(tower, options, verb)
    for number, account in enumerate(wanted, 1):
        amount = account.settleable if verb == "settle" else account.capturable
        if options.dry_run:
            settled = account.chain.settled
            record = {"channel": to_hex(account.id), "would": verb, "to": str(amount), "settled": str(settled)}
            _put(options, record, f"{to_hex(account.id)}  would {verb}: chain total {settled} -> {amount}")
            continue
        _say(f"[{number}/{len(wanted)}] {verb} {to_hex(account.id)}")
        try:
            _put_account(options, await one(tower, account))
        except ChannelFault as fault:
            failed += 1
            record = {"channel": to_hex(account.id), "failed": fault.reason.value, "detail": fault.message}
            _put(options, record, f"{to_hex(account.id)}  failed: {fault}")
    return _FAILED if failed else 0


def _put_account(options: argparse.Namespace, account: Account) -> None:
    _put(options, _record(account), _line(account))


async def _settle_one(tower: Watchtower, account: Account) -> Account:
    return await tower.treasury.treasurer.settle(account.id)


async def _close_one(tower: Watchtower, account: Account) -> Account:
    closed, _ = await tower.treasury.closer.close(account, "operator")
    return closed


async def _wanted(tower: Watchtower, options: argparse.Namespace, verb: str) -> list[Account]:
    if options.channel:
        return [await _account(tower, text) for text in options.channel]
    if not options.all:
        raise _Refused(f"name channels to {verb}, or say --all")
    found: list[Account] = []
    after = None
    while page := await tower.ledger.page(Which.NOT_CLOSED, after=after):
        after = page[-1].id
        found += [a for a in page if verb == "close" or a.settleable > a.chain.settled]
    return found


async def _account(tower: Watchtower, text: str) -> Account:
    try:
        channel = parse_channel_id(text if text.startswith("0x") else "0x" + text, field="channel")
    except ChannelFault:
        raise _Refused(f"{text!r} is not a channel id (0x and 64 hex digits)") from None
    account = await tower.ledger.load(channel)
    if account is None:
        raise _Refused(f"{text} is no channel of this node")
    return account


# ----------------------------------------------------------------------------------------------- reconcile and restore


async def _reconcile(tower: Watchtower, _: Config, options: argparse.Namespace) -> int:
    reconciler = Reconciler(tower.ledger, tower.chain)
    said = 0
    async for difference in reconciler.run():
        record = {"channel": to_hex(difference.channel), "what": difference.what, "detail": difference.detail}
        _put(options, record, str(difference))
        if reconciler.totals.channels - said >= _SAY_EVERY:
            said = reconciler.totals.channels
            _say(f"{said} channels compared")
    totals = reconciler.totals
    text = (
        f"{totals.channels} channels: spent {_usd(totals.spent)}, settled {_usd(totals.settled)}, "
        f"lost {_usd(totals.lost)}, {totals.differences} differences"
    )
    _put(options, {"totals": {name: str(value) for name, value in asdict(totals).items()}}, text)
    return _FAILED if totals.differences else 0


async def _restore(tower: Watchtower, config: Config, options: argparse.Namespace) -> int:
    others = await tower.ledger.living() - {tower.life.id}
    # A file is ours alone by its lock, and names the processes that used it when the backup was made.
    if others and not isinstance(config.node.ledger, Path):
        # They would go on from accounts they have in memory, over what is restored here.
        raise _Refused(f"{len(others)} processes use this ledger: stop them first")
    spool: Path | None = options.spool or config.node.spool
    spooled = {} if spool is None else read_spool(spool)
    _say(f"{len(spooled)} channels in the spool" if spool else "no spool: only the chain's word is taken")
    restorer = Restorer(tower.ledger, tower.books, tower.chain, spooled, dry=options.dry_run)
    changes = await restorer.run()
    for change in changes:
        record = asdict(change) | {"channel": to_hex(change.channel)}
        words = f"accepted {change.accepted[0]} -> {change.accepted[1]}, spent {change.spent[0]} -> {change.spent[1]}"
        text = f"{to_hex(change.channel)}  {change.phase[0]} -> {change.phase[1]}  {words}"
        _put(options, record, text + (f"  REFUSED: {change.refused}" if change.refused else ""))
    return _FAILED if any(change.refused for change in changes) else 0
