"""Every operation of the node's ledger and of its chain fails once, in three ways, under a payer's whole story.

The story: open, stream with vouchers and a top-up, close, each tried again once. For n = 1, 2, 3 and so on the n-th operation of
the port fails; the payer does what a payer does; then the process ends, a new one starts on the same files, recovers
and closes what is open. When a run meets no fault the sweep has covered them all. ``test_sweep_store.py`` does the same
to the ledger alone, on both stores.
"""

from __future__ import annotations

import asyncio
import functools
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import aiohttp
import pytest

from channels.account import check, fold
from channels.descriptor import SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.model import Phase
from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.units import PICO_PER_UNIT, Units
from mppnode import app
from mppnode.app import Node
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devnet import FUNDS, PATH_USD, Devnet, DevnetOptions
from mppnode.config.schema import LimitsConfig, SessionConfig
from mppnode.http.sse import EventStream
from mppnode.payer.client import PayingClient, PaymentGivenUp, RequestFailed
from mppnode.treasury.settler import Settler, SettlerLimits
from tests.fault.faulty import Faulty, Mode

TOKEN = b'"delta":{"content":"'
TOKENS = 150
OUTPUT, PROMPT = 10 * PICO_PER_UNIT, PICO_PER_UNIT // 2
WINDOW_UNITS = 200
LOSS_MAX = (WINDOW_UNITS + 10) * PICO_PER_UNIT
"""One fault costs the node one window and one token at most."""
OPERATIONS_MIN = {"ledger": 20, "chain": 15}
CUT_OFF = (aiohttp.ClientError, OSError, PaymentGivenUp, RequestFailed)
ENDS = frozenset({"start", "stop"})
"""Of the ledger, and not counted: one that fails to start has left nothing behind, and a dead process stops nothing."""


