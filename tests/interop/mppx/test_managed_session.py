"""The reference client's session manager: whole streams, top-ups, several requests, interruptions, the end."""

from __future__ import annotations

import pytest

from channels.model import Phase
from channels.units import Units
from mppnode.cli.devnet import Devnet, DevnetOptions
from mppnode.config.schema import SessionConfig
from tests.interop.mppx.rig import (
    ClientFailed,
    ReferenceClient,
    chat,
    encode_credential,
    only_account,
    post,
    price_pico,
    require_agreement,
    units_of,
    voucher_payload,
)

pytestmark = pytest.mark.interop

SMALL_DEPOSITS = DevnetOptions(
    session=SessionConfig(min_deposit=Units(1_000), suggested_deposit=Units(1_000), chain_ttl_s=0)
)


async def test_stream_from_open_to_close(payer: ReferenceClient) -> None:
    """A managed stream is delivered whole, charged exactly and settled for what was spent; the rest comes back."""
    async with Devnet(DevnetOptions()) as net:
        request = chat(300)
        await payer.make(net, "manager")
        stream = payer.start("sse", name="payer", url=net.chat_url, body=request)
        ended = await stream.end()
        account = await only_account(net.node.books)
        expected = units_of(price_pico(request))
        assert len(stream.text.split()) == 300
        assert int(stream.receipt["spent"]) == int(ended["state"]["spent"]) == account.spent == expected
        assert int(ended["cumulative"]) == account.accepted

        closed = await payer.run("close", name="payer")
        assert int(closed["receipt"]["spent"]) == expected
        assert [wire.action for wire in payer.wires][:2] == [None, "open"]
        assert {wire.status for wire in payer.sent("voucher")} == {204}
        await require_agreement(net, [await only_account(net.node.books)])


async def test_top_up_in_mid_stream(payer: ReferenceClient) -> None:
    """A deposit smaller than the response is topped up on chain while the stream waits, and no word is lost."""
    async with Devnet(SMALL_DEPOSITS) as net:
        request = chat(300)
        await payer.make(net, "manager")
        stream = payer.start("sse", name="payer", url=net.chat_url, body=request)
        ended = await stream.end()
        top_ups = payer.sent("topUp")
        added = sum(int(wire.credential["payload"]["additionalDeposit"]) for wire in top_ups)
        account = await only_account(net.node.books)
        assert len(stream.text.split()) == 300
        assert top_ups
        assert {wire.status for wire in top_ups} == {204}
        assert account.chain.deposit == 1_000 + added == int(ended["state"]["deposit"])
        assert account.spent == units_of(price_pico(request))

        await payer.run("close", name="payer")
        assert net.provider.requests == 1
        await require_agreement(net, [await only_account(net.node.books)])


async def test_top_up_by_hand_between_requests(payer: ReferenceClient) -> None:
    """A top-up asked for by the application counts once, with its transaction in the receipt."""
    async with Devnet(SMALL_DEPOSITS) as net:
        await payer.make(net, "manager")
        await payer.run("sse", name="payer", url=net.chat_url, body=chat(20))
        added = await payer.run("topUp", name="payer", amount="0.005")
        account = await only_account(net.node.books)
        (wire,) = payer.sent("topUp")
        assert account.chain.deposit == 6_000
        assert wire.receipt is not None
        assert wire.receipt.tx_hash is not None
        assert added["receipt"]["txHash"] == "0x" + wire.receipt.tx_hash.hex()

        again = await post(net.chat_url, wire.authorization)
        assert (again.status, again.receipt.tx_hash) == (204, wire.receipt.tx_hash)
        assert (await only_account(net.node.books)).chain.deposit == 6_000
        await payer.run("close", name="payer")
        await require_agreement(net, [await only_account(net.node.books)])


async def test_several_requests_on_one_channel(payer: ReferenceClient) -> None:
    """Two streams and a buffered answer share one channel; their exact prices add up before they are rounded."""
    async with Devnet(DevnetOptions()) as net:
        requests = [chat(33), chat(47), chat(21, stream=False)]
        await payer.make(net, "manager")
        for request in requests[:2]:
            await payer.run("sse", name="payer", url=net.chat_url, body=request)
        answered = await payer.run("fetch", name="payer", url=net.chat_url, body=requests[2])
        assert answered["status"] == 200
        assert len(payer.sent("open")) == 1
        assert {wire.session for wire in payer.wires[3:] if wire.action is None} == {answered["channelId"]}
        account = await only_account(net.node.books)
        assert account.owed_pico == price_pico(*requests)

        await payer.run("close", name="payer")
        await require_agreement(net, [await only_account(net.node.books)])


async def test_second_manager_takes_the_channel_over(payer: ReferenceClient) -> None:
    """A client that was restarted with its channel store pays on; nothing is opened twice."""
    async with Devnet(DevnetOptions()) as net:
        await payer.make(net, "manager", name="before", store={})
        await payer.run("sse", name="before", url=net.chat_url, body=chat(30))
        await payer.make(net, "manager", name="after", store=dict(payer.store))
        await payer.run("sse", name="after", url=net.chat_url, body=chat(50))
        await payer.run("close", name="after")
        assert len(payer.sent("open")) == 1
        account = await only_account(net.node.books)
        assert account.spent == units_of(price_pico(chat(30), chat(50)))
        await require_agreement(net, [account])


