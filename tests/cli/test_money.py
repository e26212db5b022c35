"""The operator's commands, beside a running node and without one."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from channels.ids import to_hex
from channels.model import Phase
from mppnode.cli.devnet import FUNDS
from tests.cli.operator import Desk, desk


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk(tmp_path) as made:
        yield made


async def test_channels_are_listed_and_shown_beside_a_running_node(shop: Desk) -> None:
    """List has a line per open channel, show has everything about one; both speak JSON when asked."""
    await shop.stream(shop.payer())
    (account,) = await shop.accounts()
    listed = await shop.run("channels", "list", "--json")
    assert listed.status == 0
    (record,) = listed.records
    assert record["channel"] == to_hex(account.id)
    assert (record["phase"], record["spent"], record["deposit"]) == ("open", str(account.spent), str(account.chain.deposit))
    assert record["unsettled"] == str(account.spent)
    text = await shop.run("channels", "list")
    assert to_hex(account.id) in text.out
    assert "1 channels" in text.err
    assert (await shop.run("channels", "list", "--phase", "closed")).out == ""
    shown = await shop.run("channels", "show", to_hex(account.id), "--json")
    assert shown.records[0]["ladder"] == [str(rung.cumulative) for rung in account.ladder]
    assert shown.records[0]["intents"] == []


@pytest.mark.parametrize(
    ("channel", "words"),
    [("0x12", "is not a channel id"), ("0x" + "zz" * 32, "is not a channel id"), ("0x" + "11" * 32, "is no channel of this node")],
)
async def test_a_wrong_channel_is_named(shop: Desk, channel: str, words: str) -> None:
    """What is wrong with an id is said in words, and nothing is done."""
    ran = await shop.run("channels", "show", channel)
    assert (ran.status, ran.out) == (2, "")
    assert words in ran.err


async def test_settle_and_close_move_exactly_what_is_earned(shop: Desk) -> None:
    """A dry run moves nothing; settle brings the earned rung to the chain; close captures what is spent, to the unit."""
    payer = shop.payer()
    for _ in range(2):
        await shop.stream(payer, 700)
    (account,) = await shop.accounts()
    assert account.settleable > 0
    refused = await shop.run("channels", "settle")
    assert refused.status == 2
    assert "--all" in refused.err
    for verb, amount in (("settle", account.settleable), ("close", account.spent)):
        dry = await shop.run("channels", verb, "--all", "--dry-run", "--json")
        assert dry.records == [{"channel": to_hex(account.id), "would": verb, "to": str(amount), "settled": "0"}]
    assert shop.net.chain.balance(shop.net.payee) == FUNDS
    settled = await shop.run("channels", "settle", "--all", "--json")
    assert settled.status == 0, settled.err
    assert settled.records[0]["settled"] == str(account.settleable)
    assert "[1/1]" in settled.err
    assert shop.net.chain.balance(shop.net.payee) == FUNDS + account.settleable
    await shop.stream(payer, 40)  # the running node sees what another process wrote, and goes on
    (account,) = await shop.accounts()
    closed = await shop.run("channels", "close", to_hex(account.id), "--json")
    assert closed.status == 0, closed.err
    assert closed.records[0]["phase"] == "closed"
    (after,) = await shop.accounts()
    assert after.phase is Phase.CLOSED
    assert shop.net.chain.balance(shop.net.payee) == FUNDS + account.spent
    assert shop.net.chain.balance(shop.net.payer) == FUNDS - account.spent
    reconciled = await shop.run("reconcile", "--json")
    assert reconciled.status == 0, reconciled.out
    totals = reconciled.records[-1]["totals"]
    assert (totals["channels"], totals["spent"], totals["settled"], totals["differences"]) == ("1", str(account.spent), str(account.spent), "0")


async def test_reconcile_names_every_difference(shop: Desk) -> None:
    """A number changed behind the node's back is found, named by its channel, and the exit status says so."""
    await shop.stream(shop.payer())
    (account,) = await shop.accounts()
    await shop.net.node.stop()
    with sqlite3.connect(shop.folder / "ledger.sqlite") as connection:
        connection.execute("DELETE FROM journal WHERE entry = 2")
    ran = await shop.run("reconcile")
    assert ran.status == 1
    assert ran.out.startswith(f"{to_hex(account.id)} journal/account: ")
    assert "1 differences" in ran.out
    shop.net.node = shop.net.new_node()
    await shop.net.node.start()


async def test_a_backup_of_a_running_node_is_whole(shop: Desk) -> None:
    """The copy has everything that was answered before it began, and it never overwrites anything."""
    await shop.stream(shop.payer())
    (account,) = await shop.accounts()
    target = shop.folder / "copy.sqlite"
    assert (await shop.run("backup", "--to", str(target))).status == 0
    with sqlite3.connect(target) as connection:
        (spent,) = connection.execute("SELECT spent FROM channel").fetchone()
    assert int(spent) == account.spent
    again = await shop.run("backup", "--to", str(target))
    assert again.status == 2
    assert "exists already" in again.err


async def test_an_old_backup_comes_up_to_date(tmp_path: Path) -> None:
    """O8: vouchers of the lost time come back from the spool, settled amounts from the chain, and nobody pays twice."""
    async with desk(tmp_path) as shop:
        net = shop.net
        await net.node.stop()
        spool = tmp_path / "spool" / "vouchers.jsonl"
        net.spool = spool
        net.node = net.new_node()
        await net.node.start()
        first, second = shop.payer(), shop.payer()
        await shop.stream(first)
        backup = tmp_path / "backup.sqlite"
        assert (await shop.run("backup", "--to", str(backup))).status == 0
        await shop.stream(first, 900)
        await shop.stream(first, 40)
        await shop.stream(second)
        settled = await shop.run("channels", "settle", "--all", "--json")
        assert settled.status == 0, settled.err
        now = {account.id: account for account in await shop.accounts()}
        await net.node.stop()
        for suffix in ("", "-wal", "-shm"):
            (tmp_path / f"ledger.sqlite{suffix}").unlink(missing_ok=True)
        shutil.copy(backup, tmp_path / "ledger.sqlite")

        stale = await shop.run("reconcile")
        assert stale.status == 1, "the chain has paid more than these books know of"
        dry = await shop.run("restore", "--spool", str(spool), "--dry-run", "--json")
        done = await shop.run("restore", "--spool", str(spool), "--json")
        assert done.status == 0, done.out + done.err
        assert dry.records == done.records
        assert {record["channel"] for record in done.records} == {to_hex(channel) for channel in now}
        net.node = net.new_node()
        await net.node.start()
        restored = {account.id: account for account in await shop.accounts()}
        for channel, account in restored.items():
            assert account.phase is Phase.OPEN
            assert account.accepted == now[channel].accepted, "no signed voucher is lost"
            assert now[channel].chain.settled <= account.spent <= now[channel].spent
        assert (await shop.run("restore", "--spool", str(spool))).out == "", "once is enough"
        assert await shop.stream(first, 40) == 40, "the channel goes on"
        assert (await shop.run("channels", "close", "--all")).status == 0
        assert (await shop.run("reconcile")).status == 0
        paid = net.chain.balance(net.payee) - FUNDS
        assert paid <= sum(account.spent for account in now.values()) + 40 * 10 + 10
