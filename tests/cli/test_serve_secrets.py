"""``mppnode serve`` with secrets that keep nobody out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WEBHOOK = """
[billing]
secret_key = { env = "STRIPE" }
webhook_secrets = [{ file = "weak" }]
success_url = "https://shop.example/back"
cancel_url = "https://shop.example/back"
return_url = "https://shop.example/back"
packs_cents = [500]
livemode = false
"""
ADMIN = """
[admin]
token = { file = "weak" }
"""


def serve(folder: Path, tables: str, secret: str) -> subprocess.CompletedProcess[str]:
    (folder / "weak").write_text(secret)
    (folder / "node.toml").write_text((ROOT / "docs" / "mppnode.example.toml").read_text() + tables)
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MPPNODE_CHALLENGE_SECRET": "c" * 40,
        "MPPNODE_PAYEE_KEY": "0x" + "22" * 32,
        "STRIPE": "sk_test_" + "a" * 24,
    }
    command = [sys.executable, "-m", "mppnode.cli.main", "serve", "--config", "node.toml"]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("tables", "secret", "key"),
    [
        (WEBHOOK, "", "billing.webhook_secrets"),
        (WEBHOOK, "whsec_", "billing.webhook_secrets"),
        (WEBHOOK, "whsec_short", "billing.webhook_secrets"),
        (ADMIN, "", "admin.token"),
        (ADMIN, "short-operator-token", "admin.token"),
        (ADMIN, " " * 40, "admin.token"),
    ],
)
def test_a_weak_secret_keeps_the_node_from_starting(tmp_path: Path, tables: str, secret: str, key: str) -> None:
    """An empty or short webhook secret or admin token ends serve at once, named by its key and not repeated."""
    ran = serve(tmp_path, tables, secret)
    assert ran.returncode != 0
    assert f"node.toml: {key}: " in ran.stderr
    assert "short" not in ran.stdout + ran.stderr
    assert not (tmp_path / "mppnode.sqlite").exists()
