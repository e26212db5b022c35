"""What the deployment files say, read as the programs that use them would read them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from channels.ids import to_hex
from mppnode.config.load import load_config
from mppnode.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "docs/deploy/mppnode.toml"
SECRETS_DIR = "/run/secrets"


def need(program: str) -> str:
    """Where a program is; without it the test is skipped, or fails when ``REQUIRE_DEPLOY=1`` says that is no answer."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        if os.environ.get("REQUIRE_DEPLOY") == "1":
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed")
    return found


def read_yaml(path: Path) -> Any:
    """A YAML file, merge keys resolved; a key that is there twice is an error."""
    return YAML(typ="safe", pure=True).load(path.read_text())


def compose() -> dict[str, Any]:
    """docker-compose.yml with the defaults of its variables put in."""
    text = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", (ROOT / "docker-compose.yml").read_text())
    document: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return json.loads(json.dumps(document))  # type: ignore[no-any-return]  # plain values, as a validator wants them


@dataclass
class Stage:
    """One ``FROM`` of the Dockerfile and what follows it."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]

    def one(self, instruction: str) -> str:
        (text,) = self.all(instruction)
        return text

    def exec_form(self, instruction: str) -> list[str]:
        """An instruction's JSON list; shell form is an error."""
        words = json.loads(self.one(instruction))
        assert isinstance(words, list)
        return words


def dockerfile() -> list[Stage]:
    """The stages of the Dockerfile."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    stages: list[Stage] = []
    arguments: dict[str, str] = {}
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, text = line.partition(" ")
        if name == "ARG":
            key, _, value = text.partition("=")
            arguments[key] = value
        elif name == "FROM":
            words = text.split()
            base = re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], words[0])
            stages.append(Stage(base, words[2] if len(words) == 3 else ""))
        else:
            stages[-1].steps.append((name, text))
    return stages


def copied() -> list[str]:
    """What the build stage takes from the context."""
    taken: list[str] = []
    for text in dockerfile()[0].all("COPY"):
        taken += shlex.split(text)[:-1]
    return taken


def health_command() -> list[str]:
    """The command of the image's HEALTHCHECK."""
    words = dockerfile()[-1].one("HEALTHCHECK").partition("CMD ")[2]
    command: list[str] = json.loads(words)
    return command


def make_secrets(folder: Path, database_url: str, key: bytes) -> None:
    """Files such as the guide makes, for tests."""
    folder.mkdir(exist_ok=True)
    values = {
        "challenge_secret": "a" * 64,
        "challenge_secret_previous": "b" * 64,
        "payee_key": to_hex(key),
        "database_url": database_url,
        "provider_key": "provider-key-canary",
        "postgres_password": "c" * 64,
        "grafana_password": "d" * 48,
    }
    for name, value in values.items():
        (folder / name).write_text(value + "\n")


def load_compose_config(folder: Path) -> Config:
    """The compose file's configuration, its secrets read from ``folder``."""
    path = folder / "mppnode.toml"
    path.write_text(CONFIG.read_text().replace(SECRETS_DIR, str(folder)))
    return load_config(path, {})


def config_tree() -> dict[str, Any]:
    """The compose file's configuration as TOML."""
    return tomllib.loads(CONFIG.read_text())
