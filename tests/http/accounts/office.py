"""The account routes and the admin API on loopback, over a real SQLite ledger and a clock that moves when told."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from channels.credit import AccountId, FundsKind, Hold, KeyId, MoveFunds, Settle, plan
from channels.instants import UnixMillis, UnixSeconds
from channels.model import HoldId
from channels.units import Pico
from mppnode.accounts.directory import Directory, Tokens
from mppnode.accounts.forms import KeyForm, Opening
from mppnode.accounts.keyring import Accounts, Keyring, Made
from mppnode.accounts.model import Account, AccountKind, Identity, Prepaid
from mppnode.config.secrets import Secret
from mppnode.http.account_routes import AccountSurface
from mppnode.http.admin import admin_app
from mppnode.http.billing_routes import BillingPort, BillingSurface
from mppnode.http.middleware import fault_boundary
from mppnode.http.usage_routes import UsageSurface
from mppnode.kernel.clock import ManualClock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.ledger.credit_rows import RequestRow
from mppnode.ledger.credits import Credits
from mppnode.ledger.sqlite import SqliteStore
from mppnode.ledger.talk import Till

ADMIN = "admin-token-0123456789abcdef0123456789"
DOLLAR = 10**12


class Issuer(Tokens):
    """Takes ``jwt.<trust>`` as a verified token for that account."""

    async def identity(self, token: str) -> Identity:
        start, _, trust = token.partition(".")
        if start != "jwt":
            raise NodeFault(NodeReason.INVALID_TOKEN, detail="the token is not one")
        return Identity(trust, (trust,), UnixSeconds(2**40))


@dataclass
class Reply:
    """An answer, read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])

    @property
    def param(self) -> str | None:
        return self.json["error"]["param"]  # type: ignore[no-any-return]


@dataclass
class Office:
    """Two servers, their ledger, and a browser."""

    books: Credits
    clock: ManualClock
    directory: Directory
    keyring: Keyring
    accounts: Accounts
    http: ClientSession
    public: TestServer
    admin: TestServer
    bugs: list[str] = field(default_factory=list)

    async def ask(self, method: str, path: str, bearer: str | None = None, body: Any = None, *, admin: bool = False, **headers: str) -> Reply:
        server = self.admin if admin else self.public
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if bearer is not None:
            sent["Authorization"] = f"Bearer {bearer}"
        data = body if body is None or isinstance(body, bytes) else orjson.dumps(body)
        async with self.http.request(method, server.make_url("/").with_path("").join(server.make_url(path)), data=data, headers=sent) as response:
            return Reply(response.status, response.headers.copy(), await response.read())

    async def rule(self, method: str, path: str, body: Any = None) -> Reply:
        """As the operator."""
        return await self.ask(method, f"/admin/v1{path}", ADMIN, body, admin=True)

    async def customer(self, trust: str) -> tuple[Account, Made]:
        """An account and a key of it without limits."""
        account = await self.accounts.create(Opening(trust, AccountKind.USER, None, Prepaid()))
        return account, await self.keyring.create(account.id, KeyForm())

    async def spend(self, account: AccountId, name: str, cost: int, *, key: str = "", at: int | None = None, model: str = "dev/echo", document: str = "{}") -> None:
        """A request that was held, charged and recorded, as the engine does it."""
        credit = await self.books.load(account)
        assert credit is not None
        if credit.headroom < cost:
            await self.books.apply(account, MoveFunds(FundsKind.GRANT, f"for {name}", 10 * DOLLAR))
        await self.books.apply(account, Hold(HoldId(name), Pico(cost), Pico(cost), access=credit.access, key=KeyId(key)))
        when = UnixMillis(self.clock.now_millis() if at is None else at)
        row = RequestRow(name, account, KeyId(key), when, model, "dev", cost, 7, 1, 5, 2, document)
        await self.books.transact(account, lambda found: (plan(found, Settle(HoldId(name), Pico(cost)), now=self.clock.now()), (row,)))


@asynccontextmanager
async def office(folder: Path, *, billing: BillingPort | None = None, till: Till | None = None) -> AsyncIterator[Office]:
    clock = ManualClock()
    store = SqliteStore(folder / "ledger.sqlite", clock=clock, on_fatal=_never)
    await store.start()
    books = Credits(till or store, clock=clock)
    keyring, accounts = (kind(books, clock=clock, entropy=os.urandom) for kind in (Keyring, Accounts))
    directory = Directory(books, clock=clock, tokens=Issuer(), entropy=os.urandom)
    bugs: list[str] = []

    def log(event: str, **more: object) -> None:
        if event != "operator.action":  # that one is no mistake of ours
            bugs.append(f"{event} {more}")

    app = web.Application(middlewares=[fault_boundary(log, os.urandom)])
    app.add_routes(AccountSurface(directory=directory, keyring=keyring, accounts=accounts, books=books, clock=clock).routes())
    app.add_routes(UsageSurface(directory=directory, books=books).routes())
    app.add_routes(BillingSurface(directory=directory, billing=billing).routes())
    ruled = admin_app(
        token=lambda: Secret(ADMIN), keyring=keyring, accounts=accounts, books=books, clock=clock, log=log, entropy=os.urandom, billing=billing
    )
    try:
        async with TestServer(app) as public, TestServer(ruled) as admin, ClientSession() as http:
            yield Office(books, clock, directory, keyring, accounts, http, public, admin, bugs)
        assert bugs == []
    finally:
        await store.stop()


def _never(error: BaseException) -> None:
    raise AssertionError(f"fatal: {error!r}")
