"""A node is killed with SIGKILL again and again while it is paid; then the books, the chain and the payer are compared.

Three payers stream at once through a witness that counts what leaves the node. Each node dies after a random number of
bytes, at whatever it was doing: opening, taking a voucher, streaming, renewing, closing. The next one starts on the same
ledger. ``KILL9_CYCLES`` and ``KILL9_SEED`` make it longer and repeat a run.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from channels.account import fold
from channels.descriptor import RESERVE_ADDRESS, Escrow, SessionProtocol
from channels.ids import ChannelId
from channels.model import Account, Phase
from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.units import PICO_PER_UNIT, Units
from mppnode.chain.devchain import DevChain
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devchain_server import start_devchain
from mppnode.cli.devnet import CHAIN_ID, PATH_USD, V1_ESCROW
from mppnode.cli.devprovider_server import DevProviderServer, start_devprovider
from mppnode.kernel.clock import SystemClock
from mppnode.ledger.rows import COLUMNS, read_account, read_event
from mppnode.payer.client import PayingClient, PaymentGivenUp, RequestFailed
from tests.fault.witness import Witness
from tests.support.node_process import INPUT_PICO, OUTPUT_PICO, WINDOW_UNITS, NodeProcess, Spec

CYCLES = int(os.environ.get("KILL9_CYCLES", "30"))
SEED = int(os.environ.get("KILL9_SEED", str(random.randrange(10**6))))
PAYERS = 3
ON_PROMISE = 0.4
"""How often a node is killed the moment it has answered a payment: what it said must then be on disk already."""
CLOSES = 0.1
"""How often a payer closes its channel instead of streaming."""
FUNDS = Units(10**12)
PROMPT = "tell me everything about channels " * 20
PROMPT_PICO = len(PROMPT) // 6 * INPUT_PICO
"""A prompt as it is charged with the first token: six bytes to a token."""
LOSS_UNITS_MAX = WINDOW_UNITS + 64 * OUTPUT_PICO // PICO_PER_UNIT
"""One window, and one read of the upstream beside it: far fewer than 64 tokens at this pace."""
TOKENS_PER_SECOND = 3_000.0
PATIENCE_S = 30
CUT_OFF = (aiohttp.ClientError, OSError, PaymentGivenUp, RequestFailed)


@dataclass
class Payer:
    """One wallet; its client is replaced when it has given its channel up."""

    client: PayingClient
    done: Counter[str] = field(default_factory=Counter)

    async def stream(self, url: str, tokens: int) -> str:
        body = {"model": "dev/story", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens}
        end = "complete"
        try:
            async with self.client.stream(url, body) as events:
                async for _ in events:
                    pass
        except* CUT_OFF as group:
            end = type(_first(group)).__name__
        return end

    async def close(self, url: str) -> str:
        try:
            closed = await self.client.close(url)
        except CUT_OFF as error:
            return f"close: {type(error).__name__}"
        return "closed" if closed is not None else "nothing to close"


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


@dataclass
class World:
    """All that outlives a node."""

    spec: Spec
    chain: DevChain
    chain_url: str
    provider: DevProviderServer
    witness: Witness
    http: aiohttp.ClientSession
    keys: list[bytes]
    random: random.Random

    @property
    def chat(self) -> str:
        return f"{self.witness.url}/v1/chat/completions"

    def client(self, key: bytes) -> PayingClient:
        signer, clock = LocalSigner(key), SystemClock()
        policy = PayerPolicy(
            payer=signer.address,
            signer=signer.address,
            escrows=frozenset({Escrow(SessionProtocol.V2, CHAIN_ID, RESERVE_ADDRESS)}),
            tokens=frozenset({PATH_USD}),
            request_cap=Units(10**7),
            channel_cap=Units(10**8),
            max_deposit=Units(10**8),
        )
        chain = RpcChain(HttpTransport(self.http, self.chain_url), clock, limits=RpcLimits())
        return PayingClient(self.http, chain=chain, signer=signer, policy=policy, now=clock.now_millis, entropy=self.random.randbytes)


@asynccontextmanager
async def world(folder: Path, seed: int) -> AsyncIterator[World]:
    rng = random.Random(seed)
    chain = DevChain(SystemClock(), chain_id=CHAIN_ID, v1_address=V1_ESCROW)
    keys = [rng.randbytes(32) for _ in range(PAYERS + 1)]
    for key in keys:
        chain.fund(LocalSigner(key).address, FUNDS)
    runner, chain_url = await start_devchain(chain, "127.0.0.1", 0)
    provider = await start_devprovider(tokens_per_second=TOKENS_PER_SECOND)
    witness = Witness()
    await witness.start()
    spec = Spec(str(folder / "ledger.sqlite"), chain_url, provider.url, keys[-1].hex())
    try:
        async with aiohttp.ClientSession() as http:
            yield World(spec, chain, chain_url, provider, witness, http, keys, rng)
    finally:
        await witness.stop()
        await provider.stop()
        await runner.cleanup()


def ledger(path: str) -> dict[ChannelId, Account]:
    """The books as another process sees them, each account checked against its journal."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        rows = connection.execute(f"SELECT id, terms, {','.join(COLUMNS)} FROM channel").fetchall()
        accounts = [read_account(row[0], row[1], dict(zip(COLUMNS, row[2:], strict=True))) for row in rows]
        for account in accounts:
            entries = connection.execute("SELECT kind, body FROM journal WHERE channel = ? ORDER BY entry", (account.id,))
            assert reduce(fold, (read_event(kind, body) for kind, body in entries), None) == account
    finally:
        connection.close()
    return {account.id: account for account in accounts}


