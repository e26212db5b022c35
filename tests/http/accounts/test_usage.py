"""Usage, requests, credits and statements: every number equals the ledger's, and is the asker's alone."""

from __future__ import annotations

import csv
import io
from typing import Any

import orjson
import pytest

from mppnode.accounts.forms import Gift
from mppnode.http.account_json import usd
from mppnode.http.usage_routes import table
from tests.http.accounts.office import DOLLAR, Office

DAY_MS = 86_400_000
NOON = 1_900_000_000_000 - 1_900_000_000_000 % DAY_MS


@pytest.mark.parametrize(
    ("pico", "text"),
    [(0, "0.000000"), (1, "0.000000000001"), (-1, "-0.000000000001"), (1_500_000, "0.0000015"), (DOLLAR, "1.000000"), (-25 * 10**11, "-2.500000"), (4 * 10**18, "4000000.000000")],
)
def test_dollars_are_exact(pico: int, text: str) -> None:
    """Every pico-dollar is in the text, and never fewer than six places."""
    assert usd(pico) == text


async def test_credits_say_what_may_still_be_spent(desk: Office) -> None:
    """Balance, held and available are the ledger's, in dollars, micro and pico; terms say what may be owed."""
    account, owner = await desk.customer("first")
    await desk.rule("POST", f"/accounts/{account.id}/credits", {"amount_cents": 250, "reference": "welcome"})
    await desk.spend(account.id, "req_1", 1_000_001)
    shown = (await desk.ask("GET", "/v1/credits", owner.secret.text)).json
    assert shown["balance"] == {"usd": "2.499998999999", "micro_usd": 2_499_998, "pico_usd": "2499998999999"}
    assert (shown["held"]["pico_usd"], shown["available"], shown["terms"], shown["trust_limit"]) == ("0", shown["balance"], "prepaid", None)
    await desk.rule("PATCH", f"/accounts/{account.id}", {"terms": "postpaid", "trust_limit_cents": 100})
    owing = (await desk.ask("GET", "/v1/credits", owner.secret.text)).json
    assert (owing["terms"], owing["trust_limit"]["usd"], owing["available"]["usd"]) == ("postpaid", "1.000000", "3.499998999999")


async def test_the_statement_is_paged_and_adds_up(desk: Office) -> None:
    """Every line once, the newest first, and the amounts sum to the balance."""
    account, owner = await desk.customer("first")
    await desk.accounts.grant(account.id, Gift(DOLLAR, "welcome"))  # type: ignore[arg-type]
    for number in range(6):
        await desk.spend(account.id, f"req_{number}", 100 + number)
    lines: list[Any] = []
    cursor = ""
    while True:
        page = (await desk.ask("GET", f"/v1/credits/transactions?limit=3{cursor}", owner.secret.text)).json
        lines += page["data"]
        if not page["has_more"]:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert [line["kind"] for line in lines] == ["usage"] * 6 + ["grant"]
    assert [line["reference"] for line in lines] == [*(f"req_{number}" for number in reversed(range(6))), "welcome"]
    assert sum(int(line["amount"]["pico_usd"]) for line in lines) == int(lines[0]["balance"]["pico_usd"]) == DOLLAR - 615


async def _story(desk: Office) -> tuple[str, str]:
    account, owner = await desk.customer("first")
    made = await desk.keyring.create(account.id, _plain())
    document = orjson.dumps({"ending": "finished", "attempts": 2, "ttft_ms": 31, "duration_ms": 900, "id": "forged", "receipt": None}).decode()
    for number, (key, model, day) in enumerate([(owner.key.id, "a", 0), (owner.key.id, "b", 0), (made.key.id, "a", 1), (owner.key.id, "a", 1), (made.key.id, "a", 1)]):
        await desk.spend(account.id, f"req_{number}", 10**number, key=key, model=model, at=NOON + day * DAY_MS + number, document=document)
    return owner.secret.text, made.key.id


def _plain() -> Any:
    from mppnode.accounts.forms import KeyForm

    return KeyForm()


