"""The PostgreSQL store when connections break, the server dies, or the database is not what it was."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import reduce
from urllib.parse import urlsplit

import asyncpg
import pytest

from channels.account import fold
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.intent import IntentKind, IntentState, ended, planned
from channels.model import AcceptVoucher, Account, Command, Finish, HoldId, NodeId, Outcome, Plan, Renew
from channels.units import Units
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import ManualClock
from mppnode.ledger import postgres_link
from mppnode.ledger.base import Budget, Grant, LedgerError, Which
from mppnode.ledger.postgres import PostgresStore
from mppnode.ledger.postgres_link import GenerationFell
from mppnode.registry import STORES
from tests.store.shops import PATIENCE_S, step, told
from tests.support.builders import CHANNEL, NOW, opening, pico, reserve, voucher
from tests.support.postgres import PASSWORD, PostgresServer, Relay, cut_connections, postgres_server, run_sql

OTHER = ChannelId(b"\x02" * 32)


class Rig:
    """A database, and stores on it whose fatal errors are kept."""

    def __init__(self, server: PostgresServer, dsn: str, exits: AsyncExitStack) -> None:
        self.server = server
        self.dsn = dsn
        self.fatal: list[BaseException] = []
        self._exits = exits

    async def open(self, dsn: str | None = None) -> PostgresStore:
        store = PostgresStore(Secret(dsn or self.dsn), clock=ManualClock(), on_fatal=self.fatal.append)
        await store.start()
        self._exits.push_async_callback(store.stop)
        return store

    def through(self, relay: Relay) -> str:
        return self.server.dsn(urlsplit(self.dsn).path[1:], socket=relay.directory)

    async def sql(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        return await run_sql(self.dsn, statement, *values)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    server = postgres_server()
    async with server.database() as dsn, AsyncExitStack() as exits:
        yield Rig(server, dsn, exits)


async def whole(store: PostgresStore, channel: ChannelId = CHANNEL) -> Account:
    """The account, checked against its journal: one entry per version."""
    account, journal = await store.load(channel), await store.journal(channel)
    assert account is not None
    assert reduce(fold, journal, None) == account
    assert len(journal) == account.version
    return account


# ------------------------------------------------------------------------------------------------ broken connections


def story(channel: ChannelId) -> list[Command]:
    return [
        opening(channel=channel),
        AcceptVoucher(voucher(500)),
        reserve(40),
        Renew(HoldId("h"), pico(30), pico(60)),
        Finish(HoldId("h"), pico(31)),
    ]


async def tell(store: PostgresStore, channel: ChannelId) -> list[Plan[Outcome]]:
    return [await store.transact(channel, step(command)) for command in story(channel)]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_connection_may_break_at_every_message(rig: Rig, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break it at message 1, 2, 3 ... of a story: every step happens once, and its asker gets the answer it has earned.

    Also when COMMIT happened and its answer was lost: the end of a request is not charged twice and not called fenced.
    """
    monkeypatch.setattr(postgres_link, "_PAUSE_S", 0.001)
    async with Relay(rig.server) as relay:
        store = await rig.open(rig.through(relay))
        expected = [plan.result for plan in await tell(store, CHANNEL)]
        for number in range(1, 200):
            channel = ChannelId(bytes([number]) * 32)
            relay.cut(number, after=after)
            plans = await asyncio.wait_for(tell(store, channel), PATIENCE_S)
            assert [plan.result for plan in plans] == expected
            assert (await whole(store, channel)).version == 6
            if relay.messages < number:
                assert number > 4 * len(story(channel)), "begin, read, write and commit of each step were cut"
                break
        else:
            raise AssertionError("the story never ran to its end")
    assert rig.fatal == []


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_money_on_its_way_is_decided_once(rig: Rig, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grant or an intent whose COMMIT was lost is not refused to the one who has made it."""
    monkeypatch.setattr(postgres_link, "_PAUSE_S", 0.001)
    budget = Budget(grants_per_sender=10**6, total=Units(10**6))
    async with Relay(rig.server) as relay:
        store = await rig.open(rig.through(relay))
        for number in range(1, 100):
            name = bytes([number]) * 32
            wish = planned(str(number), ChannelId(name), IntentKind.CLOSE, Units(1), owner=NodeId("a"), now=NOW)
            relay.cut(number, after=after)
            assert await store.grant(Grant(Hash32(name), Address(bytes(20)), Units(5), UnixSeconds(NOW)), budget)
            await store.add_intent(wish)
            assert await store.move_intent(wish, ended(wish, IntentState.DEAD, now=NOW))
            if relay.messages < number:
                break
        else:
            raise AssertionError("the story never ran to its end")
        assert len(await store.open_grants()) == number
        assert len(await store.intents(active=False)) == number
    assert rig.fatal == []


async def test_a_server_that_dies_loses_no_answer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process of the server is killed in the middle of two hundred steps; all are answered, and all are there."""
    monkeypatch.setattr(postgres_link, "DEADLINE_S", 60.0)  # a busy machine takes its time to recover
    store = await rig.open()
    channels = [ChannelId(bytes([n]) * 32) for n in range(20)]
    await asyncio.gather(*(store.transact(channel, step(opening(channel=channel, deposit=10_000))) for channel in channels))
    answered: dict[ChannelId, int] = {}
    at_crash: dict[ChannelId, int] = {}
    crashing: list[asyncio.Task[None]] = []

    async def crash() -> None:
        await asyncio.to_thread(rig.server.crash)
        at_crash.update(answered)
        await asyncio.to_thread(rig.server.start)

    async def advance(channel: ChannelId) -> None:
        for amount in range(101, 111):
            made = await store.transact(channel, step(AcceptVoucher(voucher(amount))))
            assert made.account.accepted == amount
            assert made.account.version == amount - 99, "applied once"
            answered[channel] = amount
            if len(answered) == 15 and not crashing:
                crashing.append(asyncio.ensure_future(crash()))

    try:
        await asyncio.gather(*(advance(channel) for channel in channels))
    finally:
        await asyncio.gather(*crashing)
    assert sum(at_crash.values()) < 110 * len(channels), "it died in the middle"
    for channel in channels:
        assert (await whole(store, channel)).accepted == 110
    assert rig.fatal == []


async def test_acknowledged_work_survives_the_server(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right after an answer the server is killed: what was answered is in the database it comes back with."""
    monkeypatch.setattr(postgres_link, "DEADLINE_S", 60.0)
    store = await rig.open()
    await store.transact(CHANNEL, step(opening()))
    made = await store.transact(CHANNEL, step(AcceptVoucher(voucher(700))))
    await asyncio.to_thread(rig.server.crash)
    await asyncio.to_thread(rig.server.start)
    found = await rig.sql("SELECT accepted, version FROM channel")
    assert [tuple(map(int, row)) for row in found] == [(700, made.account.version)]  # type: ignore[call-overload]
    assert await store.load(CHANNEL) == made.account


async def test_a_server_that_stays_away_is_an_answer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the deadline askers are told that the ledger is not available, and when it is back it serves again."""
    monkeypatch.setattr(postgres_link, "DEADLINE_S", 0.3)
    store = await rig.open()
    await store.transact(CHANNEL, step(opening()))
    await asyncio.to_thread(rig.server.crash)
    asked: list[Awaitable[object]] = [
        store.transact(CHANNEL, step(AcceptVoucher(voucher(200)))),
        store.load(OTHER),
        store.page(Which.ALL),
        store.join("a"),
    ]
    answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), PATIENCE_S)
    await asyncio.to_thread(rig.server.start)
    for answer in answers:
        assert isinstance(answer, ChannelFault)
        assert answer.reason is Reason.STORE_UNAVAILABLE
    monkeypatch.undo()
    assert (await store.transact(CHANNEL, step(AcceptVoucher(voucher(300))))).account.accepted == 300
    assert rig.fatal == []