@dataclass
class Auditor:
    """Compares a restarted node's books with what the witness saw; amounts in pico."""

    witness: Witness
    seen: dict[ChannelId, tuple[int, int]] = field(default_factory=dict)
    """Per channel: the version, and what its payer has got for nothing so far."""
    losses: list[int] = field(default_factory=list)

    def price(self, channel: ChannelId) -> int:
        got = self.witness.channels[channel]
        return got.tokens * OUTPUT_PICO + got.streams * PROMPT_PICO

    def audit(self, books: dict[ChannelId, Account]) -> None:
        for channel, got in self.witness.channels.items():
            account = books[channel]
            assert not account.holds, "nothing is reserved for requests that died"
            assert account.accepted >= got.accepted, "a voucher that was answered is lost"
            assert account.spent >= got.spent, "a number that was shown has fallen"
            free = self.price(channel) - account.owed_pico
            assert free >= 0, f"the payer is charged {-free} pico for what it never got"
            if account.phase is Phase.CLOSED:
                assert account.close is not None
                assert account.close.capture == account.owed_pico // PICO_PER_UNIT
            if (account.version, free) == self.seen.get(channel):
                continue  # nothing happened here since
            loss = free - self.seen.get(channel, (0, 0))[1]
            self.seen[channel] = account.version, free
            assert loss <= LOSS_UNITS_MAX * PICO_PER_UNIT, f"one crash cost {loss} pico"
            self.losses.append(loss)


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
    before = ledger(net.spec.ledger)
    assert await asyncio.gather(*(payer.stream(net.chat, 50) for payer in payers)) == ["complete"] * PAYERS
    whole = 50 * OUTPUT_PICO + len(PROMPT) // 4 * INPUT_PICO  # the provider's report counts four bytes to a token
    for channel, account in ledger(net.spec.ledger).items():
        known = before.get(channel)
        charged = account.owed_pico - (0 if known is None else known.owed_pico)
        assert charged in (0, whole), "a response that arrived whole is charged exactly"
    closing = [payer.client.sessions()[-1].state.channel for payer in payers]
    assert await asyncio.gather(*(payer.close(net.chat) for payer in payers)) == ["closed"] * PAYERS
    books = ledger(net.spec.ledger)
    for channel in closing:
        assert channel is not None
        account = books[channel.id]
        assert account.phase is Phase.CLOSED
        assert account.close is not None
        assert account.close.capture == account.spent, "captured is what was spent"
        assert account.spent * PICO_PER_UNIT <= auditor.price(channel.id) + whole
    return len(closing)


async def test_a_node_killed_at_any_moment_never_overcharges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No answered voucher is lost, nobody pays for what did not arrive, and the node loses at most one window."""
    print(f"KILL9_SEED={SEED} KILL9_CYCLES={CYCLES}")
    ends: Counter[str] = Counter()
    async with world(tmp_path, SEED) as net:
        payers = [Payer(net.client(key)) for key in net.keys[:PAYERS]]
        auditor = Auditor(net.witness)
        node, spare = await NodeProcess.spawn(net.spec), await NodeProcess.spawn(net.spec)
        try:
            for _ in range(CYCLES):
                net.witness.point_at(await node.go())
                auditor.audit(ledger(net.spec.ledger))
                ends += await cycle(net, node, payers)
                node, spare = spare, await NodeProcess.spawn(net.spec)
            net.witness.on_news = lambda passed, promises: None
            net.witness.point_at(await node.go())
            auditor.audit(ledger(net.spec.ledger))
            await settle(net, payers, auditor)
        finally:
            for process in (node, spare):
                process.kill()
                await process.gone()
        books = ledger(net.spec.ledger)
        captured = sum(account.close.capture or 0 for account in books.values() if account.phase is Phase.CLOSED and account.close)
        earned = net.chain.balance(LocalSigner(net.keys[-1]).address) - FUNDS
        assert earned == captured, "the chain paid what the books say, once"
    tokens = sum(got.tokens for got in net.witness.channels.values())
    losses = sorted(loss // PICO_PER_UNIT for loss in auditor.losses)
    with capsys.disabled():
        print(
            f"\nkill -9: {CYCLES} kills, {tokens} tokens on {len(books)} channels, overcharged 0, "
            f"lost per stream median {losses[len(losses) // 2]}, most {losses[-1]} units (allowed {LOSS_UNITS_MAX}); "
            f"ends {dict(ends)}"
        )
