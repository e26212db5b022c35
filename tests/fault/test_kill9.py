"""A node is killed with SIGKILL again and again while it is paid; then the books, the chain and the payer are compared.

Three payers stream at once through a witness that counts what leaves the node. Each node dies after a random number of
bytes, at whatever it was doing: opening, taking a voucher, streaming, renewing, settling, closing. The next one starts on
the same ledger. ``KILL9_CYCLES`` (per store) and ``KILL9_SEED`` make it longer and repeat a run.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from channels.model import Phase
from channels.units import PICO_PER_UNIT
from mppnode.payer.client import PaymentGivenUp
from tests.fault.crash_world import WHOLE_PROMPT_PICO, Auditor, Payer, World, assert_chain_agrees, world
from tests.support.node_process import OUTPUT_PICO, NodeProcess, nursery
from tests.support.postgres import postgres_database

CYCLES = int(os.environ.get("KILL9_CYCLES", "30"))
SEED = int(os.environ.get("KILL9_SEED", str(random.randrange(10**6))))
PAYERS = 3
ON_PROMISE = 0.4
"""How often a node is killed the moment it has answered a payment: what it said must then be on disk already."""
CLOSES = 0.1
"""How often a payer closes its channel instead of streaming."""
PATIENCE_S = 30


async def cycle(net: World, node: NodeProcess, payers: list[Payer]) -> Counter[str]:
    """Let the payers go, kill the node after a random number of bytes, and wait until everything has come in."""
    rng = net.random
    closing = [rng.random() < CLOSES for _ in payers]
    # Openings and closes are over after a few kilobytes; a full window needs about a hundred from each stream.
    bytes_max = rng.randrange(1, rng.choice([6_000, 60_000, 900_000]) if not any(closing) else 12_000)
    promises_max = rng.randrange(1, 8) if rng.random() < ON_PROMISE else 10**9
    net.witness.on_news = lambda passed, promises: node.kill() if passed >= bytes_max or promises >= promises_max else None
    ends: Counter[str] = Counter()

    async def act(index: int) -> None:
        payer = payers[index]
        if closing[index]:
            end = await payer.close(net.chat)
            payers[index] = Payer(net.client(net.keys[index]))
        else:
            end = await payer.stream(net.chat, 50_000)
            if end == PaymentGivenUp.__name__:
                payers[index] = Payer(net.client(net.keys[index]))
        ends[end] += 1

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(act(index) for index in range(PAYERS)))
        node.kill()
        await node.gone()
        await net.witness.quiet()
    return ends


async def settle(net: World, payers: list[Payer], auditor: Auditor) -> int:
    """Stream once more on the same channels, to the end, and close them; returns how many were closed."""
    before = await net.ledger()
    assert await asyncio.gather(*(payer.stream(net.chat, 50) for payer in payers)) == ["complete"] * PAYERS
    whole = 50 * OUTPUT_PICO + WHOLE_PROMPT_PICO
    for channel, account in (await net.ledger()).items():
        known = before.get(channel)
        charged = account.owed_pico - (0 if known is None else known.owed_pico)
        assert charged in (0, whole), "a response that arrived whole is charged exactly"
    closing = [payer.client.sessions()[-1].state.channel for payer in payers]
    assert await asyncio.gather(*(payer.close(net.chat) for payer in payers)) == ["closed"] * PAYERS
    books = await net.ledger()
    for channel in closing:
        assert channel is not None
        account = books[channel.id]
        assert account.phase is Phase.CLOSED
        assert account.close is not None
        assert account.close.capture == account.spent, "captured is what was spent"
        assert account.spent * PICO_PER_UNIT <= auditor.price(channel.id)
    return len(closing)


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
async def test_a_node_killed_at_any_moment_never_overcharges(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No answered voucher is lost, nobody pays for what did not arrive, and the node loses at most one window."""
    print(f"KILL9_SEED={SEED} KILL9_CYCLES={CYCLES}")
    ends: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        where = str(tmp_path / "ledger.sqlite")
        if store == "postgres":
            where = await stack.enter_async_context(postgres_database())
        net = await stack.enter_async_context(world(where, SEED, PAYERS))
        nodes = await stack.enter_async_context(nursery())
        payers = [Payer(net.client(key)) for key in net.keys[:PAYERS]]
        auditor = Auditor(net.witness)
        node = await nodes.spawn(net.spec)
        try:
            for _ in range(CYCLES):
                net.witness.point_at(await node.go())
                auditor.audit(await net.ledger())
                ends += await cycle(net, node, payers)
                node = await nodes.spawn(net.spec)
            net.witness.on_news = lambda passed, promises: None
            net.witness.point_at(await node.go())
            auditor.audit(await net.ledger())
            await settle(net, payers, auditor)
        finally:
            node.kill()
            await node.gone()
        assert_chain_agrees(net, await net.ledger())
        with capsys.disabled():
            print(f"\nkill -9 on {store}: {CYCLES} kills, {auditor.figures()}; ends {dict(ends)}")
