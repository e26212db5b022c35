"""A node is killed once at every point of its life; the next one goes on, and payer, books and chain agree at the end.

The story: a payer opens a channel, streams beyond its deposit, tops up, and the node stops; a second node settles what
was earned, serves a second stream, and closes when the payer asks. Whichever of the two dies, and whenever, another one
takes its place and the payer simply goes on.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from channels.intent import IntentKind, IntentState
from channels.model import Phase
from mppnode.kernel.clock import SystemClock
from mppnode.observe.logs import quiet
from mppnode.parts import World as NodeWorld
from mppnode.parts import open_ledger
from mppnode.payer.client import PaymentGivenUp
from tests.fault.crash_world import Auditor, Payer, World, assert_chain_agrees, close_everything, world
from tests.fault.points import AFTER_A_DEATH, ELSEWHERE, STORY
from tests.support.node_process import NodeProcess, Nursery, Spec, nursery
from tests.support.postgres import postgres_database

TOKENS = 700
"""Of one response: 7,000 units, more than the first deposit and worth more than a settlement's fee."""
DEPOSIT = 6_000
FEE = 5_250
"""Of a settlement on the development chain: what is not worth more is not settled."""
SEED = 20_261_121
PATIENCE_S = 30
PATIENCE = 2
"""How often a payer asks for its close before it leaves the rest to the operator."""
TRIES_MAX = 6


@dataclass
class Stage:
    """The node behind the witness, replaced whenever it is dead."""

    net: World
    nodes: Nursery
    spec: Spec
    node: NodeProcess | None = None
    deaths: int = 0

    async def alive(self) -> NodeProcess:
        """The node that listens now; one that was to die at a point dies once, and its successors live."""
        while self.node is None or self.node.dead:
            self.node = await self.nodes.spawn(self.spec)
            if not await self.node.go():
                await self._buried()
                continue
            self.net.witness.point_at(self.node.url)
        return self.node

    async def _buried(self) -> None:
        assert self.node is not None
        self.deaths += 1
        self.spec = replace(self.spec, crash="")
        await self.node.gone()
        await self.net.witness.quiet()

    async def until(self, act: object) -> None:
        """Repeat something a payer does until it succeeds, whatever happens to the node meanwhile."""
        assert callable(act)
        for _ in range(TRIES_MAX):
            node = await self.alive()
            if await act():
                return
            await asyncio.sleep(0)
            if await self._has_died(node):
                await self._buried()
        raise AssertionError("the payer could not go on")

    async def _has_died(self, node: NodeProcess) -> bool:
        """A connection that broke is a node that died; the end of its socket is then a moment away."""
        if node.spec.crash:
            async with asyncio.timeout(PATIENCE_S):
                await node.gone()
        return node.dead

    async def stop(self) -> None:
        """A graceful stop, which may be the moment to die."""
        assert self.node is not None
        crash = self.node.spec.crash
        await self.node.stop()
        await self.net.witness.quiet()
        self.node = None
        if crash.startswith("drain"):
            self.deaths += 1
            self.spec = replace(self.spec, crash="")


async def tell(net: World, stage: Stage) -> None:
    """The whole story, by one payer who never gives up."""
    payer, closes = Payer(net.client(net.keys[0])), 0

    async def stream() -> bool:
        nonlocal payer
        end = await payer.stream(net.chat, TOKENS)
        if end == PaymentGivenUp.__name__:  # its top-up was interrupted: it opens another channel
            payer = Payer(net.client(net.keys[0]))
        return end == "complete"

    async def until_settled() -> bool:
        node = await stage.alive()
        while not node.dead:
            books = await net.ledger()
            if all(account.settleable - account.chain.settled <= FEE for account in books.values()):
                return True
            if node.reader.at_eof():
                return False
            await asyncio.sleep(0.02)
        return False

    async def close() -> bool:
        nonlocal closes
        closes += 1
        if await payer.close(net.chat) == "closed" or closes > PATIENCE:
            return True
        # The answer was lost, or the node goes on with it by itself: what counts is that the channel gets closed.
        node, channel = await stage.alive(), payer.client.sessions()[-1].state.channel
        assert channel is not None
        while not node.reader.at_eof() and (phase := (await net.ledger())[channel.id].phase) is not Phase.CLOSED:
            if phase in (Phase.OPEN, Phase.CONTESTED):
                return False
            await asyncio.sleep(0.02)
        return not node.reader.at_eof()

    async with asyncio.timeout(PATIENCE_S):
        await stage.until(stream)
        await stage.stop()
        await stage.until(until_settled)
        await stage.until(stream)
        await stage.until(close)
        await stage.stop()
        await close_everything(net)


