"""The embedded store alone: its file, its lock, and what it does when the disk fails."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from channels.account import fold, plan
from channels.faults import ChannelFault, Reason
from channels.model import (
    NOBODY,
    AcceptVoucher,
    Account,
    Command,
    Finish,
    Hold,
    HoldId,
    Opened,
    Outcome,
    Plan,
    ReleaseOrphans,
    Renew,
)
from channels.store import Step
from mppnode.kernel.clock import ManualClock
from mppnode.ledger import sqlite_file
from mppnode.ledger.base import LedgerError, Which
from mppnode.ledger.rows import account_columns, terms_column, write_journal
from mppnode.ledger.sqlite import InstanceLock, InstanceLocked, SqliteStore
from tests.store.shops import PATIENCE_S, step
from tests.support.builders import CHANNEL, NOW, POLICY, after, opened, opening, pico, reserve, voucher


class Disk:
    """A connection whose statements can be made to fail, counted from 1 over BEGIN, writes and COMMIT."""

    def __init__(self, real: sqlite3.Connection) -> None:
        self.real = real
        self.fail_at = 0
        self.after_effect = False
        self.error: Exception = _io_error()
        self.statements = 0

    def execute(self, sql: str, *arguments: Any) -> Any:
        return self._do(lambda: self.real.execute(sql, *arguments))

    def executemany(self, sql: str, rows: Any) -> Any:
        return self._do(lambda: self.real.executemany(sql, rows))

    def _do(self, statement: Callable[[], Any]) -> Any:
        self.statements += 1
        if self.statements == self.fail_at and not self.after_effect:
            raise self.error
        result = statement()
        if self.statements == self.fail_at:
            raise self.error
        return result

    @property
    def total_changes(self) -> int:
        return self.real.total_changes

    def close(self) -> None:
        self.real.close()


def _io_error() -> sqlite3.Error:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
    return error


class FaultyStore(SqliteStore):
    """The real store over a disk that can fail."""

    disk: Disk

    def _connect(self) -> Any:
        self.disk = Disk(super()._connect())
        return self.disk


class Rig:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.fatal: list[BaseException] = []
        self.store = FaultyStore(path, clock=ManualClock(), on_fatal=self.fatal.append)

    async def ask(self, command: Command) -> Plan[Outcome]:
        return await asyncio.wait_for(self.store.transact(CHANNEL, step(command)), PATIENCE_S)

    async def attempt(self, command: Command) -> Plan[Outcome] | None:
        """The answer, or None when the ledger was not available; any other refusal is an error."""
        try:
            return await self.ask(command)
        except ChannelFault as fault:
            if fault.reason is not Reason.STORE_UNAVAILABLE:
                raise
            return None

    async def reopened(self) -> Account | None:
        """What another process would find now; its journal must fold to it."""
        await self.store.stop()
        return await read(self.path)


async def read(path: Path) -> Account | None:
    other = SqliteStore(path, clock=ManualClock(), on_fatal=lambda error: None)
    await other.start()
    account, journal = await other.load(CHANNEL), await other.journal(CHANNEL)
    await other.stop()
    assert reduce(fold, journal, None) == account
    return account


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path / "ledger.sqlite")
    await made.store.start()
    yield made
    await made.store.stop()


async def refused(rig: Rig, command: Command) -> Reason:
    with pytest.raises(ChannelFault) as caught:
        await rig.ask(command)
    return caught.value.reason


# --------------------------------------------------------------------------------------------------------- the file


async def test_a_reopened_store_has_every_commit(rig: Rig) -> None:
    """Account and journal are the same for the next process."""
    commands = [opening(), AcceptVoucher(voucher(500)), reserve(40), Renew(HoldId("h"), pico(7.125), pico(60))]
    for command in commands:
        account = (await rig.ask(command)).account
    assert await rig.reopened() == account


async def test_two_nodes_never_share_a_file(rig: Rig) -> None:
    """The second is turned away and the first goes on; when the first has stopped the file is free."""
    second = SqliteStore(rig.path, clock=ManualClock(), on_fatal=lambda error: None)
    with pytest.raises(InstanceLocked):
        await second.start()
    await rig.ask(opening())
    await rig.store.stop()
    await second.start()
    assert await second.load(CHANNEL) is not None
    await second.stop()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    """An old program must not write what it does not understand; the file stays free for the right one."""
    path = tmp_path / "ledger.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 999")
    connection.close()
    for _ in range(2):  # the second attempt meets the same refusal, not a lock left behind
        store = SqliteStore(path, clock=ManualClock(), on_fatal=lambda error: None)
        with pytest.raises(LedgerError, match="newer"):
            await store.start()


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """Somebody else's file is not overwritten."""
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"these are not the books you are looking for" * 40)
    store = SqliteStore(path, clock=ManualClock(), on_fatal=lambda error: None)
    with pytest.raises(sqlite3.DatabaseError):
        await store.start()
    assert path.read_bytes().startswith(b"these are not")


