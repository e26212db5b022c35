"""docs/deploy/mppnode.service: what systemd says of it, and what must be in it."""

from __future__ import annotations

import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from mppnode.cli.main import _parser
from mppnode.cli.serve import _BAD_CONFIG
from mppnode.config.schema import LimitsConfig
from tests.deploy.files import ROOT, need

UNIT = ROOT / "docs/deploy/mppnode.service"


@pytest.fixture(scope="module")
def service() -> dict[str, str]:
    """The [Service] section; a directive that is there twice is an error."""
    parser = ConfigParser(interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    assert parser.sections() == ["Unit", "Service", "Install"]
    return dict(parser["Service"])


def verified(text: str, folder: Path) -> str:
    """What ``systemd-analyze verify`` says of a unit whose program is one that is here."""
    path = folder / "mppnode.service"
    path.write_text(text.replace("/opt/mppnode/bin/mppnode", "/bin/true"))
    done = subprocess.run([need("systemd-analyze"), "verify", "--man=no", path], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_systemd_knows_every_directive(tmp_path: Path) -> None:
    """``systemd-analyze verify`` has nothing to say; it does when a directive is misspelt."""
    text = UNIT.read_text()
    assert "mppnode.service" not in verified(text, tmp_path)
    assert "RestrictNamespace" in verified(text.replace("RestrictNamespaces=", "RestrictNamespace="), tmp_path)


def test_it_drains_reloads_and_does_not_insist_on_a_bad_file(service: dict[str, str]) -> None:
    """SIGTERM first and time for the drain, HUP for a reload, restarts on failure but not for a bad configuration."""
    limits = LimitsConfig()
    assert service["Type"] == "exec"
    assert (service["KillSignal"], service["KillMode"]) == ("SIGTERM", "mixed")
    assert int(service["TimeoutStopSec"]) >= limits.drain_delay_s + limits.drain_s + 5 + 10
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert service["Restart"] == "on-failure"
    assert int(service["RestartPreventExitStatus"]) == _BAD_CONFIG
    assert int(service["LimitNOFILE"]) >= 3 * limits.streams_max


def test_it_starts_what_the_guide_installs(service: dict[str, str]) -> None:
    """The command parses, and its paths and user are the ones the guide makes."""
    guide = (ROOT / "docs/production.md").read_text()
    program, *arguments = service["ExecStart"].split()
    options = _parser().parse_args(arguments)
    assert f"> {options.config}" in guide
    assert f"{Path(program).parent}/pip install" in guide
    assert f"useradd --system --home-dir /var/lib/{service['StateDirectory']}" in guide
    assert service["User"] == service["Group"] == "mppnode"
    assert service["WorkingDirectory"] == f"/var/lib/{service['StateDirectory']}"


def test_a_node_that_is_broken_into_has_little(service: dict[str, str]) -> None:
    """No new privileges, no capabilities, nothing to write but its state, no families but the internet's and local."""
    strict = {name: service[name] for name in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictNamespaces")}
    assert set(strict.values()) == {"yes"}
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"] == ""
    assert service["RestrictAddressFamilies"].split() == ["AF_INET", "AF_INET6", "AF_UNIX"]
    assert service["UMask"] == "0077"
