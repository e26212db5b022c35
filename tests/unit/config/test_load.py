"""Configuration: read whole, checked whole, every problem by its key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from channels.descriptor import SessionProtocol
from mppnode.config.accounts import AccountsConfig, AdminConfig, JwtConfig, TrustLimits
from mppnode.config.billing import BillingConfig
from mppnode.config.load import ConfigError, load_config, parse_config
from mppnode.config.ops import MetricsConfig
from mppnode.config.secrets import Secret
from mppnode.kernel.listing import ProviderKind

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "docs" / "mppnode.example.toml"
CANARY = "canary-secret-that-must-never-be-printed-0123456789"
ENVIRON = {
    "MPPNODE_CHALLENGE_SECRET": CANARY,
    "MPPNODE_PAYEE_KEY": "0x" + "22" * 32,
    "MY_VLLM_KEY": CANARY,
}


def tree() -> dict[str, Any]:
    return tomllib.loads(EXAMPLE.read_text())


def problems(changed: dict[str, Any], environ: dict[str, str] = ENVIRON) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(changed, environ, base=ROOT)
    return caught.value.problems


def test_the_example_loads_with_its_defaults() -> None:
    """The shipped example is a working configuration, and relative paths are relative to it."""
    config = load_config(EXAMPLE, ENVIRON)
    assert config.node.ledger == EXAMPLE.parent / "mppnode.sqlite"
    assert config.session.protocols == (SessionProtocol.V2,)
    assert config.session.min_deposit == 1_000_000
    assert config.models[0].input == 100_000
    assert config.models[0].output == 400_000
    assert config.models[0].cached_input == 100_000
    assert config.providers[0].kind is ProviderKind.NATIVE


def test_commented_defaults_of_the_example_are_the_real_ones() -> None:
    """A commented key in the example shows the value the node uses when the key is absent."""
    prose = ("above", "the input price", "the output price", "v1_escrow", "api_key")
    lines = [
        line[2:] if re.match(r"# [a-z_0-9]+ = ", line) and not any(word in line for word in prose) else line
        for line in EXAMPLE.read_text().splitlines()
    ]
    shown, default = parse_config(tomllib.loads("\n".join(lines)), ENVIRON, base=EXAMPLE.parent), load_config(EXAMPLE, ENVIRON)
    assert len([line for line in lines if not line.startswith("#")]) > 40
    assert (shown.session, shown.limits, shown.models, shown.log) == (default.session, default.limits, default.models, default.log)
    assert (shown.pricing, shown.routing, shown.providers) == (default.pricing, default.routing, default.providers)
    assert (shown.accounts, shown.billing, shown.admin) == (default.accounts, None, None) == (AccountsConfig(), None, None)
    assert (shown.node.host, shown.node.port, shown.node.ledger) == (default.node.host, default.node.port, default.node.ledger)


SWITCHED = ("[accounts.jwt]", "[billing]", "[admin]", "[metrics]")


def test_tables_that_are_switched_on_are_shown_whole() -> None:
    """Uncommented, the tables for customers load, have every key there is, and show the defaults where there are some."""
    lines, on = list[str](), False
    for line in EXAMPLE.read_text().splitlines():
        on = line.startswith("#   ") and (on or line[4:] in SWITCHED)
        # one of the two ways to check tokens; both are shown
        lines.append(line[4:] if on and not line.startswith("#   jwks_url") else line)
    environ = ENVIRON | {
        "JWT_SECRET": CANARY,
        "STRIPE_SECRET_KEY": "sk_test_" + "a" * 24,
        "STRIPE_WEBHOOK_SECRET": "whsec_" + "b" * 24,
        "MPPNODE_ADMIN_TOKEN": CANARY,
    }
    shown = tomllib.loads("\n".join(lines).replace('"price_..."', '"price_usage"'))
    config = parse_config(shown, environ, base=EXAMPLE.parent)
    assert config.accounts.jwt is not None
    assert config.billing is not None
    assert config.admin is not None
    assert config.metrics is not None
    tables = (
        (shown["accounts"]["jwt"], JwtConfig),
        (shown["billing"], BillingConfig),
        (shown["admin"], AdminConfig),
        (shown["metrics"], MetricsConfig),
    )
    for table, kind in tables:
        keys = {field.name for field in fields(kind)}
        assert keys - {"jwks_url"} == set(table), kind
        for field in fields(kind):
            if field.default is not MISSING and field.default is not None:
                assert table[field.name] == field.default, field.name
    text = EXAMPLE.read_text()
    for kind in (AccountsConfig, TrustLimits, JwtConfig):
        for name in {field.name for field in fields(kind)} - {"jwt", "trust_limits"}:
            assert re.search(rf"^# +{name} = ", text, re.MULTILINE), name


def test_all_problems_are_reported_at_once() -> None:
    """A file with many faults gives one line per fault, each beginning with its key."""
    bad = tree()
    bad["node"]["realm"] = "has space"
    bad["node"]["challenge_secrets"] = ["literal-secret"]
    bad["chain"]["chain_id"] = "4217"
    bad["chain"]["token"] = "0x12"
    bad["session"] = {"min_deposit": 1.5, "voucher_wait_seconds": 3}
    bad["models"][0]["input_usd_per_million"] = 0.1
    bad["providers"][0]["base_url"] = "ftp://x"
    bad["extra"] = 1
    found = problems(bad)
    keys = {line.split(":")[0] for line in found}
    assert keys == {
        "node.realm",
        "node.challenge_secrets",
        "chain.chain_id",
        "chain.token",
        "session.min_deposit",
        "session.voucher_wait_seconds",
        "models[0].input_usd_per_million",
        "providers[0].base_url",
        "extra",
    }


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        (("node", "port"), 70_000, "node.port"),
        (("node", "port"), True, "node.port"),
        (("node", "challenge_secrets"), [], "node.challenge_secrets"),
        (("node", "challenge_secrets"), [{"env": "MISSING"}], "node.challenge_secrets"),
        (("node", "challenge_secrets"), [{"file": "no-such-file"}], "node.challenge_secrets"),
        (("chain", "payee_key"), {"env": "MY_VLLM_KEY"}, "chain.payee_key"),
        (("chain", "rpc_url"), "rpc.example.com", "chain.rpc_url"),
        (("session",), {"protocols": ["v3"]}, "session.protocols"),
        (("session",), {"protocols": []}, "session.protocols"),
        (("session",), {"protocols": ["v1"]}, "chain.v1_escrow"),
        (("session",), {"suggested_deposit": "0.5"}, "session.suggested_deposit"),
        (("limits",), {"body_bytes_max": 1}, "limits.body_bytes_max"),
        (("log",), {"level": "loud"}, "log.level"),
        (("log",), {"format": "xml"}, "log.format"),
        (("providers",), [], "providers"),
        (("models",), [], "models"),
        (("models", 0, "provider"), "nobody", "models"),
        (("models", 0, "context"), 0, "models[0].context"),
        (("models", 0, "output_usd_per_million"), "1e3", "models[0].output_usd_per_million"),
        (("models", 0, "id"), "bad id", "models[0].id"),
        (("providers", 0, "kind"), "cloud", "providers[0].kind"),
    ],
)
def test_each_bad_value_is_named(path: tuple[Any, ...], value: Any, key: str) -> None:
    """One wrong value is reported under its own key."""
    bad: Any = tree()
    place = bad
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert any(line.startswith(f"{key}:") for line in problems(bad)), problems(bad)


def test_missing_sections_and_keys_are_named() -> None:
    """An empty file names everything that is required."""
    found = problems({})
    for key in ("node:", "chain:", "providers:", "models:", "node.realm:", "chain.rpc_url:"):
        assert any(line.startswith(key) for line in found), found


def test_doubles_are_refused() -> None:
    """Two models or providers of one name would make the choice between them accidental."""
    bad = tree()
    bad["models"] *= 2
    bad["providers"] *= 2
    found = problems(bad)
    assert any(line.startswith("models.id:") for line in found)
    assert any(line.startswith("providers.name:") for line in found)


def test_a_free_model_is_refused() -> None:
    """A price of zero on both sides cannot be quoted."""
    bad = tree()
    bad["models"][0] |= {"input_usd_per_million": "0", "output_usd_per_million": "0"}
    assert any("output_usd_per_million" in line for line in problems(bad))


def test_secrets_never_show(tmp_path: Path) -> None:
    """No text form of a configuration or of its errors holds a secret."""
    config = load_config(EXAMPLE, ENVIRON)
    assert CANARY not in repr(config) + str(config)
    assert "22" * 32 not in repr(config)
    assert repr(Secret(CANARY)) == str(Secret(CANARY)) == "Secret(***)"
    bad = tree()
    bad["chain"]["payee_key"] = {"env": "MY_VLLM_KEY"}
    assert CANARY not in "\n".join(problems(bad))


def test_secret_files_are_read_beside_the_configuration(tmp_path: Path) -> None:
    """`{ file = ... }` is relative to the file that names it, and a trailing newline is not part of the secret."""
    (tmp_path / "key.txt").write_text("0x" + "33" * 32 + "\n")
    changed = tree()
    changed["chain"]["payee_key"] = {"file": "key.txt"}
    config = parse_config(changed, ENVIRON, base=tmp_path)
    assert config.chain.payee_key.reveal() == bytes.fromhex("33" * 32)


@pytest.mark.parametrize("text", ["not toml [", "\xff"])
def test_an_unreadable_file_is_one_clear_problem(tmp_path: Path, text: str) -> None:
    """Broken TOML and broken UTF-8 are reported, not raised."""
    path = tmp_path / "x.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_config(path, ENVIRON)
    assert "is not TOML" in caught.value.problems[0]
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.toml", ENVIRON)


def test_serve_reports_everything_before_anything_starts(tmp_path: Path) -> None:
    """`mppnode serve` with a bad file prints every problem, exits with 2 and leaves no ledger behind."""
    path = tmp_path / "bad.toml"
    path.write_text('[node]\nrealm = "x"\nport = -1\n[chain]\nrpc_url = "nope"\n')
    run = subprocess.run(
        [sys.executable, "-m", "mppnode.cli.main", "serve", "--config", str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 2
    for key in ("node.port", "node.challenge_secrets", "chain.rpc_url", "chain.token", "providers", "models"):
        assert f"{key}:" in run.stderr
    assert list(tmp_path.iterdir()) == [path]
