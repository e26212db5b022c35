"""Keys and accounts as their owners and operators change them: every change is decided on the rows as they are.

Who may do what (threat K10):

* an operator, and whoever shows a token of the account, may do everything with it;
* a key may make, change, replace and revoke keys that have no right it lacks itself, and no others;
* what it may do with itself is to take rights away: limits are raised by somebody else, or they are none.

A caller is admitted before the change is written. So the change is refused as :class:`Stale` when the account has
counted on since: a key that was revoked or narrowed in that moment makes no key with the rights it had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, TypeVar

from channels.credit import (
    KEYS_MAX,
    NO_CAPS,
    AccountId,
    CreditAccount,
    CreditFault,
    CreditReason,
    FundsKind,
    KeyId,
)
from channels.instants import UnixMillis, UnixSeconds
from mppnode.accounts.access import widened
from mppnode.accounts.directory import Admission, new_account
from mppnode.accounts.documents import account_row, key_row, read_account, read_key
from mppnode.accounts.forms import AccountForm, Gift, KeyForm, Opening
from mppnode.accounts.model import Account, ApiKey, RateLimits
from mppnode.accounts.notices import SUSPENSION
from mppnode.gateways.alerts import new_alert_secret
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.keys import NewKey, new_key
from mppnode.ledger import credit_lists, credit_talk
from mppnode.ledger.credit_grants import OtherAmount, grant
from mppnode.ledger.credit_rows import AccountRow, KeyRow, TaskState
from mppnode.ledger.credit_talk import Exists
from mppnode.ledger.credits import Credits
from mppnode.ledger.talk import Talk

R = TypeVar("R")
Who = Admission | AccountId
"""Who asks: a bearer that was admitted a moment ago, or the operator, for the account named."""

_PAGE: Final = 100
_ID_BYTES: Final = 12  # 96 random bits: nobody guesses one, and two are never the same
_FIELDS: Final = MappingProxyType(
    {"caps": "spend_caps", "rates": "rpm", "ceiling": "max_input_price_per_million", "account": "id"}
)
"""What :func:`widened` calls a right, as the API calls the field."""


class Stale(Exception):
    """The account has changed since its bearer was admitted: admit it again, then ask again."""


@dataclass(frozen=True, slots=True)
class Made:
    """A new key; ``secret`` is its text, which exists here and nowhere else."""

    key: ApiKey
    secret: NewKey


class Keyring:
    """The keys of every account."""

    def __init__(self, books: Credits, *, clock: Clock, entropy: Callable[[int], bytes]) -> None:
        self._books = books
        self._clock = clock
        self._entropy = entropy

    async def create(self, who: Who, form: KeyForm) -> Made:
        """Make a key. What the form does not say it has from the key that makes it, so that it is not wider by silence.

        Raises:
            NodeFault: ``ACCOUNT_FORBIDDEN`` naming the right that would be too much, ``CONFLICT`` when the account has
                as many keys as it may, ``NOT_FOUND``.
            Stale: see there.
        """
        account, parent = account_of(who), _key_of(who)
        secret = new_key(self._entropy)
        fresh = form.applied(self._blank(account, parent, secret))
        if parent is not None:
            _refuse(widened(fresh, parent))
        await self._write(who, lambda _, at: self._add(fresh, at))
        return Made(fresh, secret)

    async def page(self, who: Who, after: KeyId | None, limit: int) -> list[ApiKey]:
        """Keys in the order of their ids, ended ones too."""
        account = account_of(who)
        rows = await self._books.read(lambda: credit_lists.keys(account, after, limit))
        return [read_key(row) for row in rows]

    async def find(self, who: Who, key: KeyId) -> ApiKey:
        """One key of the account. Raises ``NOT_FOUND``, also for another's."""
        account = account_of(who)
        row = await self._books.read(lambda: credit_lists.key(account, key))
        if row is None:
            raise _no_key()
        return read_key(row)

    async def change(self, who: Who, key: KeyId, form: KeyForm) -> ApiKey:
        """Change a key.

        Raises:
            NodeFault: as :meth:`create`; ``CONFLICT`` for a key that has ended.
            Stale: see there.
        """
        asking = _key_of(who)

        def change(row: KeyRow) -> KeyRow:
            before = read_key(row)
            if row.ended:
                raise NodeFault(NodeReason.CONFLICT, detail="the key has ended: make another one")
            after = form.applied(before)
            if asking is not None:
                _refuse(_raised(after, before) if asking.id == key else _beyond(asking, before, after))
            return key_row(after)

        return await self._replaced(who, key, change)

    async def revoke(self, who: Who, key: KeyId) -> ApiKey:
        """End a key for good, at once and on every node; a repeat changes nothing. Raises as :meth:`change`."""
        asking, now = _key_of(who), self._clock.now()

        def change(row: KeyRow) -> KeyRow:
            before = read_key(row)
            if asking is not None and asking.id != key:
                _refuse(_beyond(asking, before))
            return row if before.revoked_at is not None else key_row(replace(before, revoked_at=now))

        return await self._replaced(who, key, change)

    async def rotate(self, who: Who, key: KeyId, overlap_s: int) -> Made:
        """Put a new key in the place of one that goes on working for ``overlap_s`` seconds (0 ends it at once).

        The new one has the same rights, and its spending is counted anew: so a key that is limited in what it spends
        or how fast is replaced by its owner or the operator, never by itself.

        Raises:
            NodeFault: as :meth:`create`; ``CONFLICT`` for a key that has ended or was replaced already.
            Stale: see there.
        """
        account, asking, now = account_of(who), _key_of(who), self._clock.now()
        secret, name = new_key(self._entropy), self._name()

        def rotating(_: CreditAccount, at: UnixMillis) -> Talk[ApiKey]:
            row = yield from credit_lists.key(account, key)
            if row is None:
                raise _no_key()
            old = read_key(row)
            if row.ended or old.rotated_to is not None or (old.expires_at is not None and now >= old.expires_at):
                raise NodeFault(NodeReason.CONFLICT, detail="the key has ended or was replaced already")
            new = replace(old, id=name, digest=secret.digest, prefix=secret.prefix, created_at=now)
            if asking is not None:
                _refuse(_beyond(asking, old, new))
            yield from self._add(new, at)
            until = UnixSeconds(now + overlap_s)
            retired = replace(old, rotated_to=name, grace_until=until)
            yield from credit_talk.change_key(account, key, lambda _: key_row(retired), at)
            return new

        return Made(await self._write(who, rotating), secret)

    # --------------------------------------------------------------------------------------------------------- inside

    async def _replaced(self, who: Who, key: KeyId, change: Callable[[KeyRow], KeyRow]) -> ApiKey:
        account = account_of(who)
        row = await self._write(who, lambda _, at: credit_talk.change_key(account, key, change, at))
        if row is None:
            raise _no_key()
        return read_key(row)

    async def _write(self, who: Who, talk: Callable[[CreditAccount, UnixMillis], Talk[R]]) -> R:
        at = self._clock.now_millis()
        return await self._books.write(lambda: guarded(who, lambda found: talk(found, at)), of=account_of(who))

    def _add(self, key: ApiKey, at: UnixMillis) -> Talk[None]:
        row = key_row(key)
        added = yield from credit_talk.create_key(row, KEYS_MAX)
        if not added:
            yield from self._retire(key.account, at)
            added = yield from credit_talk.create_key(row, KEYS_MAX)
        if not added:
            raise NodeFault(NodeReason.CONFLICT, detail=f"the account has {KEYS_MAX} live keys: revoke one first")

    def _retire(self, account: AccountId, at: UnixMillis) -> Talk[None]:
        """End the keys whose time is over: they count as live only because nobody has said otherwise yet."""
        after: KeyId | None = None
        while rows := (yield from credit_lists.keys(account, after, KEYS_MAX)):
            after = rows[-1].id
            for row in rows:
                key = read_key(row)
                ends = [until for until in (key.expires_at, key.grace_until) if until is not None]
                if not row.ended and ends and min(ends) * 1000 <= at:
                    yield from credit_talk.change_key(account, row.id, lambda found: replace(found, ended=True), at)

    def _blank(self, account: AccountId, parent: ApiKey | None, secret: NewKey) -> ApiKey:
        blank = ApiKey(
            id=self._name(),
            account=account,
            name="",
            digest=secret.digest,
            prefix=secret.prefix,
            created_at=self._clock.now(),
        )
        if parent is None:
            return blank
        ends = [until for until in (parent.expires_at, parent.grace_until) if until is not None]
        return replace(
            blank,
            model_pool=parent.model_pool,
            allow_external=parent.allow_external,
            ceiling=parent.ceiling,
            expires_at=min(ends, default=None),
        )

    def _name(self) -> KeyId:
        return KeyId(f"key_{self._entropy(_ID_BYTES).hex()}")


