"""``mppnode doctor`` as a whole: its exit status, its lines, its deadlines, and what it never says."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from mppnode.config.accounts import AccountsConfig, AdminConfig, JwtConfig
from mppnode.config.billing import BillingConfig
from mppnode.config.schema import ProviderConfig
from mppnode.config.secrets import Secret
from mppnode.doctor.findings import Check, Finding, Result, Status, fail, ok
from mppnode.doctor.registry import BEGIN, CHECKS, END, main, table, with_table
from mppnode.doctor.runner import run_checks
from tests.cli.doctor_kit import case_of, config, never, server
from tests.cli.operator import ROOT, configuration, desk

MANUAL = ROOT / "docs" / "doctor.md"
FIELDS = {"status", "check", "subject", "finding", "remedy"}


async def test_the_command_beside_a_running_node(tmp_path):
    """It says what fails with status 1, what does not with 0, as lines and as JSON, and leaves no trace."""
    async with desk(tmp_path) as shop:
        whole = await shop.run("doctor", "--json")
        files = sorted(path.name for path in tmp_path.iterdir())
        assert whole.status == 1, whole.err
        rows = whole.records
        assert all(set(row) == FIELDS and row["status"] in set(Status) for row in rows)
        assert [row["check"] for row in rows if row["subject"] == ""] == [
            check.name for check in CHECKS if check.subjects(config()) == ("",)
        ]
        found = {(row["check"], row["subject"]): row["status"] for row in rows}
        for name in (("config", ""), ("rpc", "chain.rpc_url"), ("clock", ""), ("escrow", "v2"), ("token", ""), ("payee-balance", ""),
                     ("provider", "dev"), ("prices", ""), ("models", ""), ("ledger", "")):
            assert found[name] == "ok", name
        assert found["challenge-secrets", ""] == "fail", "the tests' own secret is a placeholder"
        assert {row["check"] for row in rows if row["status"] == "fail"} <= {"challenge-secrets", "ledger-disk", "ledger-sync", "files", "memory"}
        some = await shop.run("doctor", "--only", "rpc", "--only", "ledger")
        assert some.status == 0, some.out
        assert [line.split(":")[0].split() for line in some.out.splitlines()] == [["ok", "rpc", "chain.rpc_url"], ["ok", "ledger"]]
        assert sorted(path.name for path in tmp_path.iterdir()) == files
        assert await shop.stream(shop.payer()), "the node serves as before"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mppnode.cli.main", "doctor", *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)


def test_a_configuration_that_cannot_be_used(tmp_path):
    """Every problem is a line of the configuration's check, the status is 2, and nothing else is looked at."""
    path = tmp_path / "node.toml"
    path.write_text('[node]\nrealm = "not a host"\nchalenge_secrets = []\n[chain]\nchain_id = 0\n')
    ended = run("--config", str(path), "--json", cwd=tmp_path)
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 2
    assert {(row["status"], row["check"]) for row in rows} == {("fail", "config")}
    problems = "\n".join(row["finding"] for row in rows)
    for key in ("node.realm", "node.challenge_secrets", "node.chalenge_secrets", "chain.chain_id", "chain.payee_key"):
        assert key in problems
    words = run("--config", str(tmp_path / "none.toml"), cwd=tmp_path)
    assert words.returncode == 2
    assert words.stdout.startswith("FAIL  config: ")


