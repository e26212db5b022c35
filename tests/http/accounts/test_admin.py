"""The admin API: accounts, keys, credit and the outbox, as an operator works with them."""

from __future__ import annotations

import asyncio

import pytest

from channels.credit import AccountId
from mppnode.ledger.credit_grants import GRANT
from mppnode.ledger.credit_rows import Task, TaskState
from tests.http.accounts.office import DOLLAR, Office


async def test_an_account_from_its_opening_to_its_suspension(desk: Office) -> None:
    """Opened, listed, found by its trust, given terms and limits, suspended and resumed; a name is taken once."""
    opened = await desk.rule("POST", "/accounts", {"trust": "acme", "kind": "organisation", "email": "a@b.example"})
    assert (opened.status, opened.json["terms"]) == (201, "prepaid")
    taken = await desk.rule("POST", "/accounts", {"trust": "acme"})
    assert (taken.status, taken.code, taken.param) == (409, "conflict", "trust")
    path = f"/accounts/{opened.json['id']}"
    for number in range(2):
        await desk.rule("POST", "/accounts", {"trust": f"t{number}"})
    listed = (await desk.rule("GET", "/accounts?limit=2")).json
    rest = (await desk.rule("GET", f"/accounts?limit=2&cursor={listed['next_cursor']}")).json
    assert len({row["id"] for row in listed["data"] + rest["data"]}) == 3
    assert [row["id"] for row in (await desk.rule("GET", "/accounts?trust=acme")).json["data"]] == [opened.json["id"]]
    changed = await desk.rule("PATCH", path, {"terms": "postpaid", "trust_limit_cents": 250, "model_pool": ["a"], "email": None})
    assert (changed.json["trust_limit"]["usd"], changed.json["model_pool"], changed.json["email"]) == ("2.500000", ["a"], None)
    credit = await desk.books.load(AccountId(opened.json["id"]))
    assert credit is not None
    assert (credit.overdraft, credit.headroom) == (25 * 10**11, 25 * 10**11)
    assert (await desk.rule("PATCH", path, {"terms": "prepaid"})).json["trust_limit"] is None
    made = (await desk.rule("POST", f"{path}/keys", {"name": "first", "rpm": 3})).json
    await desk.rule("PATCH", path, {"suspended": True})
    assert (await desk.ask("GET", "/v1/account", made["key"])).code == "account_suspended"
    assert (await desk.rule("PATCH", path, {"suspended": False})).json["suspended_at"] is None
    assert (await desk.ask("GET", "/v1/account", made["key"])).status == 200
    rotated = (await desk.rule("POST", f"{path}/keys/{made['id']}/rotate", {"overlap_s": 0})).json
    assert rotated["rpm"] == 3
    assert (await desk.rule("DELETE", f"{path}/keys/{rotated['id']}")).json["status"] == "revoked"
    assert {key["status"] for key in (await desk.rule("GET", f"{path}/keys")).json["data"]} == {"rotated", "revoked"}


async def test_credit_is_given_once_per_reference(desk: Office) -> None:
    """Ten parallel grants of one reference book one; another amount under it is refused; a deduction is one more line."""
    account, _ = await desk.customer("first")
    path = f"/accounts/{account.id}"
    gift = {"amount_cents": 500, "reference": "invoice 7"}
    replies = await asyncio.gather(*(desk.rule("POST", f"{path}/credits", gift) for _ in range(10)))
    assert sorted(reply.status for reply in replies) == [200] * 9 + [201]
    assert sorted(reply.json["booked"] for reply in replies) == [False] * 9 + [True]
    other = await desk.rule("POST", f"{path}/credits", gift | {"amount_cents": 501})
    assert (other.status, other.param) == (409, "reference")
    assert (await desk.rule("POST", f"{path}/credits", {"amount_cents": -200, "reference": "back"})).json["balance"]["usd"] == "3.000000"
    stranger, _ = await desk.customer("second")
    assert (await desk.rule("POST", f"/accounts/{stranger.id}/credits", gift)).status == 201
    lines = (await desk.rule("GET", f"{path}/transactions")).json["data"]
    assert [(line["kind"], line["amount"]["micro_usd"], line["reference"]) for line in lines] == [
        ("grant_reversed", -2_000_000, "back"), ("grant", 5_000_000, "invoice 7"),
    ]
    credit = await desk.books.load(account.id)
    assert credit is not None
    assert credit.balance == 3 * DOLLAR


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"reference": "x"}, "amount_cents"), ({"amount_cents": 0, "reference": "x"}, "amount_cents"), ({"amount_cents": 1.5, "reference": "x"}, "amount_cents"),
        ({"amount_cents": 10**8, "reference": "x"}, "amount_cents"), ({"amount_cents": 5}, "reference"), ({"amount_cents": 5, "reference": ""}, "reference"),
        ({"amount_cents": 5, "reference": "a\nb"}, "reference"), ({"amount_cents": 5, "reference": "x" * 201}, "reference"), ({"amount_cents": 5, "referense": "x"}, "referense"),
    ],
)
async def test_a_wrong_gift_is_refused_by_name(desk: Office, body: dict[str, object], named: str) -> None:
    """Money is booked as it was meant or not at all."""
    account, _ = await desk.customer("first")
    refused = await desk.rule("POST", f"/accounts/{account.id}/credits", body)
    assert (refused.status, refused.param) == (400, named)


async def test_an_account_that_is_not_there_is_404_everywhere(desk: Office) -> None:
    """No route of one account makes up another."""
    for method, path, body in (
        ("GET", "", None), ("PATCH", "", {}), ("GET", "/keys", None), ("POST", "/keys", {}), ("GET", "/usage", None), ("GET", "/transactions", None),
        ("GET", "/credits", None), ("POST", "/credits", {"amount_cents": 5, "reference": "x"}), ("DELETE", "/keys/key_1", None), ("POST", "/keys/key_1/rotate", {}),
    ):
        for name in ("acct_0", "%00"):
            assert (await desk.rule(method, f"/accounts/{name}{path}", body)).status == 404, (method, path)
    assert (await desk.books.load(AccountId("acct_0"))) is None


async def test_a_parked_task_is_tried_again(desk: Office) -> None:
    """What was given up is listed without its secrets and becomes due once; what is not parked is left alone."""
    account, _ = await desk.customer("first")
    task = Task("alert:1", "alert", account.id, 5, '{"url":"https://a.example","secret":"whsec_canary"}', TaskState.PARKED, created_ms=5)
    await desk.books.add_task(task)
    listed = await desk.rule("GET", "/outbox?kind=alert&state=parked")
    assert [(row["id"], row["document"]) for row in listed.json["data"]] == [("alert:1", {"url": "https://a.example"})]
    assert (await desk.rule("GET", "/outbox?kind=alert&state=due")).json["data"] == []
    retried = await desk.rule("POST", "/outbox/alert:1/retry")
    assert (retried.json["state"], retried.json["due_ms"]) == ("due", desk.clock.now_millis())
    assert [due.id for due in await desk.books.due("alert")] == ["alert:1"]
    assert (await desk.rule("POST", "/outbox/alert:1/retry")).status == 409
    assert (await desk.rule("POST", "/outbox/alert:2/retry")).status == 404
    assert (await desk.rule("GET", "/outbox")).param == "kind"
    assert (await desk.rule("GET", f"/outbox?kind={GRANT}")).json["data"] == []
