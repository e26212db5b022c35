"""Every 402 the node produces, read by the reference client: it understands each one and pays its way out of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from channels.faults import Reason
from channels.instants import UnixMillis, UnixSeconds
from channels.units import Units
from channels.wire.problems import PROBLEMS
from mppnode.chain.devchain import RpcRefusal
from mppnode.cli.devnet import FUNDS, Devnet, DevnetOptions
from mppnode.config.schema import SessionConfig
from mppnode.kernel.clock import SystemClock
from tests.interop.mppx.rig import (
    Answer,
    ReferenceClient,
    Wire,
    answer_with,
    chat,
    only_account,
    post,
    price_pico,
    require_agreement,
    units_of,
    voucher_payload,
)
from tests.support.builders import unwatched

pytestmark = pytest.mark.interop

REQUEST = chat(40, stream=False)


class ShiftedClock(SystemClock):
    """The machine's clock, moved forward."""

    def __init__(self) -> None:
        self.offset_s = 0

    def now(self) -> UnixSeconds:
        return UnixSeconds(super().now() + self.offset_s)

    def now_millis(self) -> UnixMillis:
        return UnixMillis(super().now_millis() + 1000 * self.offset_s)

    def monotonic(self) -> float:
        return super().monotonic() + self.offset_s


@dataclass(frozen=True)
class Refused:
    """One way to be refused: the header, the request it comes with, and the reason to expect."""

    reason: Reason
    authorization: str | None
    body: Mapping[str, object]


