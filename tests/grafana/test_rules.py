"""Every alert rule: silent just below what it warns of, firing just beyond, after just its waiting time."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry
from ruamel.yaml import YAML

from mppnode.cli.main import _parser
from mppnode.gauging import page_of
from mppnode.kernel.clock import SystemClock
from mppnode.observe.metric_labels import Vocabulary
from mppnode.observe.metrics import Metrics
from tests.grafana.server import GRAFANA, ROOT, RULES, hurried, program, running
from tests.grafana.test_live import evaluated

SHIPPED: dict[str, Any] = YAML(typ="safe").load(RULES.read_text())
ALERTS = {rule["alert"]: rule for group in SHIPPED["groups"] for rule in group["rules"]}
NODE = 'instance="a:8404",job="mppnode"'
RUNBOOKS = ROOT / "docs" / "runbooks.md"


# ------------------------------------------------------------------------------------------------------------ promtool


def test_promtool_accepts_rules_and_configuration() -> None:
    """``promtool check`` finds nothing wrong with the rules or with the configuration that names them."""
    for what in (["check", "rules", RULES], ["check", "config", GRAFANA / "prometheus" / "prometheus.yml"]):
        done = subprocess.run([program("promtool"), *map(str, what)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Case:
    """An alert, series under which it fires, and the same a little better, under which it does not.

    A series is a name with labels and what becomes of it, a sample a minute in promtool's notation. ``at`` is the first
    minute at which it fires; a minute before it does not.
    """

    alert: str
    bad: dict[str, str]
    good: dict[str, str]
    at: int = 1
    labels: str = ""

    def input(self, series: dict[str, str]) -> list[dict[str, str]]:
        def named(name: str) -> str:
            metric, _, labels = name.partition("{")
            given = labels.rstrip("}")
            return f"{metric}{{{NODE}{',' + given if given else ''}}}"

        # As many samples as are looked at: with four days of them for everybody promtool takes half a minute.
        length = f"x{self.at + 40}"
        return [{"series": named(name), "values": values.replace("xN", length)} for name, values in series.items()]

    def test(self, series: dict[str, str], minute: int, *, fires: bool) -> dict[str, Any]:
        """One of promtool's unit tests: whether the alert fires at ``minute``."""
        severity = ALERTS[self.alert]["labels"]["severity"]
        own = f",{self.labels}" if self.labels else ""
        found = f'ALERTS{{alertname="{self.alert}",alertstate="firing",severity="{severity}"{own}}}'
        expr = f'ALERTS{{alertname="{self.alert}",alertstate="firing"}}'
        samples = [{"labels": found, "value": 1}] if fires else []
        return {
            "interval": "1m",
            "input_series": self.input(series),
            "promql_expr_test": [{"expr": expr, "eval_time": f"{minute}m", "exp_samples": samples}],
        }

    def tests(self) -> list[dict[str, Any]]:
        late = self.at + 30
        return [
            self.test(self.bad, self.at, fires=True),
            *([self.test(self.bad, self.at - 1, fires=False)] if self.at else []),
            self.test(self.good, late, fires=False),
        ]


def steady(value: object) -> str:
    return f"{value}xN"


def rising(step: object) -> str:
    return f"0+{step}xN"


def since(seconds: int) -> str:
    """A time that was ``seconds`` ago at minute 0, never told again."""
    return f"{-seconds}xN"


def shares(name: str, bad: str, rest: str, per_cent: float, volume: int = 100) -> dict[str, str]:
    """Two counters of which the first is so many per cent of their sum, at ``volume`` a minute."""
    part = volume * per_cent / 100
    return {f"{name}{{{bad}}}": rising(part), f"{name}{{{rest}}}": rising(volume - part)}