async def test_a_network_that_swallows_is_an_answer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody says that the connection is dead: after the deadline it is given up, and the next one serves."""
    monkeypatch.setattr(postgres_link, "DEADLINE_S", 0.2)
    async with Relay(rig.server) as relay:
        store = await rig.open(rig.through(relay))
        await store.transact(CHANNEL, step(opening()))
        relay.passing.clear()
        with pytest.raises(ChannelFault) as caught:
            await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
        relay.passing.set()
        monkeypatch.undo()
        assert (await store.transact(CHANNEL, step(AcceptVoucher(voucher(300))))).account.accepted == 300
        await whole(store)
    assert rig.fatal == []


async def test_news_go_on_after_the_connections_were_cut(rig: Rig) -> None:
    """Listening and looking come back by themselves."""
    a, b = await rig.open(), await rig.open()
    await a.transact(CHANNEL, step(opening()))
    heard: list[int] = []
    b.subscribe(lambda account: heard.append(account.accepted))
    b.follow(lambda: [CHANNEL])
    await told(lambda: heard == [100])
    await cut_connections(rig.dsn)
    await a.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
    await told(lambda: heard[-1] == 200)


async def test_a_row_that_stays_locked_is_an_answer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's open transaction costs refusals on its channel, and nobody else's."""
    monkeypatch.setattr(postgres_link, "DEADLINE_S", 0.3)
    store = await rig.open()
    for channel in (CHANNEL, OTHER):
        await store.transact(channel, step(opening(channel=channel)))
    stranger = await asyncpg.connect(rig.dsn)
    try:
        await stranger.execute("BEGIN; UPDATE channel SET soft = soft WHERE id = decode(repeat('c1', 32), 'hex')")
        with pytest.raises(ChannelFault) as caught:
            await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
        assert await store.load(CHANNEL) is not None, "reading waits for nobody"
        assert (await store.transact(OTHER, step(AcceptVoucher(voucher(200))))).account.accepted == 200
    finally:
        await stranger.close()
    assert (await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))).account.accepted == 200
    assert rig.fatal == []


