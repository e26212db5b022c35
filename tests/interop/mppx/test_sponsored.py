"""The unmodified reference client when the challenge offers to pay its fees."""

from __future__ import annotations

from dataclasses import replace

import pytest

from channels import escrow as v2
from channels import tip20
from channels.chain import FEE_MANAGER
from channels.descriptor import RESERVE_ADDRESS, SessionProtocol
from channels.faults import Reason
from channels.ids import Address, Hash32
from channels.model import Account, Phase
from channels.tempo_tx import Form, decode
from channels.units import Units
from mppnode.chain.devchain import PATH_USD, LocalTransport
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.cli.devnet import FUNDS, Devnet, DevnetOptions
from mppnode.config.schema import SessionConfig, TreasuryConfig
from tests.interop.mppx.rig import (
    ClientFailed,
    ReferenceClient,
    Wire,
    chat,
    only_account,
    post,
    price_pico,
    request_of,
    units_of,
)

pytestmark = pytest.mark.interop

FEE = 3_360  # what an open or a top-up costs on the development chain
SMALL_DEPOSITS = SessionConfig(min_deposit=Units(1_000), suggested_deposit=Units(1_000), chain_ttl_s=0)


def sponsoring(**options: object) -> DevnetOptions:
    """A network whose node pays for its payers."""
    return DevnetOptions(session=SMALL_DEPOSITS, treasury=TreasuryConfig(sponsor=True, **options))  # type: ignore[arg-type]


async def payers_of_fees(net: Devnet, account: Account) -> list[Address]:
    """Who paid the fee of a channel's open and of each of its top-ups, in order."""
    chain = RpcChain(LocalTransport(net.chain), net.clock, limits=RpcLimits())
    names = [v2.CHANNEL_OPENED, v2.TOPPED_UP]
    logs = await chain.logs(
        RESERVE_ADDRESS, topics=[names, Hash32(account.id)], from_block=0, to_block=net.chain.head
    )
    found = []
    for log in logs:
        receipt = await chain.receipt(log.tx_hash)
        assert receipt is not None
        (fee,) = (e for e in tip20.decode_transfers(PATH_USD, receipt.logs) if e.to == FEE_MANAGER)
        found.append(fee.sender)
    return found


def transaction_of(wire: Wire) -> bytes:
    """The transaction a credential carries."""
    return bytes.fromhex(wire.credential["payload"]["transaction"][2:])


async def test_open_and_top_ups_at_the_nodes_expense(payer: ReferenceClient) -> None:
    """T-21: the client leaves its fees open, streams through sponsored top-ups, and pays for tokens only."""
    async with Devnet(sponsoring()) as net:
        net.chain.fees = True
        request = chat(300)
        await payer.make(net, "manager")
        stream = payer.start("sse", name="payer", url=net.chat_url, body=request)
        await stream.end()
        assert len(stream.text.split()) == 300
        (opened,), top_ups = payer.sent("open"), payer.sent("topUp")
        assert top_ups
        assert {decode(transaction_of(wire)).form for wire in (opened, *top_ups)} == {Form.ENVELOPE}
        account = await only_account(net.node.books)
        assert await payers_of_fees(net, account) == [net.payee] * (1 + len(top_ups))
        await payer.run("close", name="payer")
        account = await only_account(net.node.books)
        assert account.phase is Phase.CLOSED
        assert account.spent == units_of(price_pico(request))
        assert FUNDS - net.chain.balance(net.payer) == account.spent
        fees = (1 + len(top_ups) + 1) * FEE  # the open, the top-ups and our own close
        assert net.chain.balance(net.payee) - FUNDS == account.spent - fees


async def test_the_budget_is_settled_by_what_was_paid(payer: ReferenceClient) -> None:
    """When the open is final its grant shrinks from the worst case to the fee, without anybody asking."""
    async with Devnet(sponsoring()) as net:
        net.chain.fees = True
        await payer.make(net, "manager")
        await payer.run("sse", name="payer", url=net.chat_url, body=chat(20))
        (grant,) = await net.node.ledger.open_grants()
        assert (grant.sender, grant.fee_max > FEE) == (net.payer, True)
        net.node.treasury.treasurer._swept_at = None  # the chore is due
        await net.node.treasury.treasurer.turn()
        assert await net.node.ledger.open_grants() == []


async def test_only_v2_challenges_offer_it() -> None:
    """The offer stands in the v2 challenge and nowhere else; without a sponsor it stands nowhere."""
    both = replace(SMALL_DEPOSITS, protocols=(SessionProtocol.V2, SessionProtocol.V1))
    async with Devnet(replace(sponsoring(), session=both)) as net:
        asked = await post(net.chat_url)
        assert request_of(asked.challenge())["methodDetails"]["feePayer"] is True
        assert "feePayer" not in request_of(asked.challenge(SessionProtocol.V1))["methodDetails"]
    async with Devnet(DevnetOptions()) as net:
        assert "feePayer" not in request_of((await post(net.chat_url)).challenge())["methodDetails"]


async def test_a_spent_budget_lets_payers_pay_themselves(payer: ReferenceClient) -> None:
    """When the hour's budget is gone the promise is withdrawn: the same client opens at its own expense."""
    async with Devnet(sponsoring(sponsor_budget=Units(1))) as net:
        net.chain.fees = True
        await payer.make(net, "manager")
        with pytest.raises(ClientFailed):
            await payer.run("sse", name="payer", url=net.chat_url, body=chat(20))
        assert {wire.status for wire in payer.sent("open")} == {429}
        refused = await post(net.chat_url, payer.sent("open")[0].authorization, chat(20))
        assert refused.code == Reason.RATE_LIMITED.value
        await payer.make(net, "manager")
        await payer.run("sse", name="payer", url=net.chat_url, body=chat(20))
        opened = payer.sent("open")[-1]
        assert decode(transaction_of(opened)).form is Form.COMPLETE
        assert await payers_of_fees(net, await only_account(net.node.books)) == [net.payer]


async def test_the_same_sponsored_open_again(payer: ReferenceClient) -> None:
    """T-12: the credential of a sponsored open, sent again, opens nothing and costs nothing more."""
    async with Devnet(sponsoring()) as net:
        net.chain.fees = True
        await payer.make(net, "manager")
        await payer.run("sse", name="payer", url=net.chat_url, body=chat(20))
        before = net.chain.balance(net.payee)
        (opened,) = payer.sent("open")
        again = await post(net.chat_url, opened.authorization)
        assert again.status == 204
        assert net.chain.balance(net.payee) == before
        assert len(await net.node.ledger.open_grants()) == 1
