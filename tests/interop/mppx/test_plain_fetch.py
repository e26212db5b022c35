"""The reference client's payment-aware fetch: single requests, repeated credentials, many at once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from channels.instants import UnixMillis
from channels.units import Units
from channels.wire.receipt import SessionReceipt
from channels.wire.receipt import decode as decode_receipt
from mppnode.cli.devnet import Devnet, DevnetOptions
from mppnode.cli.devprovider_server import Gate
from tests.interop.mppx.rig import (
    ReferenceClient,
    Wire,
    answer_with,
    chat,
    only_account,
    post,
    price_pico,
    require_agreement,
    text_of,
    units_of,
    voucher_payload,
)
from tests.support.builders import unwatched

pytestmark = pytest.mark.interop


def timeless(receipt: SessionReceipt) -> SessionReceipt:
    """A receipt without the moment it was written."""
    return replace(receipt, timestamp_ms=UnixMillis(0))


def data_of(text: str) -> list[str]:
    """The data lines of an event stream."""
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


async def close(net: Devnet, opened: Wire) -> None:
    """Settle a channel as its payer: the plain fetch has no close of its own, so this credential is ours."""
    account = await only_account(net.node.books)
    challenge = (await post(net.chat_url)).challenge()
    payload = voucher_payload(net, opened, account.accepted, action="close")
    closed = await post(net.chat_url, answer_with(challenge, payload))
    assert closed.status == 204
    await require_agreement(net, [await only_account(net.node.books)])


async def test_buffered_answer(payer: ReferenceClient) -> None:
    """A request without ``stream`` is paid with one credential and charged by its usage; its receipt says so."""
    async with Devnet(DevnetOptions()) as net:
        request = chat(40, stream=False)
        await payer.make(net, "mppx")
        answered = await payer.run("fetch", name="payer", url=net.chat_url, body=request)
        document = json.loads(answered["text"])
        receipt = decode_receipt(answered["headers"]["payment-receipt"])
        expected = units_of(price_pico(request))
        assert answered["status"] == 200
        assert document["usage"]["completion_tokens"] == len(document["choices"][0]["message"]["content"].split()) == 40
        assert receipt.spent == expected == (await only_account(net.node.books)).spent
        assert [(wire.action, wire.status) for wire in payer.wires] == [(None, 402), ("open", 200)]
        await close(net, payer.sent("open")[0])


async def test_streamed_answer(payer: ReferenceClient) -> None:
    """The plain fetch hands the stream on as it is, pays for it in the middle and hides the payment events."""
    async with Devnet(DevnetOptions()) as net:
        request = chat(300)
        await payer.make(net, "mppx")
        answered = await payer.run("fetch", name="payer", url=net.chat_url, body=request)
        data = data_of(answered["text"])
        assert len(text_of(data).split()) == 300
        assert data[-1] == "[DONE]"
        assert "payment-need-voucher" not in answered["text"]
        assert {wire.status for wire in payer.sent("voucher")} == {204}
        assert (await only_account(net.node.books)).spent == units_of(price_pico(request))
        await close(net, payer.sent("open")[0])


async def test_same_voucher_twice(payer: ReferenceClient) -> None:
    """The same bodyless voucher is answered 204 twice with the same receipt, and buys nothing by itself."""
    async with Devnet(DevnetOptions()) as net:
        await payer.make(net, "mppx")
        await payer.run("fetch", name="payer", url=net.chat_url, body=chat(40, stream=False))
        (opened,) = payer.sent("open")
        challenge = (await post(net.chat_url)).challenge()
        voucher = answer_with(challenge, voucher_payload(net, opened, 4_000))
        before = await only_account(net.node.books)
        first = await post(net.chat_url, voucher)
        between = await only_account(net.node.books)
        second = await post(net.chat_url, voucher)
        after = await only_account(net.node.books)
        assert (first.status, second.status) == (204, 204)
        assert timeless(first.receipt) == timeless(second.receipt)
        assert first.receipt.accepted == 4_000 == after.accepted
        assert unwatched(between) == unwatched(after)
        assert (after.spent, after.owed_pico) == (before.spent, before.owed_pico)
        assert net.provider.requests == 1
        await close(net, opened)


async def test_used_credential_buys_nothing(payer: ReferenceClient) -> None:
    """A credential that has bought a response is refused for another, with and without a stream, and changes nothing."""
    async with Devnet(DevnetOptions()) as net:
        await payer.make(net, "mppx")
        for stream in (False, True):
            await payer.run("fetch", name="payer", url=net.chat_url, body=chat(30, stream=stream))
        before, served = await only_account(net.node.books), net.provider.requests
        for used in (payer.sent("open")[0], payer.sent("voucher", body=True)[0]):
            for stream in (False, True):
                again = await post(net.chat_url, used.authorization, chat(30, stream=stream))
                assert again.status == 402
                assert again.code in ("credential_used", "voucher_too_low")
                assert "Payment-Receipt" not in again.headers
        after = await only_account(net.node.books)
        assert (after.owed_pico, after.accepted, after.holds) == (before.owed_pico, before.accepted, before.holds)
        assert net.provider.requests == served
        await close(net, payer.sent("open")[0])


async def test_first_requests_in_parallel(payer: ReferenceClient) -> None:
    """T-27: five first requests at once open one channel; all of them are answered and charged once each."""
    async with Devnet(DevnetOptions()) as net:
        requests = [chat(20 + number, stream=False) for number in range(5)]
        await payer.make(net, "mppx")
        running = [payer.start("fetch", name="payer", url=net.chat_url, body=request) for request in requests]
        answers = [await operation.end() for operation in running]
        assert [answer["status"] for answer in answers] == [200] * 5
        assert len(payer.sent("open")) == 1
        account = await only_account(net.node.books)
        assert account.owed_pico == price_pico(*requests)
        await close(net, payer.sent("open")[0])


async def test_buffered_answer_beside_a_stream(payer: ReferenceClient) -> None:
    """A buffered request on the channel of a running stream is answered, and the stream goes on to its end."""
    async with Devnet(DevnetOptions()) as net:
        net.provider.gate = Gate(lent=1)
        await payer.make(net, "mppx")
        stream = payer.start("fetch", name="payer", url=net.chat_url, body=chat(50))
        await stream.until("headers")
        await net.provider.gate.release(20)
        answered = await payer.run("fetch", name="payer", url=net.chat_url, body=chat(30, stream=False))
        assert answered["status"] == 200
        await net.provider.gate.release(30)
        ended = await stream.end()
        assert len(text_of(data_of(ended["text"])).split()) == 50
        account = await only_account(net.node.books)
        assert account.owed_pico == price_pico(chat(50), chat(30))
        await close(net, payer.sent("open")[0])


async def test_newer_stream_ends_the_older(payer: ReferenceClient) -> None:
    """T-57: a channel carries one stream; the older one ends with its receipt, and both are charged for their words."""
    async with Devnet(DevnetOptions()) as net:
        net.provider.gate = Gate(lent=1)
        await payer.make(net, "mppx")
        older = payer.start("fetch", name="payer", url=net.chat_url, body=chat(50))
        await older.until("headers")
        await net.provider.gate.release(20)
        newer = payer.start("fetch", name="payer", url=net.chat_url, body=chat(30))
        first = await older.end()
        await net.provider.gate.release(10)
        second = await newer.end()
        words = [len(text_of(data_of(answer["text"])).split()) for answer in (first, second)]
        assert '"superseded"' in first["text"]
        assert words[1] == 30
        account = await only_account(net.node.books)
        assert words[0] <= 20
        assert 10 * sum(words) <= account.spent <= units_of(price_pico(chat(words[0]), chat(30)))
        assert len(payer.sent("open")) == 1
        await close(net, payer.sent("open")[0])


async def test_challenge_edited_by_one_character(payer: ReferenceClient) -> None:
    """A credential whose challenge differs in one character anywhere is refused, and nothing changes."""
    async with Devnet(DevnetOptions()) as net:
        await payer.make(net, "mppx")
        await payer.run("fetch", name="payer", url=net.chat_url, body=chat(30, stream=False))
        (opened,) = payer.sent("open")
        before, served = await only_account(net.node.books), net.provider.requests
        challenge = (await post(net.chat_url, body=chat(30))).challenge()
        voucher = voucher_payload(net, opened, Units(before.accepted + 1_000))
        fields = ("id", "realm", "method", "intent", "request", "expires", "opaque")
        for name in fields:
            value = getattr(challenge, name)
            for at in (0, len(value) // 2, len(value) - 2):
                other = "0" if value[at] != "0" else "1"
                edited = replace(challenge, **{name: value[:at] + other + value[at + 1 :]})
                for body in (None, chat(30)):
                    refused = await post(net.chat_url, answer_with(edited, voucher), body)
                    assert refused.status == 402, (name, at)
                    assert refused.code in ("invalid_challenge", "malformed_credential"), (name, at)
                    assert unwatched(await only_account(net.node.books)) == unwatched(before), (name, at)
        assert net.provider.requests == served
        honest = await post(net.chat_url, answer_with(challenge, voucher), chat(30))
        assert honest.status == 200
        await close(net, opened)