class Accounts:
    """Accounts, their settings and what operators give them."""

    def __init__(self, books: Credits, *, clock: Clock, entropy: Callable[[int], bytes]) -> None:
        self._books = books
        self._clock = clock
        self._entropy = entropy

    async def create(self, opening: Opening) -> Account:
        """Open an account. Raises ``CONFLICT`` when its name is taken."""
        account = new_account(
            opening.trust,
            opening.kind,
            clock=self._clock,
            entropy=self._entropy,
            terms=opening.terms,
            email=opening.email,
        )
        try:
            await self._books.create_account(account_row(account), overdraft=opening.terms.overdraft)
        except Exists:
            raise NodeFault(NodeReason.CONFLICT, field="trust", detail="is the name of another account") from None
        return account

    async def find(self, account: AccountId) -> Account:
        """One account. Raises ``NOT_FOUND``."""
        row = await self._books.read(lambda: credit_lists.find_account(credit_lists.By.ID, account))
        if row is None:
            raise _no_account()
        return read_account(row)

    async def page(self, after: AccountId | None, limit: int) -> Sequence[Account]:
        """Accounts in the order of their ids."""
        rows = await self._books.read(lambda: credit_lists.accounts(after, limit))
        return [read_account(row) for row in rows]

    async def change(self, who: Who, form: AccountForm) -> tuple[Account, str | None]:
        """Change an account's settings; with the secret of its alerts if that is a new one.

        Raises:
            NodeFault: ``ACCOUNT_FORBIDDEN`` for a key that is limited in any way: a setting of the account holds for
                every key of it. ``NOT_FOUND``.
            Stale: see there.
        """
        require_owner(who)
        account, at = account_of(who), self._clock.now_millis()
        secret, now = new_alert_secret(self._entropy).reveal(), self._clock.now()

        def change(row: AccountRow) -> AccountRow:
            return account_row(form.applied(read_account(row), secret=secret, now=now))

        overdraft = None if form.terms is None else form.terms.overdraft

        def changing(_: CreditAccount) -> Talk[AccountRow | None]:
            if form.suspended is not None:
                # An operator's word is the last one: money that comes must not end what an operator wants kept.
                yield from _forget_billings(account, at)
            return (yield from credit_talk.change_account(account, change, at, overdraft))

        row = await self._books.write(lambda: guarded(who, changing), of=account)
        if row is None:
            raise _no_account()
        if form.suspended is not None:
            self._books.suspended(account, "operator", lifted=not form.suspended)
        changed = read_account(row)
        fresh = changed.alerts is not None and changed.alerts.secret == secret
        return changed, secret if fresh else None

    async def credit(self, account: AccountId) -> CreditAccount:
        """An account's money. Raises ``NOT_FOUND``."""
        found = await self._books.load(account)
        if found is None:
            raise _no_account()
        return found

    async def grant(self, account: AccountId, gift: Gift) -> tuple[CreditAccount, bool]:
        """Give credit, or take it, once per reference; says whether this was the time.

        What is taken may be more than there is: an operator who corrects an error knows what for, and the account then
        owes it as it would after a chargeback.

        Raises:
            NodeFault: ``NOT_FOUND``; ``CONFLICT`` when the reference was used for another amount; ``INVALID_FIELD``
                when no account can hold that much.
        """
        at = self._clock.now_millis()
        try:
            given = await self._books.write(lambda: grant(account, gift.reference, gift.amount, at), of=account)
        except OtherAmount:
            raise NodeFault(NodeReason.CONFLICT, field="reference", detail="was used for another amount") from None
        except CreditFault as fault:
            if fault.reason is CreditReason.NOT_FOUND:
                raise _no_account() from None
            raise NodeFault(NodeReason.INVALID_FIELD, field="amount", detail="does not fit the account") from None
        if given[1]:
            self._books.moved(account, FundsKind.GRANT, gift.amount, gift.reference)
        return given