async def test_usage_is_added_up_by_any_combination(desk: Office) -> None:
    """Grouped by key, model, provider and day in any order the sums are of the same requests; filters narrow them."""
    text, other = await _story(desk)
    by_day = (await desk.ask("GET", "/v1/usage?group_by=day", text)).json["data"]
    assert [(row["requests"], row["cost"]["pico_usd"]) for row in by_day] == [(2, "11"), (3, "11100")]
    assert by_day[0]["day"] == "2030-03-17"
    both = (await desk.ask("GET", "/v1/usage?group_by=model,key", text)).json["data"]
    assert sum(row["requests"] for row in both) == 5
    assert {row["model"] for row in both} == {"a", "b"}
    assert sum(int(row["cost"]["pico_usd"]) for row in both) == 11_111
    mine = (await desk.ask("GET", f"/v1/usage?group_by=provider&key={other}&model=a", text)).json["data"]
    assert [(row["provider"], row["requests"], row["usage"]["prompt_tokens"]) for row in mine] == [("dev", 2, 14)]
    since = (await desk.ask("GET", f"/v1/usage?since={(NOON + DAY_MS) // 1000}&until=2030-03-19T00:00:00Z", text)).json["data"]
    assert [row["id"] for row in since] == ["req_4", "req_3", "req_2"]


async def test_requests_are_paged_and_shown_one_by_one(desk: Office) -> None:
    """Pages join to all requests; one shows its tokens, cost and what was noted, which cannot overwrite its id."""
    text, _ = await _story(desk)
    first = (await desk.ask("GET", "/v1/usage?limit=2", text)).json
    second = (await desk.ask("GET", f"/v1/usage?limit=3&cursor={first['next_cursor']}", text)).json
    assert [row["id"] for row in first["data"] + second["data"]] == [f"req_{number}" for number in (4, 3, 2, 1, 0)]
    one = (await desk.ask("GET", "/v1/requests/req_3", text)).json
    assert one == first["data"][1]
    assert (one["id"], one["ending"], one["attempts"], one["ttft_ms"], one["cost"]["pico_usd"]) == ("req_3", "finished", 2, 31, "1000")
    assert one["usage"] == {"prompt_tokens": 7, "cached_tokens": 1, "completion_tokens": 5, "reasoning_tokens": 2}
    for missing in ("req_9", "%00", "..%2f..%2fetc", "x" * 200, "%F0%9F%92%B8"):
        assert (await desk.ask("GET", f"/v1/requests/{missing}", text)).status == 404


async def test_a_table_has_every_request_and_no_formula(desk: Office) -> None:
    """CSV by query or by Accept is the whole list with a header row, and no cell is one a spreadsheet would run."""
    account, owner = await desk.customer("first")
    for number, model in enumerate(["=cmd()", "+1", "-1", "@x", 'a,"b"', "plain"]):
        await desk.spend(account.id, f"req_{number}", 5, model=model)
    for asked in ({"path": "/v1/usage?format=csv"}, {"path": "/v1/usage", "Accept": "text/csv"}):
        reply = await desk.ask("GET", asked["path"], owner.secret.text, **{name: value for name, value in asked.items() if name != "path"})
        assert reply.headers["Content-Type"] == "text/csv; charset=utf-8"
        rows = list(csv.DictReader(io.StringIO(reply.body.decode())))
        assert [row["model"] for row in reversed(rows)] == ["'=cmd()", "'+1", "'-1", "'@x", 'a,"b"', "plain"]
        assert {row["cost_usd"] for row in rows} == {"0.000000000005"}
    grouped = await desk.ask("GET", "/v1/usage?format=csv&group_by=model", owner.secret.text)
    assert grouped.body.startswith(b"model,requests,prompt_tokens,")
    assert b"\r\n=" not in grouped.body
    assert table([["\t=1", "\r=1", -1, None]]) == b"'\t=1,\"'\r=1\",-1,\r\n"
    assert table([["\n=1", "\uff1d1", "\uff0b1", "\uff0d1", "\uff201"]]).decode() == '"\'\n=1",' + ",".join(f"'{sign}1" for sign in "\uff1d\uff0b\uff0d\uff20") + "\r\n"


