"""``mppnode prices`` against a provider that answers well, badly and with malice."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from mppnode.cli import main as cli
from mppnode.pricing import fetch as fetching
from mppnode.pricing.entries import read_entries
from mppnode.pricing.fetch import BODY_BYTES_MAX, FetchFailed, fetch, price_session

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-canary-0123456789"
ENVIRON = {"SECRET": "s" * 40, "KEY": "0x" + "11" * 32, "INFRA_KEY": KEY}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def deepinfra(**prices: tuple[object, object]) -> dict[str, Any]:
    """A list in DeepInfra's shape: model to input and output price."""
    return {
        "data": [
            {"id": name, "metadata": {"context_length": 8192, "pricing": {"input_tokens": paid, "output_tokens": asked}}}
            for name, (paid, asked) in prices.items()
        ]
    }


@dataclass
class Place:
    """A directory with a configuration, and the provider it names."""

    path: Path
    answer: Handler | None = None
    seen: list[dict[str, str]] = field(default_factory=list)

    @property
    def prices(self) -> Path:
        return self.path / "prices.json"

    def says(self, document: Any) -> None:
        async def answer(_: web.Request) -> web.Response:
            return web.Response(text=document if isinstance(document, str) else json.dumps(document))

        self.answer = answer

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append({"path": request.path} | dict(request.headers))
        assert self.answer is not None
        return await self.answer(request)

    async def run(self, *arguments: str) -> int:
        """One command, in a thread of its own, since it runs its own event loop."""
        return await asyncio.to_thread(cli.main, ["prices", *arguments, "--config", str(self.path / "node.toml")])


def configuration(url: str, models: str) -> str:
    return f"""
[node]
realm = "127.0.0.1"
challenge_secrets = [{{ env = "SECRET" }}]
[chain]
rpc_url = "https://rpc.example.com"
chain_id = 4217
token = "0x20C000000000000000000000b9537d11c60E8b50"
payee_key = {{ env = "KEY" }}
[pricing]
markup_bps = 2000
[[providers]]
name = "infra"
preset = "deepinfra"
base_url = "{url}v1/openai"
api_key = {{ env = "INFRA_KEY" }}
models = {models}
[[providers]]
name = "my-vllm"
base_url = "http://127.0.0.1:1/v1"
[[models]]
id = "own/model"
provider = "my-vllm"
input_usd_per_million = "0.10"
output_usd_per_million = "0.40"
context = 8192
max_output = 1024
"""


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    here = Place(tmp_path)
    application = web.Application()
    application.router.add_get("/{tail:.*}", here.handle)
    server = TestServer(application)
    await server.start_server()
    (tmp_path / "node.toml").write_text(configuration(str(server.make_url("/")), '["*"]'))
    yield here
    await server.close()


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