def _forget_billings(account: AccountId, at: UnixMillis) -> Talk[None]:
    """End every reason for which billing keeps an account suspended; whether it is so is not changed."""
    while standing := (yield from credit_lists.tasks(account, SUSPENSION, TaskState.DUE, _PAGE)):
        for task in standing:
            yield from credit_lists.move_task(task, replace(task, state=TaskState.DONE, due_ms=at))


def account_of(who: Who) -> AccountId:
    """Whose account it is about."""
    return who.account.id if isinstance(who, Admission) else who


def require_owner(who: Who) -> None:
    """Refuse a key that has any limit of its own. Raises ``ACCOUNT_FORBIDDEN``."""
    key = _key_of(who)
    if key is not None and widened(_unlimited(key), key) is not None:
        raise NodeFault(NodeReason.ACCOUNT_FORBIDDEN, detail="a limited key may not act for the whole account")


def guarded(who: Who, talk: Callable[[CreditAccount], Talk[R]]) -> Talk[R]:
    """A talk about an account that is as its bearer was admitted to it. Raises ``Stale``, ``NOT_FOUND``."""
    found = yield from credit_talk.load_credit(account_of(who), lock=True)
    if found is None:
        raise _no_account()
    if isinstance(who, Admission) and found.access != who.changes:
        raise Stale
    return (yield from talk(found))