async def test_the_database_itself_refuses_a_broken_law(rig: Rig) -> None:
    """Spending beyond the voucher is impossible even for a program that skips every check of ours."""
    await rig.ask(opening())
    with pytest.raises(sqlite3.IntegrityError):
        rig_write(rig.path, "UPDATE channel SET spent = '000000000000000000000000000000000101'")
    with pytest.raises(sqlite3.IntegrityError):
        rig_write(rig.path, "UPDATE channel SET deposit = '000000000000000000000000000000000099'")


def rig_write(path: Path, sql: str) -> None:
    connection = sqlite3.connect(path)
    try:
        with connection:
            connection.execute(sql)
    finally:
        connection.close()


async def test_a_tampered_row_stops_its_channel_not_the_node(rig: Rig) -> None:
    """A row that breaks the law on reading is refused to its asker; other channels go on."""
    await rig.ask(opening())
    await rig.store.stop()
    rig_write(rig.path, "UPDATE channel SET owed_pico = '000000000000000000000000000100000001'")
    store = SqliteStore(rig.path, clock=ManualClock(), on_fatal=rig.fatal.append)
    await store.start()
    with pytest.raises(AssertionError):
        await store.load(CHANNEL)
    other = CHANNEL[:-1] + b"\x00"
    assert await store.load(type(CHANNEL)(other)) is None
    await store.stop()
    assert rig.fatal == []


async def test_a_stopped_store_answers_nothing(rig: Rig) -> None:
    """After the end every question is refused at once, also one that comes while it is ending."""
    await rig.ask(opening())
    stopping = asyncio.ensure_future(rig.store.stop())
    await asyncio.sleep(0)
    assert await refused(rig, AcceptVoucher(voucher(200))) is Reason.STORE_UNAVAILABLE
    await stopping
    assert await refused(rig, AcceptVoucher(voucher(200))) is Reason.STORE_UNAVAILABLE


def schema_one(path: Path) -> None:
    """A file as the first release wrote it: a live channel and its journal."""
    connection = sqlite3.connect(path)
    connection.executescript(resources.files("mppnode.ledger").joinpath("sql/sqlite_001.sql").read_text())
    account = after(None, opening(), AcceptVoucher(voucher(300)), reserve(40), Renew(HoldId("h"), pico(7), pico(40)))
    columns = account_columns(account, None)
    del columns["active_at"], columns["live"]
    columns |= {"terms": terms_column(account), "holds": '{"h":["40000000","7000000"]}'}
    marks = ",".join("?" * (len(columns) + 1))
    connection.execute(f"INSERT INTO channel ({','.join(columns)}, id) VALUES ({marks})", (*columns.values(), CHANNEL))
    ladder = json.dumps([[str(n), voucher(n).signature.hex()] for n in (100, 300)])
    entries = [
        *write_journal([Opened(opened())], None),
        ("VoucherAccepted", ladder),
        ("Held", f'["h","40000000","t",{NOW + 300},{NOW}]'),
        ("Folded", '["h","7000000","40000000"]'),
    ]
    for number, (kind, body) in enumerate(entries, 1):
        connection.execute("INSERT INTO journal VALUES (?, ?, 0, ?, ?)", (CHANNEL, number, kind, body))
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()


async def test_a_file_of_the_first_release_is_taken_over(tmp_path: Path) -> None:
    """Accounts, journals and live holds of schema 1 are there after the update, and serve."""
    path = tmp_path / "ledger.sqlite"
    schema_one(path)
    store = SqliteStore(path, clock=ManualClock(), on_fatal=lambda error: None)
    await store.start()
    (account,) = await store.page(Which.HELD)
    assert account.holds == {"h": Hold(pico(40), pico(7), NOBODY, True)}
    assert (account.accepted, account.spent, account.version, account.active_at) == (300, 7, 4, NOW)
    assert reduce(fold, await store.journal(CHANNEL), None) == account
    made = await store.transact(CHANNEL, step(ReleaseOrphans()))
    assert dict(made.account.holds) == {}
    assert await store.page(Which.HELD) == []
    await store.stop()


async def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """All of the new schema or nothing of it: the old program can go on with the file."""
    path = tmp_path / "ledger.sqlite"
    schema_one(path)
    rig_write(path, "CREATE TABLE sponsored (in_the_way TEXT)")
    store = SqliteStore(path, clock=ManualClock(), on_fatal=lambda error: None)
    with pytest.raises(sqlite3.OperationalError):
        await store.start()
    connection = sqlite3.connect(path)
    columns = {row[1] for row in connection.execute("PRAGMA table_info(channel)")}
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert not columns & {"active_at", "live", "soft"}
    connection.close()


