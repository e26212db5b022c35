"""Who may use which account now: one table by state of the key, and the rules of X-Trust."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from channels.credit import SpendCaps
from channels.instants import UnixSeconds
from channels.units import Pico
from mppnode.accounts.access import Access, TrustRule, admit_identity, admit_key, select_trust, widened
from mppnode.accounts.model import CONCURRENCY_MAX, Identity, Postpaid, Prepaid, RateLimits, check_caps
from mppnode.http.problem import STATUS
from mppnode.kernel.faults import NodeReason
from mppnode.kernel.listing import Ability
from mppnode.kernel.strategy import PriceCeiling, Strategy
from mppnode.kernel.wishes import Wishes
from mppnode.routing.plan import plan
from tests.unit.accounts.kit import NOW, account, api_key, refused

LATER, AGO = NOW + 1, NOW - 1
ROTATED = {"rotated_to": "k2", "grace_until": NOW}


@pytest.mark.parametrize(
    ("key", "who", "reason", "status"),
    [
        (None, account(), NodeReason.INVALID_KEY, 401),
        (api_key(), None, NodeReason.INVALID_KEY, 401),
        (api_key(revoked_at=AGO), account(), NodeReason.KEY_REVOKED, 403),
        (api_key(revoked_at=LATER), account(), NodeReason.KEY_REVOKED, 403),
        (api_key(revoked_at=AGO, expires_at=AGO, **ROTATED), account(suspended_at=AGO), NodeReason.KEY_REVOKED, 403),
        (api_key(**ROTATED), account(), NodeReason.KEY_ROTATED, 401),
        (api_key(expires_at=AGO, **ROTATED), account(), NodeReason.KEY_ROTATED, 401),
        (api_key(expires_at=NOW), account(), NodeReason.KEY_EXPIRED, 401),
        (api_key(expires_at=NOW), account(suspended_at=AGO), NodeReason.KEY_EXPIRED, 401),
        (api_key(), account(suspended_at=LATER), NodeReason.ACCOUNT_SUSPENDED, 403),
    ],
)
def test_each_state_of_a_key_has_its_refusal(key: Any, who: Any, reason: NodeReason, status: int) -> None:
    """The first refusal that fits, in a fixed order; revocation and suspension do not wait for a node's clock."""
    refused(reason, admit_key, key, who, NOW)
    assert STATUS[reason] == status


@pytest.mark.parametrize("deadline", [{"expires_at": LATER}, {"rotated_to": "k2", "grace_until": LATER}])
def test_a_deadline_is_the_first_second_that_is_refused(deadline: dict[str, Any]) -> None:
    """P-67: within the overlap a key works; a cached admission is refused from the very second of its deadline."""
    access = admit_key(api_key(**deadline), account(), NOW)
    assert access.valid_until == LATER
    access.check(NOW)
    reason = NodeReason.KEY_EXPIRED if "expires_at" in deadline else NodeReason.KEY_ROTATED
    refused(reason, access.check, UnixSeconds(LATER))
    refused(reason, admit_key, api_key(**deadline), account(), UnixSeconds(LATER))


def test_the_nearest_deadline_counts() -> None:
    """A key that expires during its overlap ends then; one without deadlines has none."""
    both = api_key(expires_at=NOW + 9, rotated_to="k2", grace_until=NOW + 5)
    assert admit_key(both, account(), NOW).valid_until == NOW + 5
    forever = admit_key(api_key(), account(), NOW)
    assert forever.valid_until is None
    forever.check(UnixSeconds(2**40))


def test_a_key_is_never_joined_with_another_account() -> None:
    """A wrong join is a bug of ours that must not bill a stranger."""
    with pytest.raises(AssertionError):
        admit_key(api_key(account="a2"), account(), NOW)


