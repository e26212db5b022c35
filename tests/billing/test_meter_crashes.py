"""A node that reports usage is killed at every step, and Stripe ends with the exact total."""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from channels.credit import AccountId
from channels.units import Pico
from mppnode.accounts.documents import account_row
from mppnode.accounts.model import Account, AccountKind, BillingProfile, Postpaid
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import ManualClock
from mppnode.ledger import credit_lists
from mppnode.ledger.credit_rows import TaskState
from mppnode.ledger.credits import Credits
from tests.billing.kit import CENT, DOLLAR, METER
from tests.fault.points import around
from tests.store.shops import open_shop
from tests.support.stripe_peer import NOW, Mishap, running_peer

ROOT = Path(__file__).resolve().parents[2]
POINTS = around("seal", "meter", "metered")
ACCOUNT = AccountId("acct_1")


@pytest.mark.parametrize("kind", ["sqlite-shared", "postgres"])
async def test_k12_p45_the_outbox_survives_sigkill_at_each_step(kind: str, tmp_path: Path) -> None:
    """Killed before and after sealing, reporting and marking, with answers lost and identifiers forgotten: exact."""
    clock = ManualClock(NOW)
    async with open_shop(kind, tmp_path) as shop, running_peer(clock=clock) as peer:
        peer.metered_price(METER)
        customer = peer.add("customer", "cus", metadata={}, balance=0)["id"]
        billed = BillingProfile(customer, "pm_visa", "sub_1")
        account = Account(id=ACCOUNT, kind=AccountKind.USER, trust="one", terms=Postpaid(Pico(DOLLAR)), billing=billed)
        books = Credits(await shop.open(), clock=shop.clock)
        await books.create_account(account_row(replace(account)), overdraft=DOLLAR)
        place = shop.place.reveal() if isinstance(shop.place, Secret) else str(shop.place)

        async def run(point: str, spend: int) -> int:
            command = (sys.executable, "-m", "tests.billing.meter_child", kind, place, peer.base_url, str(clock.now()), point, str(spend))
            child = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
            return await child.wait()

        for number, point in enumerate(POINTS, 1):
            clock.advance(120)
            assert await run(point, number * CENT) == -signal.SIGKILL, point
        peer.mishaps.append(Mishap.LOSE_ANSWER)
        clock.advance(120)
        assert await run("", CENT) == 0
        clock.advance(120)
        assert await run("meter.after", CENT) == -signal.SIGKILL
        clock.advance(25 * 3_600)  # what was reported then is no longer known by its identifier
        assert await run("", 0) == 0
        credit = await books.load(ACCOUNT)
        assert credit is not None
        assert credit.reported_micro == sum(range(1, len(POINTS) + 1)) * 10_000 + 20_000
        events = peer.of("billing.meter_event")
        assert sum(int(event["payload"]["value"]) for event in events) == credit.reported_micro
        assert await books.read(lambda: credit_lists.tasks(ACCOUNT, "meter", TaskState.DUE, 10)) == []
