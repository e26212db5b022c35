"""Broken builds of the treasury: the product's source with replacements, run from memory and never written anywhere.

A replacement that no longer applies is an error, so a mutant cannot quietly stop being one when the source is reworded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.sim.process import PRODUCT

Change = tuple[str, str, str]
"""(module, old text, new text); every place where the old text stands is changed."""

_BY_SPENT = "max([account.chain.settled, *(r.cumulative for r in account.ladder if r.cumulative <= account.spent)])"

MUTANTS: dict[str, tuple[Change, ...]] = {
    "settles the highest voucher": (("treasurer", "account.settleable", "account.accepted"),),
    "settles what live streams may give back": (("treasurer", "account.settleable", _BY_SPENT),),
    "fixes the capture before the streams have ended": (
        (
            "closer",
            "        await self.end_requests(channel)\n        plan =",
            "        early = await self._books.load(channel)\n        await self.end_requests(channel)\n        plan =",
        ),
        ("closer", "IntentKind.CLOSE, account.close.capture,", "IntentKind.CLOSE, early.capturable,"),
    ),
    "opens a channel again when no receipt came": (
        (
            "closer",
            "if fault.reason is Reason.CHAIN_REJECTED and first:",
            "if fault.reason in (Reason.CHAIN_REJECTED, Reason.CHAIN_OUTCOME_UNKNOWN):",
        ),
        ("closer", "if not await self._ledger.intents(active=True, channel=channel):", "if True:"),
    ),
    "believes the newest block about channels": (("watcher", "self._chain.finalised()", "self._chain.head()"),),
    "signs again while the first may live": (
        (
            "settler",
            """                raise ChannelFault(
                    Reason.CHAIN_OUTCOME_UNKNOWN, field=intent.kind.value, detail="was sent and is not final yet"
                )""",
            """                now = self._clock.now()
                return await self._move(
                    intent, steps.ended(_unmined(intent, now), IntentState.DEAD, now=now), via=intent
                )""",
        ),
    ),
    "believes the newest block about a death": (
        ("rpc", "final = await self.finalised()\n        receipt", "final = await self.head()\n        receipt"),
    ),
    "does not react to a close request": (("treasurer", "if account.phase is not Phase.CONTESTED or (", "if True or ("),),
    "leaves its own transactions to the leader": (
        ("treasurer", "                await self._adopt()", "                await self._adopt() if await self._ledger.lead(JOB, self._node()) else None"),
    ),
    "signs by its own clock": (
        ("rpc", "min(head.timestamp, self._clock.now() + CLOCK_APART_S)", "self._clock.now()"),
    ),
    "comes back once a minute": (("closer", "(2, 5, 10)", "(2, 5, 60)"),),
    "gives up a close after the first failure": (
        ("treasurer", "if account.phase in (Phase.CLOSING, Phase.CAPTURED):", "if account.phase in ():"),
    ),
}


@contextmanager
def built(name: str) -> Iterator[SimpleNamespace]:
    """The product with one mutant in it."""
    sources: dict[str, str] = {}
    for module, old, new in MUTANTS[name]:
        source = sources.get(module) or Path(getattr(PRODUCT, module).__file__).read_text()
        assert old in source, f"the mutant no longer applies, say it in today's words: {old}"
        sources[module] = source.replace(old, new)
    product = SimpleNamespace(**vars(PRODUCT))
    with pytest.MonkeyPatch.context() as patch:
        for where, source in sources.items():
            module = ModuleType(f"mutant_{where}")
            patch.setitem(sys.modules, module.__name__, module)
            exec(compile(source, f"<mutant {where}>", "exec"), module.__dict__)
            setattr(product, where, module)
        yield product