@pytest.mark.parametrize(
    ("may", "header", "rule", "outcome"),
    [
        (["ann"], [], TrustRule.WHEN_SEVERAL, "ann"),
        (["ann"], ["ann"], TrustRule.WHEN_SEVERAL, "ann"),
        (["ann", "firm"], ["firm"], TrustRule.ALWAYS, "firm"),
        (["ann"], [], TrustRule.ALWAYS, NodeReason.INVALID_FIELD),
        (["ann", "firm"], [], TrustRule.WHEN_SEVERAL, NodeReason.INVALID_FIELD),
        (["ann"], ["firm"], TrustRule.WHEN_SEVERAL, NodeReason.ACCOUNT_FORBIDDEN),
        (["ann"], ["ANN"], TrustRule.WHEN_SEVERAL, NodeReason.ACCOUNT_FORBIDDEN),
        ([], [], TrustRule.WHEN_SEVERAL, NodeReason.ACCOUNT_FORBIDDEN),
        ([], [], TrustRule.ALWAYS, NodeReason.ACCOUNT_FORBIDDEN),
        ([], ["ann"], TrustRule.ALWAYS, NodeReason.ACCOUNT_FORBIDDEN),
        (["ann"], ["ann", "ann"], TrustRule.WHEN_SEVERAL, NodeReason.INVALID_FIELD),
        (["ann"], [""], TrustRule.WHEN_SEVERAL, NodeReason.INVALID_FIELD),
        (["ann"], ["ann "], TrustRule.WHEN_SEVERAL, NodeReason.INVALID_FIELD),
        (["ann"], ["ann\n"], TrustRule.WHEN_SEVERAL, NodeReason.INVALID_FIELD),
        (["ann"], ["a" * 256], TrustRule.WHEN_SEVERAL, NodeReason.INVALID_FIELD),
    ],
)
def test_x_trust_selects_an_account_of_the_bearer(may: Any, header: Any, rule: TrustRule, outcome: Any) -> None:
    """The header is needed only where the setting or several accounts need it, and always checked when it is there."""
    if not isinstance(outcome, NodeReason):
        assert select_trust(may, header, rule) == outcome
        return
    fault = refused(outcome, select_trust, may, header, rule)
    assert (fault.field == "X-Trust") == (outcome is NodeReason.INVALID_FIELD)


def test_a_foreign_account_and_none_look_the_same() -> None:
    """A bearer cannot find out which accounts exist."""
    who = Identity("ann", ("ann",), UnixSeconds(LATER))
    faults = [
        refused(NodeReason.ACCOUNT_FORBIDDEN, admit_identity, who, None, NOW),
        refused(NodeReason.ACCOUNT_FORBIDDEN, admit_identity, who, account(trust="firm"), NOW),
        refused(NodeReason.ACCOUNT_FORBIDDEN, select_trust, who.trusts, ["firm"]),
    ]
    assert len({fault.message for fault in faults}) == 1


def test_an_identity_is_admitted_until_its_token_ends() -> None:
    """P-67 for tokens: a cached admission ends with the token, and a suspended account admits nobody."""
    who = Identity("ann", ("ann",), UnixSeconds(LATER))
    access = admit_identity(who, account(), NOW)
    assert (access.key, access.valid_until, len(access.preferences)) == (None, LATER, 1)
    access.check(NOW)
    refused(NodeReason.TOKEN_EXPIRED, access.check, UnixSeconds(LATER))
    refused(NodeReason.TOKEN_EXPIRED, admit_identity, who, account(), UnixSeconds(LATER))
    refused(NodeReason.ACCOUNT_SUSPENDED, admit_identity, who, account(suspended_at=AGO), NOW)


def test_the_router_takes_the_preferences_of_key_and_account() -> None:
    """The key decides before the account, the least ceiling holds, and a pool of either leaves models out."""
    key = api_key(strategy=Strategy.FASTEST, ceiling=PriceCeiling(9, 50), model_pool=("m1", "m2"))
    who = account(strategy=Strategy.CHEAPEST, allow_external=False, ceiling=PriceCeiling(10, 40), model_pool=("m2",))
    access = Access(who, key)
    wish = plan(Wishes(("m2",)), access.preferences, needs=Ability(0), prompt_tokens=1, max_tokens=1)
    assert (wish.strategy, wish.allow_external) == (Strategy.FASTEST, False)
    assert (wish.max_prompt_price, wish.max_completion_price) == (90_000, 400_000)
    assert [access.may_use(model) for model in ("m1", "m2", "m3")] == [False, True, False]
    assert Access(account(), None).may_use("m1")