def slow(name: str, limit: float, above: float, *, labels: str = "") -> dict[str, str]:
    """A histogram of which ``above`` per cent are beyond the bound ``limit``."""
    inner = f"{labels}," if labels else ""
    return {
        f'{name}_bucket{{{inner}le="{limit}"}}': rising(100 - above),
        f'{name}_bucket{{{inner}le="{limit * 2}"}}': rising(100),
        f'{name}_bucket{{{inner}le="+Inf"}}': rising(100),
    }


M = "mppnode_"
CASES = [
    Case("MppnodeBooksDisagree", {f"{M}ledger_differences": steady(1)}, {f"{M}ledger_differences": steady(0)}, 0),
    Case("MppnodeBooksDisagree", {f"{M}ledger_drift_usd": steady(-0.01)}, {f"{M}ledger_drift_usd": steady(0)}, 0),
    Case(
        "MppnodeNotReconciled",
        {f"{M}reconciled_timestamp_seconds": since(26 * 3600 - 30)},
        {f"{M}reconciled_timestamp_seconds": since(25 * 3600)},
        11,
    ),
    Case(
        "MppnodeCloseRequestWaits",
        {f"{M}close_request_oldest_age_seconds": rising(60)},
        {f"{M}close_request_oldest_age_seconds": steady(120)},
        3,
    ),
    Case(
        "MppnodeUnsettledOld",
        {f"{M}unsettled_oldest_age_seconds": steady(43_201)},
        {f"{M}unsettled_oldest_age_seconds": steady(43_200)},
        5,
    ),
    Case("MppnodeFeePayerLow", {f"{M}fee_payer_balance_usd": steady(0.99)}, {f"{M}fee_payer_balance_usd": steady(1)}, 2),
    Case(
        "MppnodeChainBlind",
        {f"{M}chain_head_age_seconds": steady(61), f'{M}chain_head_age_seconds{{replica="b"}}': steady(1)},
        {f"{M}chain_head_age_seconds": steady(60)},
        1,
        'instance="a:8404"',
    ),
    Case(
        "MppnodeTransactionReverted",
        {f'{M}transactions_total{{kind="settle",result="reverted"}}': "0 0 1xN"},
        {f'{M}transactions_total{{kind="settle",result="confirmed"}}': rising(1)},
        2,
        'kind="settle"',
    ),
    Case(
        "MppnodeSponsorBudgetNearlyUsed",
        {f"{M}sponsor_budget_used_usd": steady(0.81), f"{M}sponsor_budget_usd": steady(1)},
        {f"{M}sponsor_budget_used_usd": steady(0.8), f"{M}sponsor_budget_usd": steady(1)},
        5,
    ),
    Case(
        "MppnodeCeilingBreached",
        {f"{M}ceiling_breaches_total": "0 0 1xN"},
        {f"{M}ceiling_breaches_total": steady(0)},
        2,
    ),
    Case(
        "MppnodeEstimatedBills",
        shares(f"{M}counted_requests_total", 'source="estimated"', 'source="reported"', 3),
        shares(f"{M}counted_requests_total", 'source="estimated"', 'source="reported"', 2),
        17,
    ),
    Case("MppnodeDown", {"up": "1 1 0xN"}, {"up": steady(1)}, 3, NODE),
    Case(
        "MppnodeRequestsFail",
        shares(f"{M}model_requests_total", 'outcome="failed"', 'outcome="served"', 6),
        shares(f"{M}model_requests_total", 'outcome="failed"', 'outcome="served"', 5),
        6,
    ),
    Case(
        "MppnodeModelWithoutProvider",
        {f'{M}model_providers_usable{{model="x/y"}}': steady(0)},
        {f'{M}model_providers_usable{{model="x/y"}}': steady(1)},
        2,
        'model="x/y"',
    ),
    Case(
        "MppnodeFirstTokenSlow",
        slow(f"{M}first_token_seconds", 6.0, 6),
        slow(f"{M}first_token_seconds", 6.0, 4),
        11,
    ),
    Case(
        "MppnodeStoreFails",
        {f'{M}store_failures_total{{store="postgres"}}': "0 0 1xN"},
        {f'{M}store_failures_total{{store="postgres"}}': steady(0)},
        2,
        'store="postgres"',
    ),
    Case(
        "MppnodeLoopLags",
        slow(f"{M}loop_lag_seconds", 0.25, 2),
        slow(f"{M}loop_lag_seconds", 0.25, 0.5),
        6,
        'instance="a:8404"',
    ),
    Case(
        "MppnodePayersDoNotPay",
        shares(f"{M}pauses_total", 'ended="unpaid"', 'ended="paid"', 21),
        shares(f"{M}pauses_total", 'ended="unpaid"', 'ended="paid"', 20),
        6,
    ),
    Case(
        "MppnodeVouchersRefused",
        {f'{M}vouchers_refused_total{{reason="invalid_signature"}}': rising(12), f"{M}vouchers_total": rising(100)},
        {f'{M}vouchers_refused_total{{reason="voucher_too_low"}}': rising(50), f"{M}vouchers_total": rising(100)},
        7,
    ),
    Case(
        "MppnodeFileDescriptors",
        {"process_open_fds": steady(81), "process_max_fds": steady(100)},
        {"process_open_fds": steady(80), "process_max_fds": steady(100)},
        2,
        'instance="a:8404"',
    ),
    Case(
        "MppnodeMetricsLost",
        {f"{M}metric_snapshots_unreadable": steady(1)},
        {f"{M}metric_snapshots_unreadable": steady(0)},
        5,
    ),
    Case(
        "MppnodePricesOld",
        {
            f'{M}price_timestamp_seconds{{provider="p"}}': since(4 * 24 * 3600 - 30),
            f'{M}price_timestamp_seconds{{provider="p",replica="b"}}': since(60),
        },
        {f'{M}price_timestamp_seconds{{provider="p"}}': since(3 * 24 * 3600)},
        61,
        'provider="p"',
    ),
    Case(
        "MppnodePricesHeld",
        {f'{M}prices_held{{provider="p"}}': steady(2)},
        {f'{M}prices_held{{provider="p"}}': steady(0)},
        60,
        'provider="p"',
    ),
    Case(
        "MppnodeOutboxStuck",
        {f'{M}outbox_oldest_age_seconds{{kind="meter"}}': steady(601)},
        {f'{M}outbox_oldest_age_seconds{{kind="meter"}}': steady(600)},
        1,
        'kind="meter"',
    ),
    Case(
        "MppnodeOutboxParked",
        {f'{M}outbox_tasks{{kind="meter",state="parked"}}': steady(1)},
        {f'{M}outbox_tasks{{kind="meter",state="due"}}': steady(100)},
        5,
        'kind="meter"',
    ),
    Case(
        "MppnodeStripeFails",
        shares(f"{M}stripe_calls_total", 'result="unreachable"', 'result="ok"', 51),
        shares(f"{M}stripe_calls_total", 'result="declined"', 'result="ok"', 90),
        11,
    ),
    Case(
        "MppnodeWebhooksRefused",
        {f'{M}webhooks_refused_total{{reason="bad_signature"}}': "0 0 6xN"},
        {f'{M}webhooks_refused_total{{reason="stale"}}': rising(10)},
        2,
        'reason="bad_signature"',
    ),
    Case("MppnodeMeterErrors", {f"{M}meter_errors_total": "0 0 1xN"}, {f"{M}meter_errors_total": steady(0)}, 2),
]