async def refusals(net: Devnet, opened: Wire, used: Wire) -> list[Refused]:
    """A credential for every refusal that needs no special chain; the channel is open and has been used once."""
    challenge = (await post(net.chat_url, body=REQUEST)).challenge()
    account = await only_account(net.node.books)
    # A unit and a half more than is there: two of the three payments the client makes at most for one call.
    large = chat((units_of(account.headroom_pico) + 1_500) // 10, stream=False)
    good = voucher_payload(net, opened, account.accepted + 1_000)
    descriptor = good["descriptor"]
    forged = f"0x{'12' * 32}{good['signature'][66:]}"
    unknown = {**opened.credential["payload"], "channelId": f"0x{'ab' * 32}", "transaction": "0x76c0"}
    other_source = f"did:pkh:eip155:1337:0x{'5a' * 20}"

    def answered(payload: Mapping[str, Any], source: str | None = None) -> str:
        return answer_with(challenge, payload, source)

    def voucher(cumulative: int, action: str = "voucher") -> str:
        return answered(voucher_payload(net, opened, cumulative, action))

    return [
        Refused(Reason.PAYMENT_REQUIRED, None, REQUEST),
        Refused(Reason.PAYMENT_REQUIRED, "Basic bm90LWEtcGF5bWVudA==", REQUEST),
        Refused(Reason.MALFORMED_CREDENTIAL, "Payment !!!", REQUEST),
        Refused(Reason.INVALID_CHALLENGE, answer_with(replace(challenge, id="0" + challenge.id[1:]), good), REQUEST),
        Refused(Reason.INVALID_PAYLOAD, answered({}), REQUEST),
        Refused(Reason.INVALID_PAYLOAD, answered({**good, "cumulativeAmount": "1e3"}), REQUEST),
        Refused(Reason.DESCRIPTOR_MISMATCH, answered({**good, "descriptor": {**descriptor, "salt": "0x" + "0" * 64}}), REQUEST),
        Refused(Reason.SOURCE_MISMATCH, answered(good, other_source), REQUEST),
        Refused(Reason.TRANSACTION_REJECTED, answered(unknown), REQUEST),
        Refused(Reason.INVALID_SIGNATURE, answered({**good, "signature": forged}), REQUEST),
        Refused(Reason.VOUCHER_EXCEEDS_DEPOSIT, voucher(account.chain.deposit + 1), REQUEST),
        Refused(Reason.VOUCHER_TOO_LOW, voucher(account.accepted - 1), REQUEST),
        Refused(Reason.VOUCHER_DELTA_TOO_SMALL, voucher(account.accepted + 9), REQUEST),
        Refused(Reason.CLOSE_BELOW_SPENT, voucher(account.spent - 1, "close"), REQUEST),
        Refused(Reason.CREDENTIAL_USED, used.authorization, REQUEST),
        Refused(Reason.INSUFFICIENT_BALANCE, voucher(account.accepted), large),
    ]


async def require_readable(payer: ReferenceClient, answer: Answer, reason: Reason) -> None:
    """The refusal is the right one, is a proper problem document, and the client's parser takes its challenges."""
    problem = json.loads(answer.body)
    header = answer.headers["WWW-Authenticate"]
    read = await payer.run("read", headers={"WWW-Authenticate": header}, body=answer.body.decode())
    assert (answer.status, answer.code) == (402, reason.value)
    assert header.startswith("Payment ")
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Payment-Receipt" not in answer.headers
    assert (problem["type"], problem["title"], problem["status"]) == (PROBLEMS[reason].type_uri, PROBLEMS[reason].title, 402)
    assert [entry["request"]["methodDetails"]["sessionProtocol"] for entry in read["challenges"]] == ["v2", "v1"]
    assert problem["challengeId"] == read["challenges"][0]["id"]


def payer_net(clock: ShiftedClock | None = None) -> Devnet:
    """A network that refuses tiny advances."""
    session = SessionConfig(
        protocols=DevnetOptions().session.protocols,
        min_deposit=Units(1_000),
        suggested_deposit=Units(100_000),
        min_voucher_delta=Units(10),
        chain_ttl_s=0,
    )
    return Devnet(DevnetOptions(session=session), clock=clock)


async def test_the_client_pays_its_way_out_of_every_refusal(payer: ReferenceClient) -> None:
    """Each refusal costs nothing; the client that receives it pays with the fresh challenge in it and is served."""
    clock = ShiftedClock()
    async with payer_net(clock) as net:
        await payer.make(net, "mppx")
        await payer.run("fetch", name="payer", url=net.chat_url, body=REQUEST)
        (opened,) = payer.sent("open")
        bought = [REQUEST]
        reasons = [case.reason for case in await refusals(net, opened, opened)]
        for number in range(len(reasons)):
            clock.offset_s += 2  # the node takes ten vouchers a second from one channel
            # Made anew each time: the client has paid for a request since, so other amounts are too low or too high now.
            used = [wire for wire in payer.wires if wire.status == 200][-1]
            case = (await refusals(net, opened, used))[number]
            before = await only_account(net.node.books)
            answer = await post(net.chat_url, case.authorization, case.body)
            await require_readable(payer, answer, case.reason)
            after = await only_account(net.node.books)
            assert (after.owed_pico, after.phase, after.holds) == (before.owed_pico, before.phase, before.holds), case.reason

            headers = {} if case.authorization is None else {"Authorization": case.authorization}
            paid = await payer.run("fetch", name="payer", url=net.chat_url, body=case.body, headers=headers)
            assert paid["status"] == 200, (case.reason, paid)
            bought.append(dict(case.body))
            assert (await only_account(net.node.books)).owed_pico == price_pico(*bought), case.reason
        assert len(set(reasons)) == 14
        await require_agreement(net, [await only_account(net.node.books)])


async def test_the_client_replaces_an_expired_challenge(payer: ReferenceClient) -> None:
    """A credential whose challenge is too old buys nothing; the fresh challenge in the refusal does."""
    clock = ShiftedClock()
    async with payer_net(clock) as net:
        await payer.make(net, "mppx")
        await payer.run("fetch", name="payer", url=net.chat_url, body=REQUEST)
        (opened,) = payer.sent("open")
        challenge = (await post(net.chat_url, body=REQUEST)).challenge()
        late = answer_with(challenge, voucher_payload(net, opened, 3_000))
        clock.offset_s = 400
        before = await only_account(net.node.books)
        answer = await post(net.chat_url, late, REQUEST)
        await require_readable(payer, answer, Reason.PAYMENT_EXPIRED)
        assert unwatched(await only_account(net.node.books)) == unwatched(before)
        paid = await payer.run("fetch", name="payer", url=net.chat_url, body=REQUEST, headers={"Authorization": late})
        assert paid["status"] == 200
        assert (await only_account(net.node.books)).owed_pico == price_pico(REQUEST, REQUEST)


async def test_a_deposit_the_node_does_not_want(payer: ReferenceClient) -> None:
    """A client that can only make small deposits is refused each time, gives up by itself, and has lost nothing."""
    session = SessionConfig(min_deposit=Units(50_000), suggested_deposit=Units(50_000), chain_ttl_s=0)
    async with Devnet(DevnetOptions(session=session)) as net:
        assert net.node.books is not None
        await payer.make(net, "mppx", maxDeposit="0.002")
        ended = await payer.run("fetch", name="payer", url=net.chat_url, body=REQUEST)
        assert ended["status"] == 402
        assert json.loads(ended["text"])["error"]["code"] == "deposit_too_small"
        assert 1 <= len(payer.sent("open")) <= 3
        assert await net.node.books.accounts() == []
        assert net.chain.balance(net.payer) == FUNDS


async def test_an_open_the_chain_rejects(payer: ReferenceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open that the chain refuses moved no money, so the client may pay again; one deposit is made in the end."""
    async with Devnet(DevnetOptions()) as net:
        send = net.chain._methods["eth_sendRawTransaction"]
        refused: list[object] = []

        def refuse_once(params: list[Any]) -> Any:
            if not refused:
                refused.append(params)
                raise RpcRefusal(-32003, "transaction rejected: not today")
            return send(params)

        monkeypatch.setitem(net.chain._methods, "eth_sendRawTransaction", refuse_once)
        await payer.make(net, "manager")
        ended = await payer.run("fetch", name="payer", url=net.chat_url, body=REQUEST)
        assert refused
        assert ended["status"] == 200
        assert [wire.status for wire in payer.sent("open")] == [402, 200]
        account = await only_account(net.node.books)
        assert account.owed_pico == price_pico(REQUEST)
        await payer.run("close", name="payer")
        await require_agreement(net, [await only_account(net.node.books)])


async def test_a_manager_signs_what_a_large_request_needs(payer: ReferenceClient) -> None:
    """A buffered request far above the quoted unit: the manager reads the amount in the refusal and signs just that."""
    async with Devnet(DevnetOptions()) as net:
        large = chat(2_000, stream=False)
        await payer.make(net, "manager")
        await payer.run("fetch", name="payer", url=net.chat_url, body=REQUEST)
        answered = await payer.run("fetch", name="payer", url=net.chat_url, body=large)
        account = await only_account(net.node.books)
        assert answered["status"] == 200
        assert [wire.status for wire in payer.sent("voucher")].count(402) >= 1
        assert account.owed_pico == price_pico(REQUEST, large)
        await payer.run("close", name="payer")
        await require_agreement(net, [await only_account(net.node.books)])


async def test_a_plain_fetch_pays_for_a_large_request_in_one_call(payer: ReferenceClient) -> None:
    """The plain fetch reads no snapshot and adds the quoted amount: the refusal quotes what is missing, so once is enough."""
    async with Devnet(DevnetOptions()) as net:
        large = chat(4_096, stream=False)
        await payer.make(net, "mppx")
        answered = await payer.run("fetch", name="payer", url=net.chat_url, body=large)
        account = await only_account(net.node.books)
        assert answered["status"] == 200
        assert len(payer.sent("open")) == 1
        assert len(payer.sent("voucher")) == 1
        assert account.owed_pico == price_pico(large)
        await require_agreement(net, [account])