# --------------------------------------------------------------------------------------------------- fatal and not


async def refused_for_good(rig: Rig, store: PostgresStore) -> None:
    for _ in range(2):
        with pytest.raises(ChannelFault) as caught:
            await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert len(rig.fatal) == 1, "the node is told once that its ledger failed"


@pytest.mark.parametrize(
    "sabotage",
    [
        "ALTER TABLE journal RENAME TO lost",
        "ALTER TABLE journal ADD CHECK (entry < 2)",
        "UPDATE channel SET version = 7; INSERT INTO journal SELECT channel, 8, 0, '', '' FROM journal",
    ],
    ids=["table", "law", "journal"],
)
async def test_an_error_that_no_repetition_cures_ends_the_node(rig: Rig, sabotage: str) -> None:
    """A database that refuses to write is reported once, and nothing is answered after it."""
    store = await rig.open()
    await store.transact(CHANNEL, step(opening()))
    for statement in sabotage.split("; "):
        await rig.sql(statement)
    await refused_for_good(rig, store)
    assert isinstance(rig.fatal[0], asyncpg.PostgresError)


async def test_a_full_disk_ends_the_node(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 53 of PostgreSQL's errors is not waited out: what is promised must be on disk."""
    store = await rig.open()
    await store.transact(CHANNEL, step(opening()))
    raising = "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''full'' USING ERRCODE = ''53100''; END'"
    await rig.sql(raising)
    await rig.sql("CREATE TRIGGER full_disk BEFORE INSERT ON journal FOR EACH ROW EXECUTE FUNCTION full_disk()")
    await refused_for_good(rig, store)
    assert isinstance(rig.fatal[0], asyncpg.DiskFullError)


async def test_a_serialisation_failure_is_repeated(rig: Rig) -> None:
    """Errors of class 40 are the database's way of saying "again", here three times in a row."""
    store = await rig.open()
    await store.transact(CHANNEL, step(opening()))
    await rig.sql("CREATE SEQUENCE tries")
    raising = "BEGIN IF nextval(''tries'') < 4 THEN RAISE EXCEPTION ''again'' USING ERRCODE = ''40001''; END IF; RETURN NEW; END"
    await rig.sql(f"CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS '{raising}'")
    await rig.sql("CREATE TRIGGER again BEFORE INSERT ON journal FOR EACH ROW EXECUTE FUNCTION again()")
    made = await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
    assert (made.account.version, made.result.replayed) == (2, False)
    assert await rig.sql("SELECT last_value FROM tries") == [(4,)]
    assert await whole(store) == made.account


async def test_the_database_itself_refuses_a_broken_law(rig: Rig) -> None:
    """Charging beyond the voucher is impossible even for a program that skips every check of ours."""
    store = await rig.open()
    await store.transact(CHANNEL, step(opening()))
    for change in ("spent = 101", "deposit = 99", "owed_pico = 100000001", "held_pico = 100000001", "live = 2"):
        with pytest.raises(asyncpg.CheckViolationError):
            await rig.sql(f"UPDATE channel SET {change}")


async def test_a_tampered_row_stops_its_channel_not_the_node(rig: Rig) -> None:
    """A row that breaks the law on reading is refused to its asker; other channels go on, in the same batch too."""
    store = await rig.open()
    for channel in (CHANNEL, OTHER):
        await store.transact(channel, step(opening(channel=channel)))
    await rig.sql("UPDATE channel SET version = 2, ladder = '[[\"50\",\"00\"]]', spent = 70 WHERE id = $1", CHANNEL)
    asked = [store.load(CHANNEL), store.transact(CHANNEL, step(AcceptVoucher(voucher(200)))), store.load(OTHER)]
    loaded, moved, other = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(loaded, AssertionError)
    assert isinstance(moved, AssertionError)
    assert isinstance(other, Account)
    assert rig.fatal == []


# ------------------------------------------------------------------------------------------------------ generations


async def test_an_older_database_is_refused(rig: Rig) -> None:
    """After a failover to a standby that was behind, a node that has seen the newer one stops instead of going on."""
    await (await rig.open()).transact(CHANNEL, step(opening()))
    await rig.sql("UPDATE meta SET value = 5 WHERE name = 'generation'")
    store = await rig.open()
    await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
    await rig.sql("UPDATE meta SET value = 4 WHERE name = 'generation'")
    await cut_connections(rig.dsn)
    with pytest.raises(ChannelFault) as caught:
        await store.transact(CHANNEL, step(AcceptVoucher(voucher(300))))
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert [type(error) for error in rig.fatal] == [GenerationFell]


async def test_a_promoted_database_is_served_from_what_it_has(rig: Rig) -> None:
    """After a failover that lost commits nothing remembered is believed, not even under the same version number."""
    store = await rig.open()
    heard: list[tuple[int, int]] = []
    store.subscribe(lambda account: heard.append((account.version, account.accepted)))
    await store.transact(CHANNEL, step(opening()))
    columns = "phase, version, accepted, ladder"
    (row,) = await rig.sql(f"SELECT {columns} FROM channel")
    ours = (await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))).account
    # The standby had not seen our voucher, and another node has given it a different one since.
    await rig.sql("UPDATE channel SET phase = $1, version = $2, accepted = $3, ladder = $4", *row)
    await rig.sql("DELETE FROM journal WHERE entry = 2")
    await rig.sql("UPDATE meta SET value = value + 1 WHERE name = 'generation'")
    theirs = (await (await rig.open()).transact(CHANNEL, step(AcceptVoucher(voucher(150))))).account
    assert theirs.version == ours.version
    await cut_connections(rig.dsn)
    assert await store.load(CHANNEL) == theirs
    made = await store.transact(CHANNEL, step(AcceptVoucher(voucher(160))))
    assert heard == [(1, 100), (2, 200), (3, 160)]
    assert await whole(store) == made.account
    assert rig.fatal == []


