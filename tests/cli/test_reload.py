"""SIGHUP at real processes: what takes effect, what waits for a restart, and what is refused whole."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cli.operator import SECRET, Desk, configuration, desk
from tests.cli.test_workers import Service, children, service

NEW_SECRET = "another-challenge-secret-0123456789abcdef"
ADMIN, NEW_ADMIN = "a" * 40, "b" * 40
PATH = "/v1/chat/completions"
BODY = {"model": "dev/story", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 40}


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk(tmp_path) as made:
        (tmp_path / "secret").write_text(SECRET)
        (tmp_path / "token").write_text(ADMIN)
        (tmp_path / "reload.toml").write_text(text_of(made))
        yield made


def text_of(shop: Desk) -> str:
    """A node whose secrets are in files, with an admin API and a listener for operators."""
    text = configuration(shop.net, ledger='"reload.sqlite"')
    text = text.replace('[{ env = "SECRET" }]', '[{ file = "secret" }]')
    return text + '[admin]\ntoken = { file = "token" }\nport = 0\n[metrics]\nport = 0\n'


async def hang_up(served: Service, event: str = "config.reloaded") -> dict[str, object]:
    """Send SIGHUP and wait for what the node says to it."""
    before = served.count(event)
    served.process.send_signal(signal.SIGHUP)
    await served.until(event, before + 1)
    return [line for line in served.lines if line["event"] == event][-1]


async def ready(served: Service, times: int = 1) -> str:
    await served.until("node.started", times)
    url: str = next(line["url"] for line in served.lines if line["event"] == "node.started")
    return url


async def challenge(shop: Desk, url: str) -> tuple[str, int]:
    """The challenge for a request, and the units it quotes."""
    async with shop.http.post(url + PATH, json=BODY) as answer:
        assert answer.status == 402
        header = answer.headers["WWW-Authenticate"]
    request = header.split('request="')[1].split('"')[0]
    from channels.wire import base64url

    return header, int(json.loads(base64url.decode(request, field="request", length_max=10_000))["amount"])


async def test_prices_and_models_change_without_a_restart(shop: Desk) -> None:
    """The next challenge quotes the new price, a new model is sold, and the same process goes on with its channels."""
    path = shop.folder / "reload.toml"
    async with service(shop, "serve", "reload.toml") as served:
        url = await ready(served)
        payer = shop.payer()
        assert await shop.stream(payer, 20, url + PATH) == 20
        _, before = await challenge(shop, url)
        more = text_of(shop).replace('output_usd_per_million = "10"', 'output_usd_per_million = "20"')
        more = more.replace("[log]", '[[models]]\nid = "dev/echo"\nprovider = "dev"\ninput_usd_per_million = "1"\n'
                            'output_usd_per_million = "1"\ncontext = 1000\nmax_output = 100\n[log]')  # fmt: skip
        path.write_text(more)
        assert (await hang_up(served))["tables"] == ["models"]
        _, after = await challenge(shop, url)
        assert after == 2 * before
        async with shop.http.get(url + "/v1/models") as answer:
            assert {model["id"] for model in (await answer.json())["data"]} == {"dev/story", "dev/echo"}
        assert await shop.stream(payer, 20, url + PATH) == 20
    assert served.process.returncode == 0
    assert (await shop.run("reconcile", config="reload.toml")).status == 0


async def test_a_faulty_file_changes_nothing(shop: Desk) -> None:
    """Every problem is named in one line, the old prices stay in force, and a corrected file is taken."""
    path = shop.folder / "reload.toml"
    async with service(shop, "serve", "reload.toml") as served:
        url = await ready(served)
        _, before = await challenge(shop, url)
        raised = text_of(shop).replace('output_usd_per_million = "10"', 'output_usd_per_million = "20"')
        path.write_text(raised.replace("context = 100000", 'context = "long"').replace("drain_s = 2", "drain = 2"))
        line = await hang_up(served, "config.refused")
        assert [problem.split(":")[0] for problem in line["problems"]] == ["limits.drain", "models[0].context"]  # type: ignore[attr-defined]
        assert (await challenge(shop, url))[1] == before
        (shop.folder / "list.json").write_text("{")
        path.write_text(raised + '[pricing]\ncatalog = "list.json"\n')
        line = await hang_up(served, "config.refused")
        assert len(line["problems"]) == 1  # type: ignore[arg-type]
        assert (await challenge(shop, url))[1] == before, "a catalog that cannot be read keeps the models out too"
        path.write_text(raised)
        await hang_up(served)
        assert (await challenge(shop, url))[1] == 2 * before
        assert served.count("config.reloaded") == 1


async def test_secrets_are_read_again(shop: Desk) -> None:
    """A new challenge secret signs while the listed old one still verifies; a new admin token shuts the old one out."""
    path = shop.folder / "reload.toml"
    async with service(shop, "serve", "reload.toml") as served:
        url = await ready(served)
        old, _ = await challenge(shop, url)
        (shop.folder / "new-secret").write_text(NEW_SECRET)
        (shop.folder / "token").write_text(NEW_ADMIN)
        both = text_of(shop).replace('[{ file = "secret" }]', '[{ file = "new-secret" }, { file = "secret" }]')
        path.write_text(both)
        assert (await hang_up(served))["tables"] == ["node", "admin"]
        fresh, _ = await challenge(shop, url)
        assert await verdict(shop, url, old) != "invalid_challenge"
        assert await verdict(shop, url, fresh) != "invalid_challenge"
        path.write_text(text_of(shop).replace('{ file = "secret" }', '{ file = "new-secret" }'))
        await hang_up(served)
        assert await verdict(shop, url, old) == "invalid_challenge", "no longer listed"
        assert await verdict(shop, url, fresh) != "invalid_challenge"
        written = "".join(json.dumps(line) for line in served.lines)
        assert not any(secret in written for secret in (SECRET, NEW_SECRET, ADMIN, NEW_ADMIN))


async def verdict(shop: Desk, url: str, header: str) -> str:
    """What the node says to a credential that answers a challenge with nothing that could pay."""
    from channels.wire import base64url
    from channels.wire.headers import authorization, parse_challenges

    shown = parse_challenges([header])[0]
    members = {
        name: getattr(shown, name)
        for name in ("id", "realm", "method", "intent", "request", "expires", "digest", "opaque", "description")
        if getattr(shown, name) is not None
    }
    credential = {"challenge": members, "payload": {"action": "voucher", "channelId": "0x" + "11" * 32,
                  "cumulativeAmount": "1", "signature": "0x" + "11" * 65}}  # fmt: skip
    sent = authorization(base64url.encode(json.dumps(credential).encode()))
    async with shop.http.post(url + PATH, json=BODY, headers={"Authorization": sent}) as answer:
        code: str = (await answer.json())["error"]["code"]
        return code


async def test_what_needs_a_restart_is_named_and_not_taken(shop: Desk) -> None:
    """Changed keys that only a start reads are logged by name at every reload; the rest of the file is taken."""
    path = shop.folder / "reload.toml"
    async with service(shop, "serve", "reload.toml") as served:
        await ready(served)
        path.write_text(text_of(shop).replace("drain_s = 2", "drain_s = 3\nstall_s = 7").replace('realm = "127.0.0.1"', 'realm = "x"'))
        for _ in range(2):
            assert (await hang_up(served))["tables"] == []
            await served.until("config.needs_restart", served.count("config.reloaded"))
        told = [line["keys"] for line in served.lines if line["event"] == "config.needs_restart"]
        assert told[-1] == ["node.realm", "limits.stall_s", "limits.drain_s"]


async def test_workers_reload_with_their_supervisor(shop: Desk) -> None:
    """One hang-up reaches every worker, also one that is just being started, and none of them ends by it."""
    path = shop.folder / "reload.toml"
    async with service(shop, "serve", "reload.toml", "--workers", "2") as served:
        await served.until("workers.started")
        await served.until("node.started", 2)
        workers = children(served.process.pid)
        path.write_text(text_of(shop).replace('output_usd_per_million = "10"', 'output_usd_per_million = "20"'))
        served.process.send_signal(signal.SIGHUP)
        await served.until("config.reloaded", 2)
        assert children(served.process.pid) == workers
        os.kill(workers[0], signal.SIGKILL)
        await served.until("worker.died")
        async with asyncio.timeout(20):
            while len(children(served.process.pid)) < len(workers):
                await asyncio.sleep(0.005)
        served.process.send_signal(signal.SIGHUP)  # long before the new one has read a line of Python
        await served.until("config.reloaded", 4)
        assert served.count("worker.died") == 1
    assert served.process.returncode == 0


async def test_many_hang_ups_at_once_are_few_reloads(shop: Desk) -> None:
    """Signals that come while a reload runs are served by one more, and the last file written is in force."""
    path = shop.folder / "reload.toml"
    async with service(shop, "serve", "reload.toml") as served:
        url = await ready(served)
        _, before = await challenge(shop, url)
        for cents in range(11, 31):
            path.with_suffix(".new").write_text(
                text_of(shop).replace('output_usd_per_million = "10"', f'output_usd_per_million = "{cents}"')
            )
            path.with_suffix(".new").replace(path)
            served.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(20):
            while (await challenge(shop, url))[1] != 3 * before:
                await served.news.wait()
                served.news.clear()
        assert served.count("config.refused") == 0
        assert served.count("config.reloaded") <= 20


async def test_a_watchtower_survives_a_hang_up(shop: Desk) -> None:
    """It has nothing to exchange, says so, and goes on; its operators' listener tells that it is well."""
    path = shop.folder / "reload.toml"
    async with service(shop, "watchtower", "reload.toml") as tower:
        await tower.until("watchtower.started")
        path.write_text(text_of(shop).replace('output_usd_per_million = "10"', 'output_usd_per_million = "20"'))
        assert (await hang_up(tower))["tables"] == []
        await tower.until("config.needs_restart")
        url = next(line["ops_url"] for line in tower.lines if line["event"] == "watchtower.started")
        async with shop.http.get(url + "/readyz") as answer:
            assert (answer.status, (await answer.json())["status"]) == (200, "ready")
    assert tower.process.returncode == 0


