"""``/admin/v1``: the operator's API, an application of its own for a port of its own.

It is never mounted on the public one: there is no header, path or setting by which a customer's request could reach it
(threat K10, CVE-2026-35029). Everything but its own token is refused before a route is even looked for.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Middleware

from channels.credit import AccountId, CreditAccount, KeyId
from mppnode.accounts.forms import known, read_gift, read_key_form, read_opening, read_operated, read_rotation
from mppnode.accounts.keyring import Accounts, Keyring
from mppnode.accounts.model import Account, Postpaid
from mppnode.config.secrets import Secret
from mppnode.http.account_json import account_json, credits_json, key_json, task_json
from mppnode.http.account_routes import keys_page, made_json, page, transactions_page, with_secret
from mppnode.http.answers import body_of
from mppnode.http.billing_routes import BillingPort
from mppnode.http.middleware import fault_boundary, route_of, stamp
from mppnode.http.reception import Query, answer, answered, bearer_of, cursor, identifier, refusal
from mppnode.http.usage_routes import usage_answer
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.ledger import credit_lists
from mppnode.ledger.credit_grants import task
from mppnode.ledger.credit_rows import TaskState
from mppnode.ledger.credits import Credits
from mppnode.observe.logs import Log

ROOT: Final = "/admin/v1"
_BODY_MAX: Final = 64 * 1024  # twice the largest form
_CREATED: Final = 201
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def admin_app(
    *,
    token: Callable[[], Secret[str]],
    keyring: Keyring,
    accounts: Accounts,
    books: Credits,
    clock: Clock,
    log: Log,
    entropy: Callable[[int], bytes],
    billing: BillingPort | None = None,
    private_alerts: bool = False,
) -> web.Application:
    """The application; whoever runs it binds it to ``[admin]``'s host and port. ``token`` gives the one in force."""
    if not token().reveal():
        raise ValueError("the admin API needs a token")
    surface = AdminSurface(keyring, accounts, books, clock, billing, private_alerts=private_alerts)
    layers = [fault_boundary(log, entropy), _audited(log), _gate(token)]
    app = web.Application(middlewares=layers, client_max_size=_BODY_MAX)
    app.add_routes(surface.routes())
    app.on_response_prepare.append(stamp)
    return app


def _audited(log: Log) -> Middleware:
    """One line for everything somebody asked to be changed, done or refused; its token may have been a wrong one."""

    @web.middleware
    async def audit(request: web.Request, handler: Handler) -> web.StreamResponse:
        status: int | None = None  # of what raises, or is broken off: it may have been done or not
        try:
            response = await handler(request)
            status = response.status
        finally:
            if request.method not in ("GET", "HEAD"):
                log(
                    "operator.action",
                    method=request.method,
                    route=route_of(request),
                    account=request.match_info.get("account"),
                    target=request.match_info.get("id"),
                    status=status,
                    remote=request.remote,
                )
        return response

    return audit


def _gate(token: Callable[[], Secret[str]]) -> Middleware:
    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            # Digests are compared, so that not even the length of the token shows in the time it takes.
            wanted = hashlib.sha256(token().reveal().encode()).digest()
            given = hashlib.sha256(bearer_of(request).encode("utf-8", "surrogateescape")).digest()
            if not hmac.compare_digest(given, wanted):
                raise NodeFault(NodeReason.INVALID_KEY, detail="is not the token of this admin API")
        except NodeFault as fault:
            return refusal(fault)
        return await handler(request)

    return gate


