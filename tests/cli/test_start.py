"""A start that cannot be finished, or is not wanted any more, at real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.cli.operator import Desk, configuration, desk


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk(tmp_path) as made:
        yield made


@asynccontextmanager
async def silent_chain() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """The URL of a chain node that takes requests and never answers; the event is set when one has come."""
    asked = asyncio.Event()

    class Silent(asyncio.Protocol):
        def data_received(self, _: bytes) -> None:
            asked.set()

    server = await asyncio.get_running_loop().create_server(Silent, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()


@pytest.mark.parametrize("command", ["serve", "watchtower"])
async def test_a_stop_ends_a_start_that_waits(shop: Desk, command: str) -> None:
    """SIGTERM while the chain is silent ends the process in order, without its patience, and gives the ledger back."""
    async with silent_chain() as (url, asked):
        text = configuration(shop.net, ledger='"waits.sqlite"')
        (shop.folder / "waits.toml").write_text(text.replace(shop.net.chain_url, url))
        process = await shop.start(command, "--config", str(shop.folder / "waits.toml"))
        async with asyncio.timeout(20):
            await asked.wait()
            process.terminate()
            _, said = await process.communicate()
        assert (process.returncode, said.decode()) == (0, "")
    (shop.folder / "waits.toml").write_text(text)
    assert (await shop.run("reconcile", config="waits.toml")).status == 0


@pytest.mark.parametrize("command", ["serve", "watchtower"])
@pytest.mark.parametrize("numbers", [(signal.SIGHUP, signal.SIGTERM), (signal.SIGINT,)], ids=["HUP TERM", "INT"])
async def test_signals_that_come_early_wait(shop: Desk, command: str, numbers: tuple[signal.Signals, ...]) -> None:
    """A reload right after the start does not end the process, and a stop does so in order, before anybody listens."""
    path = shop.folder / "early.toml"
    os.mkfifo(path)
    process = await shop.start(command, "--config", str(path))
    async with asyncio.timeout(20):
        file = await asyncio.to_thread(path.open, "w")  # it is there, and reads its configuration
        for number in numbers:
            process.send_signal(number)
        file.write(configuration(shop.net, ledger='"early.sqlite"'))
        file.close()
        _, said = await process.communicate()
    assert (process.returncode, said.decode()) == (0, "")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ('[pricing]\ncatalog = "list.json"\n', "is not JSON"),
        (('[[models]]\nid = "a"\nprovider = "dev"\ninput_usd_per_million = "1"\noutput_usd_per_million = "1"\n'
          'context = 100\nmax_output = 10\ntokenizer = "list.json"\n'), "list.json"),
    ],
    ids=["catalog", "tokenizer"],
)  # fmt: skip
async def test_files_that_cannot_be_used_are_told_in_a_line(shop: Desk, more: str, why: str) -> None:
    """A broken price list or tokenizer is named in one line and status 1, not in a traceback."""
    (shop.folder / "list.json").write_text("{")
    (shop.folder / "broken.toml").write_text(configuration(shop.net, ledger='"broken.sqlite"') + more)
    process = await shop.start("serve", "--config", str(shop.folder / "broken.toml"))
    _, said = await process.communicate()
    (line,) = said.decode().splitlines()
    assert line.startswith("mppnode: cannot start: ")
    assert why in line
    assert process.returncode == 1