def _key_of(who: Who) -> ApiKey | None:
    return who.key if isinstance(who, Admission) else None


def _beyond(asking: ApiKey, *keys: ApiKey) -> str | None:
    """The first right that one of the keys has and the asking one lacks."""
    return next((right for right in (widened(key, asking) for key in keys) if right is not None), None)


def _raised(after: ApiKey, before: ApiKey) -> str | None:
    """The first limit that a key would lift of its own; unlike :func:`widened` it may keep its caps, or lower them."""
    for new, old in zip(
        (after.caps.day, after.caps.month, after.caps.total), (before.caps.day, before.caps.month, before.caps.total),
        strict=True,
    ):
        if old is not None and (new is None or new > old):
            return "caps"
    for name in ("rpm", "tpm", "concurrency"):
        new, old = getattr(after.rates, name), getattr(before.rates, name)
        if old is not None and (new is None or new > old):
            return name
    return widened(_unpaced(after), _unpaced(before))


def _unpaced(key: ApiKey) -> ApiKey:
    return replace(key, caps=NO_CAPS, rates=RateLimits())


def _unlimited(key: ApiKey) -> ApiKey:
    bare = replace(_unpaced(key), model_pool=None, allow_external=None, ceiling=None)
    return replace(bare, expires_at=None, rotated_to=None, grace_until=None)


def _refuse(right: str | None) -> None:
    if right is not None:
        detail = "is more than the key that asks has itself, or may give away"
        raise NodeFault(NodeReason.ACCOUNT_FORBIDDEN, field=_FIELDS.get(right, right), detail=detail)


def _no_key() -> NodeFault:
    return NodeFault(NodeReason.NOT_FOUND, detail="the account has no such key")


def _no_account() -> NodeFault:
    return NodeFault(NodeReason.NOT_FOUND, detail="there is no such account")
