"""Three nodes on one PostgreSQL serve the same payers; one is killed, one is frozen and wakes up; the books agree.

Any node takes any voucher: each payer's stream runs through one node and its vouchers go to another, chosen at random by
the door they all knock at. What a dead or sleeping node held is released by the others.
"""

from __future__ import annotations

import asyncio
import random
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import aiohttp
import pytest

from channels.model import Phase
from channels.payer.signer import LocalSigner
from mppnode.ledger.base import GRACE_S, LEASE_S
from mppnode.ledger.life import SWEEP_S
from tests.fault.crash_world import (
    PROMPT_PICO,
    WHOLE_PROMPT_PICO,
    Auditor,
    Payer,
    World,
    assert_chain_agrees,
    close_everything,
    world,
)
from tests.fault.witness import Witness
from tests.support.node_process import NodeProcess, nursery
from tests.support.postgres import postgres_database

PAYERS = 6
TOKENS = 2_000
SEED = 7
ORPHANED_S = LEASE_S + GRACE_S + 2 * SWEEP_S + 10
"""After this long nothing of a dead node's may be held any more."""


@dataclass
class Fleet:
    """The nodes, each behind a witness of its own that shares one count."""

    net: World
    nodes: list[NodeProcess]
    doors: list[Witness] = field(default_factory=list)

    async def open_doors(self) -> None:
        for node in self.nodes:
            door = Witness()
            door.channels = self.net.witness.channels
            await door.start()
            door.point_at(node.url)
            self.doors.append(door)

    async def close_doors(self) -> None:
        for door in self.doors:
            await door.stop()

    def chat(self, index: int) -> str:
        return f"{self.doors[index].url}/v1/chat/completions"


async def fleet(stack: AsyncExitStack, *, tokens_per_second: float = 1_500.0) -> Fleet:
    dsn = await stack.enter_async_context(postgres_database())
    net = await stack.enter_async_context(world(dsn, SEED, PAYERS, tokens_per_second=tokens_per_second))
    nodes = await stack.enter_async_context(nursery())
    spawned = [await nodes.spawn(replace(net.spec, name=f"node-{index}")) for index in range(3)]
    assert all([await node.go() for node in spawned])
    made = Fleet(net, spawned)
    await made.open_doors()
    stack.push_async_callback(made.close_doors)
    return made


async def test_three_nodes_one_killed_one_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    """Every stream ends, no payer is charged for what did not arrive, and books, chain and payers agree to the unit."""
    async with AsyncExitStack() as stack:
        made = await fleet(stack)
        net, rng, auditor = made.net, random.Random(SEED), Auditor(made.net.witness)
        ends: list[str] = []

        async def pay(index: int) -> None:
            payer = Payer(net.client(net.keys[index]))
            for _ in range(6):
                end = await payer.stream(made.chat(rng.randrange(3)), rng.randrange(200, TOKENS))
                ends.append(end)
                if end == "PaymentGivenUp":
                    payer = Payer(net.client(net.keys[index]))

        paying = asyncio.gather(*(pay(index) for index in range(PAYERS)))
        try:
            await asyncio.sleep(0.6)  # wall time is the subject: leases of real processes
            made.nodes[0].kill()
            await made.nodes[0].gone()
            made.doors[0].point_at(made.nodes[1].url)
            made.nodes[2].signal(signal.SIGSTOP)
            await asyncio.sleep(LEASE_S + GRACE_S + SWEEP_S)
            made.nodes[2].signal(signal.SIGCONT)
            async with asyncio.timeout(60):
                await paying
            async with asyncio.timeout(ORPHANED_S):
                while any(account.holds for account in (await net.ledger()).values()):
                    await asyncio.sleep(0.2)
        finally:
            made.nodes[2].signal(signal.SIGCONT)
        auditor.audit(await net.ledger())
        await close_everything(net)
        books = await net.ledger()
        auditor.audit(books)
        assert {account.phase for account in books.values()} == {Phase.CLOSED}
        assert_chain_agrees(net, books)
        assert "complete" in ends[len(ends) // 2 :], "the survivors go on serving"
        with capsys.disabled():
            print(f"\nthree nodes: {len(ends)} streams, {auditor.figures()}")


async def test_a_voucher_on_another_node_resumes_a_stream() -> None:
    """A stream on one node waits for money; the voucher arrives at another one, and the stream goes on."""
    async with AsyncExitStack() as stack:
        made = await fleet(stack)
        net = made.net
        doors = [made.chat(0), made.chat(1)]

        payer = Payer(net.client(net.keys[0]))
        client = payer.client
        send = client._send

        async def elsewhere(url: str, data: bytes, credential: str | None) -> aiohttp.ClientResponse:
            """Content goes where it was sent; what pays for it goes to the other node."""
            return await send(url if data else doors[1], data, credential)

        client._send = elsewhere  # type: ignore[method-assign]
        async with asyncio.timeout(30):
            assert await payer.stream(doors[0], TOKENS) == "complete"
        Auditor(net.witness).audit(await net.ledger())
        (account,) = (await net.ledger()).values()
        assert len(account.ladder) > 1
        assert LocalSigner(net.keys[0]).address == account.descriptor.payer


async def test_a_newer_stream_on_another_node_ends_the_older_one_exactly() -> None:
    """The older stream is asked to end, bills what arrived to the unit, and ends with its receipt."""
    async with AsyncExitStack() as stack:
        made = await fleet(stack, tokens_per_second=300.0)
        net = made.net
        first = Payer(net.client(net.keys[0]))
        older = asyncio.ensure_future(first.stream(made.chat(0), TOKENS))
        async with asyncio.timeout(10):
            while not any(account.streams for account in (await net.ledger()).values()):
                await asyncio.sleep(0.02)
            while net.witness.channels and max(got.tokens for got in net.witness.channels.values()) < 60:
                await asyncio.sleep(0.02)
        async with asyncio.timeout(20):
            assert await first.stream(made.chat(1), 50) == "complete"
            await older
        (account,) = (await net.ledger()).values()
        auditor = Auditor(net.witness)
        auditor.audit({account.id: account})
        # The cut response ends with a last chunk too, but without the provider's report of its prompt.
        unreported = WHOLE_PROMPT_PICO - PROMPT_PICO
        assert auditor.price(account.id) - unreported == account.owed_pico, "nothing was given away and nothing taken"
        assert net.witness.channels[account.id].streams == 2
