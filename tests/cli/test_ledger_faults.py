"""What a node does when its ledger fails: go on when it may, or end with a status and a clear line; never promise more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from mppnode.payer.client import PayingClient, PaymentGivenUp, RequestFailed
from tests.cli.operator import Desk, configuration, desk
from tests.cli.test_workers import PATIENCE_S, Service, service
from tests.support.postgres import postgres_server

CUT_OFF = (aiohttp.ClientError, OSError, PaymentGivenUp, RequestFailed)


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk(tmp_path) as made:
        (tmp_path / "own.toml").write_text(configuration(made.net, ledger='"own/ledger.sqlite"'))
        (tmp_path / "own").mkdir()
        yield made


def chat(served: Service) -> str:
    return next(line["url"] for line in served.lines if line["event"] == "node.started") + "/v1/chat/completions"


async def cut_off(shop: Desk, payer: PayingClient, url: str) -> bool:
    """Whether a payer who streams again and again is cut off at last; a full disk has some room left."""
    for _ in range(50):
        failed = False
        try:
            await shop.stream(payer, 40, url)
        except* CUT_OFF:
            failed = True
        if failed:
            return True
    return False


async def test_a_full_disk_ends_the_node_with_a_clear_line(shop: Desk) -> None:
    """Nothing is promised that cannot be written: the node stops with a status, says why, and the next start has it all."""
    ledger = shop.folder / "own" / "ledger.sqlite"
    async with service(shop, "serve", "own.toml") as served:
        await served.until("node.started")
        payer = shop.payer()
        assert await shop.stream(payer, 40, chat(served)) == 40
        # From here on no file of this process may grow: what a full disk looks like from inside.
        size = Path(f"{ledger}-wal").stat().st_size
        resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (size, size))
        assert await cut_off(shop, payer, chat(served))
        async with asyncio.timeout(PATIENCE_S):
            assert await served.process.wait() == 1
    text = "".join(line.get("text", "") for line in served.lines)
    assert "stopped because the ledger failed" in text
    async with service(shop, "serve", "own.toml") as again:
        await again.until("node.started")
        assert await shop.stream(shop.payer(), 40, chat(again)) == 40
    assert (await shop.run("reconcile", config="own.toml")).status == 0


async def test_a_file_that_cannot_be_written_is_named_at_the_start(shop: Desk) -> None:
    """A ledger that is no database, or of a newer program, ends the start with one line and status 1."""
    ledger = shop.folder / "own" / "ledger.sqlite"
    ledger.write_bytes(b"this is no database, it is a letter to my aunt" * 100)
    ran = await shop.run("serve", config="own.toml")
    assert ran.status == 1
    assert ran.err.startswith("mppnode: cannot start: ")
    ledger.unlink()
    with sqlite3.connect(ledger) as connection:
        connection.execute("PRAGMA user_version = 99")
    ran = await shop.run("serve", config="own.toml")
    assert ran.status == 1
    assert "newer than this program" in ran.err
    shutil.rmtree(shop.folder / "own")
    ran = await shop.run("serve", config="own.toml")
    assert ran.status == 1
    assert ran.err.startswith("mppnode: cannot start: ")


@pytest.fixture
def small_disk(shop: Desk) -> Iterator[Path]:
    """A disk of two megabytes under the ledger; making one needs the right to mount."""
    folder = shop.folder / "own"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip("no right to mount a small disk; the test above limits the size of files instead")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


async def test_a_small_disk_that_fills_up_and_is_then_read_only(shop: Desk, small_disk: Path) -> None:
    """A real full disk ends the node with status 1; remounted read-only it is named at the start, and nothing is written."""
    async with service(shop, "serve", "own.toml") as served:
        await served.until("node.started")
        payer = shop.payer()
        assert await shop.stream(payer, 40, chat(served)) == 40
        with contextlib.suppress(OSError), (small_disk / "ballast").open("wb") as ballast:
            while ballast.write(bytes(4096)):
                ballast.flush()
        assert await cut_off(shop, payer, chat(served))
        async with asyncio.timeout(PATIENCE_S):
            assert await served.process.wait() == 1
    (small_disk / "ballast").unlink()
    assert (await shop.run("reconcile", config="own.toml")).status == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = (small_disk / "ledger.sqlite").read_bytes()
    ran = await shop.run("serve", config="own.toml")
    assert ran.status == 1
    assert ran.err.startswith("mppnode: cannot start: ")
    assert len(ran.err.splitlines()) == 1
    assert (small_disk / "ledger.sqlite").read_bytes() == before


async def test_a_locked_file_is_waited_for_and_refused_politely(shop: Desk) -> None:
    """Somebody holds the file longer than the node waits: requests are refused, the node lives, and then serves again."""
    async with service(shop, "serve", "own.toml") as served:
        await served.until("node.started")
        payer = shop.payer()
        assert await shop.stream(payer, 40, chat(served)) == 40
        holder = sqlite3.connect(shop.folder / "own" / "ledger.sqlite", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(CUT_OFF):
            await shop.stream(shop.payer(), 40, chat(served))
        holder.execute("ROLLBACK")
        holder.close()
        assert served.process.returncode is None
        assert await shop.stream(payer, 40, chat(served)) == 40


async def test_a_database_that_goes_away_comes_back_to_a_node_that_waited(tmp_path: Path) -> None:
    """PostgreSQL is killed and started again under a node: what was answered is there, and it serves on by itself."""
    async with AsyncExitStack() as stack:
        shop = await stack.enter_async_context(desk(tmp_path))
        server = postgres_server()
        os.environ["DATABASE"] = await stack.enter_async_context(server.database())
        stack.callback(os.environ.pop, "DATABASE")
        (tmp_path / "own.toml").write_text(configuration(shop.net, ledger='{ env = "DATABASE" }'))
        async with service(shop, "serve", "own.toml") as served:
            await served.until("node.started")
            payer = shop.payer()
            assert await shop.stream(payer, 40, chat(served)) == 40
            before = (await shop.run("channels", "list", "--json", config="own.toml")).records
            await asyncio.to_thread(server.crash)
            with pytest.raises(CUT_OFF):
                await shop.stream(shop.payer(), 40, chat(served))
            await asyncio.to_thread(server.start)
            assert served.process.returncode is None, "an absent database is waited for"
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    try:
                        assert await shop.stream(shop.payer(), 40, chat(served)) == 40
                        break
                    except CUT_OFF:
                        await asyncio.sleep(0.2)
            after = {record["channel"]: record for record in (await shop.run("channels", "list", "--json", config="own.toml")).records}
            for record in before:
                assert int(after[record["channel"]]["accepted"]) >= int(record["accepted"])
                assert int(after[record["channel"]]["spent"]) >= int(record["spent"])
            assert (await shop.run("reconcile", config="own.toml")).status == 0
