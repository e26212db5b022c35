"""Every kind of traffic and failure a node sees, in rounds: payers and customers, good and bad providers, Stripe."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from channels.descriptor import SessionProtocol
from channels.instants import UnixMillis, to_rfc3339
from channels.model import Phase
from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.units import Pico, Units
from mppnode.accounts.documents import read_account
from mppnode.accounts.model import Postpaid
from mppnode.billing.service import Billing
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devnet import PATH_USD, DevnetOptions
from mppnode.config.accounts import AccountsConfig, AdminConfig
from mppnode.config.billing import BillingConfig
from mppnode.config.ops import MetricsConfig
from mppnode.config.schema import LimitsConfig, PricingConfig, SessionConfig, TreasuryConfig
from mppnode.config.secrets import Secret
from mppnode.gauging import Gauges
from mppnode.kernel.clock import SystemClock
from mppnode.ledger.credit_lists import By, find_account
from mppnode.payer.client import PayingClient
from mppnode.treasury.reconcile import DailyReconcile
from tests.support.customers import Customer, new_customer
from tests.support.http_client import UNIT, chat
from tests.support.providers import MODEL, Shop, Sold, answers, new_shop, serves, stalls
from tests.support.stripe_peer import KEY, StripePeer, running_peer

HOOK = "whsec_loadLoadLoadLoadLoadLoad0123"
TOKEN = "operator-token-of-more-than-32-characters"
METER = "usage"
PAGE = "https://node.example.com/"
LISTED = {
    "provider": "listed",
    "model": MODEL,
    "upstream_model": "theirs",
    "cost": {"input_usd_per_million": "0.60", "output_usd_per_million": "12"},
    "context": 128_000,
    "max_output": 100_000,
    "abilities": ["tools"],
    "source": "https://prices.example/models",
}


@dataclass
class Town:
    """A node that sells everything, everybody it deals with, and the means to make them act."""

    shop: Shop
    peer: StripePeer
    payer: PayingClient
    http: aiohttp.ClientSession
    customer: Customer = field(init=False)
    """With credit."""
    poor: Customer = field(init=False)
    """With almost none, and a cap."""
    late: Customer = field(init=False)
    """Who is billed for usage."""
    owing: bool = True
    """Whether somebody is yet to stop paying: a share of payers who do would be an alarm, on a busy machine sooner."""

    @property
    def ops(self) -> str:
        """Host and port of the operators' listener."""
        return self.shop.net.node.ops_url.removeprefix("http://")

    @property
    def billing(self) -> Billing:
        paying = self.shop.net.node.paying
        assert paying is not None
        assert isinstance(paying.port, Billing)
        return paying.port

    @property
    def gauges(self) -> Gauges:
        found = self.shop.net.node.gauges
        assert found is not None
        return found

    @property
    def daily(self) -> DailyReconcile:
        treasury = self.shop.net.node.treasury
        assert treasury is not None
        return treasury.daily

    # ------------------------------------------------------------------------------------------------------- payers

    async def paid_stream(self, model: str = "dev/story", tokens: int = 60) -> None:
        """One stream of the well-behaved client: opens, signs ahead, reads to the end."""
        async with self.payer.stream(self.shop.net.chat_url, chat(model, max_tokens=tokens)) as events:
            async for _ in events:
                pass

    async def sessions(self) -> None:
        """Channels of all sorts: one paid and paused, one left at each moment, the first time one never paid, one refused."""
        shop = self.shop
        # Longer than any one voucher is asked for: however fast it runs, it pauses twice.
        channel, body = await shop.opened(), chat("dev/story", max_tokens=20_000)
        credential = await shop.pay(shop.payer.voucher(channel, 3 * UNIT), body)
        async with shop.stream(body, credential) as stream:  # paused, paid, paused again, left
            need = await stream.until("payment-need-voucher")
            await asyncio.sleep(0.05)
            await shop.manage(shop.payer.voucher(channel, int(json.loads(need.data)["requiredCumulative"])))
            await stream.until("payment-need-voucher")
            await asyncio.sleep(0.05)
            stream.response.close()
        unpaid = await shop.opened()
        if self.owing:
            self.owing = False
            credential = await shop.pay(shop.payer.voucher(unpaid, 3 * UNIT), body)
            async with shop.stream(body, credential) as stream:  # never paid: ends by itself
                await stream.rest()
        await shop.manage(shop.payer.voucher(unpaid, 0))  # too low
        left = await shop.opened()
        slow = chat("dev/slow", max_tokens=200)
        credential = await shop.pay(shop.payer.voucher(left, 60 * UNIT), slow)
        async with shop.stream(slow, credential) as stream:  # left in the middle
            await stream.tokens(2)
            stream.response.close()
        await shop.settled()
        again = await shop.pay(shop.payer.voucher(left, 70 * UNIT), chat("dev/stalls-first", max_tokens=5))
        asking = asyncio.ensure_future(shop.send(chat("dev/stalls-first", max_tokens=5), again))
        await asyncio.sleep(0.1)
        asking.cancel()  # left before anything came
        await asyncio.wait({asking})
        await shop.send(chat())
        await shop.send(chat("dev/no-such-model"))
        await shop.send(b"{")

    async def failures(self) -> None:
        """Providers that fail, one beside them that serves, ceilings nobody meets, and somebody who forges webhooks."""
        for model in (MODEL, MODEL, "dev/error-500", *(["dev/dies-after-3"] * 3), "dev/no-usage"):
            with contextlib.suppress(Exception):
                await self.paid_stream(model, 8)
        customer = self.customer
        low = {"max_price": {"prompt": "0.55", "completion": "11"}}
        await customer.send(chat(MODEL, stream=False, provider=low))  # leaves one provider out
        await customer.send(chat(MODEL, stream=False, models=[MODEL, "dev/echo"]))
        await customer.send(chat("auto", stream=False))
        url = f"{self.shop.net.node.url}/webhooks/stripe"
        await self.peer.deliver(self.http, url, HOOK[:-1] + "x", self.peer.events[-1:])

    # ---------------------------------------------------------------------------------------------------- customers

    async def sign_up(self) -> None:
        """Customers: one with credit and an alert address, one with a small cap, one who is billed."""
        self.customer = await new_customer(self.shop, trust="ada")
        self.poor = await new_customer(self.shop, trust="bob", credit=10**9, spend_caps={"total": 1}, rpm=1_000)
        page = await self.customer.send({"amount_cents": 500}, path="/billing/checkout")
        assert page.status == 200, page.body
        self.pay_page()
        await self.deliver()
        late = await new_customer(self.shop, credit=0, trust="eve", terms=Postpaid(Pico(10**13)))
        assert (await late.send({"card": True}, path="/billing/checkout")).status == 200
        self.pay_page()
        await self.deliver()
        row = await late.books.read(lambda: find_account(By.ID, late.account))
        assert row is not None
        await self.billing.subscribe(read_account(row))
        self.late = late

    def pay_page(self) -> dict[str, Any]:
        """The newest page is paid on, or a card left."""
        return self.peer.complete_checkout(self.peer.of("checkout.session")[-1]["id"])

    async def keys(self) -> None:
        """Requests of keys: served, refused for credit, billed later, and a pack bought and refunded."""
        await self.customer.send(chat("dev/story", max_tokens=20, stream=False))
        async with self.customer.stream(chat("dev/story", max_tokens=20)) as stream:
            await stream.rest()
        await self.poor.send(chat("dev/story", max_tokens=5_000, stream=False))
        await self.late.send(chat("dev/story", max_tokens=20, stream=False))
        await self.customer.send({"amount_cents": 500}, path="/billing/checkout")
        payment = self.pay_page()
        self.peer.refund(payment["id"], 100)
        await self.deliver()
        assert self.billing.meters is not None
        await self.shop.settled()
        await self.billing.meters.seal()
        await self.billing.meters.send()

    async def deliver(self) -> None:
        """Everything Stripe announces, delivered."""
        url = f"{self.shop.net.node.url}/webhooks/stripe"
        statuses = await self.peer.deliver(self.http, url, HOOK, list(self.peer.events))
        assert set(statuses) <= {200}, statuses

    # ------------------------------------------------------------------------------------------------------- rounds

    async def round(self, *, failures: bool = True) -> None:
        """Everything once, and a look at all that is looked at."""
        await asyncio.gather(self.paid_stream(), self.sessions(), self.keys())
        if failures:
            await self.failures()
        await self.settle()
        await self.gauges.look_here()
        await self.gauges.look_at_ledger()
        await self.gauges.look_at_chain()

    async def settle(self) -> None:
        """Money moves: a settlement, a close, sponsored gas written down, and the daily comparison."""
        treasury = self.shop.net.node.treasury
        assert treasury is not None
        await self.shop.settled()
        await self.paid_stream(tokens=1_000)
        assert self.shop.net.node.books is not None
        for account in await self.shop.net.node.books.accounts():
            if account.phase is Phase.OPEN and account.settleable > account.chain.settled:
                await treasury.treasurer.settle(account.id)
        await self.payer.close(self.shop.net.chat_url)
        for chore in treasury.treasurer._chores:
            await chore()
        await treasury.treasurer._review()
        await self.daily.run()


