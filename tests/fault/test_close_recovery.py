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
from channels.chain import Confirmed
from channels.faults import ChannelFault, Reason
from channels.instants import UnixSeconds
from channels.model import Account, Phase
from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.tempo_tx import Call
from channels.units import Units
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devnet import FUNDS, PATH_USD, Devnet, DevnetOptions
from mppnode.config.schema import LimitsConfig
from mppnode.payer.client import PayingClient, PaymentGivenUp


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


class Broken:
    """The real intents whose `close` fails some times, before or after its effect; everything else passes through."""

    def __init__(self, real: Any, reason: Reason, *, after: bool, times: int) -> None:
        self._real, self._reason, self._after, self._times = real, reason, after, times
        self.closes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def close(self, account: Account) -> Confirmed:
        self.closes += 1
        if self.closes > self._times:
            return await self._real.close(account)
        if self._after and self.closes == 1:
            await self._real.close(account)
        raise ChannelFault(self._reason, detail="injected")


def break_close(net: Devnet, reason: Reason, *, after: bool, times: int = 1) -> Broken:
    assert net.node.rail is not None
    broken = Broken(net.node.rail._intents, reason, after=after, times=times)
    net.node.rail._intents = broken
    return broken


def assert_paid_exactly(net: Devnet, account: Account) -> None:
    assert account.close is not None
    assert account.close.capture == account.spent
    assert FUNDS - net.chain.balance(net.payer) == account.spent == net.chain.balance(net.payee) - FUNDS


@pytest.mark.parametrize(("reason", "after"), [(Reason.CHAIN_OUTCOME_UNKNOWN, True), (Reason.CHAIN_OUTCOME_UNKNOWN, False), (Reason.CHAIN_UNAVAILABLE, False)])
async def test_a_repeated_close_finishes_an_unanswered_one(net: Devnet, payer: PayingClient, reason: Reason, after: bool) -> None:
    """The payer's repeat of a close whose answer was lost, sent or not, captures the same amount, once."""
    assert await stream(payer, net) == 40
    broken = break_close(net, reason, after=after)
    assert await payer.close(net.chat_url) is not None
    account = await until_closed(net)
    assert broken.closes == 2
    assert_paid_exactly(net, account)


class Patience:
    """Stands in for the node's sleep: it waits until the payer has given up, then not at all."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.asked: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        await self.over.wait()
        await asyncio.sleep(0)


async def test_an_unanswered_close_is_finished_in_the_background(net: Devnet, payer: PayingClient) -> None:
    """When the payer has given up, the node goes on until the chain has answered."""
    await stream(payer, net)
    assert net.node.rail is not None
    net.node.rail._sleep = patience = Patience()
    broken = break_close(net, Reason.CHAIN_UNAVAILABLE, after=False, times=6)
    with pytest.raises(PaymentGivenUp):
        await payer.close(net.chat_url)
    patience.over.set()
    assert_paid_exactly(net, await until_closed(net))
    assert broken.closes == 7
    assert patience.asked[0] == 2


async def test_a_crash_after_the_close_was_sent_is_recovered_at_start(net: Devnet, payer: PayingClient) -> None:
    """The chain closed the channel, the node died before it knew: the next start finds the transaction."""
    await stream(payer, net)
    assert net.node.rail is not None
    break_close(net, Reason.CHAIN_OUTCOME_UNKNOWN, after=True, times=100)
    asleep = asyncio.Event()

    async def for_ever(_: float) -> None:
        await asleep.wait()

    net.node.rail._sleep = for_ever
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


async def test_a_rejected_close_reopens_the_channel(net: Devnet, payer: PayingClient) -> None:
    """When the chain surely will not include the close, the channel is usable again and can be closed later."""
    await stream(payer, net)
    break_close(net, Reason.CHAIN_REJECTED, after=False)
    # The payer's machine repeats a refused close once by itself.
    closed = await payer.close(net.chat_url)
    assert closed is not None
    assert_paid_exactly(net, await until_closed(net))


async def test_a_used_channel_survives_a_restart(net: Devnet, payer: PayingClient) -> None:
    """Accepted, spent and the ladder are on disk: after a restart the same channel pays for another stream."""
    await stream(payer, net)
    before = await only_account(net)
    port = int(net.node.url.rpartition(":")[2])
    await net.node.stop()
    net.node = net.new_node(port)
    await net.node.start()
    assert await only_account(net) == before
    assert await stream(payer, net) == 40
    closed = await payer.close(net.chat_url)
    assert closed is not None
    account = await only_account(net)
    assert account.spent > before.spent
    assert_paid_exactly(net, account)


async def test_an_earlier_attempt_that_lands_first_is_found(net: Devnet, payer: PayingClient) -> None:
    """Our second transaction reverts because our first one was mined just before it: that is a success, not a refusal."""
    await stream(payer, net)
    assert net.node.rail is not None
    desk = net.node.rail._intents
    real = desk._chain

    class Late:
        """The chain as seen by a node whose first close was mined between its look and its second transaction."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        async def broadcast(self, raw: bytes) -> Any:
            await real.broadcast(raw)
            raise ChannelFault(Reason.CHAIN_REJECTED, detail="reverted")

    desk._chain = Late()
    assert await payer.close(net.chat_url) is not None
    assert_paid_exactly(net, await until_closed(net))


async def test_a_rejected_repeat_never_reopens_the_channel(net: Devnet, payer: PayingClient) -> None:
    """After an attempt with unknown outcome a refusal proves nothing: the first transaction may still be mined."""
    await stream(payer, net)
    assert net.node.rail is not None
    real = net.node.rail._intents
    reasons = [Reason.CHAIN_OUTCOME_UNKNOWN, Reason.CHAIN_REJECTED, Reason.CHAIN_REJECTED]
    phases: list[Phase] = []

    class Doubtful:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        async def close(self, account: Account) -> Confirmed:
            phases.append((await only_account(net)).phase)
            if reasons:
                raise ChannelFault(reasons.pop(0), detail="injected")
            return await real.close(account)

    net.node.rail._intents = Doubtful()
    net.node.rail._sleep = patience = Patience()
    with pytest.raises(PaymentGivenUp):
        await payer.close(net.chat_url)
    patience.over.set()
    assert_paid_exactly(net, await until_closed(net))
    assert set(phases) == {Phase.CAPTURED}


async def test_a_withdrawal_is_not_booked_as_our_capture(net: Devnet, payer: PayingClient) -> None:
    """When the payer got out first, the account is closed without a transaction of ours and without a receipt."""
    await stream(payer, net)
    account = await only_account(net)
    assert net.node.rail is not None
    real = net.node.rail._intents

    class Overtaken:
        """The payer withdraws between the fixing of the capture and the close."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        async def close(self, fixed: Account) -> Confirmed:
            await withdraw(net, account)
            return await real.close(fixed)

    net.node.rail._intents = Overtaken()
    with pytest.raises(PaymentGivenUp):
        await payer.close(net.chat_url)
    closed = await only_account(net)
    assert closed.phase is Phase.CLOSED
    assert closed.close is not None
    assert closed.close.tx_hash is None
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