async def make_stage(stack: AsyncExitStack, store: str, folder: Path, crash: str, *, report: bool = False) -> Stage:
    where = str(folder / "ledger.sqlite")
    if store == "postgres":
        where = await stack.enter_async_context(postgres_database())
    net = await stack.enter_async_context(world(where, SEED, 1, tokens_per_second=20_000.0))
    net.spec = replace(net.spec, deposit=DEPOSIT)
    nodes = await stack.enter_async_context(nursery())
    return Stage(net, nodes, replace(net.spec, crash=crash, report=report))


def test_every_point_has_its_story() -> None:
    """Nothing is left out by forgetting: the three lists are disjoint."""
    assert len({*STORY, *AFTER_A_DEATH, *ELSEWHERE}) == len(STORY) + len(AFTER_A_DEATH) + len(ELSEWHERE)


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
async def test_the_story_passes_every_point(store: str, tmp_path: Path) -> None:
    """A run without deaths passes exactly the points of the list, in either store."""
    async with AsyncExitStack() as stack:
        stage = await make_stage(stack, store, tmp_path, "", report=True)
        seen: set[str] = set()
        spawn = stage.nodes.spawn

        async def remember(spec: Spec) -> NodeProcess:
            node = await spawn(spec)
            node.points = seen
            return node

        stage.nodes.spawn = remember  # type: ignore[method-assign]
        await tell(stage.net, stage)
        assert stage.deaths == 0
        assert seen == set(STORY)


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
@pytest.mark.parametrize("point", [*STORY, *AFTER_A_DEATH])
async def test_a_node_that_dies_at_a_point(point: str, store: str, tmp_path: Path) -> None:
    """Whatever was answered holds, nobody pays for what did not arrive, and the story still comes to its end."""
    async with AsyncExitStack() as stack:
        stage = await make_stage(stack, store, tmp_path, f"{point}:1")
        net = stage.net
        if point in AFTER_A_DEATH:
            await leave_orphans(stage)
        await tell(net, stage)
        assert stage.deaths >= 1, "the point was never passed"
        books = await net.ledger()
        Auditor(net.witness).audit(books)
        assert {account.phase for account in books.values()} == {Phase.CLOSED}
        assert_chain_agrees(net, books)
        await assert_intents_ended(net)


async def leave_orphans(stage: Stage) -> None:
    """A node dies in the middle of a stream, so that the next one has holds to release."""
    crash, stage.spec = stage.spec, replace(stage.spec, crash="write.after:3")
    payer = Payer(stage.net.client(stage.net.keys[0]))
    node = await stage.alive()
    assert await payer.stream(stage.net.chat, TOKENS) != "complete"
    await node.gone()
    await stage.net.witness.quiet()
    stage.spec = crash


async def assert_intents_ended(net: World) -> None:
    """No transaction is left in doubt, and each channel was closed by exactly one."""
    ledger = open_ledger(net.spec.config(), NodeWorld(SystemClock(), net.random.randbytes, quiet, _never), shared=True)
    await ledger.start()
    try:
        intents = await ledger.intents(active=False, limit=1_000)
    finally:
        await ledger.stop()
    assert not [intent for intent in intents if intent.active]
    closes = [i.channel for i in intents if i.kind is IntentKind.CLOSE and i.state is IntentState.FINAL]
    assert len(closes) == len(set(closes))


def _never(error: BaseException) -> None:
    raise AssertionError(f"the ledger failed: {error!r}")