async def test_stream_given_up_by_the_client(payer: ReferenceClient) -> None:
    """A client that stops reading pays for no more than was sent, and goes on with its channel."""
    async with Devnet(DevnetOptions(tokens_per_second=500)) as net:
        await payer.make(net, "manager")
        await payer.run("sse", name="payer", url=net.chat_url, body=chat(1_000, model="dev/never-ends"), stopAfter=20)
        stream = payer.start("sse", name="payer", url=net.chat_url, body=chat(25))
        await stream.end()
        closed = await payer.run("close", name="payer")
        account = await only_account(net.node.books)
        # It read the opening chunk and 19 words; the last of them may still have been under way when it left.
        assert account.spent >= 18 * 10 + units_of(price_pico(chat(25)))
        assert account.spent <= units_of(price_pico(chat(1_000), chat(25)))
        assert int(closed["receipt"]["spent"]) == account.spent
        assert len(stream.text.split()) == 25
        assert net.provider.live == 0
        await require_agreement(net, [account])


async def test_the_cap_of_the_client_holds(payer: ReferenceClient) -> None:
    """A client that may sign no more gets what its cap buys; the node charges no unit beyond it and the close works."""
    async with Devnet(DevnetOptions()) as net:
        await payer.make(net, "manager", maxDeposit="0.001")
        stream = payer.start("sse", name="payer", url=net.chat_url, body=chat(300))
        with pytest.raises(ClientFailed, match="exceeds local maxDeposit 1000"):
            await stream.end()
        closed = await payer.run("close", name="payer")
        account = await only_account(net.node.books)
        assert account.accepted == account.ladder[-1].cumulative == 1_000
        assert 0 < account.spent <= 1_000
        assert int(closed["receipt"]["spent"]) == account.spent
        await require_agreement(net, [account])


async def test_url_with_a_query_in_mid_stream(payer: ReferenceClient) -> None:
    """T-43: vouchers sent to a URL with a query manage the running stream; they do not start a second one."""
    async with Devnet(DevnetOptions()) as net:
        request = chat(300)
        await payer.make(net, "manager")
        stream = payer.start("sse", name="payer", url=f"{net.chat_url}?trace=1&x=%20", body=request)
        await stream.end()
        assert len(stream.text.split()) == 300
        assert payer.sent("voucher")
        assert {(wire.url.partition("?")[2], wire.status) for wire in payer.sent("voucher")} == {("trace=1&x=%20", 204)}
        assert net.provider.requests == 1
        await payer.run("close", name="payer")
        account = await only_account(net.node.books)
        assert account.owed_pico == price_pico(request)
        await require_agreement(net, [account])


async def test_request_after_the_close(payer: ReferenceClient) -> None:
    """After a close the old channel answers 410 for ever; the closed manager refuses, and a new one opens a channel."""
    async with Devnet(DevnetOptions()) as net:
        assert net.node.books is not None
        await payer.make(net, "manager")
        first = await payer.run("sse", name="payer", url=net.chat_url, body=chat(30))
        await payer.run("close", name="payer")
        opened, closing = payer.sent("open")[0], payer.sent("close")[0]
        challenge = {**closing.credential, "payload": voucher_payload(net, opened, 5_000)}
        refused = await post(net.chat_url, encode_credential(challenge))
        assert (refused.status, refused.code) == (410, "channel_finalized")
        repeated = await post(net.chat_url, closing.authorization)
        assert closing.receipt is not None
        assert (repeated.status, repeated.receipt.tx_hash) == (204, closing.receipt.tx_hash)

        with pytest.raises(ClientFailed, match="closed"):
            await payer.run("sse", name="payer", url=net.chat_url, body=chat(40))
        await payer.make(net, "manager", name="again")
        second = await payer.run("sse", name="again", url=net.chat_url, body=chat(40))
        assert second["channelId"] != first["channelId"]
        await payer.run("close", name="again")
        accounts = await net.node.books.accounts()
        assert sorted(account.spent for account in accounts) == [units_of(price_pico(chat(n))) for n in (30, 40)]
        await require_agreement(net, accounts)


async def test_stored_channel_closed_by_somebody_else(payer: ReferenceClient) -> None:
    """A client whose stored channel is gone learns it from a 410, forgets it and opens a new one by itself."""
    async with Devnet(DevnetOptions()) as net:
        assert net.node.books is not None
        await payer.make(net, "manager", name="one", store={})
        await payer.run("sse", name="one", url=net.chat_url, body=chat(30))
        await payer.make(net, "manager", name="two", store=dict(payer.store))
        await payer.run("close", name="one")
        stream = payer.start("sse", name="two", url=net.chat_url, body=chat(40))
        await stream.end()
        assert len(stream.text.split()) == 40
        assert [wire.status for wire in payer.sent("voucher", body=True)] == [410]
        assert len(payer.sent("open")) == 2
        await payer.run("close", name="two")
        accounts = await net.node.books.accounts()
        assert {account.phase for account in accounts} == {Phase.CLOSED}
        await require_agreement(net, accounts)