async def test_workers_share_what_their_supervisor_has_locked(tmp_path: Path) -> None:
    """The supervisor's lock keeps other nodes away; its workers open the file beside each other."""
    path = tmp_path / "ledger.sqlite"
    workers = [SqliteStore(path, clock=ManualClock(), on_fatal=lambda error: None, shared=True) for _ in range(2)]
    with InstanceLock(path):
        for worker in workers:
            await worker.start()
        with pytest.raises(InstanceLocked):
            await SqliteStore(path, clock=ManualClock(), on_fatal=lambda error: None).start()
        for worker in workers:
            await worker.stop()
    alone = SqliteStore(path, clock=ManualClock(), on_fatal=lambda error: None)
    await alone.start()
    with pytest.raises(InstanceLocked), InstanceLock(path):
        pass
    await alone.stop()


# -------------------------------------------------------------------------------------------------------- durability


async def test_firm_and_relaxed_commits_ask_for_what_they_need(rig: Rig) -> None:
    """A batch with a firm step in it syncs the log; one of relaxed steps alone leaves that to the next that does."""
    levels: list[int] = []

    def noting(command: Command) -> Step[Outcome]:  # runs on the writer's own thread, inside the transaction
        def run(account: Account | None) -> Plan[Outcome]:
            levels.append(rig.store.disk.real.execute("PRAGMA synchronous").fetchone()[0])
            return step(command)(account)

        return run

    full, normal = 2, 1
    for command in (opening(), reserve(40)):
        await rig.store.transact(CHANNEL, noting(command))
    await rig.store.transact(CHANNEL, noting(Renew(HoldId("h"), pico(3), pico(3))), relaxed=True)
    await rig.store.transact(CHANNEL, noting(Renew(HoldId("h"), pico(4), pico(4))), relaxed=True)
    assert levels == [full, full, normal, normal]
    release = asyncio.Event()
    blocked = rig.store.transact(CHANNEL, waiting(release))  # so that the next two are one batch
    relaxed = rig.store.transact(CHANNEL, noting(Renew(HoldId("h"), pico(5), pico(5))), relaxed=True)
    firm = rig.store.transact(CHANNEL, noting(AcceptVoucher(voucher(200))))
    asked = asyncio.gather(blocked, relaxed, firm)
    await asyncio.sleep(0)
    release.set()
    await asked
    assert levels[4:] == [full, full]


def waiting(release: asyncio.Event) -> Step[Outcome]:
    """A step that keeps the writer busy until ``release`` is set."""

    def run(account: Account | None) -> Plan[Outcome]:
        assert account is not None
        while not release.is_set():
            pass
        return Plan(account, (), Outcome())

    return run


# ----------------------------------------------------------------------------------------------------- failing disks


@pytest.mark.parametrize("after_effect", [False, True], ids=["before", "after"])
async def test_every_statement_may_fail(tmp_path: Path, after_effect: bool) -> None:
    """Fail statement 1, 2, 3 ... of a story until none fails: the file holds the step or it does not, never half of it."""
    story: list[Command] = [
        opening(),
        AcceptVoucher(voucher(500)),
        reserve(40),
        Renew(HoldId("h"), pico(30), pico(60)),
        Finish(HoldId("h"), pico(31)),
    ]
    for fail_at in range(1, 100):
        rig = Rig(tmp_path / f"{fail_at}.sqlite")
        await rig.store.start()
        rig.store.disk.fail_at, rig.store.disk.after_effect = fail_at, after_effect
        states: list[Account | None] = [None]
        failed = None
        for command in story:
            made = await rig.attempt(command)
            if made is None:
                failed = command
                break
            states.append(made.account)
        found = await rig.reopened()
        if failed is None:
            assert fail_at > 4 * len(story)
            assert found == states[-1]
            assert rig.fatal == []
            return
        assert len(rig.fatal) == 1, "the node is told once that its ledger failed"
        acknowledged = states[-1]
        unknown = plan(acknowledged, failed, now=NOW, policy=POLICY).account
        assert found in ([acknowledged, unknown] if after_effect else [acknowledged])
    raise AssertionError("the story never ran to its end")


