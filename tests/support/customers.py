"""A customer with an API key, at a node under test."""

from __future__ import annotations

from typing import Any

import orjson

from channels.credit import AccountId, CreditAccount, KeyId
from channels.units import Pico
from mppnode.accounts.forms import Gift, KeyForm, Opening, read_key_form
from mppnode.accounts.model import AccountKind, Postpaid, Prepaid
from mppnode.customers import Customers
from mppnode.ledger import credit_lists
from mppnode.ledger.credit_rows import Entry, RequestRow
from mppnode.ledger.credits import Credits
from tests.support.http_client import Reply, Stream, World

DOLLAR = 10**12


def customers_of(world: World) -> Customers:
    found = world.net.node.customers
    assert found is not None
    return found


class Customer:
    """One account and its first key."""

    def __init__(self, world: World, account: AccountId, key: KeyId, secret: str) -> None:
        self.world = world
        self.account = account
        self.key = key
        self.bearer = f"Bearer {secret}"

    @property
    def books(self) -> Credits:
        return customers_of(self.world).books

    async def send(self, body: object = None, **more: Any) -> Reply:
        return await self.world.send(body, self.bearer, **more)

    def stream(self, body: object, **more: Any) -> Any:
        return self.world.stream(body, self.bearer, **more)

    async def credit(self) -> CreditAccount:
        found = await self.books.load(self.account)
        assert found is not None
        return found

    async def requests(self) -> list[RequestRow]:
        return await self.books.read(lambda: credit_lists.requests(self.account, credit_lists.Between(), None, 1_000))

    async def entries(self) -> list[Entry]:
        return await self.books.read(lambda: credit_lists.entries(self.account, None, 1_000))

    async def another_key(self, **form: Any) -> Customer:
        made = await customers_of(self.world).keyring.create(self.account, key_form(self.world, **form))
        return Customer(self.world, self.account, made.key.id, made.secret.text)

    async def grant(self, amount: int, reference: str) -> None:
        await customers_of(self.world).accounts.grant(self.account, Gift(Pico(amount), reference))


def key_form(world: World, **fields: Any) -> KeyForm:
    return read_key_form(orjson.dumps({"name": "test", **fields}), now=world.clock.now())


async def new_customer(
    world: World, credit: int = DOLLAR, *, trust: str = "customer", terms: Prepaid | Postpaid | None = None, **form: Any
) -> Customer:
    """Open an account with ``credit`` pico-dollars and a key of this form."""
    customers = customers_of(world)
    account = await customers.accounts.create(Opening(trust, AccountKind.USER, None, terms or Prepaid()))
    made = await customers.keyring.create(account.id, key_form(world, **form))
    customer = Customer(world, account.id, made.key.id, made.secret.text)
    if credit:
        await customer.grant(credit, "welcome")
    return customer


__all__ = ["DOLLAR", "Customer", "Stream", "customers_of", "new_customer"]
