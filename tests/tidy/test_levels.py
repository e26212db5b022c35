"""The house has levels: an import goes to a strictly lower one or stays in its room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = {
    "channels": 0,
    "mppnode.kernel": 1,
    "mppnode.config": 2,
    "mppnode.observe": 2,
    "mppnode.ledger": 3,
    "mppnode.chain": 3,
    "mppnode.providers": 3,
    "mppnode.gateways": 3,
    "mppnode.accounts": 4,
    "mppnode.billing": 5,
    "mppnode.routing": 4,
    "mppnode.metering": 4,
    "mppnode.pricing": 4,
    "mppnode.rails": 5,
    "mppnode.treasury": 5,
    "mppnode.engine": 6,
    "mppnode.http": 7,
    "mppnode.app": 8,
    "mppnode.parts": 8,
    "mppnode.watchtower": 8,
    "mppnode.registry": 8,
    "mppnode.selling": 8,
    "mppnode.customers": 8,
    "mppnode.gauging": 8,
    "mppnode.paying": 8,
    "mppnode.reload": 8,
    "mppnode.cli": 8,
    "mppnode.doctor": 8,
    "mppnode.payer": 1,
}
PURE_BANS = {"asyncio", "aiohttp", "sqlite3", "os", "logging", "time", "random", "socket", "threading", "web3", "mppnode"}
AIOHTTP_WEB = ("mppnode.http", "mppnode.cli", "mppnode.app")
FILES = sorted([*ROOT.glob("channels/**/*.py"), *ROOT.glob("mppnode/**/*.py")])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "channels" else ".".join(parts[:2])


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path: Path) -> None:
    """No module imports its own level from another room, or anything above it."""
    module = module_of(path)
    room = room_of(module)
    if room in ("mppnode.__init__", "mppnode"):
        return
    for name in imports_of(path):
        if name.split(".")[0] not in ("channels", "mppnode") or name == "mppnode":
            continue
        other = room_of(name)
        assert other in LEVELS, f"{module} imports {name}, which is in no known room"
        assert other == room or LEVELS[other] < LEVELS[room] or (LEVELS[room] == 8 and LEVELS[other] == 8), f"{module} imports {name}"


def test_payer_drivers_know_only_the_library() -> None:
    """A payer's driver runs in other people's programs: it brings nothing of the server with it."""
    for path in ROOT.glob("mppnode/payer/*.py"):
        server = {name for name in imports_of(path) if name.startswith("mppnode") and not name.startswith("mppnode.payer")}
        assert not server, f"{path.name} imports {server}"


def test_channels_is_pure() -> None:
    """The channel library does no I/O and reads no clock; its test doubles alone may use asyncio."""
    for path in ROOT.glob("channels/**/*.py"):
        heads = {name.split(".")[0] for name in imports_of(path)}
        allowed = {"asyncio"} if "testing" in path.parts else set()
        assert not (heads & PURE_BANS) - allowed, f"{path.name} imports {heads & PURE_BANS}"


def test_the_web_framework_stays_in_its_rooms() -> None:
    """Only surfaces and development servers speak aiohttp.web."""
    for path in ROOT.glob("mppnode/**/*.py"):
        if "aiohttp.web" in imports_of(path):
            assert module_of(path).startswith(AIOHTTP_WEB), f"{path.name} imports aiohttp.web"


def test_only_the_root_composes() -> None:
    """Nobody below level 8 imports the composition root or the registry."""
    for path in FILES:
        if LEVELS.get(room_of(module_of(path)), 8) < 8:
            assert not imports_of(path) & {"mppnode.app", "mppnode.registry"}, path