class AdminSurface:
    """What an operator does with accounts, keys, credit and the outbox."""

    def __init__(
        self,
        keyring: Keyring,
        accounts: Accounts,
        books: Credits,
        clock: Clock,
        billing: BillingPort | None,
        *,
        private_alerts: bool = False,
    ) -> None:
        self._keyring = keyring
        self._accounts = accounts
        self._books = books
        self._clock = clock
        self._billing = billing
        self._private_alerts = private_alerts

    def routes(self) -> list[web.RouteDef]:
        """The routes of the admin API."""
        one = ROOT + "/accounts/{account}"
        return [
            web.post(ROOT + "/accounts", self.create_account),
            web.get(ROOT + "/accounts", self.list_accounts),
            web.get(one, self.show_account),
            web.patch(one, self.change_account),
            web.post(one + "/keys", self.create_key),
            web.get(one + "/keys", self.list_keys),
            web.patch(one + "/keys/{id}", self.change_key),
            web.delete(one + "/keys/{id}", self.revoke_key),
            web.post(one + "/keys/{id}/rotate", self.rotate_key),
            web.post(one + "/credits", self.grant),
            web.get(one + "/credits", self.show_credits),
            web.get(one + "/usage", self.usage),
            web.get(one + "/transactions", self.list_transactions),
            web.get(ROOT + "/outbox", self.list_tasks),
            web.post(ROOT + "/outbox/{id:.+}/retry", self.retry),
        ]

    # ------------------------------------------------------------------------------------------------------ accounts

    @answered
    async def create_account(self, request: web.Request) -> web.Response:
        """Open an account."""
        opening = read_opening(await body_of(request))
        if self._billing is not None and isinstance(opening.terms, Postpaid):
            words = "must be prepaid until a card is saved: nobody could be billed"
            raise NodeFault(NodeReason.CONFLICT, field="terms", detail=words)
        account = await self._accounts.create(opening)
        return answer(account_json(account), status=_CREATED)

    @answered
    async def list_accounts(self, request: web.Request) -> web.Response:
        """Accounts in the order of their ids, or the one that ``trust`` names."""
        query = Query(request, ("limit", "cursor", "trust"))
        trust = query.name("trust")
        if trust is not None:
            row = await self._books.read(lambda: credit_lists.find_account(credit_lists.By.TRUST, trust))
            found = [] if row is None else [account_json(await self._accounts.find(row.id))]
            return answer(page(found, None))
        after, limit = query.cursor(str), query.limit()
        rows = await self._accounts.page(None if after is None else AccountId(after[0]), limit)
        return answer(page([account_json(row) for row in rows], cursor(rows[-1].id) if len(rows) == limit else None))

    @answered
    async def show_account(self, request: web.Request) -> web.Response:
        """One account and its money."""
        account = await self._account(request)
        return answer({**account_json(account), "credits": credits_json(account, await self._credit(account))})

    @answered
    async def change_account(self, request: web.Request) -> web.Response:
        """Suspend or resume it, set terms, limits, e-mail and settings."""
        account = await self._account(request)
        form = read_operated(await body_of(request), private_alerts=self._private_alerts)
        if self._billing is not None and isinstance(form.terms, Postpaid):
            # Before the terms: somebody who may owe and is billed by nobody is a gift. Without a payment processor the
            # operator writes the invoices.
            await self._billing.subscribe(replace(account, terms=form.terms))
        changed, secret = await self._accounts.change(account.id, form)
        if self._billing is not None and isinstance(form.terms, Postpaid):
            await self._billing.subscribe(changed)  # what was agreed is the least it may owe: it may have grown beyond
        return answer(with_secret(account_json(changed), secret))

    # ---------------------------------------------------------------------------------------------------------- keys

    @answered
    async def create_key(self, request: web.Request) -> web.Response:
        """Make a key; this answer is the only place its text is ever shown."""
        account = await self._account(request)
        form = read_key_form(await body_of(request), now=self._clock.now())
        made = await self._keyring.create(account.id, form)
        return answer(made_json(made, self._clock), status=_CREATED)

    @answered
    async def list_keys(self, request: web.Request) -> web.Response:
        """An account's keys."""
        account = await self._account(request)
        return answer(await keys_page(request, account.id, self._keyring, self._books, self._clock))

    @answered
    async def change_key(self, request: web.Request) -> web.Response:
        """Change a key."""
        form = read_key_form(await body_of(request), now=self._clock.now())
        key = await self._keyring.change(*self._key(request), form)
        return answer(key_json(key, now=self._clock.now()))

    @answered
    async def revoke_key(self, request: web.Request) -> web.Response:
        """End a key at once."""
        return answer(key_json(await self._keyring.revoke(*self._key(request)), now=self._clock.now()))

    @answered
    async def rotate_key(self, request: web.Request) -> web.Response:
        """Put a new key in a key's place."""
        overlap_s = read_rotation(await body_of(request))
        made = await self._keyring.rotate(*self._key(request), overlap_s)
        return answer(made_json(made, self._clock), status=_CREATED)

    # ------------------------------------------------------------------------------------------------ money and usage

    @answered
    async def grant(self, request: web.Request) -> web.Response:
        """Give or take credit, once per reference; a repeat answers 200 instead of 201 and books nothing."""
        account = await self._account(request)
        _, first = await self._accounts.grant(account.id, read_gift(await body_of(request)))
        shown = {**credits_json(account, await self._credit(account)), "booked": first}
        return answer(shown, status=_CREATED if first else 200)

    @answered
    async def show_credits(self, request: web.Request) -> web.Response:
        """What an account has left."""
        account = await self._account(request)
        return answer(credits_json(account, await self._credit(account)))

    @answered
    async def usage(self, request: web.Request) -> web.StreamResponse:
        """As ``/v1/usage``."""
        account = await self._account(request)
        return await usage_answer(request, account.id, self._books)

    @answered
    async def list_transactions(self, request: web.Request) -> web.Response:
        """As ``/v1/credits/transactions``."""
        account = await self._account(request)
        return answer(await transactions_page(request, account.id, self._books))

    # -------------------------------------------------------------------------------------------------------- outbox

    @answered
    async def list_tasks(self, request: web.Request) -> web.Response:
        """The newest tasks of a kind, of everybody or one account."""
        query = Query(request, ("kind", "state", "account", "limit"))
        kind, account = query.name("kind"), query.name("account")
        state = query.choice("state", [each.value for each in TaskState])
        if kind is None:
            raise NodeFault(NodeReason.INVALID_FIELD, field="kind", detail="is missing")
        whose = None if account is None else AccountId(account)
        wanted = None if state is None else TaskState(state)
        tasks = await self._books.read(lambda: credit_lists.tasks(whose, kind, wanted, query.limit()))
        return answer(page([task_json(each) for each in tasks], None))

    @answered
    async def retry(self, request: web.Request) -> web.Response:
        """Let a task that was given up be tried again now."""
        known(list(request.query), ())
        name = identifier(request)
        found = await self._books.read(lambda: task(name))
        if found is None:
            raise NodeFault(NodeReason.NOT_FOUND, detail="there is no such task")
        if found.state is not TaskState.PARKED:
            raise NodeFault(NodeReason.CONFLICT, detail=f"the task is {found.state.value}, not parked")
        due = replace(found, state=TaskState.DUE, due_ms=self._clock.now_millis(), version=found.version + 1)
        if not await self._books.move_task(found, due):
            raise NodeFault(NodeReason.CONFLICT, detail="somebody else has just moved the task")
        return answer(task_json(due))

    # -------------------------------------------------------------------------------------------------------- helpers

    async def _account(self, request: web.Request) -> Account:
        return await self._accounts.find(AccountId(identifier(request, "account")))

    async def _credit(self, account: Account) -> CreditAccount:
        return await self._accounts.credit(account.id)

    @staticmethod
    def _key(request: web.Request) -> tuple[AccountId, KeyId]:
        return AccountId(identifier(request, "account")), KeyId(identifier(request))