async def test_sync_writes_what_it_read(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The first synchronisation fills the catalog file, asks with the key, and the second changes nothing but times."""
    place.says(deepinfra(a=(0.055, 0.79), b=(1, 2)))
    assert await place.run("sync", "--json") == 0
    told = lines(capsys.readouterr().out)
    assert [(row["provider"], row.get("model"), row["verdict"]) for row in told] == [
        ("infra", "a", "new"),
        ("infra", "b", "new"),
        ("my-vllm", None, "skipped"),
    ]
    assert told[2]["reason"] == "publishes no prices"
    assert [(entry.model, entry.cost.input, entry.cost.output) for entry in read_entries(place.prices)] == [("a", 55_000, 790_000), ("b", 1_000_000, 2_000_000)]
    assert place.seen[0]["path"] == "/v1/openai/models"
    assert place.seen[0]["Authorization"] == f"Bearer {KEY}"
    assert place.seen[0]["Accept-Encoding"] == "identity"
    assert await place.run("sync") == 0
    assert "2 same" in capsys.readouterr().out


async def test_a_dry_run_writes_nothing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """`--dry-run` says what would happen."""
    place.says(deepinfra(a=(1, 2)))
    assert await place.run("sync", "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not place.prices.exists()


async def test_a_held_price_needs_its_name(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A jump is held with exit 1, shown, and taken when it is named; naming what is not held is refused."""
    place.says(deepinfra(a=(1, 2)))
    await place.run("sync")
    place.says(deepinfra(a=(100, 2)))
    assert await place.run("sync") == 1
    assert "input rose more than 10 times" in capsys.readouterr().out
    assert read_entries(place.prices)[0].cost.input == 1_000_000
    assert await place.run("show", "--json") == 0
    shown = {row["model"]: row for row in lines(capsys.readouterr().out)}
    assert (shown["a"]["state"], shown["a"]["held"]["cost"]["input_usd_per_million"]) == ("held", "100.00")
    assert await place.run("sync", "--accept", "infra/b") == 2
    assert await place.run("sync", "--accept", "infra") == 2
    assert await place.run("sync", "--accept", "infra/a", "--provider", "nobody") == 2
    assert read_entries(place.prices)[0].cost.input == 1_000_000
    assert await place.run("sync", "--accept", "infra/a") == 0
    (entry,) = read_entries(place.prices)
    assert (entry.cost.input, entry.held, entry.history[0].cost.input) == (100_000_000, None, 1_000_000)


async def redirect(_: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("/elsewhere")


async def huge(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    sent = 0
    try:
        while sent < 100 * 1024 * 1024:
            await response.write(b" " * (1 << 20))
            sent += 1 << 20
    except ConnectionError:
        # The reader left: that is what this answer is for.
        assert sent > BODY_BYTES_MAX // 2
    return response


async def failing(_: web.Request) -> web.StreamResponse:
    return web.Response(status=500, text=f"internal: {KEY}")


async def compressed(_: web.Request) -> web.StreamResponse:
    return web.Response(body=b"\x1f\x8b\x08", headers={"Content-Encoding": "gzip"})


async def broken_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b'{"data": [')
    assert request.transport is not None
    request.transport.close()
    return response


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (redirect, "answered with status 302"),
        (huge, "more than 16777216 bytes"),
        (failing, "answered with status 500"),
        (compressed, "compressed"),
        (broken_off, "hung up"),
        ("<html>sign in</html>", "is not JSON"),
        ('{"data": [{"id": "a", "metadata": {"pricing": {"input_tokens": NaN}}}]}', "number that JSON does not have"),
        ('{"data": [], "data": []}', "same key twice"),
        ('{"models": []}', "is not a list of models"),
    ],
)
async def test_a_hostile_answer_changes_no_price(place: Place, capsys: pytest.CaptureFixture[str], answer: Any, words: str) -> None:
    """Whatever comes instead of a list: exit 1, a line that says what, the file untouched, and no key in the output."""
    place.says(deepinfra(a=(1, 2)))
    await place.run("sync")
    before = place.prices.read_bytes()
    asked = len(place.seen)
    if isinstance(answer, str):
        place.says(answer)
    else:
        place.answer = answer
    assert await place.run("sync") == 1
    told = capsys.readouterr()
    assert words in told.out
    assert KEY not in told.out + told.err
    assert place.prices.read_bytes() == before
    assert len(place.seen) == asked + 1


