"""The gateway against localstripe, a Stripe server that is not ours, as a process of its own.

It knows customers, payment methods, PaymentIntents, refunds and signed webhooks, in an API version before the one pinned here:
what was renamed since (the list of allowed payment methods) and what it does not have is the business of the strict peer.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import stripe
from aiohttp import web

from mppnode.config.secrets import Secret
from mppnode.gateways.stripe_api import StripeGateway
from mppnode.gateways.stripe_events import CustomerDeleted, Ignored, StripeEvent, WebhookFault, WebhookReader
from mppnode.gateways.stripe_faults import StripeFault, StripeFaultKind
from mppnode.gateways.stripe_objects import Purpose
from mppnode.kernel.clock import ManualClock, SystemClock
from mppnode.observe.logs import quiet
from tests.support.stripe_peer import ACCOUNT, KEY, NOW

HOOK = "whsec_canaryCanaryCanary0123456789"
WHY = Purpose("acc-1", "topup-7")
PATIENCE_S = 30.0


def installed() -> None:
    """Skip without localstripe, or fail where it is asked for."""
    if importlib.util.find_spec("localstripe") is None:
        if os.environ.get("REQUIRE_INTEROP") == "1":
            pytest.fail("localstripe is not installed: pip install 'mppnode[test]'")
        pytest.skip("localstripe is not installed")


@dataclass
class Foreign:
    """A running localstripe, and a gateway to it."""

    url: str
    session: aiohttp.ClientSession
    stripe: StripeGateway

    async def ask(self, method: str, path: str, **params: str) -> dict[str, Any]:
        """Do what a browser or the dashboard would."""
        headers = {"Authorization": f"Bearer {KEY}"}
        async with self.session.request(method, self.url + path, data=params, headers=headers) as response:
            assert response.status == 200, await response.text()
            return dict(await response.json())


async def listening(url: str, session: aiohttp.ClientSession, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            assert process.returncode is None, "localstripe ended"
            try:
                async with session.get(url + "/v1/balance", headers={"Authorization": f"Bearer {KEY}"}) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.02)  # a process that starts gives no other sign


@pytest.fixture
async def foreign(unused_tcp_port: int, tmp_path: Path) -> AsyncIterator[Foreign]:
    installed()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "localstripe", "--port", str(unused_tcp_port), "--from-scratch",
        cwd=tmp_path, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )
    url = f"http://localhost:{unused_tcp_port}"
    try:
        async with aiohttp.ClientSession() as session:
            await listening(url, session, process)
            yield Foreign(url, session, StripeGateway(Secret(KEY), session=session, below=lambda _: 0, log=quiet, base_url=url))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def receiver(reader: WebhookReader) -> AsyncIterator[tuple[str, asyncio.Queue[StripeEvent | WebhookFault]]]:
    """An endpoint that reads webhooks and keeps what came of them."""
    found: asyncio.Queue[StripeEvent | WebhookFault] = asyncio.Queue()

    async def handle(request: web.Request) -> web.Response:
        try:
            found.put_nowait(reader.read(await request.read(), request.headers.get("Stripe-Signature")))
        except WebhookFault as fault:
            found.put_nowait(fault)
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/hook", found
    finally:
        await runner.cleanup()


async def test_customers_and_refunds_are_understood(foreign: Foreign) -> None:
    """What the gateway writes is taken by a server that is not ours, and what that server writes is read."""
    customer = await foreign.stripe.create_customer(WHY, email="owner@customer.example", key="customer-1")
    kept = await foreign.ask("GET", f"/v1/customers/{customer}")
    assert (kept["email"], kept["metadata"]["mppnode_account"]) == ("owner@customer.example", "acc-1")
    card = {"type": "card", "card[number]": "4242424242424242", "card[exp_month]": "12", "card[exp_year]": "2040", "card[cvc]": "123"}
    method = (await foreign.ask("POST", "/v1/payment_methods", **card))["id"]
    await foreign.ask("POST", f"/v1/payment_methods/{method}/attach", customer=customer)
    await foreign.stripe.set_default_card(customer=customer, payment_method=method, key="default-card-1")
    assert (await foreign.ask("GET", f"/v1/customers/{customer}"))["invoice_settings"]["default_payment_method"] == method
    paid = await foreign.ask(
        "POST", "/v1/payment_intents", amount="2000", currency="usd", customer=customer, payment_method=method, confirm="true", off_session="true"
    )
    made = [await foreign.ask("POST", "/v1/refunds", payment_intent=paid["id"], amount=cents) for cents in ("500", "300")]
    refunds = await foreign.stripe.refunds_of(paid["id"])
    assert {refund.id: refund.amount for refund in refunds} == {made[0]["id"]: 500, made[1]["id"]: 300}
    assert await foreign.stripe.refund(made[0]["id"]) in refunds
    missing = foreign.stripe.refund("re_missing")
    with pytest.raises(StripeFault) as caught:
        await missing
    assert caught.value.kind is StripeFaultKind.INVALID


async def test_its_webhooks_are_read_and_others_are_not(foreign: Foreign) -> None:
    """K5: a webhook another program signed is read with its secret, and refused with any other."""
    clock = SystemClock()
    good = WebhookReader([Secret(HOOK)], account=ACCOUNT, livemode=False, clock=clock)
    wrong = WebhookReader([Secret(HOOK + "x")], account=ACCOUNT, livemode=False, clock=clock)
    async with receiver(good) as (here, read), receiver(wrong) as (there, refused), asyncio.timeout(PATIENCE_S):
        for name, url in (("good", here), ("wrong", there)):
            async with foreign.session.post(f"{foreign.url}/_config/webhooks/{name}", data={"url": url, "secret": HOOK}) as response:
                assert response.status == 200
        customer = await foreign.stripe.create_customer(WHY, email=None, key="customer-1")
        await foreign.ask("DELETE", f"/v1/customers/{customer}")
        happened: list[object] = []
        while CustomerDeleted(customer) not in happened:
            event = await read.get()
            assert isinstance(event, StripeEvent)
            happened.append(event.what)
            assert isinstance(await refused.get(), WebhookFault)
        assert Ignored("customer.created") in happened


def test_what_the_package_signs_is_let_in() -> None:
    """The package's own signature of a webhook, made for tests like this one, is one of Stripe's to us."""
    body = '{"id": "evt_1", "object": "event", "type": "invoice.created", "created": 1900000000, "livemode": false, "data": {"object": {}}}'
    header = stripe.WebhookSignature.generate_signature_header(body, HOOK, NOW)
    reader = WebhookReader([Secret(HOOK)], account=ACCOUNT, livemode=False, clock=ManualClock(NOW))
    assert reader.read(body.encode(), header).what == Ignored("invoice.created")
