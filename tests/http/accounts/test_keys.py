"""Keys over HTTP: made, shown without their secret, changed, replaced and ended; and what a stranger learns of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from channels.credit import KEYS_MAX
from channels.units import Pico
from mppnode.accounts.directory import Directory
from mppnode.accounts.forms import Gift, KeyForm, Opening
from mppnode.accounts.keyring import Accounts, Keyring
from mppnode.accounts.model import AccountKind, Prepaid
from mppnode.kernel.faults import NodeFault
from mppnode.kernel.keys import KEY_START, new_key
from mppnode.ledger.credits import Credits
from mppnode.ledger.talk import Talk, Till
from tests.http.accounts.office import Office, office
from tests.store.shops import open_shop


class Watched(Till):
    """A till that remembers every statement and parameter that passes it."""

    def __init__(self, till: Till) -> None:
        self.till = till
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def _watched(self, talk: Any) -> Any:
        def run() -> Talk[Any]:
            inner = talk()
            rows = None
            while True:
                try:
                    statement, values = inner.send(rows) if rows is not None else next(inner)
                except StopIteration as end:
                    return end.value
                self.asked.append((statement, tuple(values)))
                rows = yield statement, values

        return run

    async def write(self, talk: Any, *, of: str) -> Any:
        return await self.till.write(self._watched(talk), of=of)

    async def read(self, talk: Any) -> Any:
        return await self.till.read(self._watched(talk))


async def test_a_key_is_shown_once_and_lives_as_told(desk: Office) -> None:
    """The text of a key is in one answer and in nothing else the node says; lists and changes show its settings."""
    _, owner = await desk.customer("first")
    asked = {
        "name": "ci", "model_pool": ["dev/echo"], "optimize_mode": "cost", "routing_strategy": "cheapest",
        "allow_external": False, "max_input_price_per_million": 50, "max_output_price_per_million": 100,
        "spend_caps": {"day": 100, "total": 500}, "rpm": 60, "tpm": 1000, "concurrency": 3, "expires_at": "2031-01-01T00:00:00Z",
    }
    made = await desk.ask("POST", "/v1/keys", owner.secret.text, asked)
    assert made.status == 201
    assert made.headers["Cache-Control"] == "private, no-store"
    shown = made.json
    text = shown.pop("key")
    assert text.startswith(KEY_START)
    assert shown["spend_caps"] == {"day": 100, "month": None, "total": 500}
    assert {name: shown[name] for name in asked if name not in ("spend_caps", "expires_at")} == {
        name: value for name, value in asked.items() if name not in ("spend_caps", "expires_at")
    }
    assert shown["expires_at"] == 1_924_992_000
    listed = await desk.ask("GET", "/v1/keys", owner.secret.text)
    one = await desk.ask("GET", f"/v1/keys/{shown['id']}", text)
    assert text not in listed.body.decode() + one.body.decode()
    assert one.json | {"spent": None} == shown | {"spent": None}
    assert {key["id"] for key in listed.json["data"]} == {owner.key.id, shown["id"]}
    changed = await desk.ask("PATCH", f"/v1/keys/{shown['id']}", owner.secret.text, {"name": "cd", "rpm": None, "model_pool": None})
    assert (changed.json["name"], changed.json["rpm"], changed.json["tpm"], changed.json["model_pool"]) == ("cd", None, 1000, None)


async def test_keys_are_paged(desk: Office) -> None:
    """Pages join to the whole list, each key once, and a cursor of another route is refused."""
    account, owner = await desk.customer("first")
    for _ in range(4):
        await desk.keyring.create(account.id, KeyForm())
    seen, cursor = [], ""
    while True:
        page = (await desk.ask("GET", f"/v1/keys?limit=2{cursor}", owner.secret.text)).json
        seen += [key["id"] for key in page["data"]]
        if not page["has_more"]:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert len(seen) == len(set(seen)) == 5
    refused = await desk.ask("GET", f"/v1/credits/transactions?limit=2{cursor}", owner.secret.text)
    assert (refused.status, refused.param) == (400, "cursor")


async def test_p67_a_revoked_key_fails_on_its_next_request_on_every_node(desk: Office) -> None:
    """P-67: revoked at one node, a key is refused by name at this node and at another on the same ledger, remembered or not."""
    _, owner = await desk.customer("first")
    made = (await desk.ask("POST", "/v1/keys", owner.secret.text, {})).json
    other = Directory(desk.books, clock=desk.clock, entropy=os.urandom)
    remembered = await other.admit(made["key"])
    assert (await desk.ask("GET", "/v1/credits", made["key"])).status == 200
    revoked = await desk.ask("DELETE", f"/v1/keys/{made['id']}", owner.secret.text)
    assert revoked.json["status"] == "revoked"
    again = await desk.ask("DELETE", f"/v1/keys/{made['id']}", owner.secret.text)
    assert again.json["revoked_at"] == revoked.json["revoked_at"]
    refused = await desk.ask("GET", "/v1/credits", made["key"])
    assert (refused.status, refused.code, refused.headers["x-should-retry"]) == (403, "api_key_revoked", "false")
    with pytest.raises(Exception, match="revoked"):
        await other.admit(made["key"], fresh=True)
    # What reserves names the count it knew, and the ledger has counted on: the other node looks again.
    credit = await desk.books.load(remembered.account.id)
    assert credit is not None
    assert credit.access != remembered.changes
    with pytest.raises(Exception, match="revoked"):
        await other.again(remembered)
    patched = await desk.ask("PATCH", f"/v1/keys/{made['id']}", owner.secret.text, {"name": "x"})
    assert (patched.status, patched.code) == (409, "conflict")


async def test_a_rotation_overlaps_for_as_long_as_told(desk: Office) -> None:
    """Both keys work within the overlap, the old one is refused by name after it, and it is replaced once only."""
    _, owner = await desk.customer("first")
    made = (await desk.ask("POST", "/v1/keys", owner.secret.text, {"name": "ci", "model_pool": ["a", "b"]})).json
    rotated = await desk.ask("POST", f"/v1/keys/{made['id']}/rotate", owner.secret.text, {"overlap_s": 60})
    assert rotated.status == 201
    assert (rotated.json["name"], rotated.json["model_pool"]) == ("ci", ["a", "b"])
    for text in (made["key"], rotated.json["key"]):
        assert (await desk.ask("GET", "/v1/keys", text)).status == 200
    second = await desk.ask("POST", f"/v1/keys/{made['id']}/rotate", owner.secret.text)
    assert (second.status, second.code) == (409, "conflict")
    desk.clock.advance(60)
    late = await desk.ask("GET", "/v1/keys", made["key"])
    assert (late.status, late.code, late.headers["WWW-Authenticate"]) == (401, "api_key_rotated", "Bearer")
    assert (await desk.ask("GET", "/v1/keys", rotated.json["key"])).status == 200
    leaked = await desk.ask("POST", f"/v1/keys/{rotated.json['id']}/rotate", owner.secret.text, {"overlap_s": 0})
    assert (await desk.ask("GET", "/v1/keys", rotated.json["key"])).code == "api_key_rotated"
    assert (await desk.ask("GET", "/v1/keys", leaked.json["key"])).status == 200


async def test_keys_are_bounded_and_dead_ones_make_room(desk: Office) -> None:
    """An account has at most KEYS_MAX live keys; those whose time is over are not counted when room is needed."""
    account, owner = await desk.customer("first")
    await desk.keyring.create(account.id, KeyForm({"expires_at": desk.clock.now() + 60}))
    for _ in range(KEYS_MAX - 2):
        await desk.keyring.create(account.id, KeyForm())
    full = await desk.ask("POST", "/v1/keys", owner.secret.text, {})
    assert (full.status, full.code) == (409, "conflict")
    desk.clock.advance(60)
    assert (await desk.ask("POST", "/v1/keys", owner.secret.text, {})).status == 201
    assert (await desk.ask("POST", "/v1/keys", owner.secret.text, {})).status == 409


async def test_k1_a_key_is_looked_up_by_its_digest_and_a_malformed_one_never(tmp_path: Path) -> None:
    """K1: the ledger is asked for SHA-256 in hex and nothing of the text; what cannot be a key does not reach it."""
    async with open_shop("sqlite", tmp_path) as shop:
        watched = Watched(await shop.open())
        (tmp_path / "other").mkdir()
        async with office(tmp_path / "other", till=watched) as desk:
            _, owner = await desk.customer("first")
            watched.asked.clear()
            assert (await desk.ask("GET", "/v1/account", owner.secret.text)).status == 200
            digest = hashlib.sha256(owner.secret.text.encode()).hexdigest()
            assert ("SELECT id, account, digest, ended, document, created_ms FROM api_key WHERE digest = ?", (digest,)) in watched.asked
            assert owner.secret.text[len(KEY_START) :] not in str(watched.asked)
            watched.asked.clear()
            for wrong in (KEY_START, owner.secret.text[:-1], owner.secret.text + "A", owner.secret.text[:-1] + "!", "sk-other"):
                refused = await desk.ask("GET", "/v1/account", wrong)
                assert refused.status == 401
            assert watched.asked == []


HOSTILE = [
    "' OR '1'='1", "'; DROP TABLE api_key; --", "1 UNION SELECT id, account, digest, 0, document, 0 FROM api_key--", '" OR ""="',
    "sk-mpp-' OR 1=1--", "sk-mpp-" + "%27" * 16, "$1", "?", "\\x00", "%00", "admin'/*", "'||(SELECT document FROM account)||'", "${7*7}", "{{7*7}}",
    "sk-mpp-" + "A" * 48, "x" * 8192, "x" * 9000,
]


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_k2_hostile_bearers_reach_the_ledger_as_digests_alone(tmp_path: Path, kind: str) -> None:
    """K2: whatever the bearer is, the ledger sees one prepared text and 64 hexadecimal digits, on both stores."""
    async with open_shop(kind, tmp_path) as shop:
        watched = Watched(await shop.open())
        books = Credits(watched, clock=shop.clock)
        directory = Directory(books, clock=shop.clock, entropy=os.urandom)
        sound = [new_key(os.urandom).text for _ in range(3)]
        for bearer in [*HOSTILE, *(f"sk-mpp-{text}" for text in HOSTILE), *sound]:
            with pytest.raises(Exception, match="API key"):
                await directory.admit(bearer, fresh=True)
        assert {statement for statement, _ in watched.asked} == {
            "SELECT id, account, digest, ended, document, created_ms FROM api_key WHERE digest = ?"
        }
        assert [values for _, values in watched.asked] == [(hashlib.sha256(text.encode()).hexdigest(),) for text in sound]


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_both_stores_do_the_same_with_keys_and_gifts(tmp_path: Path, kind: str) -> None:
    """Creating, rotating, retiring and giving credit are one transaction each on either store."""
    async with open_shop(kind, tmp_path) as shop:
        books = Credits(await shop.open(), clock=shop.clock)
        keyring, accounts = (made(books, clock=shop.clock, entropy=os.urandom) for made in (Keyring, Accounts))
        account = await accounts.create(Opening("first", AccountKind.USER, None, Prepaid()))
        made = await keyring.create(account.id, KeyForm({"expires_at": shop.clock.now() + 60}))
        new = await keyring.rotate(account.id, made.key.id, 5)
        with pytest.raises(NodeFault, match="replaced already"):
            await keyring.rotate(account.id, made.key.id, 5)
        assert (await keyring.find(account.id, made.key.id)).rotated_to == new.key.id
        gift = Gift(Pico(5), "x")
        assert [(await accounts.grant(account.id, gift))[1] for _ in range(2)] == [True, False]
        with pytest.raises(NodeFault, match="another amount"):
            await accounts.grant(account.id, Gift(Pico(6), "x"))
        with pytest.raises(NodeFault, match="does not fit"):
            await accounts.grant(account.id, Gift(Pico(5 * 10**18), "y"))
        assert (await accounts.credit(account.id)).balance == 5
        assert (await accounts.grant(account.id, Gift(Pico(7), "y")))[1]