def quiet_night(name: str, bad: str, rest: str) -> dict[str, str]:
    """A failure every seven minutes, and little besides."""
    return {f"{name}{{{bad}}}": "0x4 1x6 2x6 3x6 4x6 5x30", f"{name}{{{rest}}}": "0x8 1x60"}


SLOW = f"{M}first_token_seconds_bucket"
ORDINARY: dict[str, dict[str, str]] = {
    "a quiet night with a failure now and then": {
        **quiet_night(f"{M}model_requests_total", 'outcome="failed"', 'outcome="served"'),
        **{f'{SLOW}{{le="{bound}"}}': "0x4 1x6 2x6 3x6 4x30" if bound == "+Inf" else "0x60" for bound in ("6.0", "12.0", "+Inf")},
    },
    "one call in a while to a Stripe that is briefly away": {
        f'{M}stripe_calls_total{{result="unreachable"}}': "0x4 1x8 2x8 3x60",
        f'{M}stripe_calls_total{{result="ok"}}': "5x60",
    },
    "nobody asks for anything": {
        f'{M}model_requests_total{{outcome="{outcome}"}}': "7x60" for outcome in ("served", "failed", "abandoned")
    },
    "a restart: every counter begins again, and nobody has reconciled yet": {
        f'{M}model_requests_total{{outcome="failed"}}': "40x20 0x40",
        f'{M}model_requests_total{{outcome="served"}}': "9000+600x20 0+600x40",
        f"{M}ceiling_breaches_total": "2x20 0x40",
        f'{M}store_failures_total{{store="sqlite"}}': "3x20 0x40",
        f'{M}transactions_total{{kind="settle",result="reverted"}}': "1x20 0x40",
        f"{M}meter_errors_total": "4x20 0x40",
        f"{M}reconciled_timestamp_seconds": "-3600x20 _x40",
        "process_start_time_seconds": "-90000x20 1200x40",
        f"{M}close_request_oldest_age_seconds": "0x20 _x2 0x38",
        "up": "1x20 0x0 1x39",
    },
    "another node takes over the treasury": {
        f"{M}unsettled_oldest_age_seconds": "21000+60x20 _x40",
        f'{M}unsettled_oldest_age_seconds{{replica="b"}}': "_x22 0+60x38",
        f"{M}reconciled_timestamp_seconds": "-80000x60",
        f"{M}ledger_differences": "0x20 _x40",
    },
    "a customer's card is declined again and again": {
        f'{M}stripe_calls_total{{result="declined"}}': rising(2),
        f'{M}outbox_tasks{{kind="recharge",state="due"}}': steady(1),
        f'{M}outbox_oldest_age_seconds{{kind="recharge"}}': steady(0),
    },
}


