"""Whether a bearer may use an account now. Pure: whoever asks has looked up the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from channels.credit import NO_CAPS
from channels.instants import UnixSeconds
from mppnode.accounts.model import TRUST_NAME, Account, ApiKey, Identity, RateLimits, Routing
from mppnode.kernel.faults import NodeFault, NodeReason

_HEADER: Final = "X-Trust"


class TrustRule(StrEnum):
    """When a request must name the account it is for in ``X-Trust``. One that is given is checked under both."""

    WHEN_SEVERAL = "when_several"
    """Only when the bearer may act for several: stock SDKs send no such header."""
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Access:
    """Who may go on, until when: what is cached for the next request with the same bearer.

    ``valid_until`` is the first second in which it no longer holds, or None. Revocation and suspension are no
    deadlines; whoever caches this must drop it when the rows change.
    """

    account: Account
    key: ApiKey | None
    token_until: UnixSeconds | None = None
    """Of a JWT: the end of its own validity, leeway included."""

    @property
    def valid_until(self) -> UnixSeconds | None:
        """The nearest of all deadlines, Unix seconds, exclusive."""
        return self.token_until if self.key is None else _deadline(self.key)

    @property
    def preferences(self) -> tuple[Routing, ...]:
        """Routing defaults, the most specific first, as ``mppnode.routing.plan.plan`` takes them."""
        return (self.account,) if self.key is None else (self.key, self.account)

    def check(self, now: UnixSeconds) -> None:
        """Refuse it again if a deadline has passed since: a cache hit is no admission (market rule P-67).

        Raises:
            NodeFault: as :func:`admit_key` and :func:`admit_identity`.
        """
        if self.valid_until is None or now < self.valid_until:
            return
        if self.key is not None:
            _check_key(self.key, now)
        raise NodeFault(NodeReason.TOKEN_EXPIRED, detail="the token has expired")

    def may_use(self, model: str) -> bool:
        """Whether no pool of the key or account leaves this model out."""
        return all(who.model_pool is None or model in who.model_pool for who in self.preferences)


def admit_key(key: ApiKey | None, account: Account | None, now: UnixSeconds) -> Access:
    """Admit a key that was looked up by its digest, and its account; None is what was not found.

    Raises:
        NodeFault: ``INVALID_KEY``, ``KEY_REVOKED``, ``KEY_ROTATED``, ``KEY_EXPIRED`` or ``ACCOUNT_SUSPENDED``, in this
            order. Only who holds the secret learns more than the first.
    """
    if key is None or account is None:
        raise NodeFault(NodeReason.INVALID_KEY, detail="the API key is unknown")
    assert key.account == account.id, "a key was joined with another's account"
    _check_key(key, now)
    _check_account(account)
    return Access(account, key)


def admit_identity(identity: Identity, account: Account | None, now: UnixSeconds) -> Access:
    """Admit the verified bearer of a JWT to the account that :func:`select_trust` chose for it.

    Raises:
        NodeFault: ``TOKEN_EXPIRED``, ``ACCOUNT_FORBIDDEN`` or ``ACCOUNT_SUSPENDED``.
    """
    if now >= identity.valid_until:
        raise NodeFault(NodeReason.TOKEN_EXPIRED, detail="the token has expired")
    # One answer for what does not exist and what is somebody else's: the difference is a list of customers.
    if account is None or account.trust not in identity.trusts:
        raise _forbidden()
    _check_account(account)
    return Access(account, None, identity.valid_until)


def select_trust(may: Sequence[str], header: Sequence[str], rule: TrustRule = TrustRule.WHEN_SEVERAL) -> str:
    """The account a request is for: ``may`` are the trusts of its bearer, ``header`` every ``X-Trust`` it carries.

    Raises:
        NodeFault: ``INVALID_FIELD`` when the header is missing, repeated or malformed; ``ACCOUNT_FORBIDDEN`` when it
            names an account that is not the bearer's, or the bearer has none.
    """
    if len(header) > 1:
        raise NodeFault(NodeReason.INVALID_FIELD, field=_HEADER, detail="is given more than once")
    if header:
        if TRUST_NAME.fullmatch(header[0]) is None:
            raise NodeFault(NodeReason.INVALID_FIELD, field=_HEADER, detail="is not the name of an account")
        if header[0] not in may:
            raise _forbidden()
        return header[0]
    if not may:
        raise _forbidden()
    if rule is TrustRule.ALWAYS:
        raise NodeFault(NodeReason.INVALID_FIELD, field=_HEADER, detail="is missing")
    if len(may) > 1:
        # Taking the first would bill whichever the issuer happened to list first.
        raise NodeFault(NodeReason.INVALID_FIELD, field=_HEADER, detail="is missing: the token is for several accounts")
    return may[0]


def widened(child: ApiKey, parent: ApiKey) -> str | None:
    """The first right by which ``child`` would have more than ``parent``, or None: a key mints no key above itself.

    A key that is limited in what it spends or how fast mints none at all: limits are counted by key, and ten keys with
    the same cap spend ten times as much. Source: threat K10.
    """
    if child.account != parent.account:
        return "account"
    if parent.caps != NO_CAPS:
        return "caps"
    if parent.rates != RateLimits():
        return "rates"
    if parent.model_pool is not None and not (child.model_pool and set(child.model_pool) <= set(parent.model_pool)):
        return "model_pool"
    if parent.allow_external is False and child.allow_external is not False:
        return "allow_external"
    mine, theirs = child.ceiling, parent.ceiling
    if theirs is not None and (
        mine is None or mine.input_cents > theirs.input_cents or mine.output_cents > theirs.output_cents
    ):
        return "ceiling"
    until, last = _deadline(child), _deadline(parent)
    return "expires_at" if last is not None and (until is None or until > last) else None


def _deadline(key: ApiKey) -> UnixSeconds | None:
    return min((at for at in (key.expires_at, key.grace_until) if at is not None), default=None)


def _check_key(key: ApiKey, now: UnixSeconds) -> None:
    # Not compared with now: it is an event, not a date. A node whose clock is late must not go on honouring the key.
    if key.revoked_at is not None:
        raise NodeFault(NodeReason.KEY_REVOKED, detail="the API key was revoked")
    if key.grace_until is not None and now >= key.grace_until:
        raise NodeFault(NodeReason.KEY_ROTATED, detail="the API key was replaced by another one")
    if key.expires_at is not None and now >= key.expires_at:
        raise NodeFault(NodeReason.KEY_EXPIRED, detail="the API key has expired")


def _check_account(account: Account) -> None:
    if account.suspended_at is not None:
        raise NodeFault(NodeReason.ACCOUNT_SUSPENDED, detail="the account is suspended")


def _forbidden() -> NodeFault:
    return NodeFault(NodeReason.ACCOUNT_FORBIDDEN, detail="the bearer may not act for this account")