async def test_nothing_is_answered_after_a_failed_commit(rig: Rig) -> None:
    """A disk that failed once may seem to work again; the promise is gone with the first error."""
    await rig.ask(opening())
    rig.store.disk.fail_at = rig.store.disk.statements + 1
    asked = [rig.store.transact(CHANNEL, step(AcceptVoucher(voucher(101 + n)))) for n in range(600)]
    answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), PATIENCE_S)
    assert all(isinstance(answer, ChannelFault) and answer.reason is Reason.STORE_UNAVAILABLE for answer in answers)
    assert await refused(rig, AcceptVoucher(voucher(900))) is Reason.STORE_UNAVAILABLE
    found = await rig.reopened()
    assert found is not None
    assert found.accepted == 100


@pytest.mark.parametrize("how", ["read-only", "closed", "full"])
async def test_real_refusals_of_the_disk_are_fatal(rig: Rig, how: str) -> None:
    """A ledger that cannot be written is reported, and every asker gets an answer."""
    await rig.ask(opening())
    real = rig.store.disk.real
    on_thread: dict[str, Callable[[], object]] = {
        "read-only": lambda: real.execute("PRAGMA query_only = ON"),
        "closed": real.close,
        "full": lambda: real.execute(f"PRAGMA max_page_count = {real.execute('PRAGMA page_count').fetchone()[0]}"),
    }

    def sabotage(account: Account | None) -> Plan[Outcome]:  # runs on the writer's own thread
        assert account is not None
        on_thread[how]()
        return Plan(account, (), Outcome())

    async def go_on() -> None:
        await asyncio.wait_for(rig.store.transact(CHANNEL, sabotage), PATIENCE_S)  # a closed file refuses its COMMIT
        for n in range(200):  # a full disk has some room left
            await rig.ask(AcceptVoucher(voucher(101 + n)))

    with pytest.raises(ChannelFault) as caught:
        await go_on()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert len(rig.fatal) == 1
    assert isinstance(rig.fatal[0], sqlite3.Error)
    assert await refused(rig, AcceptVoucher(voucher(900))) is Reason.STORE_UNAVAILABLE


async def test_what_a_visitor_wrote_is_seen_at_once(rig: Rig) -> None:
    """An operator's command beside a running node: the node's next step starts from what the command committed."""
    await rig.ask(opening())
    visitor = SqliteStore(rig.path, clock=ManualClock(), on_fatal=rig.fatal.append, shared=True)
    await visitor.start()
    try:
        for amount in (200, 300, 400):
            await visitor.transact(CHANNEL, lambda a, amount=amount: plan(a, AcceptVoucher(voucher(amount)), now=NOW, policy=POLICY))
            made = await rig.ask(AcceptVoucher(voucher(amount + 50)))
            assert made.account.accepted == amount + 50
    finally:
        await visitor.stop()
    account = await rig.store.load(CHANNEL)
    assert account is not None
    assert (account.version, rig.fatal) == (7, [])


async def test_a_row_that_is_not_the_one_that_was_read_is_fatal_not_silent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that does not find the row it read means that the laws of the file do not hold: the node stops."""
    await rig.ask(opening())
    monkeypatch.setattr(SqliteStore, "_look_for_visitors", lambda *_: None)
    rig_write(rig.path, "UPDATE channel SET version = 7")
    assert await refused(rig, AcceptVoucher(voucher(200))) is Reason.STORE_UNAVAILABLE
    assert len(rig.fatal) == 1


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
async def test_a_busy_file_is_refused_and_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared: bool) -> None:
    """A backup that holds the file costs refusals while it lasts, and nothing more."""
    monkeypatch.setattr(sqlite_file, "BUSY_S", 0.01)
    fatal: list[BaseException] = []
    store = SqliteStore(tmp_path / "busy.sqlite", clock=ManualClock(), on_fatal=fatal.append, shared=shared)
    await store.start()
    await store.transact(CHANNEL, step(opening()))
    backup = sqlite3.connect(tmp_path / "busy.sqlite", isolation_level=None)
    backup.execute("BEGIN IMMEDIATE")
    with pytest.raises(ChannelFault) as caught:
        await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    backup.execute("ROLLBACK")
    backup.close()
    assert (await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))).account.accepted == 200
    assert fatal == []
    await store.stop()


async def test_a_listener_that_fails_takes_no_answers_with_it(rig: Rig) -> None:
    """A bug in one stream must not leave every other asker of the batch waiting for ever."""
    heard: list[int] = []
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    def broken(_: Account) -> None:
        raise RuntimeError("a bug in a listener")

    rig.store.subscribe(broken)
    rig.store.subscribe(lambda account: heard.append(account.version))
    assert (await rig.ask(opening())).account.version == 1
    assert heard == [1]
    assert len(reported) == 1


async def test_the_file_is_private_to_its_lock(rig: Rig) -> None:
    """The lock file is readable by its owner only."""
    assert os.stat(f"{rig.path}.lock").st_mode & 0o077 == 0
