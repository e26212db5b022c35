"""docs/production.md: what it tells people to type works, and what it names is there."""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from mppnode.cli.main import _parser
from mppnode.config.load import load_config
from tests.deploy.files import ROOT, compose, need

GUIDE = ROOT / "docs/production.md"
TEXT = GUIDE.read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
LINES = [line for block in BLOCKS for line in re.sub(r"\\\n\s*", " ", block).splitlines()]


def block_with(words: str) -> str:
    (found,) = [block for block in BLOCKS if words in block]
    return found


def program_lines() -> list[list[str]]:
    """The arguments of every command of ours in a code block, however it is started."""
    found = []
    for line in LINES:
        words = shlex.split(line)
        if words[:4] == ["docker", "compose", "run", "--rm"]:
            assert words[4] == "node", line
            found.append(words[5:])
        elif words[0] == "mppnode":
            found.append(words[1:])
    return found


def links() -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", TEXT)


@pytest.mark.parametrize("arguments", program_lines(), ids=" ".join)
def test_commands_of_ours_parse(arguments: list[str]) -> None:
    """argparse takes each line, and the configuration is where the compose file mounts it."""
    options = _parser().parse_args(arguments)
    assert options.config == Path("/etc/mppnode/mppnode.toml")


def test_there_are_commands_to_look_at() -> None:
    """The reader of the code blocks finds them: an empty list would prove nothing."""
    assert {words[0] for words in program_lines()} == {"doctor", "restore", "reconcile", "channels"}


def test_compose_commands_name_services_that_exist() -> None:
    """Each ``docker compose`` line uses a verb we mean and a service of the file; files inside are where they are kept."""
    services, seen = compose()["services"], set()
    for line in LINES:
        words = shlex.split(line.partition(" > ")[0])
        if words[:2] != ["docker", "compose"]:
            continue
        verb, named = words[2], [word for word in words[3:] if word in services or ":" in word]
        seen.add(verb)
        if verb not in {"ps", "up"} or len(words) > 4:
            assert named, line
            assert named[0].partition(":")[0] in services, line
    assert seen == {"build", "run", "up", "ps", "exec", "cp", "kill", "stop"}
    assert "`docker compose up devnet`" in TEXT
    spool = re.search(r'^spool = "(.*)"', (ROOT / "docs/deploy/mppnode.toml").read_text(), re.MULTILINE)
    assert spool is not None
    assert f"node:{spool[1]}" in TEXT


@pytest.mark.parametrize("link", links())
def test_links_lead_somewhere(link: str) -> None:
    """Every linked file exists, and so does every heading in it that is linked to."""
    name, _, anchor = link.partition("#")
    path = GUIDE.parent / name if name else GUIDE
    assert path.is_file()
    if anchor:
        headings = [line.lstrip("# ").lower().replace(" ", "-") for line in path.read_text().splitlines() if line.startswith("#")]
        assert anchor in headings


def test_files_named_in_prose_exist() -> None:
    """Every path in backticks that looks like one of ours is there; a file of the machine is in a shipped file."""
    for name in re.findall(r"`((?:bench|docs|grafana|CHANGELOG)[\w./-]*\.\w+)`", TEXT):
        if name != "grafana/prometheus/rules.yml":  # its tests are elsewhere
            assert (ROOT / name).exists(), name
    for name in re.findall(r"python (bench/\w+\.py)", TEXT):
        assert (ROOT / name).exists(), name


def test_settings_it_names_are_settings() -> None:
    """Keys of the configuration in backticks are keys of the example, where every key is."""
    example = (ROOT / "docs/mppnode.example.toml").read_text()
    keys = set(re.findall(r"`([a-z]+_[a-z_]+)`", TEXT))
    secrets = set(compose()["secrets"])
    assert {"exposure_max", "settle_age_s", "drain_s", "drain_delay_s"} <= keys - secrets
    for key in keys - secrets:
        assert re.search(rf"^#?\s*{key} = ", example, re.MULTILINE), key
    for table in re.findall(r"`\[(\w+)\]`", TEXT):
        assert f"[{table}]" in example, table


def test_ports_it_names_are_the_ones_in_use() -> None:
    """The table's ports are those of the compose file, the example and the proxies."""
    table = set(re.findall(r"\b(\d{4})\b", TEXT[TEXT.index("## 6.") : TEXT.index("## 7.")]))
    published = {port.split(":")[1] for service in compose()["services"].values() for port in service.get("ports", [])}
    assert table == (published | {"8403", "8404", "5432"}) - {"8545"}


def test_the_secrets_are_made_as_written_and_the_configuration_loads(tmp_path: Path) -> None:
    """Step 3 typed into a shell gives every secret of the compose file, in a closed directory, and a configuration that
    loads both in the container's places and, after the words for systemd, in the machine's.
    """
    need("openssl")
    shutil.copytree(ROOT / "docs/deploy", tmp_path / "docs/deploy")
    subprocess.run(["sh", "-eu", "-c", "umask 077\n" + block_with("openssl rand -hex 24")], cwd=tmp_path, check=True)
    secrets = tmp_path / "secrets"
    assert {path.name for path in secrets.iterdir()} == set(compose()["secrets"])
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets.iterdir()} == {0o644}
    # The node's user in the container is nobody here.
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("etc", "etc/mppnode.toml")] == [0o755, 0o644]
    text = (tmp_path / "etc/mppnode.toml").read_text()
    (tmp_path / "inside.toml").write_text(text.replace("/run/secrets", str(secrets)))
    config = load_config(tmp_path / "inside.toml", {})
    assert not isinstance(config.node.ledger, Path)
    assert config.node.ledger.reveal().startswith("postgresql://mppnode:")
    (line,) = [line for line in LINES if line.startswith("sed ")]
    moved = line.replace("> /etc/mppnode/", "> ").replace("/etc/mppnode/secrets", str(secrets))
    subprocess.run(["sh", "-eu", "-c", moved], cwd=tmp_path, check=True)
    outside = load_config(tmp_path / "mppnode.toml", {})
    assert outside.metrics is not None
    assert (outside.node.host, outside.metrics.host) == ("127.0.0.1", "127.0.0.1")
    assert (tmp_path / ".env").read_text() == "MPPNODE_ETC=./etc\n"


def test_a_challenge_secret_is_rotated_without_losing_the_old_one(tmp_path: Path) -> None:
    """The lines of step 10 leave the old secret as the second and a new one as the first, in the same files."""
    need("openssl")
    folder = tmp_path / "secrets"
    folder.mkdir()
    first, second = folder / "challenge_secret", folder / "challenge_secret_previous"
    first.write_text("one\n")
    second.write_text("zero\n")
    before = (first.stat().st_ino, second.stat().st_ino)
    lines = block_with("cat secrets/challenge_secret").replace("docker compose", "true")
    subprocess.run(["sh", "-eu", "-c", lines], cwd=tmp_path, check=True)
    assert second.read_text() == "one\n"
    assert len(first.read_text().strip()) == 64
    assert (first.stat().st_ino, second.stat().st_ino) == before


def test_the_readme_leads_here() -> None:
    """Nobody finds a guide that is not linked."""
    assert "(docs/production.md)" in (ROOT / "README.md").read_text()