async def test_a_secret_that_cannot_be_read_changes_nothing(shop: Desk) -> None:
    """The key is named and not the file's content, what was in force stays, prices too; and it can be put right."""
    path = shop.folder / "reload.toml"
    async with service(shop, "serve", "reload.toml") as served:
        url = await ready(served)
        old, before = await challenge(shop, url)
        path.write_text(text_of(shop).replace('output_usd_per_million = "10"', 'output_usd_per_million = "20"'))
        (shop.folder / "secret").write_bytes(b"\xff\xfe")
        (shop.folder / "token").unlink()
        line = await hang_up(served, "config.refused")
        assert line["problems"] == [
            "node.challenge_secrets: its file cannot be read",
            "admin.token: its file cannot be read",
        ]
        assert (await challenge(shop, url))[1] == before
        assert await verdict(shop, url, old) != "invalid_challenge"
        (shop.folder / "secret").write_text(SECRET)
        (shop.folder / "token").write_text(ADMIN)
        await hang_up(served)
        assert (await challenge(shop, url))[1] == 2 * before


async def test_a_worker_that_cannot_reload_leaves_the_others_alone(shop: Desk) -> None:
    """Each takes the file up for itself and says so with its number; one that was refused follows at the next signal."""
    path = shop.folder / "reload.toml"
    async with service(shop, "serve", "reload.toml", "--workers", "2") as served:
        await served.until("node.started", 2)
        path.write_text("[node]\n")
        served.process.send_signal(signal.SIGHUP)
        await served.until("config.refused", 2)
        assert {line["worker"] for line in served.lines if line["event"] == "config.refused"} == {0, 1}
        path.write_text(text_of(shop).replace('output_usd_per_million = "10"', 'output_usd_per_million = "20"'))
        served.process.send_signal(signal.SIGHUP)
        await served.until("config.reloaded", 2)
        assert served.count("worker.died") == 0
    assert served.process.returncode == 0
