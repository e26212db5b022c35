"""What an API key costs a node: its admission when it is known and when it is not, and a whole request.

    python bench/keys.py [--admissions 20000] [--requests 2000]

Printed are microseconds of one admission (median and 99th percentile): a key that is remembered, a token that is
remembered (its signature is verified every time), and a key that is looked up; how many transactions and reads of the
ledger a warm request makes; and buffered requests per second of one key through a whole node, its client, chain and
provider in one process, on SQLite. Compare figures only from one run on one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jwt

from mppnode.accounts.bearer import TokenPolicy, shared_secret
from mppnode.accounts.directory import Directory
from mppnode.accounts.forms import KeyForm, Opening
from mppnode.accounts.keyring import Accounts, Keyring
from mppnode.accounts.model import AccountKind, Prepaid
from mppnode.accounts.tokens import TokenReader
from mppnode.cli.devnet import DevnetOptions
from mppnode.kernel.clock import SystemClock
from mppnode.ledger.credits import Credits
from mppnode.ledger.sqlite import SqliteStore
from tests.support.customers import new_customer
from tests.support.http_client import World, chat, new_world

SECRET = b"a shared signing secret of 36 bytes!"
AT_ONCE = 16


def failed(error: BaseException) -> None:
    raise AssertionError(repr(error))


async def timed(work: Callable[[], Awaitable[Any]], times: int) -> str:
    """Median and 99th percentile of ``work`` in microseconds."""
    took = []
    for _ in range(times):
        begun = time.perf_counter_ns()
        await work()
        took.append(time.perf_counter_ns() - begun)
    took.sort()
    return f"{statistics.median(took) / 1000:7.1f} / {took[times * 99 // 100] / 1000:7.1f} us"


async def admissions(times: int) -> None:
    clock = SystemClock()
    with TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "ledger.sqlite", clock=clock, on_fatal=failed)
        await store.start()
        books = Credits(store, clock=clock)
        accounts = Accounts(books, clock=clock, entropy=os.urandom)
        keyring = Keyring(books, clock=clock, entropy=os.urandom)
        account = await accounts.create(Opening("bench", AccountKind.USER, None, Prepaid()))
        key = (await keyring.create(account.id, KeyForm({"name": "bench"}))).secret.text
        reader = TokenReader(TokenPolicy("https://id.example", "mppnode"), shared=shared_secret(SECRET), clock=clock)
        directory = Directory(books, clock=clock, tokens=reader, entropy=os.urandom)
        claims = {"iss": "https://id.example", "aud": "mppnode", "sub": "bench", "exp": clock.now() + 3_600}
        token = jwt.encode(claims, SECRET, "HS256")
        await directory.admit(key)
        await directory.admit(token)
        print(f"a key that is remembered    {await timed(lambda: directory.admit(key), times)}")
        print(f"a token that is remembered  {await timed(lambda: directory.admit(token), times)}")
        print(f"a key that is looked up     {await timed(lambda: directory.admit(key, fresh=True), times // 10)}")
        await store.stop()


async def requests(times: int) -> None:
    async with new_world(DevnetOptions(tokens_per_second=0.0)) as world:
        customer = await new_customer(world, 10**15)
        body = chat(stream=False, max_tokens=16)
        assert (await customer.send(body)).status == 200
        print(f"a warm request asks the ledger: {await counted(world, lambda: customer.send(body))}")
        print(f"requests by key      {await rate(lambda: customer.send(body), times):7.0f} /s")


async def counted(world: World, work: Callable[[], Awaitable[Any]]) -> str:
    ledger: Any = world.net.node.ledger
    asked: list[str] = []
    inner = {name: getattr(ledger, name) for name in ("read", "write")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            asked.append(name)
            return inner[name](*args, **more)

        return call

    for name in inner:
        setattr(ledger, name, counting(name))
    await work()
    for name, method in inner.items():
        setattr(ledger, name, method)
    return f"{asked.count('read')} reads, {asked.count('write')} transactions"


async def rate(work: Callable[[], Awaitable[Any]], times: int) -> float:
    left = iter(range(times))

    async def worker() -> None:
        for _ in left:
            reply = await work()
            assert reply.status == 200, reply.body

    begun = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return times / (time.perf_counter() - begun)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--admissions", type=int, default=20_000)
    options.add_argument("--requests", type=int, default=2_000)
    chosen = options.parse_args()
    asyncio.run(admissions(chosen.admissions))
    asyncio.run(requests(chosen.requests))
