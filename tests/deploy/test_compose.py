"""docker-compose.yml against its schema, and against every other file it must agree with."""

from __future__ import annotations

import copy
import importlib.resources
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from jsonschema import Draft202012Validator

from mppnode.cli.main import _parser
from tests.deploy.files import (
    ROOT,
    SECRETS_DIR,
    compose,
    config_tree,
    dockerfile,
    load_compose_config,
    make_secrets,
    need,
    read_yaml,
)

DATABASE = "postgresql://mppnode:secret@postgres:5432/mppnode"


def problems(document: object) -> list[str]:
    """What the Compose Specification's schema, as the package check-jsonschema carries it, says of a document."""
    text = importlib.resources.files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    return [error.message for error in Draft202012Validator(json.loads(text)).iter_errors(document)]


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def seconds(text: str) -> int:
    """A duration as Compose writes it."""
    return int(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


def mounts(service: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Source, target and mode."""
    parts = [text.split(":") for text in service.get("volumes", [])]
    return [(part[0], part[1], part[2] if len(part) == 3 else "rw") for part in parts]


def test_the_file_is_valid_by_the_specification() -> None:
    """The official schema accepts the file, and refuses it with a misspelt key or a port of the wrong type."""
    document = compose()
    assert problems(document) == []
    for path, value in ((("helthcheck",), {}), (("ports",), [{"published": []}]), (("deploy",), {"resource": {}})):
        broken = copy.deepcopy(document)
        broken["services"]["node"][path[0]] = value
        assert problems(broken), path


def test_what_services_name_is_declared_and_what_is_declared_is_used() -> None:
    """Networks, volumes and secrets are neither missing nor left over."""
    document = compose()
    used: dict[str, set[str]] = {"networks": set(), "volumes": set(), "secrets": set()}
    for service in document["services"].values():
        used["networks"] |= set(service["networks"])
        used["secrets"] |= set(service.get("secrets", []))
        used["volumes"] |= {source for source, _, _ in mounts(service) if not source.startswith(("./", "/"))}
        assert set(service.get("depends_on", [])) <= set(document["services"])
    assert {kind: set(document[kind]) for kind in used} == used


def test_what_is_mounted_from_here_exists_and_cannot_be_written() -> None:
    """Every bind mount is a directory of this repository, read-only; a single file would hide changes from a reload."""
    for name, service in services().items():
        for source, _, mode in mounts(service):
            if source.startswith("./"):
                assert (ROOT / source).is_dir(), (name, source)
                assert mode == "ro", (name, source)


def test_secrets_are_files_that_are_neither_kept_in_git_nor_sent_to_a_builder() -> None:
    """Each secret is a file under ./secrets; no variable holds one."""
    for name, secret in compose()["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
    assert "/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert not [line for line in ignored if line.startswith("!") and "secrets" in line]
    for service in services().values():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|KEY", variable):
                assert variable.endswith("_FILE"), variable
                assert value in {f"{SECRETS_DIR}/{name}" for name in service["secrets"]}, variable


def test_nothing_is_published_beyond_this_machine() -> None:
    """Every published port is on loopback, is published once per profile, and neither database nor metrics are."""
    published: dict[str, list[str]] = {}
    for name, service in services().items():
        for port in service.get("ports", []):
            host, outer, inner = port.split(":")
            assert host == "127.0.0.1", (name, port)
            assert outer == inner, (name, port)
            published.setdefault(name, []).append(inner)
    assert published == {"node": ["8402"], "prometheus": ["9090"], "grafana": ["3000"], "devnet": ["8402", "8545"]}
    assert compose()["networks"]["ledger"] == {"internal": True}
    assert [name for name, service in services().items() if "ledger" in service["networks"]] == ["node", "postgres"]


@pytest.mark.parametrize("name", services())
def test_a_service_is_bounded_watched_and_stopped_with_patience(name: str) -> None:
    """Limits, a health check with a start period, a restart policy outside development, no new privileges, a fixed tag.

    The policy is one that a reload by signal does not switch off: Docker counts every signal it sends as a stop.
    """
    service = services()[name]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert seconds(service["healthcheck"]["start_period"]) >= 30
    if "test" not in service["healthcheck"]:
        assert service["image"].startswith("mppnode:")  # the image has one
    assert "no-new-privileges:true" in service["security_opt"]
    assert service.get("restart") == (None if "profiles" in service else "always")
    assert "stop_grace_period" in service
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+[\w.-]*", service["image"])
    if name not in {"postgres", "grafana"}:
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]


def test_the_node_has_time_to_drain(tmp_path: Path) -> None:
    """What kills the node waits longer than the drain, the delay before it and the commits after it."""
    make_secrets(tmp_path, DATABASE, b"\1" * 32)
    limits = load_compose_config(tmp_path).limits
    assert seconds(services()["node"]["stop_grace_period"]) >= limits.drain_delay_s + limits.drain_s + 5 + 10
    nofile = services()["node"]["ulimits"]["nofile"]["soft"]
    assert nofile >= 3 * limits.streams_max


def test_the_configuration_loads_and_agrees_with_the_services(tmp_path: Path) -> None:
    """Its secrets are mounted, its database is the postgres service, its ports are the image's, its spool in a volume."""
    make_secrets(tmp_path, DATABASE, b"\1" * 32)
    config = load_compose_config(tmp_path)
    node, postgres = services()["node"], services()["postgres"]
    named = set(re.findall(rf"{SECRETS_DIR}/(\w+)", (ROOT / "docs/deploy/mppnode.toml").read_text()))
    assert named == set(node["secrets"])
    assert config.metrics is not None
    exposed = {int(port) for port in dockerfile()[-1].one("EXPOSE").split()}
    assert {config.node.port, config.metrics.port} == exposed
    assert (config.node.host, config.metrics.host) == ("0.0.0.0", "0.0.0.0")
    volume = dockerfile()[-1].one("VOLUME")
    assert ("node-state", volume, "rw") in mounts(node)
    assert config.node.spool is not None
    assert config.node.spool.parent == Path(volume)
    assert config.pricing.catalog is not None
    assert config.pricing.catalog.parent == Path(volume)  # the configuration's own directory is mounted read-only
    url = urlsplit(DATABASE)
    assert (url.username, url.path[1:]) == (postgres["environment"]["POSTGRES_USER"], postgres["environment"]["POSTGRES_DB"])
    assert url.hostname in services()
    assert len(config.node.challenge_secrets) == 2


@pytest.mark.parametrize("name", ["node", "devnet"])
def test_the_commands_are_ones_the_program_has(name: str) -> None:
    """The arguments parse, and name the mounted configuration and the published ports."""
    service = services()[name]
    options = _parser().parse_args(service["command"])
    if name == "node":
        assert service["command"] == dockerfile()[-1].exec_form("CMD")
        assert options.config.parent == Path(next(target for source, target, _ in mounts(service) if source == "./docs/deploy"))
    else:
        assert [f"127.0.0.1:{port}:{port}" for port in (options.port, options.chain_port)] == service["ports"]
        assert options.host == "0.0.0.0"


def test_prometheus_scrapes_the_node_where_it_listens(tmp_path: Path) -> None:
    """The target is the node's service and ``[metrics]`` port, and the configuration and rules are read from the mount."""
    document = read_yaml(ROOT / "grafana/prometheus/prometheus.yml")
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in document["scrape_configs"]}
    assert jobs == {"mppnode": [f"node:{config_tree()['metrics']['port']}"], "prometheus": ["127.0.0.1:9090"]}
    assert set(services()["prometheus"]["networks"]) & set(services()["node"]["networks"]) == {"watch"}
    assert document["rule_files"] == ["rules.yml"]
    (target,) = [target for source, target, _ in mounts(services()["prometheus"]) if source == "./grafana/prometheus"]
    assert f"--config.file={target}/prometheus.yml" in services()["prometheus"]["command"]
    promtool = need("promtool")
    shutil.copytree(ROOT / "grafana/prometheus", tmp_path / "etc")
    rules = tmp_path / "etc/rules.yml"
    if not rules.exists():
        rules.write_text("groups: []\n")
    checked = subprocess.run([promtool, "check", "config", tmp_path / "etc/prometheus.yml"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    """The data source is the prometheus service under the uid the dashboards name; their folder is mounted."""
    (source,) = read_yaml(ROOT / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    url = urlsplit(source["url"])
    assert url.hostname in services()
    assert f"127.0.0.1:{url.port}:{url.port}" in services()[url.hostname]["ports"]
    scrape = read_yaml(ROOT / "grafana/prometheus/prometheus.yml")["global"]["scrape_interval"]
    assert (source["uid"], source["editable"], source["jsonData"]["timeInterval"]) == ("prometheus", False, scrape)
    (provider,) = read_yaml(ROOT / "grafana/provisioning/dashboards/mppnode.yml")["providers"]
    assert provider["allowUiUpdates"] is False
    mounted = {target: source for source, target, _ in mounts(services()["grafana"])}
    assert mounted[provider["options"]["path"]] == "./grafana/dashboards"
    assert mounted["/etc/grafana/provisioning"] == "./grafana/provisioning"
    for path in (ROOT / "grafana/dashboards").glob("*.json"):
        uids = set(re.findall(r'"datasource":\s*\{[^}]*"uid":\s*"([^"]*)"', path.read_text()))
        assert uids <= {"prometheus", "-- Grafana --", "grafana"}, path.name