def test_ordinary_life_raises_no_alarm(tmp_path: Path) -> None:
    """Restarts, quiet nights, a change of leader and a customer's bad card wake nobody."""
    tests = []
    for name, series in ORDINARY.items():
        given = Case(name, series, {}).input(series)
        checks = [
            {"expr": 'count(ALERTS{alertstate="firing"}) or vector(0)', "eval_time": f"{minute}m", "exp_samples": [{"labels": "{}", "value": 0}]}
            for minute in range(60)
        ]
        tests.append({"name": name, "interval": "1m", "input_series": given, "promql_expr_test": checks})
    assert_promtool_agrees(tmp_path, tests)


def test_a_node_that_never_reconciles_is_told_of(tmp_path: Path) -> None:
    """With no reconciliation at all there is no time of the last one: the process's own age stands for it."""
    name = "MppnodeNotReconciled"
    case = Case(name, {"process_start_time_seconds": since(26 * 3600 - 30)}, {"process_start_time_seconds": since(25 * 3600)}, 11)
    assert_promtool_agrees(tmp_path, case.tests())


def test_every_rule_has_a_story_here() -> None:
    """No rule ships untested."""
    assert {case.alert for case in CASES} == set(ALERTS) == {story.alert for story in STORIES}


def test_rules_fire_at_their_limits_and_after_their_waits(tmp_path: Path) -> None:
    """promtool runs the rules over invented series, minute by minute."""
    assert_promtool_agrees(tmp_path, [test for case in CASES for test in case.tests()])


