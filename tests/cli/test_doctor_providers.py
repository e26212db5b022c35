"""What the doctor says of providers and prices: who takes our key, who refuses it, what has no price."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace

import pytest
from aiohttp import web

from channels.units import Pico
from mppnode.cli.devprovider_server import start_devprovider
from mppnode.config.schema import PricingConfig, ProviderConfig, RoutingConfig
from mppnode.config.secrets import Secret
from mppnode.doctor.findings import Status
from mppnode.doctor.providers import models_request
from mppnode.kernel.clock import ManualClock
from mppnode.kernel.listing import ProviderKind
from mppnode.kernel.rates import Rates
from mppnode.pricing.entries import Entry, write_entries
from tests.cli.doctor_kit import DEAD_URL, Steps, config, look, model, server

KEY = "sk-canary-0123456789"


def listing(status: int = 200, body: object = None, *, public: bool = False):
    """A provider that wants the key, unless its list is for everybody."""

    async def answer(request: web.Request) -> web.Response:
        if not public and request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": f"no such key {KEY}"}, status=401)
        told = {"data": [{"id": "m/one"}, {"id": "m/two"}]} if body is None else body
        return web.json_response(told, status=status)

    return answer


def provider(url: str, key: str | None = KEY, **more) -> ProviderConfig:
    return ProviderConfig("infra", f"{url}/v1", api_key=None if key is None else Secret(key), **more)


async def ask(handler, key: str | None = KEY, **parts):
    async with server(handler) as url:
        return await look("provider", config(providers=(provider(url, key),), **parts), "infra")


async def test_a_provider_that_takes_the_key():
    """One request without cost says that it can be reached and whose key it takes."""
    found = await ask(listing())
    assert found.status is Status.OK
    assert found.text.endswith("takes the key")


async def test_a_provider_that_shows_its_list_to_everybody():
    """Then the key is not proved, and the line says so."""
    assert "so the key is not proved" in (await ask(listing(public=True))).text
    assert "without a key" in (await ask(listing(public=True), key=None)).text


@pytest.mark.parametrize(
    ("handler", "key", "status", "said"),
    [
        (listing(), "sk-canary-other", Status.FAIL, "refuses the key (status 401)"),
        (listing(), None, Status.FAIL, "wants a key (status 401)"),
        (listing(404), KEY, Status.WARN, "has no list of models (status 404)"),
        (listing(429), KEY, Status.WARN, "limits us (status 429)"),
        (listing(500), KEY, Status.FAIL, "does not work (status 500)"),
        (listing(302), KEY, Status.FAIL, "does not work (status 302)"),
    ],
)
async def test_a_provider_that_does_not_serve_us(handler, key, status, said):
    """Each refusal is told by its status and none by the provider's words."""
    found = await ask(handler, key)
    assert found.status is status
    assert said in found.text
    assert "infra" in found.remedy
    assert "canary" not in found.text + found.remedy


async def test_a_provider_without_our_models():
    """What we sell and it does not list is named by our own names; an answer that is no list says nothing."""
    models = tuple(model(name=f"m/{name}") for name in ("one", "four", "five", "six", "seven"))
    found = await ask(listing(), models=models)
    assert found.status is Status.WARN
    assert "does not list m/four, m/five, m/six and more" in found.text
    for body in ({"data": "all"}, [], {"models": [{"name": "models/m/one"}]}, {"data": [7, {"id": 7}]}):
        assert (await ask(listing(body=body))).status is Status.OK


async def test_a_provider_that_is_away_or_slow():
    """No connection is a failure, three seconds a warning."""
    away = await look("provider", config(providers=(provider(DEAD_URL),)), "infra")
    assert away.status is Status.FAIL
    assert "cannot be reached" in away.text
    async with server(listing()) as url:
        slow = await look("provider", config(providers=(provider(url),)), "infra", clock=Steps(4.0))
    assert slow.status is Status.WARN
    assert "4000 ms" in slow.text


async def test_a_public_name_that_leads_home(monkeypatch):
    """A hosted provider's name in our own network would take the key there; nothing is sent."""
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.json_response({})

    async def resolve(host, port, **_):
        assert host == "infra.example.net"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    async with server(answer) as url:
        home = provider(url.replace("127.0.0.1", "infra.example.net"), kind=ProviderKind.QUOTA)
        found = await look("provider", config(providers=(home,)), "infra")
    assert found.status is Status.FAIL
    assert "private network" in found.text
    assert not seen


