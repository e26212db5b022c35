"""A real Prometheus for tests: started on a port of its own, with the rules that ship, and asked through its API.

Looked for on the PATH (Debian: ``prometheus``). Without it a test is skipped, or fails when ``REQUIRE_PROMETHEUS=1``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "grafana"
RULES = GRAFANA / "prometheus" / "rules.yml"
EVERY_S = 0.2
"""Between two scrapes and two evaluations: a test has no minutes."""
READY_S = 30


def unavailable(reason: str) -> NoReturn:
    """Skip, or fail where the lane is required."""
    if os.environ.get("REQUIRE_PROMETHEUS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def program(name: str) -> str:
    """The path of ``prometheus`` or ``promtool``."""
    found = shutil.which(name)
    if found is None:
        unavailable(f"{name} is not installed")
    return found


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


class Prometheus:
    """A running server."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url

    async def _get(self, path: str, **params: str) -> Any:
        async with self._http.get(f"{self._url}/api/v1/{path}", params=params) as answer:
            document = await answer.json()
            assert document["status"] == "success", (path, params, document)
            return document["data"]

    async def query(self, expr: str) -> list[dict[str, Any]]:
        """The series of an instant query, now."""
        found: list[dict[str, Any]] = (await self._get("query", query=expr))["result"]
        return found

    async def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        return {alert["labels"]["alertname"] for alert in (await self._get("alerts"))["alerts"] if alert["state"] == "firing"}

    async def rules(self) -> list[dict[str, Any]]:
        """Every rule, with its health and last error."""
        return [rule for group in (await self._get("rules"))["groups"] for rule in group["rules"]]

    async def healthy(self) -> bool:
        """Whether every target was scraped."""
        targets = (await self._get("targets"))["activeTargets"]
        return bool(targets) and all(target["health"] == "up" for target in targets)


def hurried(rules: Mapping[str, Any]) -> dict[str, Any]:
    """The rules without their waiting times: whether ``for`` is right is tested with promtool, where time is free."""
    groups = [
        {**group, "interval": f"{int(EVERY_S * 1000)}ms", "rules": [{**rule, "for": "0s"} for rule in group["rules"]]}
        for group in rules["groups"]
    ]
    return {"groups": groups}


@asynccontextmanager
async def running(targets: list[str], rules: Mapping[str, Any]) -> AsyncIterator[Prometheus]:
    """Prometheus over ``targets`` ("host:port"), with these rules; gone with its data when the block ends."""
    binary, port = program("prometheus"), free_port()
    with tempfile.TemporaryDirectory(prefix="mpp-prom-") as folder:
        config = {
            "global": {"scrape_interval": f"{int(EVERY_S * 1000)}ms", "evaluation_interval": f"{int(EVERY_S * 1000)}ms"},
            "rule_files": [f"{folder}/rules.yml"],
            "scrape_configs": [{"job_name": "mppnode", "static_configs": [{"targets": targets}]}],
        }
        # JSON is YAML, and needs no package to be written.
        Path(folder, "prometheus.yml").write_text(json.dumps(config))
        Path(folder, "rules.yml").write_text(json.dumps(rules))
        command = [
            binary,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
        with Path(folder, "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                async with aiohttp.ClientSession() as http:
                    url = f"http://127.0.0.1:{port}"
                    async with asyncio.timeout(READY_S):
                        while not await _ready(http, url):
                            assert process.poll() is None, Path(folder, "log").read_text()
                            await asyncio.sleep(0.05)
                    yield Prometheus(http, url)
            finally:
                process.kill()


async def _ready(http: aiohttp.ClientSession, url: str) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        async with http.get(f"{url}/-/ready") as answer:
            return answer.status == 200
    return False
