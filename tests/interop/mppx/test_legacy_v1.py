"""The reference client's v1 session manager on the node that also serves v2."""

from __future__ import annotations

import pytest

from channels.descriptor import SessionProtocol
from mppnode.cli.devnet import FUNDS, V1_ESCROW, Devnet, DevnetOptions
from tests.interop.mppx.rig import (
    ReferenceClient,
    captured_on_chain,
    chat,
    only_account,
    post,
    price_pico,
    require_agreement,
    units_of,
)

pytestmark = pytest.mark.interop


async def test_stream_and_close(payer: ReferenceClient) -> None:
    """A v1 stream is delivered and charged like any other; the close pays a voucher that is not above what was spent."""
    async with Devnet(DevnetOptions()) as net:
        request = chat(300)
        await payer.make(net, "legacy", maxDeposit="0.01")
        stream = payer.start("sse", name="payer", url=net.chat_url, body=request)
        await stream.end()
        account = await only_account(net.node.books)
        assert len(stream.text.split()) == 300
        assert int(stream.receipt["spent"]) == account.spent == units_of(price_pico(request))
        assert account.escrow.protocol is SessionProtocol.V1
        assert account.escrow.address == V1_ESCROW
        assert account.chain.deposit == 10_000
        assert {wire.status for wire in payer.sent("voucher")} == {204}

        closed = await payer.run("close", name="payer")
        (closing,) = payer.sent("close")
        assert closed["receipt"]["acceptedCumulative"] == closing.credential["payload"]["cumulativeAmount"]
        account = await only_account(net.node.books)
        captured = await captured_on_chain(net, account)
        assert captured in [rung.cumulative for rung in account.ladder]
        await require_agreement(net, [account])


async def test_requests_in_turn_and_a_buffered_one(payer: ReferenceClient) -> None:
    """A v1 channel pays for several requests, each with a voucher of its own, with and without a stream."""
    async with Devnet(DevnetOptions()) as net:
        requests = [chat(40), chat(50, stream=False), chat(60)]
        await payer.make(net, "legacy", maxDeposit="0.01")
        for request in requests:
            op = "sse" if request["stream"] else "fetch"
            await payer.run(op, name="payer", url=net.chat_url, body=request)
        assert len(payer.sent("open")) == 1
        account = await only_account(net.node.books)
        assert account.owed_pico == price_pico(*requests)
        assert account.accepted == 3_000
        await payer.run("close", name="payer")
        await require_agreement(net, [await only_account(net.node.books)])


async def test_deposit_runs_out(payer: ReferenceClient) -> None:
    """A v1 payer cannot top up: its stream ends with its deposit, paid in full and with a receipt, not with a demand."""
    async with Devnet(DevnetOptions()) as net:
        await payer.make(net, "legacy", maxDeposit="0.0015")
        stream = payer.start("sse", name="payer", url=net.chat_url, body=chat(300))
        await stream.end()
        account = await only_account(net.node.books)
        words = len(stream.text.split())
        assert 0 < words < 300
        assert account.accepted == account.chain.deposit == 1_500
        # The provider was cut off before it reported its usage: every word counts, the prompt by our lower estimate.
        assert words * 10 <= account.spent <= units_of(price_pico(chat(words)))
        assert account.spent == int(stream.receipt["spent"])
        assert all(int(wire.credential["payload"]["cumulativeAmount"]) <= 1_500 for wire in payer.sent("voucher"))
        await payer.run("close", name="payer")
        await require_agreement(net, [await only_account(net.node.books)])


async def test_use_after_close(payer: ReferenceClient) -> None:
    """A closed v1 channel answers 410, and the payer's next manager opens another one."""
    async with Devnet(DevnetOptions()) as net:
        assert net.node.books is not None
        await payer.make(net, "legacy", maxDeposit="0.01")
        await payer.run("sse", name="payer", url=net.chat_url, body=chat(300))
        await payer.run("close", name="payer")
        used = payer.sent("voucher")[-1]
        refused = await post(net.chat_url, used.authorization)
        assert (refused.status, refused.code) == (410, "channel_finalized")
        await payer.make(net, "legacy", name="again", maxDeposit="0.01")
        await payer.run("sse", name="again", url=net.chat_url, body=chat(30))
        await payer.run("close", name="again")
        assert len(payer.sent("open")) == 2
        await require_agreement(net, await net.node.books.accounts())


async def test_v1_and_v2_at_once(payer: ReferenceClient) -> None:
    """Payers of both protocols stream from one node at the same time, each out of its own channel."""
    async with Devnet(DevnetOptions()) as net:
        assert net.node.books is not None
        await payer.make(net, "manager", name="new")
        await payer.make(net, "legacy", name="old", maxDeposit="0.01")
        streams = [payer.start("sse", name=name, url=net.chat_url, body=chat(300)) for name in ("new", "old")]
        for stream in streams:
            await stream.end()
            assert len(stream.text.split()) == 300
        for name in ("new", "old"):
            await payer.run("close", name=name)
        accounts = await net.node.books.accounts()
        assert {account.escrow.protocol for account in accounts} == {SessionProtocol.V1, SessionProtocol.V2}
        assert {account.owed_pico for account in accounts} == {price_pico(chat(300))}
        await require_agreement(net, accounts)


async def test_deposit_too_small_to_begin(payer: ReferenceClient) -> None:
    """A v1 payer whose cap is below what the node asks for is refused before its transaction is broadcast."""
    async with Devnet(DevnetOptions()) as net:
        assert net.node.books is not None
        await payer.make(net, "legacy", maxDeposit="0.0005")
        ended = await payer.run("sse", name="payer", url=net.chat_url, body=chat(300))
        assert ended["chunks"] == 0
        # The client takes its channel for open whatever the answer was, and then pays on a channel that never was.
        assert {wire.status for wire in payer.sent("open")} == {402}
        assert {wire.status for wire in payer.sent("voucher")} == {410}
        assert await net.node.books.accounts() == []
        assert net.chain.balance(net.payer) == FUNDS