@asynccontextmanager
async def town(folder: Path) -> AsyncIterator[Town]:
    """A node in this process with everything around it, on the real clock."""
    catalog = folder / "prices.json"
    clock = SystemClock()
    read_at = to_rfc3339(UnixMillis(clock.now_millis() - 3_600_000))
    catalog.write_text(json.dumps({"version": 1, "listings": [{**LISTED, "time": read_at}]}))
    async with running_peer(clock=clock) as peer, aiohttp.ClientSession() as http:
        price = peer.metered_price(METER)["id"]
        options = DevnetOptions(
            tokens_per_second=0.0,
            session=SessionConfig(
                protocols=(SessionProtocol.V2,),
                min_deposit=Units(1_000),
                suggested_deposit=Units(100_000),
                chain_ttl_s=0,
                voucher_wait_s=5,
            ),
            limits=LimitsConfig(drain_s=0, first_token_s=2),
            treasury=TreasuryConfig(sponsor=True, settle_fees=1, sponsor_grants_per_hour=100),
            accounts=AccountsConfig(private_alert_urls=True),
            billing=BillingConfig(
                Secret(KEY), (Secret(HOOK),), PAGE, PAGE, PAGE, (500, 1_000), METER, False, price, api_base=peer.base_url
            ),
            admin=AdminConfig(Secret(TOKEN), port=0),
            metrics=MetricsConfig(port=0),
        )
        sold = (Sold("broken", answers(503)), Sold("dead", stalls), Sold("good", serves(6)), Sold("listed", serves(6), listed=True))
        async with new_shop(*sold, options=options, pricing=PricingConfig(catalog=catalog), real_time=True) as shop:
            shop.net.chain.fees = True
            payer = PayingClient(
                http,
                chain=RpcChain(HttpTransport(http, shop.net.chain_url), clock, limits=RpcLimits()),
                signer=LocalSigner(shop.net.payer_key),
                policy=PayerPolicy(
                    shop.net.payer,
                    shop.net.payer,
                    frozenset({shop.net.escrow}),
                    frozenset({PATH_USD}),
                    Units(10**6),
                    Units(10**6),
                    Units(10**6),
                ),
                now=clock.now_millis,
                entropy=os.urandom,
            )
            made = Town(shop, peer, payer, http)
            await made.sign_up()
            yield made
