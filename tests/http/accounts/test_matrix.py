"""K4: nothing about an account is answered without its bearer, on any route, by any method, with any header."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.http.accounts.office import ADMIN, Office

FREE = {("POST", "/webhooks/stripe")}
"""The routes of these surfaces that take no bearer: an announcement carries its own signature (404 without billing)."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
TRICKS: list[dict[str, str]] = [
    {},
    {"X_Trust": "first"},
    {"X_HTTP_Method_Override": "GET"},
    {"X_Api_Key": "{key}"},
    {"Api_Key": "{key}"},
    {"Cookie": "Authorization=Bearer {key}; token={key}"},
    {"X_Forwarded_For": "127.0.0.1", "X_Real_Ip": "127.0.0.1"},
    {"X_Original_Url": "/v1/models", "X_Rewrite_Url": "/v1/models"},
    {"Payment_Authorization": "Bearer {key}"},
    {"Authorization": "{key}"},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": "Basic {key}"},
    {"Authorization": "Payment {key}"},
    {"Authorization": f"Bearer {ADMIN}"},
    {"Authorization": "Bearer null"},
]


async def test_k4_no_route_answers_without_a_bearer(desk: Office) -> None:
    """K4: route x method x header on the public port: 401, or 404 and 405 where there is nothing; never an answer."""
    _, owner = await desk.customer("first")
    routes = {(route.method, route.resource.canonical) for route in desk.public.app.router.routes() if route.resource is not None}
    assert len(routes) > 15
    assert routes >= FREE
    for path in sorted({path for _, path in routes}):
        for method in METHODS:
            for trick in TRICKS:
                headers = {name: value.format(key=owner.secret.text) for name, value in trick.items()}
                reply = await desk.ask(method, path.replace("{id}", owner.key.id), None, None, **headers)
                taken = (method, path) in routes and (method, path) not in FREE
                assert reply.status == (401 if taken else 404 if (method, path) in FREE else 405), (method, path, trick)
                if taken:
                    assert reply.headers["WWW-Authenticate"] == "Bearer"
                    assert reply.headers["Cache-Control"] == "private, no-store"
                assert owner.key.account not in reply.body.decode()
    assert (await desk.ask("GET", "/v1/keys?api_key=" + owner.secret.text)).status == 401


async def test_k4_the_admin_api_answers_its_token_alone(desk: Office) -> None:
    """K4: everything on the admin port but its token is 401, also what is no route; the public port knows none of it."""
    account, owner = await desk.customer("first")
    paths = {route.resource.canonical for route in desk.admin.app.router.routes() if route.resource is not None}
    paths |= {"/", "/admin", "/v1/keys", "/admin/v1/accounts/../../metrics"}
    for path in sorted(paths):
        place = path.replace("{account}", account.id).replace("{id:.+}", "x").replace("{id}", owner.key.id)
        for method in METHODS:
            for bearer in (None, owner.secret.text, ADMIN[:-1], ADMIN + "x", "jwt.first", ADMIN.upper()):
                reply = await desk.ask(method, place, bearer, admin=True)
                assert reply.status == 401, (method, place, bearer)
                assert account.id not in reply.body.decode()
        public = await desk.ask("GET", place, ADMIN)
        assert public.status in ((401,) if path == "/v1/keys" else (404,))


@pytest.mark.parametrize("twice", [("Bearer {key}", "Bearer {key}"), ("Payment x", "Bearer {key}")])
async def test_two_credentials_are_refused(desk: Office, twice: tuple[str, str]) -> None:
    """Of two Authorization headers none is chosen: a proxy in front might have checked the other one."""
    _, owner = await desk.customer("first")
    headers = [("Authorization", value.format(key=owner.secret.text)) for value in twice]
    async with desk.http.get(desk.public.make_url("/v1/account"), headers=headers) as response:
        assert response.status == 401


async def test_a_token_or_key_is_for_the_trust_it_may_name(desk: Office) -> None:
    """X-Trust selects among a bearer's own accounts, and every other name is refused alike."""
    account, owner = await desk.customer("first")
    await desk.customer("second")
    for bearer in (owner.secret.text, "jwt.first"):
        assert (await desk.ask("GET", "/v1/account", bearer, X_Trust="first")).json["id"] == account.id
        refusals = [await desk.ask("GET", "/v1/account", bearer, X_Trust=name) for name in ("second", "nobody")]
        assert [(reply.status, reply.body) for reply in refusals] == [(403, refusals[0].body)] * 2
    suspended = await desk.rule("PATCH", f"/accounts/{account.id}", {"suspended": True})
    assert suspended.json["suspended_at"] is not None
    assert (await desk.ask("GET", "/v1/account", owner.secret.text)).code == "account_suspended"


async def test_an_outage_is_no_refusal(desk: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that cannot be asked is 503 with a time to come back, never an unknown key."""
    from channels.faults import ChannelFault, Reason

    _, owner = await desk.customer("first")

    async def away(*_: object, **__: object) -> None:
        raise ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger is away")

    monkeypatch.setattr(desk.books, "read", away)
    for path in ("/v1/keys", "/v1/account", "/v1/credits", "/v1/usage"):
        reply = await desk.ask("GET", path, owner.secret.text)
        assert (reply.status, reply.code) == (503, "store_unavailable")
        assert "Retry-After" in reply.headers
        assert "WWW-Authenticate" not in reply.headers