def test_a_check_that_does_not_exist(tmp_path):
    """A typing error must not look like a clean bill of health."""
    ended = run("--config", "x", "--only", "rpcs", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "rpcs" in ended.stderr


# ------------------------------------------------------------------------------------------------------------- runner


def check(name: str, look) -> Check:
    return Check(name, "", look)


async def _fine(*_) -> Finding:
    return ok("fine")


async def _breaks(*_) -> Finding:
    raise ConnectionError("https://user:canary@host/?key=canary")


async def _cancels(*_) -> Finding:
    raise asyncio.CancelledError


async def test_a_check_that_breaks_fails_alone():
    """Its error is told by its type and no more."""
    async with case_of(config()) as case:
        found = await run_checks([check("a", _breaks), check("b", _fine), check("c", _cancels)], case, sleep=never)
    assert [result.finding.status for result in found] == [Status.FAIL, Status.OK, Status.FAIL]
    assert found[0].finding.text == "the check itself failed: ConnectionError"
    assert "canary" not in found[0].line()


async def test_a_check_that_hangs_ends_at_its_deadline():
    """The others are told as they are, in their order; the one that hangs is cancelled and has failed."""
    ended, asked = [], []

    async def hangs(*_) -> Finding:
        try:
            await never()
        finally:
            ended.append("hangs")
        return ok("")

    async def sleep(seconds: float) -> None:
        asked.append(seconds)
        for _ in range(10):  # turns of the loop, in which whoever has something to say says it
            await asyncio.sleep(0)

    async with case_of(config()) as case:
        found = await run_checks([check("a", hangs), check("b", _fine)], case, timeout_s=7, sleep=sleep)
    assert [(each.check, each.finding.status) for each in found] == [("a", Status.FAIL), ("b", Status.OK)]
    assert found[0].finding.text == "no answer within 7 s"
    assert (ended, asked) == (["hangs"], [7, 7])


async def test_checks_run_side_by_side():
    """Each waits for the next to begin, which one after the other never would."""
    begun = [asyncio.Event() for _ in range(4)]

    def meets(index: int):
        async def look(*_) -> Finding:
            begun[index].set()
            await begun[(index + 1) % len(begun)].wait()
            return ok("")

        return look

    async with case_of(config()) as case:
        found = await run_checks([check(str(index), meets(index)) for index in range(4)], case, sleep=never)
    assert all(each.finding.status is Status.OK for each in found)


def test_a_line_for_people():
    """Status, name, finding, and the remedy behind an arrow; a failure stands out."""
    assert Result("rpc", "x", fail("away", "call them")).line() == "FAIL  rpc x: away -> call them"
    assert Result("rpc", "", ok("well")).line() == "ok    rpc: well"


# ------------------------------------------------------------------------------------------------------------ secrets


CANARY = "canaryCanary0123456789canaryCanary0123456789"


async def _echo(request: web.Request) -> web.Response:
    """What answers everything with all it was told, as an error."""
    told = {name: str(value) for name, value in request.headers.items()} | {"url": str(request.url), "body": await request.text()}
    error = {"code": CANARY, "message": json.dumps(told), "type": CANARY}
    return web.json_response({"jsonrpc": "2.0", "id": 1, "error": error, **told}, status=200 if "rpc" in request.path else 418, reason=CANARY)


def full_of_secrets(url: str, folder: Path, ledger: Path | Secret[str]):
    """A configuration with a canary wherever a secret can be."""
    secret = Secret(CANARY)
    base = config(folder)
    return replace(
        base,
        node=replace(base.node, challenge_secrets=(Secret(CANARY.encode()),), ledger=ledger, port=int(url.rpartition(":")[2])),
        chain=replace(base.chain, rpc_url=f"{url}/rpc/{CANARY}"),
        treasury=replace(base.treasury, second_rpc_url=f"{url}/rpc/2/{CANARY}", sponsor=True),
        providers=tuple(
            ProviderConfig(f"p-{preset}", f"{url}/{preset}", api_key=secret, preset=preset) for preset in ("openai", "anthropic", "gemini", "openrouter")
        ),
        models=(),
        accounts=AccountsConfig(jwt=JwtConfig("i", "a", jwks_url=f"{url}/{CANARY}")),
        admin=AdminConfig(secret, port=0),
        billing=BillingConfig(
            Secret(f"sk_test_{CANARY}"), (Secret(f"whsec_{CANARY}"),), "https://s.example", "https://s.example", "https://s.example", (500,), "usage", False, "price_1", api_base=url
        ),
    )


@pytest.mark.parametrize("where", ["sqlite", "postgres"])
async def test_no_secret_is_told(tmp_path, where):
    """With a canary in every secret and servers that repeat them, no line has one, nor the payee's key."""
    ledger = tmp_path / "ledger.sqlite" if where == "sqlite" else Secret(f"postgresql://mpp:{CANARY}@127.0.0.1:1/x?password={CANARY}")
    async with server(_echo) as url:
        what = full_of_secrets(url, tmp_path, ledger)
        async with case_of(what) as case:
            found = await run_checks(CHECKS, case)
    said = "\n".join(each.line() + json.dumps(each.row()) for each in found).lower()
    assert "canary" not in said
    assert what.chain.payee_key.reveal().hex() not in said
    assert {each.finding.status for each in found} > {Status.FAIL, Status.SKIP}
    assert not [each.line() for each in found if "itself failed" in each.finding.text]


# -------------------------------------------------------------------------------------------------------------- manual


def test_the_manual_has_every_check_as_it_is():
    """Whoever changes a check changes its row: python -m mppnode.doctor.registry docs/doctor.md writes it."""
    text = MANUAL.read_text()
    assert with_table(text) == text
    assert table().count("\n") == len(CHECKS) + 1
    assert len({each.name for each in CHECKS}) == len(CHECKS)
    for status in Status:
        assert f"| `{status.value}` |" in text


def test_the_table_is_written_where_its_marks_are(tmp_path):
    """What stands around the marks stays, and a document without them is refused."""
    manual = tmp_path / "m.md"
    manual.write_text(f"above\n{BEGIN}old{END}\nbelow\n")
    main(manual)
    main(manual)
    assert manual.read_text() == f"above\n{BEGIN}\n\n{table()}\n\n{END}\nbelow\n"
    with pytest.raises(ValueError, match="no place"):
        with_table("nothing")


async def test_the_operators_example_has_the_checks_it_should(tmp_path):
    """A file with every optional part gives each check its subjects."""
    async with desk(tmp_path) as shop:
        more = '[treasury]\nsecond_rpc_url = "http://127.0.0.1:1"\n[admin]\ntoken = { env = "SECRET" }\nport = 0\n'
        (tmp_path / "full.toml").write_text(configuration(shop.net) + more)
        ran = await shop.run("doctor", "--json", "--only", "rpc", "--only", "rpc-heights", "--only", "port", config="full.toml")
    assert ran.status == 1
    assert [(row["check"], row["subject"], row["status"]) for row in ran.records] == [
        ("rpc", "chain.rpc_url", "ok"), ("rpc", "treasury.second_rpc_url", "fail"), ("rpc-heights", "", "skip"),
        ("port", "node", "skip"), ("port", "admin", "skip"),
    ]