async def test_versions_begin_again_after_a_failover(rig: Rig) -> None:
    """A version that was told once is told again when the database that had it is gone."""
    store = await rig.open()
    heard: list[tuple[int, int]] = []
    store.subscribe(lambda account: heard.append((account.version, account.accepted)))
    await store.transact(CHANNEL, step(opening()))
    (row,) = await rig.sql("SELECT phase, version, accepted, ladder FROM channel")
    await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
    await rig.sql("UPDATE channel SET phase = $1, version = $2, accepted = $3, ladder = $4", *row)
    await rig.sql("DELETE FROM journal WHERE entry = 2")
    await rig.sql("UPDATE meta SET value = value + 1 WHERE name = 'generation'")
    await cut_connections(rig.dsn)
    await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
    assert heard == [(1, 100), (2, 200), (2, 200)]


async def test_a_newer_schema_is_refused_and_left_alone(rig: Rig) -> None:
    """An old program must not write what it does not understand."""
    await (await rig.open()).stop()
    await rig.sql("UPDATE meta SET value = 999 WHERE name = 'schema'")
    with pytest.raises(LedgerError, match="newer"):
        await rig.open()
    assert await rig.sql("SELECT value FROM meta WHERE name = 'schema'") == [(999,)]


async def test_lanes_of_the_dead_are_tidied_up(rig: Rig) -> None:
    """A node that stops takes its marks along; those of one that was killed are gone a day later."""
    store = await rig.open()
    await store.transact(CHANNEL, step(opening()))
    await rig.sql("INSERT INTO lane VALUES ('dead', 7, now() - interval '25 h'), ('resting', 7, now() - interval '23 h')")
    await store.stop()
    await (await rig.open()).stop()
    assert await rig.sql("SELECT id FROM lane") == [("resting",)]


