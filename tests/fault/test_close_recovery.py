"""A close is one decision: whatever happens to its transaction, the same amount is captured, once."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from channels import escrow
from channels.faults import ChannelFault, Reason
from channels.instants import UnixSeconds
from channels.intent import Intent, IntentState
from channels.model import Account, Phase
from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.tempo_tx import Call, decode
from channels.units import Units
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devnet import FUNDS, PATH_USD, Devnet, DevnetOptions
from mppnode.config.schema import LimitsConfig
from mppnode.payer.client import PayingClient, PaymentGivenUp
from mppnode.treasury.settler import SettlerLimits
from tests.support.builders import unwatched


@pytest.fixture
async def net() -> AsyncIterator[Devnet]:
    async with Devnet(DevnetOptions(tokens_per_second=10_000, limits=LimitsConfig(drain_s=0))) as running:
        yield running


@pytest.fixture
async def payer(net: Devnet) -> AsyncIterator[PayingClient]:
    async with aiohttp.ClientSession() as http:
        yield PayingClient(
            http,
            chain=RpcChain(HttpTransport(http, net.chain_url), net.clock, limits=RpcLimits()),
            signer=LocalSigner(net.payer_key),
            policy=PayerPolicy(net.payer, net.payer, frozenset({net.escrow}), frozenset({PATH_USD}), Units(10**6), Units(10**6), Units(10**6)),
            now=net.clock.now_millis,
            entropy=os.urandom,
        )


async def stream(payer: PayingClient, net: Devnet, tokens: int = 40) -> int:
    seen = 0
    body = {"model": "dev/story", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": tokens}
    async with payer.stream(net.chat_url, body) as events:
        async for data in events:
            if data != "[DONE]":
                seen += sum(bool(choice.get("delta", {}).get("content")) for choice in json.loads(data)["choices"])
    return seen


async def only_account(net: Devnet) -> Account:
    assert net.node.books is not None
    (account,) = await net.node.books.accounts()
    return account


async def until_closed(net: Devnet) -> Account:
    async with asyncio.timeout(20):
        while (account := await only_account(net)).phase is not Phase.CLOSED:
            await asyncio.sleep(0.01)
    return account


class Shaky:
    """The node's real chain, except that what is sent is sometimes lost: before it left, or its fate after it did."""

    def __init__(self, real: Any, *, lost: int = 0, silent: int = 0, refused: int = 0) -> None:
        self._real = real
        self.lost, self.silent, self.refused = lost, silent, refused
        self.sent = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def send(self, raw: bytes) -> None:
        self.sent += 1
        if self.refused:
            self.refused -= 1
            raise ChannelFault(Reason.CHAIN_REJECTED, detail="injected")
        if self.lost:
            self.lost -= 1
            raise ChannelFault(Reason.CHAIN_UNAVAILABLE, detail="injected")
        await self._real.send(raw)

    async def outcome(self, tx_hash: Any, *, valid_before: Any) -> Any:
        if self.silent:
            self.silent -= 1
            raise ChannelFault(Reason.CHAIN_UNAVAILABLE, detail="injected")
        return await self._real.outcome(tx_hash, valid_before=valid_before)


def shake(net: Devnet, *, wait_s: float = 0.0, **faults: int) -> Shaky:
    """Put a shaky chain under the node's settler, which then waits ``wait_s`` for an outcome."""
    assert net.node.treasury is not None
    settler = net.node.treasury.settler
    settler._chain = shaky = Shaky(settler._chain, **faults)  # type: ignore[assignment]
    settler._limits = SettlerLimits(wait_s=wait_s, poll_s=0.0, resend_s=0.0)
    return shaky


def assert_paid_exactly(net: Devnet, account: Account) -> None:
    assert account.close is not None
    assert account.close.capture == account.spent
    assert FUNDS - net.chain.balance(net.payer) == account.spent == net.chain.balance(net.payee) - FUNDS


@pytest.mark.parametrize("fault", ["lost", "silent"])
async def test_a_repeated_close_finishes_an_unanswered_one(net: Devnet, payer: PayingClient, fault: str) -> None:
    """The payer's repeat of a close whose answer was lost, sent or not, captures the same amount, once."""
    assert await stream(payer, net) == 40
    shake(net, **{fault: 1})
    assert await payer.close(net.chat_url) is not None
    account = await until_closed(net)
    assert_paid_exactly(net, account)
    assert len(await intents(net)) == 1, "one transaction, sent again"