async def test_a_long_table_is_sent_in_pages(desk: Office) -> None:
    """More requests than a page holds are all in the table, each once."""
    account, owner = await desk.customer("first")
    rows = ",".join(
        f"('req_{number}', '{account.id}', '', {NOON + number // 3}, 'a', 'dev', 1, 1, 0, 1, 0, '{{}}')" for number in range(1203)
    )
    columns = "id, account, api_key, at_ms, model, provider, cost, prompt, cached, completion, reasoning, document"

    def fill() -> Any:
        yield f"INSERT INTO request ({columns}) VALUES {rows}", ()

    await desk.books.write(fill, of=account.id)
    reply = await desk.ask("GET", "/v1/usage?format=csv", owner.secret.text)
    named = [row["request"] for row in csv.DictReader(io.StringIO(reply.body.decode()))]
    assert len(named) == len(set(named)) == 1203
    page = await desk.ask("GET", "/v1/usage?format=csv&limit=2", owner.secret.text)
    assert page.body.count(b"\r\n") == 3
    assert "X-Next-Cursor" in page.headers


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("sinse=1", "sinse"), ("since=yesterday", "since"), ("since=1e9", "since"), ("since=-1", "since"), ("since=2&until=1", "until"),
        ("since=99999999999999999999", "since"), ("group_by=user", "group_by"), ("group_by=key,key", "group_by"), ("group_by=", "group_by"), ("limit=0", "limit"),
        ("limit=1001", "limit"), ("limit=٣", "limit"), ("format=xml", "format"), ("cursor=%00", "cursor"), ("cursor=WzFd", "cursor"),
        ("cursor=WzEsImEiXQ==", "cursor"), ("cursor=WyIxIiwiYSJd", "cursor"), ("key=%00", "key"), ("model=%0A", "model"), ("limit=1&limit=2", "limit"),
        ("group_by=day&limit=3", "group_by"), ("since=2026-01-01T00:00:00", "since"), ("since=2026-01-01", "since"), ("until=2026-02-30T00:00:00Z", "until"),
        ("since=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z", "until"), ("since=2026-01-01T00:00:00Z&until=2026-01-01T01:00:00+01:00", "until"),
    ],
)
async def test_a_wrong_query_is_refused_by_name(desk: Office, query: str, named: str) -> None:
    """What a query means is never guessed: unknown, repeated and malformed parameters are named."""
    _, owner = await desk.customer("first")
    refused = await desk.ask("GET", f"/v1/usage?{query}", owner.secret.text)
    assert (refused.status, refused.param) == (400, named)


async def test_t2_no_answer_to_one_account_holds_anything_of_another(desk: Office) -> None:
    """T2: B asks every route, with A's ids, names and cursors, and no answer of any status holds a canary of A."""
    canary = "canary-7c1f"
    account, owner = await desk.customer(canary)
    await desk.rule("PATCH", f"/accounts/{account.id}", {"email": f"{canary}@a.example", "alerts": {"url": f"https://{canary}.example/"}})
    made = (await desk.ask("POST", "/v1/keys", owner.secret.text, {"name": canary, "model_pool": [canary]})).json
    await desk.accounts.grant(account.id, Gift(DOLLAR, canary))  # type: ignore[arg-type]
    for number in range(3):
        await desk.spend(account.id, f"req_{canary}_{number}", 777_777, key=made["id"], model=canary, document=f'{{"ending":"{canary}"}}')
    theirs = [(await desk.ask("GET", f"{path}?limit=1", owner.secret.text)).json["next_cursor"] for path in ("/v1/usage", "/v1/keys", "/v1/credits/transactions")]
    canaries = [canary, account.id, made["prefix"], "777777"]
    _, stranger = await desk.customer("stranger")
    asked = [
        ("GET", "/v1/account", None), ("GET", "/v1/keys", None), ("GET", "/v1/credits", None), ("GET", "/v1/credits/transactions", None),
        ("GET", "/v1/usage", None), ("GET", "/v1/usage?format=csv", None), ("GET", "/v1/usage?group_by=key,model,provider,day", None),
        *(("GET", f"{path}?cursor={cursor}", None) for path, cursor in zip(("/v1/usage", "/v1/keys", "/v1/credits/transactions"), theirs, strict=True)),
        ("GET", f"/v1/usage?key={made['id']}", None), ("GET", f"/v1/requests/req_{canary}_0", None), ("GET", f"/v1/keys/{made['id']}", None),
        ("PATCH", f"/v1/keys/{made['id']}", {"name": "taken"}), ("DELETE", f"/v1/keys/{made['id']}", None), ("POST", f"/v1/keys/{made['id']}/rotate", {}),
        ("GET", f"/v1/keys/{owner.key.id}", None),
    ]
    for method, path, body in asked:
        for more in ({}, {"X_Trust": canary}):
            reply = await desk.ask(method, path, stranger.secret.text, body, **more)
            assert reply.status < 500
            held = reply.body.decode() + str(reply.headers)
            assert not [each for each in canaries if each in held], (method, path)
    after = (await desk.ask("GET", f"/v1/keys/{made['id']}", owner.secret.text)).json
    assert (after["name"], after["status"]) == (canary, "live")