@pytest.mark.parametrize(
    ("parent", "child", "wider"),
    [
        ({}, {}, None),
        ({}, {"account": "a2"}, "account"),
        ({"caps": SpendCaps(total=Pico(9))}, {"caps": SpendCaps(total=Pico(1))}, "caps"),
        ({"rates": RateLimits(rpm=9)}, {"rates": RateLimits(rpm=1)}, "rates"),
        ({"model_pool": ("m1", "m2")}, {"model_pool": ("m2",)}, None),
        ({"model_pool": ("m1",)}, {"model_pool": ("m1", "m2")}, "model_pool"),
        ({"model_pool": ("m1",)}, {}, "model_pool"),
        ({"allow_external": False}, {}, "allow_external"),
        ({"allow_external": False}, {"allow_external": True}, "allow_external"),
        ({"allow_external": False}, {"allow_external": False}, None),
        ({"allow_external": True}, {"allow_external": False}, None),
        ({"ceiling": PriceCeiling(5, 5)}, {}, "ceiling"),
        ({"ceiling": PriceCeiling(5, 5)}, {"ceiling": PriceCeiling(5, 6)}, "ceiling"),
        ({"ceiling": PriceCeiling(5, 5)}, {"ceiling": PriceCeiling(6, 5)}, "ceiling"),
        ({"ceiling": PriceCeiling(5, 5)}, {"ceiling": PriceCeiling(5, 4)}, None),
        ({"expires_at": LATER}, {}, "expires_at"),
        ({"expires_at": LATER}, {"expires_at": LATER + 1}, "expires_at"),
        ({"expires_at": LATER}, {"expires_at": LATER}, None),
        ({"expires_at": LATER + 9, "rotated_to": "k2", "grace_until": LATER}, {"expires_at": LATER + 1}, "expires_at"),
    ],
)
def test_k10_a_key_mints_nothing_above_itself(parent: Any, child: Any, wider: str | None) -> None:
    """K10: a new key has a subset of the rights of the key it was made with; a limited key makes none."""
    assert widened(api_key(**child), api_key(**parent)) == wider


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: api_key(name="a\nb"), "name"),
        (lambda: api_key(name="n" * 129), "name"),
        (lambda: api_key(rotated_to="k2"), "successor"),
        (lambda: api_key(grace_until=NOW), "successor"),
        (lambda: api_key(model_pool=()), "model_pool"),
        (lambda: account(model_pool=("m",) * 65), "model_pool"),
        (lambda: api_key(ceiling=PriceCeiling(-1, 0)), "ceiling"),
        (lambda: account(trust="a b"), "trust"),
        (lambda: account(trust=""), "trust"),
        (lambda: RateLimits(rpm=0), "rpm"),
        (lambda: RateLimits(tpm=10**12 + 1), "tpm"),
        (lambda: RateLimits(concurrency=0), "concurrency"),
        (lambda: RateLimits(concurrency=CONCURRENCY_MAX + 1), "concurrency"),
        (lambda: check_caps(SpendCaps(total=Pico(-1))), "spend cap"),
        (lambda: check_caps(SpendCaps(day=Pico(2), total=Pico(1))), "shorter period"),
        (lambda: Postpaid(Pico(-1)), "trust_limit"),
    ],
)
def test_no_impossible_row_is_made(make: Any, words: str) -> None:
    """Contradictions are refused where a value is made, by the name of the field."""
    with pytest.raises(ValueError, match=words):
        make()


def test_terms_say_what_may_be_owed() -> None:
    """Prepaid owes nothing, post-paid up to its trust limit; a copy with one field changed is checked again."""
    assert (Prepaid().overdraft, Postpaid(Pico(7)).overdraft) == (0, 7)
    with pytest.raises(ValueError, match="trust"):
        replace(account(), trust="\n")