async def test_the_development_provider():
    """What ships with the node answers its doctor."""
    running = await start_devprovider()
    try:
        what = config(providers=(provider(running.url, None),), models=(model(name="dev/story"),))
        assert (await look("provider", what, "infra")).status is Status.OK
    finally:
        await running.stop()


@pytest.mark.parametrize(
    ("preset", "path", "header"),
    [
        (None, "/v1/models", ("Authorization", f"Bearer {KEY}")),
        ("groq", "/v1/models", ("Authorization", f"Bearer {KEY}")),
        ("openrouter", "/v1/key", ("Authorization", f"Bearer {KEY}")),
        ("anthropic", "/v1/models?limit=1000", ("x-api-key", KEY)),
        ("gemini", "/v1/models?pageSize=1000", ("x-goog-api-key", KEY)),
    ],
)
def test_how_each_provider_is_asked(preset, path, header):
    """A GET that nobody bills, with the key where that provider looks for it, and without it on request."""
    asked = provider("https://infra.example", preset=preset)
    request = models_request(asked)
    assert (request.method, request.url, request.body) == ("GET", f"https://infra.example{path}", b"")
    assert header in request.headers
    assert KEY not in str(models_request(asked, with_key=False).headers)


# ------------------------------------------------------------------------------------------------------------- prices


def entry(clock: ManualClock, name: str, age_s: int) -> Entry:
    return Entry(
        provider="infra", model=name, upstream_model=name, cost=Rates(Pico(1), Pico(1), Pico(1)), context=1_000, max_output=100,
        source="https://infra.example/models", time=clock.now() - age_s,
    )


async def prices(tmp_path, name: str, *ages: int, **parts):
    """What ``name`` says of a catalog file with models of these ages, at most a week of which are good."""
    clock = ManualClock()
    path = tmp_path / "prices.json"
    write_entries(path, [entry(clock, f"p/{age}", age) for age in ages])
    seller = replace(provider(DEAD_URL), models=("*",))
    parts = {"models": (), "providers": (seller,), "pricing": PricingConfig(catalog=path)} | parts
    return await look(name, config(**parts), clock=clock)


async def test_prices_that_grow_old(tmp_path):
    """Fresh ones are well, some stale ones a warning, none but stale ones a failure."""
    day = 86_400
    fresh = await prices(tmp_path, "prices", 60, day)
    assert (fresh.status, fresh.text) == (Status.OK, "2 synchronised, the oldest 1 d old, 0 beyond 7 d")
    assert (await prices(tmp_path, "prices", 60, 8 * day)).status is Status.WARN
    stale = await prices(tmp_path, "prices", 8 * day)
    assert stale.status is Status.FAIL
    assert "mppnode prices sync" in stale.remedy


async def test_prices_that_are_not_there(tmp_path):
    """Written ones need no file; without either nothing is on sale; a broken file is told by its place."""
    assert (await look("prices", config())).status is Status.OK
    assert (await prices(tmp_path, "prices")).status is Status.FAIL
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"entries": 7}))
    what = config(pricing=PricingConfig(catalog=broken))
    assert (await look("prices", what)).status is Status.FAIL
    assert (await look("models", what)).status is Status.SKIP


async def test_models_nobody_can_buy(tmp_path):
    """A pool with strangers fails; models without a price, at stale prices, and idle providers are warned of."""
    assert (await prices(tmp_path, "models", 60)).status is Status.OK
    pool = await prices(tmp_path, "models", 60, routing=RoutingConfig(model_pool=("p/60", "p/none")))
    assert pool.status is Status.FAIL
    assert "p/none" in pool.text
    named = replace(provider(DEAD_URL), models=("p/60", "p/61"))
    unpriced = await prices(tmp_path, "models", 60, providers=(named,))
    assert unpriced.status is Status.WARN
    assert "infra/p/61" in unpriced.text
    assert (await prices(tmp_path, "models", 60, 10**6)).text == "1 at stale prices only: p/1000000"
    idle = await prices(tmp_path, "models", 60, providers=(replace(named, models=("*",)), replace(named, name="lazy", models=())))
    assert (idle.status, idle.text) == (Status.WARN, "lazy sells nothing")
