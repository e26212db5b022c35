"""What the doctor says of a configuration by itself."""

from __future__ import annotations

import pytest
from aiohttp import web

from channels.ids import to_hex
from channels.signature import address_of
from mppnode.config.accounts import AccountsConfig, AdminConfig, JwtConfig
from mppnode.config.ops import MetricsConfig
from mppnode.config.secrets import Secret
from mppnode.doctor.findings import Status
from mppnode.doctor.machine import Machine
from tests.cli.doctor_kit import PAYEE_KEY, config, look, server

TOKEN = "admin-token-canary-0123456789abcdef"
ANVIL = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")


@pytest.mark.parametrize(
    ("realm", "status"),
    [
        ("api.mynode.net", Status.OK),
        ("api.mynode.net:8443", Status.OK),
        ("127.0.0.1", Status.WARN),
        ("203.0.113.9", Status.WARN),
        ("localhost:8402", Status.WARN),
        ("api.example.com", Status.WARN),
        ("node.local", Status.WARN),
        ("node", Status.WARN),
    ],
)
async def test_realm(realm, status):
    """A realm is a name clients can ask; an address, this machine and the example are not."""
    found = await look("realm", config(node={"realm": realm}))
    assert found.status is status
    assert status is Status.OK or "node.realm" in found.remedy


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", Status.OK), ("::1", Status.OK), ("0.0.0.0", Status.WARN), ("10.0.0.4", Status.WARN)])
async def test_who_can_reach_the_port(host, status):
    """A port that others reach needs a proxy before it."""
    found = await look("proxy", config(node={"host": host}))
    assert found.status is status
    assert status is Status.OK or "node.host" in found.remedy


async def test_workers_on_one_file_take_turns():
    """Several workers are for PostgreSQL."""
    assert (await look("workers", config())).status is Status.OK
    several = await look("workers", config(node={"workers": 4}))
    assert several.status is Status.WARN
    assert "4 workers" in several.text
    assert "node.ledger" in several.remedy
    assert (await look("workers", config(node={"workers": 4, "ledger": Secret("postgresql://x")}))).status is Status.OK


class TwoDisks(Machine):
    """A machine on which each folder is a disk."""

    def device(self, path):
        return hash(path if path.is_dir() else path.parent)


async def test_spool(tmp_path):
    """A spool is there, can be written, and does not share the ledger's fate."""
    assert (await look("spool", config(tmp_path))).status is Status.WARN
    beside = config(tmp_path, node={"spool": tmp_path / "v.jsonl"})
    found = await look("spool", beside)
    assert found.status is Status.WARN
    assert "node.spool" in found.remedy
    other = tmp_path / "other"
    other.mkdir()
    assert (await look("spool", config(tmp_path, node={"spool": other / "v.jsonl"}), machine=TwoDisks())).status is Status.OK
    (tmp_path / "file").touch()
    broken = await look("spool", config(tmp_path, node={"spool": tmp_path / "file" / "v.jsonl"}))
    assert broken.status is Status.FAIL
    assert "cannot be written" in broken.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"], "nothing is left behind"


async def test_admin():
    """The operator's API is there, and not for everybody; its token is measured, not shown."""
    assert (await look("admin", config())).status is Status.WARN
    found = await look("admin", config(admin=AdminConfig(Secret(TOKEN))))
    assert found.status is Status.OK
    assert f"{len(TOKEN)} characters" in found.text
    public = await look("admin", config(admin=AdminConfig(Secret(TOKEN), host="0.0.0.0")))
    assert public.status is Status.WARN
    assert "admin.host" in public.remedy


async def test_metrics():
    """Without the operators' listener there are no alerts; it asks for no token, so it is not for everybody."""
    found = await look("metrics", config())
    assert found.status is Status.WARN
    assert "[metrics]" in found.remedy
    assert (await look("metrics", config(metrics=MetricsConfig()))).status is Status.OK
    public = await look("metrics", config(metrics=MetricsConfig(host="0.0.0.0")))
    assert public.status is Status.WARN
    assert "metrics.host" in public.remedy


async def test_challenge_secrets():
    """Random, each once, no more than are in use."""
    one, two, three = (Secret(bytes(range(start, start + 40))) for start in (130, 170, 210))
    ok = await look("challenge-secrets", config(node={"challenge_secrets": (one, two)}))
    assert (ok.status, ok.text) == (Status.OK, "2, the shortest of 40 bytes")
    assert (await look("challenge-secrets", config(node={"challenge_secrets": (one, one)}))).status is Status.WARN
    assert (await look("challenge-secrets", config(node={"challenge_secrets": (one, two, three)}))).status is Status.WARN
    for typed in (b"x" * 40, b"change-me-please-change-me-please", b"0123456789abcdef0123456789abcdef"):
        found = await look("challenge-secrets", config(node={"challenge_secrets": (one, Secret(typed))}))
        assert found.status is Status.FAIL
        assert "openssl rand" in found.remedy
        assert typed.decode() not in found.text + found.remedy


async def test_payee_key():
    """The address is shown, and a key that everybody has is no key."""
    found = await look("payee-key", config())
    assert (found.status, found.text) == (Status.OK, f"payee {to_hex(address_of(PAYEE_KEY))}")
    for bad in (ANVIL, b"\x11" * 32):
        assert (await look("payee-key", config(chain={"payee_key": Secret(bad)}))).status is Status.FAIL


KEYS = {"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "k1", "alg": "EdDSA", "use": "sig", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}


async def test_jwks():
    """The issuer's keys are read and parsed as the node does."""

    async def keys(request: web.Request) -> web.Response:
        match request.path:
            case "/good":
                return web.json_response(KEYS)
            case "/none":
                return web.json_response({"keys": []})
            case "/bad":
                return web.Response(text="<html>")
        return web.Response(status=500, text="canary")

    assert (await look("jwks", config())).status is Status.SKIP
    async with server(keys) as url:
        for path, status in (("/good", Status.OK), ("/none", Status.FAIL), ("/bad", Status.FAIL), ("/away", Status.FAIL)):
            jwt = JwtConfig("https://issuer", "mppnode", jwks_url=url + path)
            found = await look("jwks", config(accounts=AccountsConfig(jwt=jwt)))
            assert found.status is status, path
            assert "canary" not in found.text
            assert status is Status.OK or "accounts.jwt.jwks_url" in found.remedy


async def test_a_configuration_that_loads():
    """What loads has no problem, and says how much it has."""
    found = await look("config", config())
    assert found.status is Status.OK
    assert "providers: 1," in found.text
