"""A real Prometheus over a real node: every panel has something to show, and alerts fire when they should."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ruamel.yaml import YAML

from tests.grafana.load import Town, town
from tests.grafana.panels import notes, queries
from tests.grafana.server import RULES, Prometheus, hurried, running

RULES_SHIPPED = YAML(typ="safe").load(RULES.read_text())
ROUNDS = 3


async def scraped(prometheus: Prometheus, town: Town) -> None:
    """Wait until Prometheus has seen what the node has counted so far."""
    async with asyncio.timeout(20):
        node = town.shop.net.node.metrics
        wanted = sum(map(float, node.snapshot().cells["mppnode_requests_total"].values()))  # type: ignore[arg-type]
        while True:
            found = await prometheus.query("sum(mppnode_requests_total)")
            if found and float(found[0]["value"][1]) >= wanted:
                return
            await asyncio.sleep(0.1)


async def evaluated(prometheus: Prometheus, expected: set[str]) -> None:
    """Wait until exactly these alerts fire."""
    firing: set[str] = set()
    try:
        async with asyncio.timeout(20):
            while (firing := await prometheus.firing()) != expected:
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"wrongly silent: {expected - firing}, wrongly firing: {firing - expected}") from None


async def test_every_panel_shows_something_and_no_alert_cries_wolf(tmp_path: Path) -> None:
    """Under traffic of every kind all is quiet; when providers fail, that and nothing else is told; so is a node's end."""
    async with town(tmp_path) as place, running([place.ops], hurried(RULES_SHIPPED)) as prometheus:
        async with asyncio.timeout(20):
            while not await prometheus.healthy():
                await asyncio.sleep(0.1)
        for _ in range(ROUNDS):
            await place.round(failures=False)
            await scraped(prometheus, place)
        await evaluated(prometheus, set())
        for _ in range(ROUNDS):
            await place.round()
            await scraped(prometheus, place)
        await evaluated(prometheus, {"MppnodeRequestsFail"})
        empty = []
        for query in queries():
            values = [series["value"][1] for series in await prometheus.query(query.filled)]
            if not values or all(value == "NaN" for value in values):
                empty.append(str(query))
        assert empty == []
        for note in notes():
            await prometheus.query(note.filled)
        for rule in await prometheus.rules():
            assert rule["health"] == "ok", rule
        await place.shop.net.node.stop()
        await evaluated(prometheus, {"MppnodeDown", "MppnodeRequestsFail"})
        await place.shop.net.node.start()


async def test_the_pages_sum_is_the_ledgers(tmp_path: Path) -> None:
    """What Prometheus adds up for a day of traffic is what channels and accounts were charged, to the pico-dollar."""
    async with town(tmp_path) as place, running([place.ops], hurried(RULES_SHIPPED)) as prometheus:
        await place.round()
        await scraped(prometheus, place)
        assert place.shop.net.node.books is not None
        accounts = await place.shop.net.node.books.accounts()
        owed = sum(account.owed_pico for account in accounts)
        accounts_of_keys = [await customer.credit() for customer in (place.customer, place.poor, place.late)]
        for rail, pico in (("session", owed), ("credit", sum(credit.owed for credit in accounts_of_keys))):
            (series,) = await prometheus.query(f'mppnode_charged_usd_total{{rail="{rail}"}}')
            assert round(float(series["value"][1]) * 10**12) == pico > 0
