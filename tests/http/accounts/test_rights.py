"""K10: no key ends with more rights than it had, whatever it makes, changes, replaces and revokes, in whatever order."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channels.credit import NO_CAPS, SpendCaps
from channels.instants import UnixSeconds
from channels.units import Pico
from mppnode.accounts.directory import Admission, Directory
from mppnode.accounts.forms import AccountForm, KeyForm, Opening
from mppnode.accounts.keyring import Accounts, Keyring, Stale
from mppnode.accounts.model import AccountKind, ApiKey, Prepaid, RateLimits
from mppnode.kernel.clock import ManualClock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.strategy import PriceCeiling
from mppnode.ledger.credits import Credits
from mppnode.ledger.talk import on_sqlite
from tests.http.accounts.office import Office

SCHEMA = Path(__file__).resolve().parents[3] / "mppnode/ledger/sql/accounts.sql"


class Drawer:
    """The ledger's own tables in memory: every talk is run as SQLite runs it."""

    def __init__(self) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self.db.executescript(SCHEMA.read_text())

    async def write(self, talk: Any, *, of: str) -> Any:
        return on_sqlite(self.db, talk)

    async def read(self, talk: Any) -> Any:
        return on_sqlite(self.db, talk)


START = 1_900_000_000
NONE = st.none()
POOLS = st.one_of(NONE, st.sets(st.sampled_from("abc"), min_size=1).map(lambda pool: tuple(sorted(pool))))
CEILINGS = st.one_of(NONE, st.builds(PriceCeiling, st.integers(0, 3), st.integers(0, 3)))
TIMES = st.one_of(NONE, st.integers(1, 4).map(lambda steps: UnixSeconds(START + 100 * steps)))
CAPS = st.one_of(
    st.just(NO_CAPS),
    st.lists(st.integers(0, 3), min_size=3, max_size=3).map(sorted).map(lambda caps: SpendCaps(*map(Pico, caps))),
    st.integers(0, 3).map(lambda cap: SpendCaps(total=Pico(cap))),
)
RATES = st.fixed_dictionaries({}, optional={"rpm": st.one_of(NONE, st.integers(1, 3)), "tpm": st.one_of(NONE, st.integers(1, 3)), "concurrency": st.sampled_from([1, 2, 1024])})
VALUES = {"model_pool": POOLS, "allow_external": st.sampled_from([None, True, False]), "ceiling": CEILINGS, "expires_at": TIMES, "caps": CAPS, "name": st.sampled_from(["", "x"])}
FORMS = st.builds(KeyForm, st.fixed_dictionaries({}, optional=VALUES), RATES)
FIRST = st.builds(KeyForm, st.fixed_dictionaries(VALUES), st.one_of(st.just({}), RATES))
STEPS = st.lists(
    st.tuples(st.sampled_from(["create", "change", "rotate", "revoke", "wait"]), st.integers(0, 9), st.integers(0, 9), FORMS), max_size=12
)


def beyond(key: ApiKey, start: ApiKey) -> bool:
    """Whether ``key`` may do something that ``start`` could not; written again, and not as the node does it."""
    def more(mine: int | None, theirs: int | None) -> bool:
        return theirs is not None and (mine is None or mine > theirs)

    ends = [min((at for at in (each.expires_at, each.grace_until) if at is not None), default=None) for each in (key, start)]
    pairs = [
        (key.caps.day, start.caps.day), (key.caps.month, start.caps.month), (key.caps.total, start.caps.total),
        (key.rates.rpm, start.rates.rpm), (key.rates.tpm, start.rates.tpm), (key.rates.concurrency, start.rates.concurrency),
        (ends[0], ends[1]),
    ]
    if start.ceiling is not None:
        mine = key.ceiling
        pairs += [(mine and mine.input_cents, start.ceiling.input_cents), (mine and mine.output_cents, start.ceiling.output_cents)]
    pool = start.model_pool is not None and not (key.model_pool is not None and set(key.model_pool) <= set(start.model_pool))
    outside = start.allow_external is False and key.allow_external is not False
    return pool or outside or any(more(*pair) for pair in pairs)


@settings(max_examples=150)
@given(first=FIRST, steps=STEPS)
def test_k10_no_sequence_ends_with_more_rights(first: KeyForm, steps: list[Any]) -> None:
    """K10: whoever holds one key, and every key made with it, never holds a right the first did not have."""
    asyncio.run(_attack(first, steps))


