"""Who a bearer is and which account pays: looked up once, remembered, and never trusted longer than the ledger allows.

A remembered admission names the account's count of changes. The reservation of a request is refused when the ledger has
counted on, so a revoked key fails on its next request on every node although nobody looked it up. What reserves nothing
(statements, keys) asks :meth:`Directory.admit` to look again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from channels.credit import AccountId, KeyId
from mppnode.accounts.access import Access, TrustRule, admit_identity, admit_key, select_trust
from mppnode.accounts.documents import account_row, read_account, read_key
from mppnode.accounts.model import Account, AccountKind, ApiKey, Identity, Postpaid, Prepaid
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.keys import KeyDigest, is_key, parse_key
from mppnode.ledger.credit_lists import By, account_with_access, find_key
from mppnode.ledger.credit_rows import AccountRow
from mppnode.ledger.credit_talk import Exists
from mppnode.ledger.credits import Credits

_REMEMBERED_MAX: Final = 20_000  # about 2 KiB each
_ID_BYTES: Final = 12  # 96 random bits: nobody guesses one, and two are never the same
_PREPAID: Final = Prepaid()
_TOKEN_MAX: Final = 8_192  # characters of a bearer; the headers of a request have 24 KiB in all


class Tokens(Protocol):
    """Verifies JWTs."""

    async def identity(self, token: str) -> Identity:
        """Who a token is about.

        Raises:
            NodeFault: ``INVALID_TOKEN``, ``TOKEN_EXPIRED``, or ``IDENTITY_UNAVAILABLE`` while its issuer is away.
        """
        ...


@dataclass(frozen=True, slots=True)
class Admission:
    """Leave to act for an account, as of its ``changes``-th change."""

    access: Access
    changes: int
    bearer: bytes
    """What it is remembered by; never the bearer's text."""

    @property
    def account(self) -> Account:
        """Who pays."""
        return self.access.account

    @property
    def key(self) -> ApiKey | None:
        """The key that was shown, or None for a token."""
        return self.access.key

    @property
    def key_id(self) -> KeyId:
        """The key's id, empty for a token."""
        return KeyId("") if self.access.key is None else self.access.key.id