# ----------------------------------------------------------------------------------------------------------- secrets


def everything_said(error: BaseException) -> str:
    """What any log could print of an error, with the errors behind it."""
    return "".join(traceback.format_exception(error)) + repr(error) + repr(error.__context__) + repr(error.__cause__)


@pytest.mark.parametrize(
    "broken",
    [
        lambda dsn: dsn.replace(PASSWORD, PASSWORD + "x"),
        lambda dsn: dsn.replace("?host=", "?host=/nowhere"),
        lambda dsn: dsn.replace("@/", "@/no_such_database_"),
        lambda dsn: dsn.replace("mpp:", "nobody_we_know:"),
        lambda dsn: f"postgresql://mpp:{PASSWORD}@127.0.0.1:1/x",
        lambda dsn: f"postgresql://mpp:{PASSWORD}@no-such-host.invalid/x",
        lambda dsn: f"postgresql://mpp:{PASSWORD}@host:port/x",
        lambda dsn: f"postgresql://mpp:{PASSWORD}@[::1/x",
        lambda dsn: f"postgresql://mpp@/x?password={PASSWORD}&host=/nowhere",
        lambda dsn: f"mysql://mpp:{PASSWORD}@localhost/x",
    ],
    ids=["password", "socket", "database", "user", "refused", "name", "port", "bracket", "query", "scheme"],
)
async def test_no_error_tells_the_password(rig: Rig, broken: Callable[[str], str]) -> None:
    """A database that cannot be opened is named by host and name alone, in the message, its repr and its causes."""
    with pytest.raises(LedgerError) as caught:
        await rig.open(broken(rig.dsn))
    assert PASSWORD not in everything_said(caught.value)
    assert "PostgreSQL" in str(caught.value)


async def test_nothing_a_store_shows_has_the_password(rig: Rig) -> None:
    """Neither the store nor its parts print it, and neither does the error that ends the node."""
    store = await rig.open()
    await store.transact(CHANNEL, step(opening()))
    shown = repr(store) + str(vars(store)) + "".join(str(vars(link)) for link in store._links) + str(vars(store._wakeup))
    assert PASSWORD not in shown
    await rig.sql("ALTER TABLE journal RENAME TO lost")
    with pytest.raises(ChannelFault) as caught:
        await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))
    assert PASSWORD not in everything_said(caught.value) + everything_said(rig.fatal[0])


async def test_the_registry_opens_it(rig: Rig) -> None:
    """The name in the configuration leads here, and the package is only needed then."""
    store = STORES["postgres"](Secret(rig.dsn), clock=ManualClock(), on_fatal=rig.fatal.append)
    await store.start()
    assert await store.load(CHANNEL) is None
    await store.stop()


# -------------------------------------------------------------------------------------------------------- durability


async def test_firm_and_relaxed_commits_ask_for_what_they_need(rig: Rig) -> None:
    """A firm commit waits for the disk whatever the server's default is; a relaxed one does not."""
    await rig.sql(f"ALTER DATABASE {urlsplit(rig.dsn).path[1:]} SET synchronous_commit TO off")
    store = await rig.open()
    await rig.sql("CREATE TABLE seen (entry BIGINT, level TEXT)")
    noting = "BEGIN INSERT INTO seen VALUES (NEW.entry, current_setting(''synchronous_commit'')); RETURN NEW; END"
    await rig.sql(f"CREATE FUNCTION noting() RETURNS trigger LANGUAGE plpgsql AS '{noting}'")
    await rig.sql("CREATE TRIGGER noting BEFORE INSERT ON journal FOR EACH ROW EXECUTE FUNCTION noting()")
    for command in (opening(), reserve(40)):
        await store.transact(CHANNEL, step(command))
    fold_to = step(Renew(HoldId("h"), pico(3), pico(3)))
    await store.transact(CHANNEL, fold_to, relaxed=True)
    # Together with a firm step a relaxed one is as firm as that.
    await asyncio.gather(
        store.transact(CHANNEL, step(Renew(HoldId("h"), pico(4), pico(4))), relaxed=True),
        store.transact(CHANNEL, step(AcceptVoucher(voucher(200)))),
    )
    assert await rig.sql("SELECT level FROM seen ORDER BY entry") == [("on",), ("on",), ("off",), ("on",), ("on",)]
