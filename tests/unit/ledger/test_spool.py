"""The second copy of the vouchers: whole lines only, whatever the disk does, and no guess at what a line meant."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from channels.model import Account
from mppnode.ledger.spool import Spool, SpoolError, compact, read_spool
from tests.support.builders import opened, voucher


def after(account: Account, cumulative: int) -> Account:
    return replace(account, ladder=(*account.ladder, voucher(cumulative)))


def amounts(path: Path) -> list[int]:
    return [rung.cumulative for spooled in read_spool(path).values() for rung in spooled.vouchers]


async def test_every_new_voucher_is_a_line(tmp_path: Path) -> None:
    """What was accepted comes back, rising, and a repeat is not written twice."""
    spool = Spool(tmp_path / "v", on_error=lambda _: pytest.fail("the disk works"))
    spool.start()
    account = opened(100)
    for cumulative in (100, 300, 300, 200):
        spool.on_commit(after(account, cumulative))
    await spool.flush()
    assert amounts(tmp_path / "v") == [100, 300]


async def test_a_disk_that_takes_bytes_in_pieces_gets_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may write less than it was given without calling that an error."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda where, data: write(where, data[:7]))
    spool = Spool(tmp_path / "v", on_error=lambda _: pytest.fail("the disk works"))
    spool.on_commit(after(opened(100), 300))
    await spool.flush()
    assert amounts(tmp_path / "v") == [300]


async def test_a_full_disk_costs_no_voucher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line stays when the disk fills; what is tried again later begins on a line of its own."""
    write, room = os.write, [40]

    def full(where: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "no space")
        taken = write(where, data[: room[0]])
        room[0] -= taken
        return taken

    failures: list[OSError] = []
    spool = Spool(tmp_path / "v", on_error=failures.append)
    spool.on_commit(after(opened(100), 300))
    monkeypatch.setattr(os, "write", full)
    await spool.flush()
    await spool.flush()
    spool.on_commit(after(opened(100), 400))
    monkeypatch.setattr(os, "write", write)
    await spool.flush()
    assert [error.errno for error in failures] == [errno.ENOSPC] * 2
    assert (tmp_path / "v").stat().st_size > 40
    assert amounts(tmp_path / "v") == [300, 400]


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace('"channel"', '"chanel"'),
        lambda line: line.replace('"signature":"', '"signature":"zz'),
        lambda line: line.replace('"cumulative":"', '"cumulative":"-'),
        lambda line: line.replace('"channel":"', '"channel":"00'),
        lambda line: "[1]\n",
        lambda line: "7\n",
    ],
)
async def test_a_line_no_node_has_written_is_named(tmp_path: Path, change) -> None:
    """Money is not restored from a file somebody edited: the file and the line are named, and nothing is returned."""
    path = tmp_path / "v"
    spool = Spool(path, on_error=lambda _: pytest.fail("the disk works"))
    for cumulative in (300, 400):
        spool.on_commit(after(opened(100), cumulative))
    await spool.flush()
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + change(second))
    for read in (read_spool, compact):
        with pytest.raises(SpoolError, match="v, line 2: "):
            read(path)


async def test_compaction_keeps_the_highest_voucher(tmp_path: Path) -> None:
    """A long file becomes one line per channel; a line that a crash cut off is left out."""
    path = tmp_path / "v"
    spool = Spool(path, on_error=lambda _: pytest.fail("the disk works"))
    for cumulative in (300, 400, 500):
        spool.on_commit(after(opened(100), cumulative))
    await spool.flush()
    with path.open("a") as file:
        file.write('{"channel":"11')
    compact(path)
    assert (amounts(path), len(path.read_text().splitlines())) == ([500], 1)