@dataclass
class Delivery:
    """What the nodes of one run wrote to their clients, and what the payer read."""

    written: int = 0
    streams: int = 0
    read: int = 0


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience shrinks; how often anything is tried stays as it is."""
    monkeypatch.setattr("mppnode.parts.RpcLimits", functools.partial(RpcLimits, read_delay_s=0.0, receipt_poll_s=0.0))
    monkeypatch.setattr("mppnode.ledger.ending.PATIENCE_S", 0.05)
    monkeypatch.setattr("mppnode.parts.Settler", functools.partial(Settler, limits=SettlerLimits(0.2, 0.0, 0.0)))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: three hundred ledgers are opened, and no power cut is played here."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


@pytest.fixture
async def net(folder: Path) -> AsyncIterator[Devnet]:
    session = SessionConfig(
        protocols=(SessionProtocol.V2,),
        min_deposit=Units(500),
        suggested_deposit=Units(1_000),
        preauthorise_max=Units(400),
        window_units_max=WINDOW_UNITS,
        voucher_wait_s=0.5,  # type: ignore[arg-type]
        chain_ttl_s=0,
    )
    options = DevnetOptions(tokens_per_second=0.0, session=session, limits=LimitsConfig(drain_s=0), directory=folder)
    async with Devnet(options) as running:
        await running.node.stop()
        running.node = running.new_node()  # never started: every run has nodes of its own
        yield running


class Sweep:
    """One run: a fresh ledger, fresh keys, the same chain."""

    def __init__(self, net: Devnet, directory: Path, http: aiohttp.ClientSession) -> None:
        directory.mkdir()
        self.net = net
        self.http = http
        net.directory = directory
        net.payer_key, net.payee_key = os.urandom(32), os.urandom(32)
        for owner in (net.payer, net.payee):
            net.chain.fund(owner, FUNDS)
        self.slots = net.chain.model.reserve.slots
        self.known = set(self.slots._history)
        self.delivery = Delivery()

    def client(self) -> PayingClient:
        net, most = self.net, Units(10**6)
        return PayingClient(
            self.http,
            chain=RpcChain(HttpTransport(self.http, net.chain_url), net.clock, limits=RpcLimits(receipt_poll_s=0.0)),
            signer=LocalSigner(net.payer_key),
            policy=PayerPolicy(net.payer, net.payer, frozenset({net.escrow}), frozenset({PATH_USD}), most, most, most),
            now=net.clock.now_millis,
            entropy=os.urandom,
        )

    async def story(self, node: Node) -> None:
        """What the payer does; a refusal ends a chapter, not the story."""
        client, url = self.client(), f"{node.url}/v1/chat/completions"
        body = {"model": "dev/story", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": TOKENS}
        for _ in range(2):
            try:
                async with client.stream(url, body) as events:
                    async for data in events:
                        self.delivery.read += TOKEN.decode() in data
                break
            except* CUT_OFF:
                client = self.client()  # its channel is given up; the money in it is not
        try:
            await client.close(url)
        except CUT_OFF:
            return

    async def recover(self) -> None:
        """A new process on the same files: it goes on with what it finds, then the operator closes everything."""
        node = self.net.new_node()
        await node.start()
        try:
            assert node.books is not None
            assert node.ledger is not None
            assert node.treasury is not None
            async with asyncio.timeout(10):
                while left := [a for a in await node.books.accounts() if a.phase is not Phase.CLOSED]:
                    for account in left:
                        try:
                            await node.treasury.closer.close(account, "operator")
                        except ChannelFault:
                            await asyncio.sleep(0.01)
            await node.treasury.treasurer.turn()
            assert list(await node.ledger.intents(active=True)) == []
            await self.audit(node)
        finally:
            await node.stop()

    async def audit(self, node: Node) -> None:
        """Books, journal, chain and both parties agree."""
        assert node.books is not None
        charged = captured = 0
        accounts = await node.books.accounts()
        for account in accounts:
            check(account)
            assert reduce(fold, await node.books.journal(account.id), None) == account
            assert not account.holds
            assert account.close is not None
            assert account.close.capture == account.spent == account.owed_pico // PICO_PER_UNIT
            charged += account.owed_pico
            captured += account.close.capture
        net, ours = self.net, {account.id for account in accounts}
        earned = net.chain.balance(net.payee) - FUNDS
        assert earned == captured
        unknown = [channel for channel in set(self.slots._history) - self.known if channel not in ours]
        assert FUNDS - net.chain.balance(net.payer) - earned == sum(self.slots[channel].deposit for channel in unknown)
        assert all(self.slots[channel].settled == 0 for channel in unknown), "what the node does not know it did not take"
        made = self.delivery
        assert charged <= made.written * OUTPUT + made.streams * 2 * PROMPT, "the payer is charged for what never came"
        assert charged >= made.read * OUTPUT - LOSS_MAX, f"one fault cost {made.read * OUTPUT - charged} pico"


def fault_of(port: str, faulty: list[Faulty], mode: Mode) -> Exception:
    if port == "ledger":
        return ChannelFault(Reason.STORE_UNAVAILABLE, detail="injected")
    sent = mode is Mode.AFTER and faulty[0].failed in ("broadcast", "send")
    return ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN if sent else Reason.CHAIN_UNAVAILABLE, detail="injected")


def counts(name: str, mode: Mode) -> bool:
    # A process that is stopped leaves last; every store bounds its own patience there.
    return name not in ENDS and (mode is not Mode.HANGS or name != "leave")


async def run(sweep: Sweep, port: str, mode: Mode, fail_at: int, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """One run with one fault."""
    made: list[Faulty] = []

    def wrap(real: object) -> object:
        made.append(
            Faulty(real, fail_at=fail_at, mode=mode, fault=lambda: fault_of(port, made, mode), counts=lambda name: counts(name, mode))
        )
        return made[0]

    with monkeypatch.context() as patch:
        if port == "ledger":
            opening = app.open_ledger
            patch.setattr(app, "open_ledger", lambda *args, **more: wrap(opening(*args, **more)))
        else:
            reaching = app.open_chain

            async def reach(*args: object) -> object:
                return wrap(await reaching(*args))  # type: ignore[arg-type]

            patch.setattr(app, "open_chain", reach)
        node = sweep.net.new_node()
        life = asyncio.ensure_future(live(sweep, node))
        while not made and not life.done():
            await asyncio.sleep(0)
        waiting = asyncio.ensure_future(made[0].hanging.wait())
        async with asyncio.timeout(20):
            await asyncio.wait({life, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not life.done():  # the process is killed while it hangs
            for _ in range(20):  # but not between a socket and its owner inside asyncio.create_server
                await asyncio.sleep(0)
            life.cancel()
            await asyncio.wait({life})
        if not life.cancelled() and (error := life.exception()) is not None:
            assert isinstance(error, ChannelFault), error
        await node.stop()
    return made[0]


async def live(sweep: Sweep, node: Node) -> None:
    """A process that starts, serves the payer, and is there until the story is over."""
    await node.start()
    await sweep.story(node)


@pytest.mark.parametrize("mode", [Mode.BEFORE, Mode.AFTER, Mode.HANGS])
@pytest.mark.parametrize("port", ["ledger", "chain"])
async def test_a_node_recovers_from_a_fault_of_every_operation(
    net: Devnet, port: str, mode: Mode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """R3, R4, D10: whichever operation fails, books, chain and payer agree afterwards: captured is spent is delivered."""
    failed: list[str] = []
    folder = net.directory
    async with aiohttp.ClientSession() as http:
        for number in range(1, 400):
            sweep = Sweep(net, folder / f"run-{number}", http)
            write = EventStream.write

            def counted(self: EventStream, frames: bytes, *, sweep: Sweep = sweep, write: object = write) -> None:
                sweep.delivery.written += frames.count(TOKEN)
                write(self, frames)  # type: ignore[operator]

            opening = EventStream.open

            async def begun(self: EventStream, *, sweep: Sweep = sweep, opening: object = opening) -> object:
                sweep.delivery.streams += 1
                return await opening(self)  # type: ignore[operator]

            with monkeypatch.context() as patch:
                patch.setattr(EventStream, "write", counted)
                patch.setattr(EventStream, "open", begun)
                faulty = await run(sweep, port, mode, number, monkeypatch)
                await sweep.recover()
            if faulty.failed is None:
                assert sweep.delivery.read == TOKENS, "a story without a fault is told to its end"
                break
            failed.append(faulty.failed)
        else:
            pytest.fail("the story never ends")
    assert net.fatal is None
    assert len(failed) >= OPERATIONS_MIN[port]
    with capsys.disabled():
        print(f"\n{port} {mode}: {len(failed)} operations of {len(set(failed))} kinds")
