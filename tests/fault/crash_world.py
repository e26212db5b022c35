"""What the crash tests share: payers, a witness, a chain and a provider that outlive every node, and the comparison.

The parent is the payer and the chain, so it knows what was delivered, what was promised and what was paid out; the node
and its ledger are what is killed.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import aiohttp

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
from mppnode.ledger.base import Which
from mppnode.observe.logs import quiet
from mppnode.parts import World as NodeWorld
from mppnode.parts import open_ledger
from mppnode.payer.client import PayingClient, PaymentGivenUp, RequestFailed
from mppnode.watchtower import Watchtower
from tests.fault.witness import Witness
from tests.support.node_process import INPUT_PICO, OUTPUT_PICO, WINDOW_UNITS, Spec

FUNDS = Units(10**12)
PROMPT = "tell me everything about channels " * 20
PROMPT_PICO = len(PROMPT) // 6 * INPUT_PICO
"""A prompt as it is charged with the first token: six bytes to a token."""
WHOLE_PROMPT_PICO = len(PROMPT) // 4 * INPUT_PICO
"""And at the end of a whole response, by the provider's report: four bytes to a token."""
LOSS_UNITS_MAX = WINDOW_UNITS + 64 * OUTPUT_PICO // PICO_PER_UNIT
"""One window, and one read of the upstream beside it: far fewer than 64 tokens at this pace."""
TOKENS_PER_SECOND = 3_000.0
CUT_OFF = (aiohttp.ClientError, OSError, PaymentGivenUp, RequestFailed)


@dataclass
class Payer:
    """One wallet; its client is replaced when it has given its channel up."""

    client: PayingClient

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

    @property
    def earned(self) -> int:
        """Units the chain has paid to the node."""
        return self.chain.balance(LocalSigner(bytes.fromhex(self.spec.key)).address) - FUNDS

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

    async def ledger(self) -> dict[ChannelId, Account]:
        """The books as another process sees them, each account checked against its journal."""
        fatal: list[BaseException] = []
        store = open_ledger(self.spec.config(), NodeWorld(SystemClock(), self.random.randbytes, quiet, fatal.append), shared=True)
        await store.start()
        try:
            accounts = list(await store.page(Which.ALL, limit=100_000))
            for account in accounts:
                # Read after the account, so it may have entries of later: the node behind it goes on settling.
                entries = (await store.journal(account.id))[: account.version]
                assert reduce(fold, entries, None) == account
        finally:
            await store.stop()
        return {account.id: account for account in accounts}


@asynccontextmanager
async def world(ledger: str, seed: int, payers: int, *, tokens_per_second: float = TOKENS_PER_SECOND) -> AsyncIterator[World]:
    rng = random.Random(seed)
    chain = DevChain(SystemClock(), chain_id=CHAIN_ID, v1_address=V1_ESCROW)
    keys = [rng.randbytes(32) for _ in range(payers + 1)]
    for key in keys:
        chain.fund(LocalSigner(key).address, FUNDS)
    runner, chain_url = await start_devchain(chain, "127.0.0.1", 0)
    provider = await start_devprovider(tokens_per_second=tokens_per_second)
    witness = Witness()
    await witness.start()
    spec = Spec(ledger, chain_url, provider.url, keys[-1].hex())
    try:
        async with aiohttp.ClientSession() as http:
            yield World(spec, chain, chain_url, provider, witness, http, keys, rng)
    finally:
        await witness.stop()
        await provider.stop()
        await runner.cleanup()


@dataclass
class Auditor:
    """Compares a restarted node's books with what the witness saw; amounts in pico."""

    witness: Witness
    seen: dict[ChannelId, tuple[int, int]] = field(default_factory=dict)
    """Per channel: the version, and what its payer has got for nothing so far."""
    losses: list[int] = field(default_factory=list)

    def price(self, channel: ChannelId) -> int:
        got = self.witness.channels[channel]
        return got.tokens * OUTPUT_PICO + got.streams * PROMPT_PICO + got.whole * (WHOLE_PROMPT_PICO - PROMPT_PICO)

    def audit(self, books: dict[ChannelId, Account], *, holds: bool = False) -> None:
        for channel, got in self.witness.channels.items():
            account = books[channel]
            assert holds or not account.holds, "nothing is reserved for requests that died"
            assert account.accepted >= got.accepted, "a voucher that was answered is lost"
            assert account.spent >= got.spent, "a number that was shown has fallen"
            # A stream whose last chunk was cut off may have been charged by the provider's report already, which tells
            # the true length of its prompt. What came of it is charged for then, and nothing else.
            most = got.tokens * OUTPUT_PICO + got.streams * WHOLE_PROMPT_PICO
            assert account.owed_pico <= most, f"charged {account.owed_pico - most} pico for what never came"
            free = max(self.price(channel) - account.owed_pico, 0)
            assert account.chain.settled * PICO_PER_UNIT <= most, "settled beyond what was delivered"
            if account.phase is Phase.CLOSED:
                assert account.close is not None
                assert account.close.capture == account.owed_pico // PICO_PER_UNIT
            if (account.version, free) == self.seen.get(channel):
                continue  # nothing happened here since
            loss = free - self.seen.get(channel, (0, 0))[1]
            self.seen[channel] = account.version, free
            assert loss <= LOSS_UNITS_MAX * PICO_PER_UNIT, f"one crash cost {loss} pico"
            self.losses.append(loss)

    def figures(self) -> str:
        """The losses beside their bound, in units."""
        losses = sorted(loss // PICO_PER_UNIT for loss in self.losses) or [0]
        tokens = sum(got.tokens for got in self.witness.channels.values())
        return (
            f"{tokens} tokens on {len(self.witness.channels)} channels, overcharged 0 units, accepted vouchers lost 0, "
            f"lost per stream and crash: median {losses[len(losses) // 2]}, most {losses[-1]} of at most {LOSS_UNITS_MAX} units"
        )


async def close_everything(net: World) -> None:
    """Channels payers gave up are the operator's to close, from a process that serves nobody."""

    def never(error: BaseException) -> None:
        raise AssertionError(f"the ledger failed: {error!r}")

    tower = Watchtower(net.spec.config(), NodeWorld(SystemClock(), net.random.randbytes, quiet, never))
    await tower.open()
    try:
        for account in (await net.ledger()).values():
            if account.phase is not Phase.CLOSED:
                await tower.treasury.closer.close(account, "operator")
    finally:
        await tower.stop()


def assert_chain_agrees(net: World, books: dict[ChannelId, Account]) -> None:
    """The chain paid what the books say, once: captures of closed channels and settlements of the others."""
    slots = net.chain.model.reserve.slots
    settled = {channel: slots[channel].settled for channel, account in books.items() if account.phase is not Phase.CLOSED}
    for channel, amount in settled.items():
        assert amount <= books[channel].final, "settled beyond what was charged for good"
    captured = sum(account.close.capture or 0 for account in books.values() if account.phase is Phase.CLOSED and account.close)
    assert net.earned == captured + sum(settled.values())