def assert_promtool_agrees(tmp_path: Path, tests: list[dict[str, Any]]) -> None:
    """Run promtool's unit tests on the shipped rules."""
    file = tmp_path / "tests.json"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run([program("promtool"), "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------- stories


@dataclass(frozen=True)
class Story:
    """What is told to a node's own metrics, and the alert that must follow; ``undo`` makes it good again."""

    alert: str
    tell: Any
    undo: Any = None


def times(count: int, tell: Any) -> Any:
    def many(metrics: Metrics) -> None:
        for _ in range(count):
            tell(metrics)

    return many


def ended(metrics: Metrics, *, ending: str = "complete", source: str = "reported", first_s: float = 0.1) -> None:
    metrics.request_began("session", stream=True)
    metrics.request_ended(
        "session", ending, stream=True, model="x/y", provider="p", cost_pico=10**9, source=source, first_s=first_s
    )


HOURS = 3_600
NOW = SystemClock().now()
STORIES = [
    Story("MppnodeBooksDisagree", lambda m: m.reconciled(NOW, 2, 10**12), lambda m: m.reconciled(NOW, 0, 0)),
    Story("MppnodeNotReconciled", lambda m: m.reconciled(NOW - 27 * HOURS, 0, 0), lambda m: m.reconciled(NOW, 0, 0)),
    Story("MppnodeCloseRequestWaits", lambda m: m.close_requests(1, 130), lambda m: m.close_requests(0, 0)),
    Story("MppnodeUnsettledOld", lambda m: m.unsettled_age(13 * HOURS), lambda m: m.unsettled_age(0)),
    Story("MppnodeFeePayerLow", lambda m: m.fee_payer_balance(10**11), lambda m: m.fee_payer_balance(10**14)),
    Story("MppnodeChainBlind", lambda m: m.chain_head_age(90), lambda m: m.chain_head_age(1)),
    Story(
        "MppnodeSponsorBudgetNearlyUsed",
        lambda m: m.sponsor_budget(9 * 10**11, 10**12),
        lambda m: m.sponsor_budget(0, 10**12),
    ),
    Story("MppnodeModelWithoutProvider", lambda m: m.providers_usable({"x/y": 0}), lambda m: m.providers_usable({"x/y": 1})),
    Story("MppnodeFileDescriptors", None),
    Story("MppnodeMetricsLost", lambda m: m._unreadable.put(1), lambda m: m._unreadable.put(0)),
    Story(
        "MppnodePricesOld", lambda m: m.prices_confirmed({"p": NOW - 120 * HOURS}, {}), lambda m: m.prices_confirmed({"p": NOW}, {})
    ),
    Story("MppnodePricesHeld", lambda m: m.prices_confirmed({"p": NOW}, {"p": 3}), lambda m: m.prices_confirmed({"p": NOW}, {})),
    Story(
        "MppnodeOutboxStuck",
        lambda m: m.outbox("meter", due=4, parked=0, oldest_s=700),
        lambda m: m.outbox("meter", due=0, parked=0, oldest_s=0),
    ),
    Story(
        "MppnodeOutboxParked",
        lambda m: m.outbox("recharge", due=0, parked=1, oldest_s=0),
        lambda m: m.outbox("recharge", due=0, parked=0, oldest_s=0),
    ),
    # From here on counters: they do not come back, and each story goes on firing beside the next.
    Story("MppnodeTransactionReverted", lambda m: m.transaction_failed("settle", "reverted")),
    Story("MppnodeCeilingBreached", lambda m: m.ceiling_breached()),
    Story("MppnodeStoreFails", lambda m: m.commit_failed("sqlite")),
    Story("MppnodeMeterErrors", lambda m: m.meter_error(3)),
    Story("MppnodeWebhooksRefused", times(20, lambda m: m.webhook_refused("wrong_mode"))),
    Story("MppnodeStripeFails", times(500, lambda m: m.stripe_called("unreachable"))),
    Story("MppnodeVouchersRefused", times(500, lambda m: m.voucher_refused("invalid_signature"))),
    Story(
        "MppnodePayersDoNotPay",
        times(100, lambda m: (m.pause_began(), m.pause(60.0, "unpaid"))),
    ),
    Story("MppnodeLoopLags", times(500, lambda m: m.loop_lag(0.9))),
    Story("MppnodeFirstTokenSlow", times(300, lambda m: ended(m, first_s=20.0))),
    Story("MppnodeEstimatedBills", times(300, lambda m: ended(m, source="estimated"))),
    Story("MppnodeRequestsFail", times(300, lambda m: ended(m, ending="failed"))),
    Story("MppnodeDown", None),
]


def healthy(metrics: Metrics) -> None:
    """A node at work, with nothing wrong."""
    for _ in range(200):
        ended(metrics)
        metrics.voucher_accepted(10**9, 0.001)
        metrics.pause_began()
        metrics.pause(0.1, "paid")
        metrics.loop_lag(0.001)
        metrics.stripe_called("ok")
        metrics.webhook("payment_succeeded")
        metrics.committed("sqlite", 0.001)
    for story in STORIES:
        if story.undo is not None:
            story.undo(metrics)


async def test_each_alert_fires_in_its_story_and_in_no_other() -> None:
    """Told to a node's metrics and scraped by Prometheus, a story sets off its own alert, and its text can be read."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, clock=SystemClock(), vocabulary=Vocabulary(["x/y"], ["p"]))
    page = page_of(registry)
    full = {"on": False}

    async def answer(request: web.Request) -> web.Response:
        body, kind = page(request.headers.get("Accept", ""))
        if full["on"]:
            body = re.sub(rb"(?m)^process_open_fds .*$", b"process_open_fds 1e12", body)
        return web.Response(body=body, headers={"Content-Type": kind})

    app = web.Application()
    app.add_routes([web.get("/metrics", answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        healthy(metrics)
        async with running([f"127.0.0.1:{runner.addresses[0][1]}"], hurried(SHIPPED)) as prometheus:
            while not await prometheus.query('up{job="mppnode"}'):
                pass
            healthy(metrics)
            await evaluated(prometheus, set())
            lasting = set[str]()
            for story in STORIES:
                if story.alert == "MppnodeFileDescriptors":
                    full["on"] = True
                elif story.alert == "MppnodeDown":
                    await runner.cleanup()
                else:
                    story.tell(metrics)
                await evaluated(prometheus, lasting | {story.alert})
                for alert in (await prometheus._get("alerts"))["alerts"]:
                    for text in alert["annotations"].values():
                        assert "<error" not in text, text
                        assert "%!" not in text, text
                        assert "<no value>" not in text, text
                if story.undo is not None:
                    story.undo(metrics)
                    await evaluated(prometheus, lasting)
                elif story.alert == "MppnodeFileDescriptors":
                    full["on"] = False
                    await evaluated(prometheus, lasting)
                else:
                    lasting.add(story.alert)
    finally:
        await runner.cleanup()


# ------------------------------------------------------------------------------------------------------------ runbooks


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_page(alert: str) -> None:
    """What it means, what it costs to wait, and what to do stand in the runbooks, where the alert's link leads."""
    link = ALERTS[alert]["annotations"]["runbook"]
    assert link == f"docs/runbooks.md#{alert.lower()}"
    text = RUNBOOKS.read_text()
    assert f"\n## {alert}\n" in text
    section = text.split(f"\n## {alert}\n")[1].split("\n## ")[0]
    for part in ("**Means**", "**If nobody acts**", "**Do**"):
        assert part in section, f"{alert} lacks {part}"
    commands = re.findall(r"`(mppnode [a-z]+(?: [a-z]+)?)", section)
    for command in commands:
        assert command.split()[1] in COMMANDS, command


def _commands() -> set[str]:
    subparsers = _parser()._subparsers
    assert subparsers is not None
    return {str(name) for action in subparsers._group_actions for name in action.choices or ()}


COMMANDS = _commands()