class Directory:
    """Finds accounts and keys; remembers whom it admitted."""

    def __init__(
        self,
        books: Credits,
        *,
        clock: Clock,
        tokens: Tokens | None = None,
        rule: TrustRule = TrustRule.WHEN_SEVERAL,
        sign_up: bool = False,
        entropy: Callable[[int], bytes],
    ) -> None:
        self._books = books
        self._clock = clock
        self._tokens = tokens
        self._rule = rule
        self._sign_up = sign_up
        self._entropy = entropy
        self._known: OrderedDict[bytes, Admission] = OrderedDict()

    async def admit(self, bearer: str, trusts: Sequence[str] = (), *, fresh: bool = False) -> Admission:
        """Admit a bearer (what follows ``Bearer`` in ``Authorization``) to its account, or the one ``X-Trust`` names.

        ``fresh`` looks the rows up again, for requests that reserve nothing.

        Raises:
            NodeFault: ``INVALID_KEY``, ``KEY_REVOKED``, ``KEY_ROTATED``, ``KEY_EXPIRED``, ``INVALID_TOKEN``,
                ``TOKEN_EXPIRED``, ``ACCOUNT_FORBIDDEN``, ``ACCOUNT_SUSPENDED``, ``INVALID_FIELD`` naming ``X-Trust``,
                ``IDENTITY_UNAVAILABLE``.
            ChannelFault: ``STORE_UNAVAILABLE``: an outage is never told as an unknown key.
        """
        if len(bearer) > _TOKEN_MAX or not bearer.isascii():
            raise NodeFault(NodeReason.INVALID_KEY, detail="the API key is malformed")
        if is_key(bearer) or self._tokens is None:
            return await self._by_key(parse_key(bearer), trusts, fresh=fresh)
        return await self._by_token(bearer, trusts, fresh=fresh)

    def trust(self, tokens: Tokens | None) -> None:
        """Take the tokens of another issuer, or of nobody, from the next request on."""
        self._tokens = tokens

    async def again(self, admission: Admission) -> Admission:
        """The same bearer after a change of its account. Raises as :meth:`admit`."""
        self._known.pop(admission.bearer, None)
        if admission.key is not None:
            return await self._look_up_key(admission.key.digest, admission.bearer)
        return await self._look_up_trust(self._identity_of(admission), admission.account.trust, admission.bearer)

    # ------------------------------------------------------------------------------------------------------------ keys

    async def _by_key(self, digest: KeyDigest, trusts: Sequence[str], *, fresh: bool) -> Admission:
        bearer = digest.stored()
        known = None if fresh else self._known.get(bearer)
        if known is None:
            known = await self._look_up_key(digest, bearer)
        else:
            self._known.move_to_end(bearer)
            known.access.check(self._clock.now())
        # The trust a header names is checked on every request; what is remembered is the key.
        select_trust((known.account.trust,), trusts, self._rule)
        return known

    async def _look_up_key(self, digest: KeyDigest, bearer: bytes) -> Admission:
        text = digest.stored().hex()
        found = await self._books.read(lambda: find_key(text))
        if found is None:
            admit_key(None, None, self._clock.now())
        assert found is not None
        key, account, changes = found
        access = admit_key(read_key(key), read_account(account), self._clock.now())
        return self._remember(Admission(access, changes, bearer))

    # ---------------------------------------------------------------------------------------------------------- tokens

    async def _by_token(self, token: str, trusts: Sequence[str], *, fresh: bool) -> Admission:
        assert self._tokens is not None
        identity = await self._tokens.identity(token)
        trust = select_trust(identity.trusts, trusts, self._rule)
        bearer = hashlib.sha256(f"{trust}\n{token}".encode()).digest()
        known = None if fresh else self._known.get(bearer)
        if known is None:
            return await self._look_up_trust(identity, trust, bearer)
        self._known.move_to_end(bearer)
        known.access.check(self._clock.now())
        return known

    async def _look_up_trust(self, identity: Identity, trust: str, bearer: bytes) -> Admission:
        found = await self._books.read(lambda: account_with_access(By.TRUST, trust))
        if found is None and self._sign_up and trust in identity.trusts:
            found = await self._sign_up_as(trust)
        account, changes = (None, 0) if found is None else (read_account(found[0]), found[1])
        access = admit_identity(identity, account, self._clock.now())
        return self._remember(Admission(access, changes, bearer))

    def _identity_of(self, admission: Admission) -> Identity:
        until = admission.access.token_until
        assert until is not None
        return Identity("", (admission.account.trust,), until)

    def _remember(self, admission: Admission) -> Admission:
        self._known[admission.bearer] = admission
        self._known.move_to_end(admission.bearer)
        while len(self._known) > _REMEMBERED_MAX:
            self._known.popitem(last=False)
        return admission

    # -------------------------------------------------------------------------------------------------------- accounts

    async def _sign_up_as(self, trust: str) -> tuple[AccountRow, int] | None:
        account = new_account(trust, AccountKind.TRUST, clock=self._clock, entropy=self._entropy)
        with contextlib.suppress(Exists):  # its other request was faster
            await self._books.create_account(account_row(account))
        return await self._books.read(lambda: account_with_access(By.TRUST, trust))


def new_account(
    trust: str,
    kind: AccountKind,
    *,
    clock: Clock,
    entropy: Callable[[int], bytes],
    terms: Prepaid | Postpaid = _PREPAID,
    email: str | None = None,
) -> Account:
    """A fresh account, not stored yet. Raises ``ValueError`` when a value does not fit."""
    name = AccountId(f"acct_{entropy(_ID_BYTES).hex()}")
    return Account(id=name, kind=kind, trust=trust, terms=terms, email=email, created_at=clock.now())