async def _attack(first: KeyForm, steps: list[Any]) -> None:
    clock, counter, drawer = ManualClock(START), itertools.count(1), Drawer()

    def entropy(size: int) -> bytes:
        return hashlib.sha256(str(next(counter)).encode()).digest()[:size]

    books = Credits(drawer, clock=clock)
    keyring = Keyring(books, clock=clock, entropy=entropy)
    account = await Accounts(books, clock=clock, entropy=entropy).create(Opening("t", AccountKind.USER, None, Prepaid()))
    directory = Directory(books, clock=clock, entropy=entropy)
    start = await keyring.create(account.id, first)
    other = await keyring.create(account.id, KeyForm())  # another team's key, which the attacker does not hold
    mine = [start]
    for verb, asking, about, form in steps:
        if verb == "wait":
            clock.advance(50)
            continue
        try:
            who = await directory.admit(mine[asking % len(mine)].secret.text, fresh=True)
            keys = await keyring.page(account.id, None, 100)
            target = keys[about % len(keys)].id
            if verb == "create":
                mine.append(await keyring.create(who, form))
            elif verb == "change":
                await keyring.change(who, target, form)
            elif verb == "rotate":
                mine.append(await keyring.rotate(who, target, 60))
            else:
                await keyring.revoke(who, target)
        except NodeFault:
            continue
    held = {made.key.id for made in mine}
    for key in await keyring.page(account.id, None, 100):
        if key.id in held and key.revoked_at is None:
            assert not beyond(key, start.key)
    # One that is limited in what it spends or how fast has made no second key to spend as much again with.
    if start.key.caps != NO_CAPS or start.key.rates != RateLimits():
        assert len(mine) == 1
    if beyond(other.key, start.key):
        untouched = await keyring.find(account.id, other.key.id)
        assert replace(untouched, digest=other.key.digest) == replace(other.key, digest=untouched.digest)
    drawer.db.close()


async def test_k10_a_key_that_changed_meanwhile_makes_nothing(desk: Office) -> None:
    """K10: between admission and writing a key is narrowed: what it could do before is refused, on the rows as they are."""
    account, owner = await desk.customer("first")
    who = await desk.directory.admit(owner.secret.text)
    await desk.keyring.change(account.id, owner.key.id, KeyForm({"model_pool": ("a",)}))
    for attempt in (
        desk.keyring.create(who, KeyForm()),
        desk.keyring.rotate(who, owner.key.id, 0),
        desk.keyring.change(who, owner.key.id, KeyForm({"name": "x"})),
        desk.accounts.change(who, AccountForm({})),
    ):
        with pytest.raises(Stale):
            await attempt
    assert len(await desk.keyring.page(account.id, None, 10)) == 1


async def test_k10_limits_are_lifted_by_owners_alone(desk: Office) -> None:
    """K10: a key may narrow and rename itself; a token of the account and the operator may do what it may not."""
    account, owner = await desk.customer("first")
    made = (await desk.ask("POST", "/v1/keys", owner.secret.text, {"spend_caps": {"day": 10}, "rpm": 5, "model_pool": ["a", "b"]})).json
    path, text = f"/v1/keys/{made['id']}", made["key"]
    for body, named in (
        ({"spend_caps": {"day": 11}}, "spend_caps"), ({"spend_caps": None}, "spend_caps"), ({"rpm": 6}, "rpm"), ({"rpm": None}, "rpm"),
        ({"model_pool": ["a", "c"]}, "model_pool"), ({"model_pool": None}, "model_pool"),
    ):
        refused = await desk.ask("PATCH", path, text, body)
        assert (refused.status, refused.code, refused.param) == (403, "account_forbidden", named)
    narrowed = await desk.ask("PATCH", path, text, {"name": "mine", "spend_caps": {"day": 9, "total": 20}, "rpm": 4, "tpm": 9, "model_pool": ["b"]})
    assert narrowed.status == 200
    for method, where, body in (("POST", "/v1/keys", {"spend_caps": {"day": 1}}), ("POST", f"{path}/rotate", {}), ("PATCH", "/v1/account", {}), ("DELETE", f"/v1/keys/{owner.key.id}", None)):
        assert (await desk.ask(method, where, text, body)).code == "account_forbidden"
    pooled = (await desk.ask("POST", "/v1/keys", owner.secret.text, {"model_pool": ["a"]})).json
    sabotage = await desk.ask("PATCH", f"/v1/keys/{owner.key.id}", pooled["key"], {"model_pool": ["a"]})
    assert (sabotage.code, sabotage.param) == ("account_forbidden", "model_pool")
    lifted = await desk.ask("PATCH", path, "jwt.first", {"spend_caps": None})
    assert lifted.json["spend_caps"] == {"day": None, "month": None, "total": None}
    assert (await desk.rule("PATCH", f"/accounts/{account.id}/keys/{made['id']}", {"rpm": None, "tpm": None})).json["rpm"] is None


async def test_a_child_has_what_its_parent_has_unless_it_asks_for_less(desk: Office) -> None:
    """What a form leaves out is the parent's: a key is not refused for what it did not ask."""
    _, owner = await desk.customer("first")
    body = {"model_pool": ["a", "b"], "allow_external": False, "max_input_price_per_million": 5, "max_output_price_per_million": 6, "expires_at": 1_900_000_500}
    parent = (await desk.ask("POST", "/v1/keys", owner.secret.text, body)).json
    child = (await desk.ask("POST", "/v1/keys", parent["key"], {"name": "child", "model_pool": ["b"]})).json
    assert {name: child[name] for name in body} == body | {"model_pool": ["b"]}
    assert isinstance(await desk.directory.admit(child["key"]), Admission)
    fault = None
    try:
        await desk.keyring.create(await desk.directory.admit(parent["key"]), KeyForm({"expires_at": None}))
    except NodeFault as error:
        fault = error
    assert fault is not None
    assert (fault.reason, fault.field) == (NodeReason.ACCOUNT_FORBIDDEN, "expires_at")
