"""Payment pages and announcements over HTTP: who may ask, what is taken, and what an outage looks like."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from channels.faults import ChannelFault, Reason
from channels.units import Pico
from mppnode.accounts.model import Account, Postpaid
from mppnode.gateways.stripe_events import WebhookFault, WebhookReason
from mppnode.http.billing_routes import WEBHOOK_BYTES_MAX
from mppnode.kernel.faults import NodeFault, NodeReason
from tests.http.accounts.office import Office, office


class Till:
    """A payment processor's desk that writes down what it is asked, and fails when told to."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.fault: Exception | None = None

    async def _note(self, *what: object) -> str:
        if self.fault is not None:
            raise self.fault
        self.asked.append(what)
        return "https://pay.example/session"

    async def buy(self, account: Account, cents: int) -> str:
        return await self._note("buy", account.id, cents)

    async def add_card(self, account: Account) -> str:
        return await self._note("card", account.id)

    async def portal(self, account: Account) -> str:
        return await self._note("portal", account.id)

    async def subscribe(self, account: Account) -> None:
        await self._note("subscribe", account.id, account.terms)

    async def webhook(self, body: bytes, signature: str) -> None:
        await self._note("webhook", body, signature)


@pytest.fixture
def till() -> Till:
    return Till()


@pytest.fixture
async def shop(tmp_path: Path, till: Till) -> AsyncIterator[Office]:
    async with office(tmp_path, billing=till) as made:
        yield made


async def test_an_account_is_sent_to_its_own_pages(shop: Office, till: Till) -> None:
    """Buying, a card and the portal are asked for the account of the bearer and nobody else's."""
    account, owner = await shop.customer("first")
    for path, body in (("checkout", {"amount_cents": 500}), ("checkout", {"card": True}), ("portal", None)):
        reply = await shop.ask("POST", f"/billing/{path}", owner.secret.text, body)
        assert (reply.status, reply.json["url"]) == (200, "https://pay.example/session")
        assert reply.headers["Cache-Control"] == "private, no-store"
    assert till.asked == [("buy", account.id, 500), ("card", account.id), ("portal", account.id)]


@pytest.mark.parametrize(
    "body", [{}, {"amount_cents": 49}, {"amount_cents": 5.0}, {"amount_cents": "500"}, {"amount_cents": True}, {"card": False}, {"amount_cents": 500, "card": True}, {"amount": 5}]
)
async def test_a_wrong_purchase_is_refused_by_name(shop: Office, till: Till, body: dict[str, object]) -> None:
    """What is to be bought is never guessed."""
    _, owner = await shop.customer("first")
    reply = await shop.ask("POST", "/billing/checkout", owner.secret.text, body)
    assert (reply.status, reply.code) == (400, "invalid_field")
    assert till.asked == []


async def test_a_limited_key_opens_no_payment_page(shop: Office, till: Till) -> None:
    """Cards and invoices are the account's: a key with any limit of its own is refused."""
    _, owner = await shop.customer("first")
    made = (await shop.ask("POST", "/v1/keys", owner.secret.text, {"spend_caps": {"day": 1}})).json
    for path in ("checkout", "portal"):
        assert (await shop.ask("POST", f"/billing/{path}", made["key"], {"card": True})).status == 403
    assert till.asked == []


async def test_a_webhook_is_passed_on_as_the_bytes_it_was(shop: Office, till: Till) -> None:
    """The raw body and the signature arrive unchanged, without any bearer; the answer is 200 only once it is taken."""
    raw = b'{"id": "evt_1",  "livemode":false}\n'
    reply = await shop.ask("POST", "/webhooks/stripe", None, raw, Stripe_Signature="t=1,v1=00")
    assert reply.status == 200
    assert till.asked == [("webhook", raw, "t=1,v1=00")]


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (WebhookFault(next(iter(WebhookReason))), 400),
        (NodeFault(NodeReason.BILLING_UNAVAILABLE, detail="away"), 503),
        (ChannelFault(Reason.STORE_UNAVAILABLE, detail="away"), 503),
    ],
    ids=str,
)
async def test_what_fails_is_never_the_customers_key(shop: Office, till: Till, fault: Exception, status: int) -> None:
    """A webhook that is not genuine is 400, an outage of Stripe or the ledger 503 with a time to come back."""
    _, owner = await shop.customer("first")
    till.fault = fault
    reply = await shop.ask("POST", "/webhooks/stripe", None, b"{}", Stripe_Signature="t=1,v1=00")
    assert reply.status == status
    assert ("Retry-After" in reply.headers) is (status == 503)
    if status == 503:
        assert (await shop.ask("POST", "/billing/portal", owner.secret.text)).status == 503


async def test_a_webhook_has_a_size_and_one_signature(shop: Office, till: Till) -> None:
    """What is too large or signed not at all or twice does not reach the processor's desk."""
    large = await shop.ask("POST", "/webhooks/stripe", None, b"x" * (WEBHOOK_BYTES_MAX + 1), Stripe_Signature="t=1,v1=00")
    assert (large.status, large.code) == (413, "body_too_large")
    assert (await shop.ask("POST", "/webhooks/stripe", None, b"{}")).param == "Stripe-Signature"
    headers = [("Stripe-Signature", "t=1,v1=00")] * 2
    async with shop.http.post(shop.public.make_url("/webhooks/stripe"), data=b"{}", headers=headers) as response:
        assert response.status == 400
    assert till.asked == []


async def test_without_billing_there_is_nothing(desk: Office) -> None:
    """Where nothing is sold through a processor its routes are 404."""
    _, owner = await desk.customer("first")
    for path in ("/billing/checkout", "/billing/portal", "/webhooks/stripe"):
        reply = await desk.ask("POST", path, owner.secret.text, {"card": True}, Stripe_Signature="t=1,v1=00")
        assert (reply.status, reply.code) == (404, "not_found")


async def test_nobody_becomes_post_paid_who_would_not_be_billed(shop: Office, till: Till) -> None:
    """An account is subscribed before it may owe; while Stripe is away it stays prepaid."""
    account, _ = await shop.customer("first")
    till.fault = NodeFault(NodeReason.BILLING_UNAVAILABLE, detail="away")
    terms = {"terms": "postpaid", "trust_limit_cents": 100}
    assert (await shop.rule("PATCH", f"/accounts/{account.id}", terms)).status == 503
    assert (await shop.rule("GET", f"/accounts/{account.id}")).json["terms"] == "prepaid"
    till.fault = None
    assert (await shop.rule("PATCH", f"/accounts/{account.id}", terms)).json["terms"] == "postpaid"
    assert till.asked == [("subscribe", account.id, Postpaid(Pico(10**12)))] * 2
    early = await shop.rule("POST", "/accounts", {"trust": "second", **terms})
    assert (early.status, early.param) == (409, "terms")
