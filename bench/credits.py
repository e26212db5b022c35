"""Requests per second of the credit ledger: one hold and one settlement each, durable, on SQLite and PostgreSQL.

    python bench/credits.py [--seconds 2] [--stores sqlite,postgres] [--dsn postgresql://...]

Printed are pairs of hold and settlement per second for 1, 16 and 256 accounts at once with one request each, and for
500 requests at once on one account; then the statements of a warm pair. Without ``--dsn`` the PostgreSQL of the tests
is used, which keeps its files on this machine and syncs them. Compare figures only from one run on one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from channels.credit import AccountId, CreditAccount, CreditPlan, FundsKind, Hold, KeyId, MoveFunds, Settle, plan
from channels.instants import UnixMillis, UnixSeconds
from channels.model import HoldId
from channels.units import Pico
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import ManualClock
from mppnode.ledger import credit_talk
from mppnode.ledger.base import Ledger
from mppnode.ledger.credit_rows import AccountRow, RequestRow
from mppnode.ledger.credits import Credits
from mppnode.ledger.postgres import PostgresStore
from mppnode.ledger.sqlite import SqliteStore
from mppnode.ledger.talk import Talk

KEY = KeyId("key_bench")
NOW = UnixSeconds(1_900_000_000)
CASES = ((1, 1), (16, 1), (256, 1), (1, 500))
"""(accounts, requests at once on each)."""


def fatal(error: BaseException) -> None:
    """A store that fails makes no figures."""
    raise SystemExit(f"the ledger failed: {error!r}")


@asynccontextmanager
async def opened(kind: str, dsn: str | None) -> AsyncIterator[Ledger]:
    """An empty store."""
    clock = ManualClock()
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            store: Ledger = SqliteStore(Path(folder) / "ledger.sqlite", clock=clock, on_fatal=fatal)
            await store.start()
            yield store
            await store.stop()
        return
    from tests.support.postgres import postgres_server

    if dsn is not None:
        store = PostgresStore(Secret(dsn), clock=clock, on_fatal=fatal)
        await store.start()
        yield store
        await store.stop()
        return
    async with postgres_server().database() as ours:
        store = PostgresStore(Secret(ours), clock=clock, on_fatal=fatal)
        await store.start()
        yield store
        await store.stop()


def hold(name: str) -> Callable[[CreditAccount | None], tuple[CreditPlan, tuple[()]]]:
    """Hold a cent."""
    wish = Hold(HoldId(name), Pico(10**10), Pico(10**10), access=1, key=KEY, about="dev/echo")
    return lambda found: (plan(found, wish, now=NOW), ())


def settle(name: str, account: AccountId) -> Callable[[CreditAccount | None], tuple[CreditPlan, list[RequestRow]]]:
    """Charge a tenth of it, with the request's row."""

    def step(found: CreditAccount | None) -> tuple[CreditPlan, list[RequestRow]]:
        made = plan(found, Settle(HoldId(name), Pico(10**9)), now=NOW)
        counts = (made.result.charged, 100, 0, 50, 0)
        return made, [RequestRow(name, account, KEY, UnixMillis(NOW * 1000), "dev/echo", "dev", *counts, "{}")]

    return step


async def measured(books: Credits, accounts: int, each: int, seconds: float) -> float:
    """Pairs per second."""
    names = [AccountId(f"acct_{accounts}_{each}_{number}") for number in range(accounts)]
    for name in names:
        await books.create_account(AccountRow(name, f"bench {name}", None, "{}", UnixMillis(1)))
        await books.apply(name, MoveFunds(FundsKind.GRANT, "bench", 10**18))
    done, begun = 0, time.perf_counter()

    async def ask(account: AccountId, worker: int) -> None:
        nonlocal done
        number = 0
        while time.perf_counter() < begun + seconds:
            request = f"{account}-{worker}-{number}"
            await books.transact(account, hold(request))
            await books.transact(account, settle(request, account))
            number, done = number + 1, done + 1

    await asyncio.gather(*(ask(account, worker) for account in names for worker in range(each)))
    return done / (time.perf_counter() - begun)


async def statements(books: Credits) -> list[int]:
    """How many statements a warm hold and its settlement are, without those of the transaction."""
    account, counts = AccountId("acct_1_1_0"), list[int]()
    for step in (hold("counted"), settle("counted", account)):
        count = 0

        def counted(step: object = step) -> Talk[CreditPlan]:
            nonlocal count
            talk = credit_talk.transact(account, step, UnixMillis(NOW * 1000))  # type: ignore[arg-type]
            answer = None
            try:
                while True:
                    ask = talk.send(answer)  # type: ignore[arg-type]
                    count += 1
                    answer = yield ask
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

        await books.write(counted, of=account)
        counts.append(count)
    return counts


async def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--stores", default="sqlite,postgres")
    parser.add_argument("--dsn")
    options = parser.parse_args()
    for kind in options.stores.split(","):
        async with opened(kind, options.dsn) as store:
            books = Credits(store, clock=ManualClock())
            for accounts, each in CASES:
                rate = await measured(books, accounts, each, options.seconds)
                print(f"{kind:9} {accounts:4} accounts x {each:3} requests: {rate:7.0f} hold+settle/s")
            print(f"{kind:9} statements of a warm hold and its settlement: {await statements(books)}")


if __name__ == "__main__":
    asyncio.run(main())