async def test_one_bad_price_stops_no_other(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A malformed, a doubled, a negative and a vanished price are told apart, and the good one is taken."""
    place.says(deepinfra(a=(1, 2), b=(1, 2), c=(1, 2), d=(1, 2), e=(1, 2)))
    await place.run("sync")
    document = deepinfra(a=("1,5", 2), b=(-1, 2), c=(1, 2), e=(2, 3))
    document["data"] += deepinfra(c=(1, 3))["data"]
    place.says(document)
    capsys.readouterr()
    assert await place.run("sync", "--json") == 1
    found = {row["model"]: (row["verdict"], row.get("reason")) for row in lines(capsys.readouterr().out) if "model" in row}
    assert found == {
        "a": ("held", "input is not a decimal"),
        "b": ("held", "input is negative"),
        "c": ("held", "is listed twice with different prices"),
        "d": ("gone", "is not in the provider's list"),
        "e": ("changed", None),
    }
    assert [entry.cost.input for entry in read_entries(place.prices)] == [1_000_000] * 4 + [2_000_000]


async def test_show_prints_cost_markup_price_and_age(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A price list for people, with the models of the configuration beside those of the file."""
    place.says(deepinfra(a=(1, 2)))
    await place.run("sync")
    capsys.readouterr()
    assert await place.run("show") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["my-vllm", "own/model", "-", "-", "-", "0.10", "0.40", "-", "configured"] in rows
    (row,) = [row for row in rows if row[1:2] == ["a"]]
    assert row[:7] == ["infra", "a", "1.00", "2.00", "20.00%", "1.20", "2.40"]
    assert row[8] == "fresh"
    assert await place.run("show", "a", "nothing/like-it") == 1
    assert "'nothing/like-it' is not sold here" in capsys.readouterr().err


async def test_an_import_is_vouched_for(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A list from a file passes the same rails, and its prices do not go stale."""
    place.says(deepinfra(a=(1, 2)))
    await place.run("sync")
    listed = json.loads(place.prices.read_text())
    listed["listings"][0]["cost"]["input_usd_per_million"] = "1.25"
    source = place.path / "list.json"
    source.write_text(json.dumps(listed))
    assert await place.run("import", str(source)) == 0
    assert [(entry.cost.input, entry.vouched) for entry in read_entries(place.prices)] == [(1_250_000, True)]
    listed["listings"][0]["cost"]["input_usd_per_million"] = "0.01"
    source.write_text(json.dumps(listed))
    assert await place.run("import", str(source)) == 1
    assert read_entries(place.prices)[0].cost.input == 1_250_000
    source.write_text("{}")
    capsys.readouterr()
    assert await place.run("import", str(source)) == 2
    assert "list.json: listings: is missing" in capsys.readouterr().err
    assert await place.run("import", str(place.path / "absent.json")) == 2


async def test_a_broken_catalog_is_named_and_left_alone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """No command overwrites a catalog file it cannot read: somebody's edit is in it."""
    place.says(deepinfra(a=(1, 2)))
    place.prices.write_text('{"version": 1, "listings": [{}]}')
    for command in (["sync"], ["show"], ["import", "example"]):
        assert await place.run(*command) == 2
        assert "prices.json: listings[0].context: is missing" in capsys.readouterr().err
    assert place.prices.read_text() == '{"version": 1, "listings": [{}]}'


async def test_a_server_that_never_ends_is_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit covers the whole answer."""
    monkeypatch.setattr(fetching, "TOTAL_S", 0.05)
    release = asyncio.Event()

    async def waiting(_: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    place.answer = waiting
    server = (place.path / "node.toml").read_text().split('base_url = "')[1].split('"')[0]
    async with price_session() as session:
        with pytest.raises(FetchFailed, match="in time"):
            await fetch(session, f"{server}/models", None)
    release.set()


async def test_nobody_there_is_a_failure_in_our_words() -> None:
    """A refused connection says nothing of the address or the key."""
    async with price_session() as session:
        with pytest.raises(FetchFailed, match="could not be reached") as caught:
            await fetch(session, "http://127.0.0.1:1/models", KEY)
    assert isinstance(session, aiohttp.ClientSession)
    assert KEY not in str(caught.value)


def test_the_example_works_as_a_process(tmp_path: Path) -> None:
    """`mppnode prices import example` and `show`, as an operator types them."""
    (tmp_path / "node.toml").write_text(configuration("http://127.0.0.1:1/", '["*"]').replace('name = "infra"', 'name = "deepinfra"'))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mppnode.cli.main", "prices", *arguments, "--config", str(tmp_path / "node.toml")],
            env={**os.environ, **ENVIRON, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    imported = run("import", "example")
    assert (imported.returncode, imported.stdout.splitlines()[-1]) == (0, "6 new")
    shown = run("show", "--json")
    assert shown.returncode == 0
    rows = {row["model"]: row for row in lines(shown.stdout)}
    assert rows["meta-llama/Meta-Llama-3.1-8B-Instruct"]["cost"] == {"input_usd_per_million": "0.055", "output_usd_per_million": "0.055"}
    assert rows["meta-llama/Meta-Llama-3.1-8B-Instruct"]["sell"] == {"input_usd_per_million": "0.066", "output_usd_per_million": "0.066"}
    assert {row["state"] for row in rows.values()} == {"vouched", "configured"}
