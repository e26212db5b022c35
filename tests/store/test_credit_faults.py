"""Credit accounts when connections break and servers die, and on databases that an older program has made."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from channels.credit import AccountId, Fold, FundsKind, MoveFunds
from channels.faults import ChannelFault, Reason
from channels.model import AcceptVoucher, HoldId
from channels.payment import PaymentRecord
from channels.units import Pico
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import ManualClock
from mppnode.ledger import credit_lists, credit_talk, idempotency, postgres_link
from mppnode.ledger.credit_lists import Between, By, Group
from mppnode.ledger.credit_rows import CREDIT_COLUMNS, Task
from mppnode.ledger.credits import Credits
from mppnode.ledger.idempotency import Claim
from mppnode.ledger.postgres import PostgresStore
from tests.fault.faulty import Faulty, Mode
from tests.store.credit_books import (
    ACCOUNT,
    DOLLAR,
    account_row,
    books_of,
    finish,
    hold,
    key_row,
    nothing_more,
    used,
    whole,
)
from tests.store.shops import LEDGERS, PATIENCE_S, Shop, open_shop, step
from tests.support.builders import CHANNEL, opening, voucher
from tests.support.postgres import PostgresServer, Relay, cut_connections, postgres_server, run_sql


class Rig:
    """A database, and books on it whose fatal errors are kept."""

    def __init__(self, server: PostgresServer, dsn: str, exits: AsyncExitStack) -> None:
        self.server, self.dsn, self._exits = server, dsn, exits
        self.fatal: list[BaseException] = []

    async def books(self, relay: Relay | None = None) -> Credits:
        dsn = self.dsn if relay is None else self.server.dsn(urlsplit(self.dsn).path[1:], socket=relay.directory)
        store = PostgresStore(Secret(dsn), clock=ManualClock(), on_fatal=self.fatal.append)
        await store.start()
        self._exits.push_async_callback(store.stop)
        return Credits(store, clock=ManualClock())


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    server = postgres_server()
    async with server.database() as dsn, AsyncExitStack() as exits:
        yield Rig(server, dsn, exits)


async def tell(books: Credits, name: str) -> list[object]:
    """Everything that is written around an account, each of it wrong when it happens twice or not at all."""
    account, at = AccountId(name), books.clock.now_millis()
    put = partial(books.write, of=name)
    return [
        (await books.create_account(account_row(account))).version,
        await books.create_key(key_row(f"k {name}", account), limit=1),
        (await books.apply(account, MoveFunds(FundsKind.GRANT, "x", DOLLAR))).account.funds,
        await put(partial(idempotency.claim, name, "n", "b", account, at)) is Claim.OURS,
        (await books.apply(account, hold(name, 500))).result.replayed,
        (await books.apply(account, Fold(HoldId(name), Pico(200)))).result.replayed,
        await put(partial(idempotency.store, name, "n", account, "answer", at)),
        (await finish(books, name, 300, account)).result.charged,
        (await books.book(account, PaymentRecord(name, paid=7), event=name, react=nothing_more)) is None,
        await books.note_event(f"other {name}"),
        await books.add_task(Task(name, "alert", account, 0, "{}")),
        await books.move_task(Task(name, "alert", account, 0, "{}"), Task(name, "alert", account, 9, "{}")),
        (await books.change_account(account, lambda row: account_row(row.id, customer=f"cus {name}"))) is None,
    ]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_talk_happens_once_wherever_it_breaks(rig: Rig, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is cut at message 1, 2, 3 ... of the story, also when COMMIT happened and its answer was lost."""
    monkeypatch.setattr(postgres_link, "_PAUSE_S", 0.001)
    async with Relay(rig.server) as relay:
        books = await rig.books(relay)
        expected = await tell(books, "first")
        for number in range(1, 400):
            name = f"a{number}"
            relay.cut(number, after=after)
            assert await asyncio.wait_for(tell(books, name), PATIENCE_S) == expected
            cut = relay.messages >= number
            account = await whole(books, AccountId(name))
            assert (account.version, account.owed, account.access) == (8, 300, 2)
            assert await used(books, AccountId(name)) == 300
            if not cut:
                assert number > 4 * len(expected), "begin, read, write and commit of each talk were cut"
                break
        else:
            raise AssertionError("the story never ran to its end")
    assert rig.fatal == []


