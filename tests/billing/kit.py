"""A node's billing over a real ledger and the Stripe peer, with a clock that moves when told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from channels.credit import AccountId, CreditAccount, FundsKind, Hold, MoveFunds, Settle, plan
from channels.model import HoldId, NodeId
from channels.payment import PICO_PER_CENT
from channels.units import Pico
from mppnode.accounts.documents import account_row, read_account
from mppnode.accounts.model import Account, AccountKind, Alerts, BillingProfile, Postpaid, Prepaid, Recharge
from mppnode.accounts.notices import notices
from mppnode.billing.service import Billing
from mppnode.config.accounts import TrustLimits
from mppnode.config.billing import BillingConfig
from mppnode.config.secrets import Secret
from mppnode.gateways.stripe_api import StripeGateway
from mppnode.kernel.clock import ManualClock
from mppnode.ledger import credit_lists
from mppnode.ledger.base import Ledger
from mppnode.ledger.credit_lists import By
from mppnode.ledger.credit_rows import Task
from mppnode.ledger.credits import Credits
from mppnode.ledger.sqlite import SqliteStore
from tests.store.shops import never
from tests.support.stripe_peer import KEY, NOW, StripePeer, running_peer, sign

SECRET = "whsec_canaryCanaryCanary0123456789"
METER = "usage"
CENT = PICO_PER_CENT
DOLLAR = 100 * CENT
HOUR = 3_600


def config(price: str | None = None) -> BillingConfig:
    page = "https://node.example.com/"
    return BillingConfig(
        Secret(KEY), (Secret(SECRET),), page, page, page, (500, 2_000), METER, False, price,
    )  # fmt: skip


@dataclass
class Desk:
    """Everything a test needs, and what was logged."""

    peer: StripePeer
    clock: ManualClock
    ledger: Ledger
    books: Credits
    stripe: StripeGateway
    billing: Billing
    log: list[tuple[str, dict[str, Any]]]
    random: int = 0

    async def account(
        self, name: str = "acct_1", *, prepaid: bool = True, recharge: Recharge | None = None, alerts: Alerts | None = None, billed: BillingProfile | None = None
    ) -> Account:
        terms = Prepaid() if prepaid else Postpaid(Pico(DOLLAR))
        made = Account(
            id=AccountId(name), kind=AccountKind.USER, trust=name, terms=terms, alerts=alerts, billing=billed or BillingProfile(recharge=recharge)
        )
        await self.books.create_account(account_row(made), overdraft=terms.overdraft)
        return made

    async def with_card(self, name: str = "acct_1", card: str = "pm_visa", **more: Any) -> Account:
        """An account with a customer at Stripe and a saved card."""
        made = await self.account(name, **more)
        await self.billing.portal(made)
        return await self.change(made.id, card=card)

    async def change(self, name: AccountId, **billing: Any) -> Account:
        row = await self.books.change_account(
            name, lambda row: account_row(replace(found := read_account(row), billing=replace(found.billing, **billing)))
        )
        assert row is not None
        return read_account(row)

    async def subscribed(self, name: str = "acct_1") -> Account:
        await self.billing.subscribe(await self.with_card(name, prepaid=False))
        return await self.read(name)

    async def read(self, name: str) -> Account:
        row = await self.books.read(lambda: credit_lists.find_account(By.ID, name))
        assert row is not None
        return read_account(row)

    async def credit(self, name: str) -> CreditAccount:
        found = await self.books.load(AccountId(name))
        assert found is not None
        return found

    async def give(self, name: str, pico: int) -> None:
        await self.books.apply(AccountId(name), MoveFunds(FundsKind.GRANT, f"gift-{self.clock.now_millis()}", pico))

    async def spend(self, name: str, pico: int) -> None:
        """A request, with what follows from it in the same transaction."""
        account, credit = await self.read(name), await self.credit(name)
        self.random += 1
        hold = HoldId(f"r{self.random}")
        await self.books.apply(account.id, Hold(hold, Pico(1), Pico(pico), access=credit.access))
        now = self.clock.now_millis()

        def step(found: CreditAccount | None) -> Any:
            assert found is not None
            made = plan(found, Settle(hold, Pico(pico)), now=self.clock.now())
            return made, notices(found, made.account, account=account, key=None, now=now)

        await self.books.transact(account.id, step)

    async def tasks(self, kind: str, name: str | None = "acct_1") -> list[Task]:
        found = await self.books.read(lambda: credit_lists.tasks(None if name is None else AccountId(name), kind, None, 100))
        return list(reversed(found))

    async def entries(self, name: str) -> int:
        """The sum of an account's statement."""
        lines = await self.books.read(lambda: credit_lists.entries(AccountId(name), None, 1_000))
        return sum(line.amount for line in lines)

    async def deliver(self, event: dict[str, Any]) -> None:
        body = json.dumps(event).encode()
        await self.billing.webhook(body, sign(body, SECRET, self.clock.now()))

    async def deliver_all(self, since: int = 0) -> None:
        for event in self.peer.events[since:]:
            await self.deliver(event)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.peer.events if event["type"] == kind]


async def no_sleep(_: float) -> None:
    await asyncio.sleep(0)


@asynccontextmanager
async def open_desk(folder: Path) -> AsyncIterator[Desk]:
    clock = ManualClock(NOW)
    lines: list[tuple[str, dict[str, Any]]] = []
    counter = iter(range(1, 1_000_000))
    store = SqliteStore(folder / "ledger.sqlite", clock=clock, on_fatal=never)
    await store.start()
    try:
        async with running_peer(clock=clock) as peer, aiohttp.ClientSession() as session:
            price = peer.metered_price(METER)["id"]
            books = Credits(store, clock=clock)

            def log(event: str, **fields: Any) -> None:
                lines.append((event, fields))

            stripe = StripeGateway(Secret(KEY), session=session, below=lambda top: 0, log=log, base_url=peer.base_url, sleep=no_sleep)
            billing = Billing(
                stripe, books, ledger=store, node=lambda: NodeId("node-1"), clock=clock, config=config(price), trust=TrustLimits(),
                entropy=lambda size: next(counter).to_bytes(size, "big"), log=log,
            )  # fmt: skip
            yield Desk(peer, clock, store, books, stripe, billing, lines)
    finally:
        await store.stop()
