"""A node is killed with SIGKILL while customers with API keys stream; then the ledger and the customers are compared.

Three streams run at once on two accounts. ``KILL9_CYCLES`` and ``KILL9_SEED`` make it longer and repeat a run, as in
``test_kill9``.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import aiohttp
import pytest

from channels.credit import AccountId, fold
from channels.units import PICO_PER_UNIT, Pico
from mppnode.accounts.forms import Gift, KeyForm, Opening
from mppnode.accounts.keyring import Accounts, Keyring
from mppnode.accounts.model import AccountKind, Prepaid
from mppnode.kernel.clock import SystemClock
from mppnode.ledger import credit_lists
from mppnode.ledger.credits import Credits
from mppnode.observe.logs import quiet
from mppnode.parts import World as NodeWorld
from mppnode.parts import open_ledger
from tests.fault.crash_world import LOSS_UNITS_MAX, PROMPT, PROMPT_PICO, WHOLE_PROMPT_PICO, World, world
from tests.support.node_process import OUTPUT_PICO, nursery
from tests.support.postgres import postgres_database

CYCLES = int(os.environ.get("KILL9_CYCLES", "12"))
SEED = int(os.environ.get("KILL9_SEED", str(random.randrange(10**6))))
CREDIT = Pico(10**15)
PATIENCE_S = 30
STREAMS = 3


@dataclass
class Customer:
    """One key; ``tokens`` and ``streams`` are what has come in on it."""

    account: AccountId
    secret: str
    tokens: int = 0
    streams: int = 0
    whole: int = 0

    async def stream(self, http: aiohttp.ClientSession, url: str, limit: int) -> None:
        """Read a stream until it ends, however it does."""
        body = {"model": "dev/story", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": limit}
        tokens = 0
        try:
            async with http.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {self.secret}"}) as answer:
                assert answer.status == 200, await answer.text()
                async for line in answer.content:
                    tokens += line.startswith(b"data: {") and b'"content"' in line
                    self.whole += line.startswith(b"data: [DONE]")
        except (aiohttp.ClientError, OSError):
            pass
        self.tokens += tokens
        self.streams += bool(tokens)


@asynccontextmanager
async def books_of(net: World) -> AsyncIterator[Credits]:
    """The ledger as another process has it."""
    fatal: list[BaseException] = []
    store = open_ledger(net.spec.config(), NodeWorld(SystemClock(), os.urandom, quiet, fatal.append), shared=True)
    await store.start()
    try:
        yield Credits(store, clock=SystemClock())
    finally:
        await store.stop()
    assert not fatal


async def new_customers(net: World) -> list[Customer]:
    """Two accounts, the first with two keys."""
    made = []
    async with books_of(net) as books:
        accounts = Accounts(books, clock=SystemClock(), entropy=os.urandom)
        keyring = Keyring(books, clock=SystemClock(), entropy=os.urandom)
        for name, keys in (("one", 2), ("two", STREAMS - 2)):
            account = await accounts.create(Opening(name, AccountKind.USER, None, Prepaid()))
            await accounts.grant(account.id, Gift(CREDIT, "welcome"))
            for _ in range(keys):
                key = await keyring.create(account.id, KeyForm({"name": "test"}))
                made.append(Customer(account.id, key.secret.text))
    return made


async def audit(net: World, customers: list[Customer], lost: dict[AccountId, int]) -> list[int]:
    """Compare every account with what its customers got; returns what this crash has cost the node, per stream."""
    losses = []
    async with books_of(net) as books:
        for account in {customer.account for customer in customers}:
            mine = [customer for customer in customers if customer.account == account]
            credit = await books.load(account)
            assert credit is not None
            assert not credit.holds, "nothing is reserved for requests that died"
            assert credit == reduce(fold, await books.read(partial(credit_lists.credit_journal, account)), None)
            rows = await books.read(partial(credit_lists.requests, account, credit_lists.Between(), None, 10_000))
            lines = await books.read(partial(credit_lists.entries, account, None, 10_000))
            assert sum(row.cost for row in rows) == credit.owed
            assert sum(line.amount for line in lines) == credit.balance
            tokens, streams = sum(who.tokens for who in mine), sum(who.streams for who in mine)
            # A stream whose last chunk was cut off may have been charged by its provider's report already.
            most = tokens * OUTPUT_PICO + streams * WHOLE_PROMPT_PICO
            assert credit.owed <= most, f"charged {credit.owed - most} pico for what never came"
            whole = sum(who.whole for who in mine)
            price = tokens * OUTPUT_PICO + streams * PROMPT_PICO + whole * (WHOLE_PROMPT_PICO - PROMPT_PICO)
            free = max(price - credit.owed, 0)
            loss = free - lost.get(account, 0)
            lost[account] = free
            assert loss <= len(mine) * LOSS_UNITS_MAX * PICO_PER_UNIT, f"one crash cost {loss} pico"
            losses.append(max(loss, 0) // len(mine) // PICO_PER_UNIT)
    return losses


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
async def test_a_killed_node_never_overcharges_a_key(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody pays for what did not arrive, statements add up after every crash, and one costs at most one window."""
    print(f"KILL9_SEED={SEED} KILL9_CYCLES={CYCLES}")
    losses: list[int] = []
    async with AsyncExitStack() as stack:
        where = str(tmp_path / "ledger.sqlite")
        if store == "postgres":
            where = await stack.enter_async_context(postgres_database())
        net = await stack.enter_async_context(world(where, SEED, 1))
        nodes = await stack.enter_async_context(nursery())
        customers, lost = await new_customers(net), dict[AccountId, int]()
        node = await nodes.spawn(net.spec)
        try:
            for _ in range(CYCLES):
                url = await node.go()
                losses += await audit(net, customers, lost)
                async with asyncio.timeout(PATIENCE_S):
                    reading = [asyncio.ensure_future(who.stream(net.http, url, 50_000)) for who in customers]
                    await asyncio.sleep(net.random.choice([0.01, 0.1, 0.6]) * net.random.random())
                    node.kill()
                    await node.gone()
                    await asyncio.gather(*reading)
                node = await nodes.spawn(net.spec)
            url = await node.go()
            losses += await audit(net, customers, lost)
            await asyncio.gather(*(who.stream(net.http, url, 50) for who in customers))
            assert all(who.whole for who in customers)
        finally:
            node.kill()
            await node.gone()
    losses.sort()
    with capsys.disabled():
        print(
            f"\nkill -9 of keys on {store}: {CYCLES} kills, {sum(who.tokens for who in customers)} tokens, overcharged 0,"
            f" lost per stream and crash: median {losses[len(losses) // 2]}, most {losses[-1]} of at most {LOSS_UNITS_MAX} units"
        )
