"""``/v1/keys``, ``/v1/account`` and ``/v1/credits``: what a customer sees and changes of their own account."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aiohttp import web

from channels.credit import KeyId, Spending
from mppnode.accounts.directory import Directory
from mppnode.accounts.forms import read_key_form, read_rotation, read_settings
from mppnode.accounts.keyring import Accounts, Keyring, Made, Who, account_of
from mppnode.http.account_json import Json, account_json, credits_json, entry_json, key_json
from mppnode.http.answers import body_of
from mppnode.http.reception import Query, Reception, answer, answered, cursor, identifier
from mppnode.kernel.clock import Clock
from mppnode.ledger import credit_lists
from mppnode.ledger.credits import Credits

KEYS: Final = "/v1/keys"
ACCOUNT: Final = "/v1/account"
CREDITS: Final = "/v1/credits"
TRANSACTIONS: Final = "/v1/credits/transactions"
_CREATED: Final = 201


class AccountSurface:
    """Keys, settings and credit of whoever shows the bearer."""

    def __init__(
        self,
        *,
        directory: Directory,
        keyring: Keyring,
        accounts: Accounts,
        books: Credits,
        clock: Clock,
        private_alerts: bool = False,
    ) -> None:
        """``private_alerts`` takes alert addresses over plain http, for development."""
        self._reception = Reception(directory)
        self._keyring = keyring
        self._accounts = accounts
        self._books = books
        self._clock = clock
        self._private_alerts = private_alerts

    def routes(self) -> Sequence[web.RouteDef]:
        """The routes of this surface."""
        return [
            web.post(KEYS, self.create_key),
            web.get(KEYS, self.list_keys),
            web.get(KEYS + "/{id}", self.show_key),
            web.patch(KEYS + "/{id}", self.change_key),
            web.delete(KEYS + "/{id}", self.revoke_key),
            web.post(KEYS + "/{id}/rotate", self.rotate_key),
            web.get(ACCOUNT, self.show_account),
            web.patch(ACCOUNT, self.change_account),
            web.get(CREDITS, self.show_credits),
            web.get(TRANSACTIONS, self.list_transactions),
        ]

    # ---------------------------------------------------------------------------------------------------------- keys

    @answered
    async def create_key(self, request: web.Request) -> web.Response:
        """Make a key; this answer is the only place its text is ever shown."""
        await self._reception.admit(request)  # before the body: a stranger's form is not worth reading
        form = read_key_form(await body_of(request), now=self._clock.now())
        made = await self._reception.changing(request, lambda who: self._keyring.create(who, form))
        return answer(made_json(made, self._clock), status=_CREATED)

    @answered
    async def list_keys(self, request: web.Request) -> web.Response:
        """The account's keys, ended ones too."""
        who = await self._reception.admit(request)
        return answer(await keys_page(request, who, self._keyring, self._books, self._clock))

    @answered
    async def show_key(self, request: web.Request) -> web.Response:
        """One key and what it has spent."""
        who = await self._reception.admit(request)
        Query(request, ())
        key = await self._keyring.find(who, KeyId(identifier(request)))
        credit = await self._books.load(key.account)
        spent = None if credit is None else credit.spending.get(key.id, Spending())
        return answer(key_json(key, spent, now=self._clock.now()))

    @answered
    async def change_key(self, request: web.Request) -> web.Response:
        """Change a key; null removes a limit or a default."""
        await self._reception.admit(request)
        name = KeyId(identifier(request))
        form = read_key_form(await body_of(request), now=self._clock.now())
        key = await self._reception.changing(request, lambda who: self._keyring.change(who, name, form))
        return answer(key_json(key, now=self._clock.now()))

    @answered
    async def revoke_key(self, request: web.Request) -> web.Response:
        """End a key at once."""
        name = KeyId(identifier(request))
        key = await self._reception.changing(request, lambda who: self._keyring.revoke(who, name))
        return answer(key_json(key, now=self._clock.now()))

    @answered
    async def rotate_key(self, request: web.Request) -> web.Response:
        """Put a new key in a key's place; both work until the overlap is over."""
        await self._reception.admit(request)
        name, overlap_s = KeyId(identifier(request)), read_rotation(await body_of(request))
        made = await self._reception.changing(request, lambda who: self._keyring.rotate(who, name, overlap_s))
        return answer(made_json(made, self._clock), status=_CREATED)

    # -------------------------------------------------------------------------------------------- account and credits

    @answered
    async def show_account(self, request: web.Request) -> web.Response:
        """The account and its settings."""
        who = await self._reception.admit(request)
        Query(request, ())
        return answer(account_json(who.account))

    @answered
    async def change_account(self, request: web.Request) -> web.Response:
        """Change settings; the secret of a new alert address is shown here and never again."""
        await self._reception.admit(request)
        form = read_settings(await body_of(request), private_alerts=self._private_alerts)
        account, secret = await self._reception.changing(request, lambda who: self._accounts.change(who, form))
        return answer(with_secret(account_json(account), secret))

    @answered
    async def show_credits(self, request: web.Request) -> web.Response:
        """What is left."""
        who = await self._reception.admit(request)
        Query(request, ())
        return answer(credits_json(who.account, await self._accounts.credit(who.account.id)))

    @answered
    async def list_transactions(self, request: web.Request) -> web.Response:
        """Money in, money out and what each request cost, the newest first."""
        who = await self._reception.admit(request)
        return answer(await transactions_page(request, who, self._books))


async def keys_page(request: web.Request, who: Who, keyring: Keyring, books: Credits, clock: Clock) -> Json:
    """A page of an account's keys."""
    query = Query(request, ("limit", "cursor"))
    after, limit, now = query.cursor(str), query.limit(), clock.now()
    keys = await keyring.page(who, None if after is None else KeyId(after[0]), limit)
    credit = await books.load(account_of(who))
    spending = {} if credit is None else credit.spending
    shown = [key_json(key, spending.get(key.id, Spending()), now=now) for key in keys]
    return page(shown, cursor(keys[-1].id) if len(keys) == limit else None)


async def transactions_page(request: web.Request, who: Who, books: Credits) -> Json:
    """A page of an account's statement."""
    query = Query(request, ("limit", "cursor"))
    before, limit, account = query.cursor(int), query.limit(), account_of(who)
    lines = await books.read(lambda: credit_lists.entries(account, None if before is None else before[0], limit))
    return page([entry_json(line) for line in lines], cursor(lines[-1].seq) if len(lines) == limit else None)


def page(rows: Sequence[Json], more: str | None) -> Json:
    """A list as OpenAI clients page through it, with the cursor of what comes after it."""
    return {"object": "list", "data": rows, "has_more": more is not None, "next_cursor": more}


def made_json(made: Made, clock: Clock) -> Json:
    """A new key with its text."""
    return {**key_json(made.key, now=clock.now()), "key": made.secret.text}


def with_secret(shown: Json, secret: str | None) -> Json:
    """An account with the secret of its new alert address, where there is one."""
    return shown if secret is None else {**shown, "alerts": {**shown["alerts"], "secret": secret}}