class Patience:
    """Stands in for the closer's sleep: it waits until the payer has given up, then not at all."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.asked: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        await self.over.wait()
        await asyncio.sleep(0)


def patient(net: Devnet) -> Patience:
    assert net.node.treasury is not None
    net.node.treasury.closer._sleep = patience = Patience()
    return patience


async def intents(net: Devnet) -> list[Intent]:
    assert net.node.ledger is not None
    return list(await net.node.ledger.intents(active=False))


async def test_an_unanswered_close_is_finished_in_the_background(net: Devnet, payer: PayingClient) -> None:
    """When the payer has given up, the node goes on until the chain has answered."""
    await stream(payer, net)
    patience, shaky = patient(net), shake(net, silent=12)
    with pytest.raises(PaymentGivenUp):
        await payer.close(net.chat_url)
    patience.over.set()
    assert_paid_exactly(net, await until_closed(net))
    assert shaky.silent == 0
    assert patience.asked[0] == 2


async def test_a_crash_after_the_close_was_sent_is_recovered_at_start(net: Devnet, payer: PayingClient) -> None:
    """The chain closed the channel, the node died before it knew: the next start finds the transaction."""
    await stream(payer, net)
    patient(net)
    shake(net, silent=10**6)
    with pytest.raises(PaymentGivenUp):
        await payer.close(net.chat_url)
    assert (await only_account(net)).phase is Phase.CAPTURED
    await net.node.stop()
    net.node = net.new_node()
    await net.node.start()
    account = await until_closed(net)
    assert account.close is not None
    assert account.close.tx_hash is not None
    assert_paid_exactly(net, account)
    assert [intent.state for intent in await intents(net)] == [IntentState.FINAL]


async def test_a_rejected_close_reopens_the_channel(net: Devnet, payer: PayingClient) -> None:
    """When the chain surely will not include the close, the channel is usable again and can be closed later."""
    await stream(payer, net)
    shake(net, wait_s=5.0, refused=1)
    # The payer's machine repeats a refused close once by itself.
    closed = await payer.close(net.chat_url)
    assert closed is not None
    assert_paid_exactly(net, await until_closed(net))
    assert [intent.state for intent in await intents(net)] == [IntentState.DEAD, IntentState.FINAL]


async def test_a_used_channel_survives_a_restart(net: Devnet, payer: PayingClient) -> None:
    """Accepted, spent and the ladder are on disk: after a restart the same channel pays for another stream."""
    await stream(payer, net)
    before = await only_account(net)
    port = int(net.node.url.rpartition(":")[2])
    await net.node.stop()
    net.node = net.new_node(port)
    await net.node.start()
    assert unwatched(await only_account(net)) == unwatched(before)
    assert await stream(payer, net) == 40
    closed = await payer.close(net.chat_url)
    assert closed is not None
    account = await only_account(net)
    assert account.spent > before.spent
    assert_paid_exactly(net, account)


async def test_a_close_of_ours_the_ledger_knows_nothing_of_is_found(net: Devnet, payer: PayingClient) -> None:
    """Our transaction reverts because one of ours landed just before it: that is a success, not a refusal."""
    await stream(payer, net)
    assert net.node.treasury is not None
    settler = net.node.treasury.settler

    class Late(Shaky):
        """The same call, sent in a transaction of its own just before: as by a watchtower on a lost ledger."""

        async def send(self, raw: bytes) -> None:
            call = decode(raw).tx.calls[0]
            earlier = await self.prepare(net.payee, (call,), fee_token=PATH_USD, entropy=os.urandom(8))
            assert (await self.broadcast(earlier.sign(net.payee_key).raw)).succeeded
            await self._real.send(raw)

    settler._chain = Late(settler._chain)  # type: ignore[assignment]
    assert await payer.close(net.chat_url) is not None
    assert_paid_exactly(net, await until_closed(net))
    assert [intent.state for intent in await intents(net)] == [IntentState.REVERTED]


async def test_a_rejected_repeat_never_reopens_the_channel(net: Devnet, payer: PayingClient) -> None:
    """After an attempt with unknown outcome a refusal proves nothing: the first transaction may still be mined."""
    await stream(payer, net)
    patience = patient(net)
    shaky = shake(net, silent=3)
    phases: list[Phase] = []
    books = net.node.books
    assert books is not None
    books.subscribe(lambda account: phases.append(account.phase))
    shaky.lost = 1  # the first attempt's fate is unknown; every later sending of its bytes is refused
    with pytest.raises(PaymentGivenUp):
        await payer.close(net.chat_url)
    shaky.refused = 2
    patience.over.set()
    account = await until_closed(net)
    assert_paid_exactly(net, account)
    assert phases.index(Phase.CLOSING) < phases.index(Phase.CAPTURED)
    assert Phase.OPEN not in phases[phases.index(Phase.CLOSING) :]


async def test_a_withdrawal_is_not_booked_as_our_capture(net: Devnet, payer: PayingClient) -> None:
    """When the payer got out first, the account is closed without a transaction of ours and without a receipt."""
    await stream(payer, net)
    account = await only_account(net)
    assert net.node.treasury is not None
    settler = net.node.treasury.settler
    real = settler.bring

    async def overtaken(*close: Any, **more: Any) -> Any:
        """The payer withdraws between the fixing of the capture and the close."""
        await withdraw(net, account)
        return await real(*close, **more)

    settler.bring = overtaken  # type: ignore[method-assign]
    with pytest.raises(PaymentGivenUp):
        await payer.close(net.chat_url)
    closed = await only_account(net)
    assert closed.phase is Phase.CLOSED
    assert closed.close is None or closed.close.tx_hash is None
    assert net.chain.balance(net.payer) == FUNDS


async def withdraw(net: Devnet, account: Account) -> None:
    """The payer's exit: request, grace, withdraw, each mined on the development chain."""
    async with aiohttp.ClientSession() as http:
        chain = RpcChain(HttpTransport(http, net.chain_url), net.clock, limits=RpcLimits())
        for data in (escrow.encode_request_close(account.descriptor), escrow.encode_withdraw(account.descriptor)):
            call = Call(account.escrow.address, data)
            tx = await chain.prepare(net.payer, (call,), fee_token=PATH_USD, entropy=os.urandom(8))
            valid = replace(tx, valid_before=UnixSeconds(net.chain._now() + 20))
            assert (await chain.broadcast(valid.sign(net.payer_key).raw)).succeeded
            net.chain.travel(901)
