"""Nodes are restarted one after the other, a hundred times, while payers and key holders stream through a balancer.

A client may see three things: a whole answer, an answer that was ended by the node and says so, or a refusal before the
first byte that it may simply repeat. Whatever it saw, it is charged for exactly that. ``ROLLING_RESTARTS`` and
``ROLLING_SEED`` make it longer and repeat a run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import aiohttp
import pytest

from channels.credit import AccountId
from channels.model import NodeId
from channels.units import Pico
from mppnode.accounts.forms import Gift, KeyForm, Opening
from mppnode.accounts.keyring import Accounts, Keyring
from mppnode.accounts.model import AccountKind, Prepaid
from mppnode.kernel.clock import SystemClock
from mppnode.ledger.base import Ledger, Which
from mppnode.ledger.credits import Credits
from mppnode.observe.logs import quiet
from mppnode.parts import World as NodeWorld
from mppnode.parts import open_ledger
from mppnode.payer.client import PayingClient, RequestFailed
from tests.fault.crash_world import PROMPT, PROMPT_PICO, WHOLE_PROMPT_PICO, World, world
from tests.support.balancer import Balancer, balancer
from tests.support.node_process import OUTPUT_PICO, NodeProcess, Nursery, nursery
from tests.support.postgres import postgres_database

RESTARTS = int(os.environ.get("ROLLING_RESTARTS", "100"))
SEED = int(os.environ.get("ROLLING_SEED", str(random.randrange(10**6))))
NODES, PAYERS, KEYS = 3, 3, 3
TOKENS_PER_SECOND = 150.0
SHORT, LONG = (8, 16, 31), 2_000
"""Tokens asked for. Answers of 32 tokens and more teach a node how long tokens are, after which it estimates; these do
not, so what is counted here and there is the same to the token. The long ones outlast every node and every drain.
"""
LONG_SHARE = 0.1
CREDIT = Pico(10**15)
EACH_TURN = 1
"""Requests a client may begin per restart. As many as it likes would be more on a machine that is slow, whose restarts
they slow down further, until a channel has had its 256 requests in five minutes and gets 429.
"""
DRAINS_S = (0, 0, 0, 0, 0, 0, 0, 1)
"""How long nodes wait for what runs: seldom at all, as the long answers use all of it."""
PATIENCE_S = 300
BROKEN = (aiohttp.ClientError, OSError)


@dataclass
class Seen:
    """What one client has got, by its own count."""

    pico: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0

    def took(self, tokens: int, end: str) -> None:
        """One stream has ended; anything but the two orderly ways fails the test."""
        assert end in ("complete", "node_stopped"), end
        self.ends[end] += 1
        self.tokens += tokens
        prompt = WHOLE_PROMPT_PICO if end == "complete" else PROMPT_PICO if tokens else 0
        self.pico += tokens * OUTPUT_PICO + prompt

    def refused(self, status: int | None) -> None:
        """Nothing was sent: a 503 with a time to come back, or no answer at all."""
        assert status in (None, 503)
        self.ends["no answer" if status is None else "503"] += 1


class Reading:
    """Counts the events of one stream."""

    def __init__(self) -> None:
        self.tokens = 0
        self.end = "cut off"
        self.begun = False

    def hear(self, data: str) -> None:
        self.begun = True
        if data == "[DONE]":
            self.end = "complete" if self.end == "cut off" else self.end
            return
        event = json.loads(data)
        self.end = event.get("mppnode", {}).get("ended", self.end)
        self.end = event.get("error", {}).get("code", self.end)
        self.tokens += sum(bool(choice["delta"].get("content")) for choice in event.get("choices", ()))


def body_of(tokens: int) -> dict[str, object]:
    return {"model": "dev/story", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens, "stream": True}


class Payer:
    """Streams by vouchers, which may travel to any node; one that was not answered is sent again."""

    def __init__(self, client: PayingClient, seen: Seen) -> None:
        self.client = client
        self.seen = seen
        self._post = client._send
        client._send = self._send  # type: ignore[method-assign]

    async def _send(self, url: str, data: bytes, credential: str | None) -> aiohttp.ClientResponse:
        while True:
            try:
                return await self._post(url, data, credential)
            except BROKEN:
                if data:
                    raise
                await asyncio.sleep(0)

    async def stream(self, url: str, tokens: int) -> None:
        reading = Reading()
        try:
            async with self.client.stream(url, body_of(tokens)) as events:
                async for data in events:
                    reading.hear(data)
        except RequestFailed as failed:
            self.seen.refused(failed.status)
        except BROKEN:
            assert not reading.begun, "a stream was cut off"
            self.seen.refused(None)
        else:
            self.seen.took(reading.tokens, reading.end)


class Keyholder:
    """Streams by API key."""

    def __init__(self, http: aiohttp.ClientSession, account: AccountId, secret: str, seen: Seen) -> None:
        self.http = http
        self.account = account
        self.secret = secret
        self.seen = seen

    async def stream(self, url: str, tokens: int) -> None:
        reading = Reading()
        headers = {"Authorization": f"Bearer {self.secret}"}
        try:
            async with self.http.post(url, json=body_of(tokens), headers=headers) as answer:
                if answer.status != 200:
                    assert int(answer.headers["Retry-After"]) > 0
                    self.seen.refused(answer.status)
                    return
                async for line in answer.content:
                    if line.startswith(b"data: ") and b'"object":"payment' not in line:
                        reading.hear(line.removeprefix(b"data: ").decode().strip())
        except BROKEN:
            assert not reading.begun, "a stream was cut off"
            self.seen.refused(None)
        else:
            self.seen.took(reading.tokens, reading.end)


@dataclass
class Books:
    """The ledger as an onlooker has it."""

    store: Ledger
    credits: Credits

    async def assert_nobody_dead_holds(self, keys: list[Keyholder]) -> None:
        """Whatever is held is held by a life that goes on: a node that has left took nothing with it."""
        owners: set[NodeId] = {
            hold.owner for account in await self.store.page(Which.HELD) for hold in account.holds.values()
        }
        for key in keys:
            account = await self.credits.load(key.account)
            assert account is not None
            owners |= {hold.owner for hold in account.holds.values()}
        # In this order: the owner of any hold that was read had joined before that.
        assert owners <= await self.store.living()


@asynccontextmanager
async def onlooker(net: World) -> AsyncIterator[Books]:
    fatal: list[BaseException] = []
    store = open_ledger(net.spec.config(), NodeWorld(SystemClock(), os.urandom, quiet, fatal.append), shared=True)
    await store.start()
    try:
        yield Books(store, Credits(store, clock=SystemClock()))
    finally:
        await store.stop()
    assert not fatal


async def new_keys(net: World, books: Books) -> list[Keyholder]:
    accounts = Accounts(books.credits, clock=SystemClock(), entropy=os.urandom)
    keyring = Keyring(books.credits, clock=SystemClock(), entropy=os.urandom)
    made = []
    for index in range(KEYS):
        account = await accounts.create(Opening(f"customer-{index}", AccountKind.USER, None, Prepaid()))
        await accounts.grant(account.id, Gift(CREDIT, "welcome"))
        key = await keyring.create(account.id, KeyForm({"name": "test"}))
        made.append(Keyholder(net.http, account.id, key.secret.text, Seen()))
    return made


@dataclass
class Fleet:
    """The nodes behind the balancer, and how to restart one."""

    net: World
    nodes: Nursery
    door: Balancer
    running: dict[str, NodeProcess] = field(default_factory=dict)
    stop_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)

    async def begin(self, name: str) -> None:
        """Start a node, some with no patience at all for what runs when they are stopped."""
        drain_s = self.net.random.choice(DRAINS_S)
        node = await self.nodes.spawn(replace(self.net.spec, name=name, drain_s=drain_s))
        begun = asyncio.get_running_loop().time()
        self.door.place(name, await node.go())
        self.running[name] = node
        await self.door.until_ready(name)
        self.start_s.append(asyncio.get_running_loop().time() - begun)

    async def end(self, name: str) -> None:
        begun = asyncio.get_running_loop().time()
        self.running[name].signal(signal.SIGTERM)
        await self.running.pop(name).gone()
        self.stop_s.append(asyncio.get_running_loop().time() - begun)


async def roll(fleet: Fleet, books: Books, keys: list[Keyholder], restarts: int) -> list[Seen]:
    """Restart one node after the other under load; returns what the payers have got."""
    net, rng, over = fleet.net, fleet.net.random, asyncio.Event()
    payers = [Payer(net.client(net.keys[index]), Seen()) for index in range(PAYERS)]
    url = f"{fleet.door.url}/v1/chat/completions"

    turns = [asyncio.Semaphore(EACH_TURN) for _ in range(PAYERS + KEYS)]

    async def use(who: Payer | Keyholder, may: asyncio.Semaphore) -> None:
        while not over.is_set():
            await who.stream(url, LONG if rng.random() < LONG_SHARE else rng.choice(SHORT))
            await may.acquire()

    def may_go_on() -> None:
        for may in turns * EACH_TURN:
            may.release()

    async with asyncio.TaskGroup() as clients:
        for who, may in zip((*payers, *keys), turns, strict=True):
            clients.create_task(use(who, may))
        for turn in range(restarts):
            may_go_on()
            name = f"node-{turn % NODES}"
            await fleet.end(name)
            await books.assert_nobody_dead_holds(keys)
            await fleet.begin(name)
        over.set()
        may_go_on()
        for name in list(fleet.running):
            await fleet.end(name)
    for payer in payers:
        (session,) = payer.client.sessions()
        assert session.state.channel is not None
        account = await books.store.load(session.state.channel.id)
        assert account is not None
        assert not account.holds
        assert account.owed_pico == payer.seen.pico, "charged for exactly what arrived"
    for key in keys:
        credit = await books.credits.load(key.account)
        assert credit is not None
        assert not credit.holds
        assert credit.owed == key.seen.pico, "charged for exactly what arrived"
    return [payer.seen for payer in payers]


def figures(times: list[float]) -> str:
    ordered = sorted(times)
    return f"median {ordered[len(ordered) // 2] * 1000:.0f} ms, slowest {ordered[-1] * 1000:.0f} ms"


async def test_a_hundred_rolling_restarts_cost_nobody_anything(capsys: pytest.CaptureFixture[str]) -> None:
    """No hold is orphaned, every answer ends in order or may be repeated, and everybody is charged what they got."""
    print(f"ROLLING_SEED={SEED} ROLLING_RESTARTS={RESTARTS}")
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(postgres_database())
        net = await stack.enter_async_context(world(dsn, SEED, PAYERS, tokens_per_second=TOKENS_PER_SECOND))
        nodes = await stack.enter_async_context(nursery())
        door = await stack.enter_async_context(balancer())
        fleet = Fleet(net, nodes, door)
        for index in range(NODES):
            await fleet.begin(f"node-{index}")
        books = await stack.enter_async_context(onlooker(net))
        keys = await new_keys(net, books)
        async with asyncio.timeout(PATIENCE_S):
            seen = [*await roll(fleet, books, keys, RESTARTS), *(key.seen for key in keys)]
    ends = sum((each.ends for each in seen), Counter[str]())
    assert all(each.ends["complete"] for each in seen), "everybody was served"
    with capsys.disabled():
        print(
            f"\n{RESTARTS} rolling restarts: {sum(ends.values())} requests, {sum(each.tokens for each in seen)} tokens,"
            f" ends {dict(ends)}; stop {figures(fleet.stop_s)}; start {figures(fleet.start_s)}"
        )
