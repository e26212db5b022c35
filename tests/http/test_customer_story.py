"""One customer from sign-up to an agreed bill: operator's API, Stripe, the OpenAI SDK, a refusal, a recharge."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from channels.credit import AccountId
from channels.payment import PICO_PER_CENT
from channels.units import Pico
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.accounts import AccountsConfig, AdminConfig
from mppnode.config.billing import BillingConfig
from mppnode.config.secrets import Secret
from tests.support.customers import Customer, customers_of
from tests.support.http_client import World, chat, new_world
from tests.support.stripe_peer import KEY, StripePeer, running_peer

HOOK = "whsec_storyStoryStoryStory0123456789"
TOKEN = "operator-token-of-more-than-32-characters"
DEAR = Pico(10**10)
"""A cent per token, so that a few answers use a pack up."""
CALLBACK = "https://shop.example/back"


def billing_at(peer: StripePeer, **more: Any) -> BillingConfig:
    return BillingConfig(
        secret_key=Secret(KEY),
        webhook_secrets=(Secret(HOOK),),
        success_url=CALLBACK,
        cancel_url=CALLBACK,
        return_url=CALLBACK,
        packs_cents=(500, 1_000),
        meter=None,
        livemode=False,
        api_base=peer.base_url,
        **more,
    )


@dataclass
class Shop:
    """A node that sells credit, and its Stripe."""

    world: World
    peer: StripePeer

    async def operate(self, path: str, body: object, method: str = "POST") -> dict[str, Any]:
        url = self.world.net.node.admin_url + path
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with self.world.http.request(method, url, json=body, headers=headers) as answer:
            assert answer.status in (200, 201), await answer.text()
            found: dict[str, Any] = await answer.json()
            return found

    async def sign_up(self, trust: str = "ada") -> Customer:
        account = await self.operate("/admin/v1/accounts", {"trust": trust, "kind": "user", "email": "ada@customer.example"})
        key = await self.operate(f"/admin/v1/accounts/{account['id']}/keys", {"name": "laptop"})
        return Customer(self.world, AccountId(account["id"]), key["id"], key["key"])

    async def deliver(self, *, times: int = 1, backwards: bool = False) -> None:
        events = list(self.peer.events)[:: -1 if backwards else 1]
        url = f"{self.world.net.node.url}/webhooks/stripe"
        statuses = await self.peer.deliver(self.world.http, url, HOOK, events, times=times)
        assert set(statuses) == {200}

    def sdk(self, customer: Customer) -> openai.AsyncOpenAI:
        key = customer.bearer.removeprefix("Bearer ")
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        return openai.AsyncOpenAI(base_url=f"{self.world.net.node.url}/v1", api_key=key, http_client=http)


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    async with running_peer() as peer:
        options = DevnetOptions(
            tokens_per_second=0.0,
            input=Pico(10**6),
            output=DEAR,
            accounts=AccountsConfig(top_up_url="https://shop.example/credit"),
            billing=billing_at(peer),
            admin=AdminConfig(Secret(TOKEN), port=0),
        )
        async with new_world(options) as world:
            world.clock.advance(peer.now() - world.clock.now())
            yield Shop(world, peer)
            assert world.log.bugs == []


async def test_from_sign_up_to_an_agreed_bill(shop: Shop) -> None:
    """Signed up, topped up, streamed, exhausted, refused, recharged: Stripe, the ledger and /v1/usage say the same."""
    customer = await shop.sign_up()
    settings = {"recharge": {"threshold_cents": 100, "amount_cents": 1_000, "month_cap_cents": 1_000}}
    assert (await customer.send(settings, method="PATCH", path="/v1/account")).status == 200
    page = await customer.send({"amount_cents": 500}, path="/billing/checkout")
    assert page.status == 200, page.body
    assert page.json["url"].startswith("http")
    (session,) = [thing["id"] for thing in shop.peer.of("checkout.session")]
    shop.peer.complete_checkout(session)
    await shop.deliver(times=3, backwards=True)
    assert (await customer.credit()).balance == 500 * PICO_PER_CENT

    said = 0
    async with shop.sdk(customer) as sdk:

        async def ask() -> int:
            texts = 0
            stream = await sdk.chat.completions.create(
                model="dev/story", messages=chat()["messages"], max_tokens=120, stream=True
            )
            async for chunk in stream:
                texts += sum(bool(choice.delta.content) for choice in chunk.choices)
            return texts

        for _ in range(4):
            said += await ask()
        with pytest.raises(openai.APIStatusError) as refused:
            await ask()
        assert refused.value.status_code == 402
        error: Any = refused.value.body
        assert error["top_up_url"] == "https://shop.example/credit"
        assert 0 < error["affordable_max_tokens"] < 120

        paying = shop.world.net.node.paying
        assert paying is not None
        assert paying.workers.recharger is not None
        await shop.world.settled()
        await paying.workers.recharger.work()
        said += await ask()
    await shop.deliver(times=10)
    await shop.world.settled()

    paid = sum(intent["amount_received"] for intent in shop.peer.of("payment_intent"))
    credit, entries = await customer.credit(), await customer.entries()
    usage = (await customer.send(method="GET", path="/v1/usage?group_by=model")).json["data"]
    rows = await customer.requests()
    assert paid == 1_500
    assert sum(entry.amount for entry in entries if entry.kind == "payment") == paid * PICO_PER_CENT
    assert said == sum(row.completion for row in rows) == 4 * 120 + 120
    assert credit.owed == sum(row.cost for row in rows) == sum(int(each["cost"]["pico_usd"]) for each in usage)
    assert credit.balance == paid * PICO_PER_CENT - credit.owed == sum(entry.amount for entry in entries)
    shown = (await customer.send(method="GET", path="/v1/credits")).json
    assert int(shown["balance"]["pico_usd"]) == credit.balance


async def test_a_refund_is_taken_back_and_nothing_is_served_on_it(shop: Shop) -> None:
    """K8: money that Stripe has given back is no credit any more, whatever was spent of it."""
    customer = await shop.sign_up()
    await customer.send({"amount_cents": 500}, path="/billing/checkout")
    (session,) = [thing["id"] for thing in shop.peer.of("checkout.session")]
    payment = shop.peer.complete_checkout(session)
    await shop.deliver()
    assert (await customer.send(chat("dev/story", max_tokens=100, stream=False))).status == 200
    shop.peer.refund(payment["id"], 500)
    await shop.deliver(times=2)
    await shop.world.settled()
    credit = await customer.credit()
    assert credit.balance == -credit.owed < 0
    refused = await customer.send(chat("dev/story", max_tokens=1))
    assert (refused.status, refused.code) == (403, "account_suspended"), "it owes, and nothing has been promised"
    kinds = {entry.kind for entry in await customer.entries()}
    assert kinds == {"payment", "payment_reversed", "usage"}


@pytest.mark.parametrize("change", ["body", "secret", "old"])
async def test_k5_a_forged_announcement_moves_nothing(shop: Shop, change: str) -> None:
    """K5: another body, another secret or an old signature: 400, and no credit."""
    customer = await shop.sign_up()
    await customer.send({"amount_cents": 500}, path="/billing/checkout")
    (session,) = [thing["id"] for thing in shop.peer.of("checkout.session")]
    shop.peer.complete_checkout(session)
    events = list(shop.peer.events)
    at, secret = (shop.world.clock.now() - 301 if change == "old" else None), HOOK[:-1] + "x" if change == "secret" else HOOK
    url = f"{shop.world.net.node.url}/webhooks/stripe"
    if change == "body":
        async with shop.world.http.post(url, data=b"{}", headers={"Stripe-Signature": f"t={shop.peer.now()},v1={'0' * 64}"}) as answer:
            assert answer.status == 400
    else:
        assert set(await shop.peer.deliver(shop.world.http, url, secret, events, at=at)) == {400}
    assert (await customer.credit()).balance == 0


async def test_the_operators_port_is_not_the_publics(shop: Shop) -> None:
    """The admin API is on its own port alone, and nothing on it answers without its token."""
    customer = await shop.sign_up()
    assert (await customer.send({}, path="/admin/v1/accounts")).status == 404
    url = shop.world.net.node.admin_url + "/admin/v1/accounts"
    for headers in ({}, {"Authorization": customer.bearer}, {"Authorization": "Bearer "}):
        async with shop.world.http.get(url, headers=headers) as answer:
            assert answer.status == 401
    assert customers_of(shop.world).books is not None