async def test_killed_connections_lose_and_double_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends all connections ten times under a hundred requests; every pico is charged once."""
    monkeypatch.setattr(postgres_link, "_PAUSE_S", 0.001)
    monkeypatch.setattr(postgres_link, "DEADLINE_S", 60.0)
    books = await rig.books()
    accounts = [AccountId(f"a{number}") for number in range(5)]
    for account in accounts:
        await books.create_account(account_row(account), overdraft=DOLLAR)
    left = 100

    async def ask(number: int) -> None:
        nonlocal left
        account, name = accounts[number % 5], f"r{number}"
        await books.apply(account, hold(name, 500))
        await books.apply(account, Fold(HoldId(name), Pico(number)))
        await finish(books, name, 100 + number, account)
        left -= 1
        if left % 10 == 5:
            await cut_connections(rig.dsn)

    await asyncio.gather(*(ask(number) for number in range(100)))
    owed = [(await whole(books, account)).owed for account in accounts]
    assert owed == [await used(books, account) for account in accounts]
    assert sum(owed) == 100 * 100 + sum(range(100))
    assert rig.fatal == []


@pytest.mark.parametrize("mode", [Mode.BEFORE, Mode.AFTER])
@pytest.mark.parametrize("shop", LEDGERS, indirect=True)
async def test_a_request_that_is_asked_again_is_charged_once(shop: Shop, mode: Mode) -> None:
    """Any one operation fails, before or after its effect, and its asker tries again: the books are those of one try."""
    books = await books_of(shop)
    for number in range(1, 20):
        name = f"r{number}"
        account = AccountId(name)
        await books.create_account(account_row(account), overdraft=DOLLAR)
        till = Faulty(books._till, fail_at=number, mode=mode)
        flaky = Credits(till, clock=shop.clock)  # type: ignore[arg-type]
        for ask in (
            partial(flaky.apply, account, hold(name, 500)),
            partial(flaky.apply, account, Fold(HoldId(name), Pico(200))),
            partial(flaky.book, account, PaymentRecord(name, paid=3), event=name, react=nothing_more),
            partial(finish, flaky, name, 300, account),
        ):
            try:
                await ask()
            except ChannelFault as fault:
                if fault.reason is not Reason.STORE_UNAVAILABLE:
                    raise
                if not (mode is Mode.AFTER and till.operations == 4):  # the bill is settled, and who asks again is told so
                    await ask()
        found = await whole(books, account)
        assert (found.owed, found.held, found.funds) == (300, 0, 3 * 10**10)
        assert await used(books, account) == 300
        if till.failed is None:
            assert number == 5
            return
    raise AssertionError("it never ran without a fault")


# ------------------------------------------------------------------------------------------------------- older tables


def script(name: str) -> str:
    return resources.files("mppnode.ledger").joinpath(f"sql/{name}.sql").read_text()


async def test_the_previous_sqlite_file_is_taken_over(tmp_path: Path) -> None:
    """A file of schema 2 gets the new tables and keeps its channels; they go on, and accounts begin."""
    (tmp_path / "new").mkdir()
    async with open_shop("sqlite", tmp_path / "new") as shop:
        made = await (await shop.open()).transact(CHANNEL, step(opening(100, 10_000)))
    old = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    old.executescript(script("sqlite_001") + script("sqlite_002"))
    old.execute(f"ATTACH '{tmp_path / 'new' / 'ledger.sqlite'}' AS made")
    for table in ("channel", "journal"):
        old.execute(f"INSERT INTO {table} SELECT * FROM made.{table}")
    old.execute("PRAGMA user_version = 2")
    old.close()
    async with open_shop("sqlite", tmp_path) as shop:
        await goes_on(shop, made.account)
        assert await shop.sql("PRAGMA user_version") == [(3,)]


async def test_the_previous_postgres_database_is_taken_over(tmp_path: Path) -> None:
    """A database of schema 1 gets the new tables and keeps its channels; two nodes may start on it at once."""
    async with open_shop("postgres", tmp_path) as shop:
        assert isinstance(shop.place, Secret)
        store = await shop.open()
        made = await store.transact(CHANNEL, step(opening(100, 10_000)))
        await store.stop()
        for table in await run_sql(shop.place.reveal(), "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"):
            if f"CREATE TABLE {table[0]} (" in script("accounts"):
                await shop.sql(f"DROP TABLE {table[0]}")
        await shop.sql("UPDATE meta SET value = 1 WHERE name = 'schema'")
        await asyncio.gather(shop.open(), shop.open())
        await goes_on(shop, made.account)
        assert await shop.sql("SELECT value FROM meta WHERE name = 'schema'") == [(2,)]


async def goes_on(shop: Shop, before: object) -> None:
    store = await shop.open()
    assert await store.load(CHANNEL) == before
    assert (await store.transact(CHANNEL, step(AcceptVoucher(voucher(200))))).account.accepted == 200
    books = Credits(store, clock=shop.clock)
    await books.create_account(account_row(ACCOUNT), overdraft=1_000)
    await books.apply(ACCOUNT, hold("r", 500))
    await finish(books, "r", 5)
    assert (await whole(books)).owed == 5


def test_every_column_of_an_account_is_in_its_table() -> None:
    """Both databases read one script, and every column of a credit account that is written has a line in it."""
    lines = [line.split("--")[0].split() for line in script("accounts").splitlines()]
    assert {"id", *CREDIT_COLUMNS} <= {line[0] for line in lines if line}


def test_no_statement_has_a_question_mark_in_a_string() -> None:
    """``?`` is always a parameter: PostgreSQL's numbering does not read strings."""
    talks = [
        credit_talk.load_credit(ACCOUNT, lock=True),
        credit_talk.add_task(Task("t", "k", ACCOUNT, 0, "{}")),
        credit_talk.note_event("e", ManualClock().now_millis()),
        credit_lists.usage(ACCOUNT, Between(model="m"), list(Group), 5),
        credit_lists.find_account(By.TRUST, "?"),
        credit_lists.due_tasks("k", ManualClock().now_millis(), 5),
    ]
    for talk in talks:
        statement, values = next(talk)
        assert "?" not in "".join(statement.split("'")[1::2])
        assert statement.count("?") == len(values)
    modules = (credit_talk, credit_lists, idempotency)
    texts = [value for module in modules for value in vars(module).values() if isinstance(value, str) and "?" in value]
    assert len(texts) > 10
    assert all("?" not in "".join(text.split("'")[1::2]) for text in texts if text != idempotency.__doc__)
