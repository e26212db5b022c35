"""``mppnode accounts``, ``keys`` and ``credits``: the operator's hands on customers without a channel.

They work on the configured ledger beside a running node: what they change holds for the next request on every node.
Results go to standard output, tables for people or one JSON object a line with ``--json``; problems go to standard
error. The text of a new key is printed once and is nowhere else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

import aiohttp

from channels.credit import AccountId, KeyId, Spending
from channels.faults import ChannelFault
from channels.model import NodeId
from channels.payment import PICO_PER_CENT
from channels.units import PICO_PER_UNIT, Pico, parse_decimal
from mppnode.accounts.documents import read_account
from mppnode.accounts.forms import Gift, read_key_form, read_opening, read_operated, read_reference, read_rotation
from mppnode.accounts.keyring import Accounts, Keyring, Made
from mppnode.accounts.model import Account, Postpaid
from mppnode.billing.workers import DAY_S
from mppnode.cli.serve import CANNOT_START, read_config, run
from mppnode.config.billing import BillingConfig
from mppnode.config.schema import Config
from mppnode.http.account_json import account_json, credits_json, entry_json, key_json
from mppnode.kernel.clock import SystemClock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.ledger import credit_lists
from mppnode.ledger.base import Ledger
from mppnode.ledger.credits import Credits
from mppnode.observe.logs import quiet
from mppnode.parts import World, open_ledger
from mppnode.paying import billing_with

if TYPE_CHECKING:
    from mppnode.billing.service import Billing

_BAD: Final = 2
_FAILED: Final = 1
_PAGE: Final = 200


@dataclass(frozen=True, slots=True)
class _Desk:
    config: Config
    world: World
    ledger: Ledger
    books: Credits
    keyring: Keyring
    accounts: Accounts
    options: argparse.Namespace

    async def account(self) -> Account:
        """The account that is named, by its id or by the name ``X-Trust`` calls it."""
        name: str = self.options.account
        for by in (credit_lists.By.ID, credit_lists.By.TRUST):
            row = await self.books.read(partial(credit_lists.find_account, by, name))
            if row is not None:
                return read_account(row)
        raise _Refused(f"{name!r} is no account of this node")


_Work: TypeAlias = Callable[[_Desk], Awaitable[int | None]]
"""What a command does; its exit status, or None for 0."""


class _Refused(Exception):
    """The command cannot be carried out; the message is for the operator."""


def accounts(options: argparse.Namespace) -> int:
    """Create, list, show, suspend and resume accounts, and set their terms."""
    suspend, resume = (partial(_change, body={"suspended": value}) for value in (True, False))
    work: dict[str, _Work] = {
        "create": _create,
        "list": _list,
        "show": _show,
        "suspend": suspend,
        "resume": resume,
        "terms": _terms,
    }
    return _at_desk(options, work[options.action])


def keys(options: argparse.Namespace) -> int:
    """Create, list, revoke and rotate keys."""
    work: dict[str, _Work] = {"create": _create_key, "list": _list_keys, "revoke": _revoke, "rotate": _rotate}
    return _at_desk(options, work[options.action])


def credit(options: argparse.Namespace) -> int:
    """Show, grant and deduct credit, list transactions, and compare all of it with Stripe."""
    work: dict[str, _Work] = {
        "show": _show_credits,
        "grant": partial(_grant, sign=1),
        "deduct": partial(_grant, sign=-1),
        "transactions": _transactions,
        "reconcile": _reconcile,
    }
    return _at_desk(options, work[options.action])


# ------------------------------------------------------------------------------------------------------------ plumbing


def _at_desk(options: argparse.Namespace, work: _Work) -> int:
    config = read_config(options.config)
    return _BAD if config is None else run(_open_and(config, options, work))


async def _open_and(config: Config, options: argparse.Namespace, work: _Work) -> int:
    fatal: list[BaseException] = []
    clock = SystemClock()
    world = World(clock, os.urandom, quiet, fatal.append)
    ledger = open_ledger(config, world, shared=True)
    try:
        await ledger.start()
    except CANNOT_START as error:
        return _problem(error, _FAILED)
    try:
        books = Credits(ledger, clock=clock)
        keyring = Keyring(books, clock=clock, entropy=os.urandom)
        accounts = Accounts(books, clock=clock, entropy=os.urandom)
        return await work(_Desk(config, world, ledger, books, keyring, accounts, options)) or 0
    except (_Refused, NodeFault) as refused:
        outage = isinstance(refused, NodeFault) and refused.reason is NodeReason.BILLING_UNAVAILABLE
        return _problem(refused, _FAILED if outage else _BAD)
    except ChannelFault as fault:
        return _problem(fault, _FAILED)
    finally:
        await ledger.stop()


def _problem(error: BaseException, status: int) -> int:
    print(f"mppnode: {error}", file=sys.stderr)
    return status


def _put(desk: _Desk, records: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Records as JSON, one a line, or as a table of the columns named; a dot goes one level down."""
    if desk.options.json:
        for record in records:
            print(json.dumps(record))
        return
    lines = [[name.rpartition(".")[0].rpartition(".")[2] or name for name in columns]]
    lines += [[_cell(record, name) for name in columns] for record in records]
    widths = [max(len(line[number]) for line in lines) for number in range(len(columns))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(record: dict[str, Any], name: str) -> str:
    value: Any = record
    for part in name.split("."):
        value = None if value is None else value[part]
    if value is None:
        return "-"
    return ",".join(value) if isinstance(value, (list, tuple)) else str(value)


# ------------------------------------------------------------------------------------------------------------ accounts

_ACCOUNT: Final = ("id", "trust", "kind", "terms", "trust_limit.usd", "suspended_at", "email")


async def _create(desk: _Desk) -> None:
    options = desk.options
    body = {"trust": options.trust, "kind": options.kind, "email": options.email, **_terms_body(options)}
    if options.terms == "postpaid" and desk.config.billing is not None:
        _refuse("an account begins prepaid: nobody could be billed before a card is saved")
    account = await desk.accounts.create(read_opening(_bytes(body)))
    _put(desk, [account_json(account)], _ACCOUNT)


async def _list(desk: _Desk) -> None:
    found: list[dict[str, Any]] = []
    after: AccountId | None = None
    while page := await desk.accounts.page(after, _PAGE):
        after = page[-1].id
        found += [account_json(account) for account in page]
    _put(desk, found, _ACCOUNT)


async def _show(desk: _Desk) -> None:
    account = await desk.account()
    credit = await desk.accounts.credit(account.id)
    record = {**account_json(account), "credits": credits_json(account, credit)}
    if desk.options.json:
        _put(desk, [record], ())
        return
    for name, value in record.items():
        print(f"{name:>28}  {json.dumps(value)}")


async def _change(desk: _Desk, body: dict[str, Any]) -> None:
    account = await desk.account()
    changed, _ = await desk.accounts.change(account.id, read_operated(_bytes(body)))
    _put(desk, [account_json(changed)], _ACCOUNT)


async def _terms(desk: _Desk) -> None:
    account, form = await desk.account(), read_operated(_bytes(_terms_body(desk.options)))
    if desk.config.billing is None or not isinstance(form.terms, Postpaid):
        changed, _ = await desk.accounts.change(account.id, form)
    else:
        async with _billing(desk, desk.config.billing) as billing:
            # As the admin API: billed first, then trusted, and then as far as what was paid allows.
            await billing.subscribe(replace(account, terms=form.terms))
            changed, _ = await desk.accounts.change(account.id, form)
            await billing.subscribe(changed)
    _put(desk, [account_json(changed)], _ACCOUNT)


def _terms_body(options: argparse.Namespace) -> dict[str, Any]:
    if options.trust_limit is None:
        return {"terms": options.terms}
    return {"terms": options.terms, "trust_limit_cents": _cents(options.trust_limit, "--trust-limit")}


# ---------------------------------------------------------------------------------------------------------------- keys

_KEY: Final = ("id", "name", "prefix", "status", "spent.total", "expires_at", "rotated_to")
_NEW: Final = ("id", "name", "prefix", "status", "expires_at")


async def _create_key(desk: _Desk) -> None:
    options = desk.options
    account = await desk.account()
    caps = {name: getattr(options, f"{name}_cap") for name in ("day", "month", "total")}
    said = {
        "name": options.name,
        "model_pool": options.model or None,
        "optimize_mode": options.optimize,
        "routing_strategy": options.strategy,
        "allow_external": options.allow_external,
        "max_input_price_per_million": options.max_input_cents,
        "max_output_price_per_million": options.max_output_cents,
        "spend_caps": {name: _cents(cap, f"--{name}-cap") for name, cap in caps.items() if cap is not None} or None,
        "rpm": options.rpm,
        "tpm": options.tpm,
        "concurrency": options.concurrency,
        "expires_at": options.expires,
    }
    body = _bytes({name: value for name, value in said.items() if value is not None})
    made = await desk.keyring.create(account.id, read_key_form(body, now=desk.books.clock.now()))
    _put_new(desk, made)


async def _list_keys(desk: _Desk) -> None:
    account = await desk.account()
    credit, now = await desk.accounts.credit(account.id), desk.books.clock.now()
    found: list[dict[str, Any]] = []
    after: KeyId | None = None
    while page := await desk.keyring.page(account.id, after, _PAGE):
        after = page[-1].id
        found += [key_json(key, credit.spending.get(key.id, Spending()), now=now) for key in page]
    _put(desk, found, _KEY)


async def _revoke(desk: _Desk) -> None:
    account = await desk.account()
    key = await desk.keyring.revoke(account.id, KeyId(desk.options.key))
    _put(desk, [key_json(key, now=desk.books.clock.now())], _NEW)


async def _rotate(desk: _Desk) -> None:
    account = await desk.account()
    overlap_s = read_rotation(_bytes({"overlap_s": desk.options.overlap}))
    _put_new(desk, await desk.keyring.rotate(account.id, KeyId(desk.options.key), overlap_s))


def _put_new(desk: _Desk, made: Made) -> None:
    shown = {**key_json(made.key, now=desk.books.clock.now()), "key": made.secret.text}
    _put(desk, [shown], ("id", "name", "key"))


# ------------------------------------------------------------------------------------------------------------- credits

_CREDITS: Final = ("account", "terms", "balance.usd", "held.usd", "available.usd", "spent.usd")
_LINES: Final = ("time", "kind", "amount.usd", "balance.usd", "reference")


async def _show_credits(desk: _Desk) -> None:
    await _put_credits(desk, await desk.account(), {})


async def _grant(desk: _Desk, sign: int) -> None:
    account = await desk.account()
    pico = _dollars(desk.options.amount, "AMOUNT") * sign
    if not pico:
        raise _Refused("AMOUNT is zero")
    gift = Gift(Pico(pico), read_reference(desk.options.reference))
    _, first = await desk.accounts.grant(account.id, gift)
    if not first:
        print("mppnode: this reference is booked already; nothing was done", file=sys.stderr)
    await _put_credits(desk, account, {"booked": first})


async def _put_credits(desk: _Desk, account: Account, more: dict[str, Any]) -> None:
    credit = await desk.accounts.credit(account.id)
    _put(desk, [{"account": account.id, **credits_json(account, credit), **more}], _CREDITS)


async def _transactions(desk: _Desk) -> None:
    account, limit = (await desk.account()).id, desk.options.limit
    lines = await desk.books.read(lambda: credit_lists.entries(account, None, limit))
    _put(desk, [entry_json(line) for line in lines], _LINES)


_DIFFERENCES: Final = ("what", "account", "reference", "ours", "theirs")
_SIDES: Final = ("payments", "paid", "refunded", "disputed")


async def _reconcile(desk: _Desk) -> int:
    """Compare Stripe's objects of some days with the ledger, book what is missing, and fail if anything differed."""
    billing = desk.config.billing
    if billing is None:
        _refuse("the configuration has no [billing]: there is nothing to compare with")
    async with _billing(desk, billing) as service:
        now = desk.world.clock.now()
        found = await service.reconcile(now - desk.options.days * DAY_S, now)
    differences = [asdict(one) for one in found.differences]
    if desk.options.json:
        sides = {name: {side: getattr(getattr(found, name), side) for side in _SIDES} for name in ("ledger", "stripe")}
        counts = {name: getattr(found, name) for name in ("booked", "foreign", "accounts")}
        _put(desk, [*differences, {**sides, **counts, "differences": len(differences)}], ())
    else:
        if differences:
            _put(desk, differences, _DIFFERENCES)
        print(
            f"{found.accounts} accounts and {found.stripe.payments} payments compared: {len(differences)} differences,"
            f" {found.booked} of them booked now; {found.foreign} payments of no account of this node"
        )
    return _FAILED if differences else 0


@asynccontextmanager
async def _billing(desk: _Desk, config: BillingConfig) -> AsyncIterator[Billing]:
    """The configured Stripe account, of the mode that the configuration says."""
    async with aiohttp.ClientSession(trust_env=False) as session:
        try:
            billing = billing_with(
                config, desk.config, desk.world, desk.books, session=session, ledger=desk.ledger, node=_no_node
            )
        except ValueError as error:
            _refuse(str(error))
        await billing.start()
        yield billing


def _no_node() -> NodeId:
    raise AssertionError("a command leads no work")


# ------------------------------------------------------------------------------------------------------------- amounts


def _dollars(text: str, name: str) -> int:
    """Dollars as pico-dollars, exactly."""
    try:
        return parse_decimal(text, field=name) * PICO_PER_UNIT
    except ChannelFault:
        _refuse(f"{name} is not an amount in dollars with at most six places, such as 5.00")


def _cents(text: str, name: str) -> int:
    cents, rest = divmod(_dollars(text, name), PICO_PER_CENT)
    if rest:
        _refuse(f"{name} is not whole cents")
    return cents


def _bytes(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _refuse(words: str) -> NoReturn:
    raise _Refused(words) from None
