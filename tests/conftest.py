"""What every test shares. ``--hypothesis-profile=deep`` searches for longer where a machine has a deep setting."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from hypothesis import settings

from tests.support.canaries import Watch, install

# An example that takes longer on a busy machine is no failure: timing belongs in bench/.
settings.register_profile("default", deadline=None)
settings.register_profile("deep", max_examples=1_500, stateful_step_count=80, deadline=None)

WATCH = pytest.StashKey[Watch]()


def pytest_configure(config: pytest.Config) -> None:
    """Watch the whole run for secrets: see :mod:`tests.support.canaries`."""
    config.stash[WATCH] = watch = Watch()
    config.add_cleanup(install(watch))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test begins."""
    item.config.stash[WATCH].begin()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail the test in which a secret came out, once it has taken itself down."""
    report = yield
    watch = item.config.stash[WATCH]
    if call.when == "teardown":
        watch.running = False
        captured = [(f"captured {name}", text) for name, text in report.sections]
        found = watch.hits(captured)
        if found and report.outcome == "passed":
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: " + "; ".join(found)
    return report
