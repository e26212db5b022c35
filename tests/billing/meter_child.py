"""A process that uses, seals and reports, and can be killed at a named point: the node of the crash test.

``python -m tests.billing.meter_child KIND PLACE PEER_URL NOW POINT SPEND``
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp

from channels.credit import AccountId, Hold, Settle
from channels.model import HoldId
from channels.units import Pico
from mppnode.billing.meters import Meters
from mppnode.config.secrets import Secret
from mppnode.gateways.stripe_api import StripeGateway
from mppnode.kernel.clock import ManualClock
from mppnode.ledger.credits import Credits
from mppnode.observe.logs import quiet
from tests.billing.kit import METER, no_sleep
from tests.store.shops import Shop
from tests.support.stripe_peer import KEY

ACCOUNT = AccountId("acct_1")


async def main(kind: str, place: str, url: str, *, now: int, point: str, spend: int) -> None:
    def probe(reached: str) -> None:
        if reached == point:
            os.kill(os.getpid(), signal.SIGKILL)

    async with AsyncExitStack() as exits, aiohttp.ClientSession() as session:
        shop = Shop(kind, Secret(place) if kind == "postgres" else Path(place), exits)
        shop.clock = ManualClock(now)
        books = Credits(await shop.open(), clock=shop.clock)
        stripe = StripeGateway(Secret(KEY), session=session, below=lambda top: 0, log=quiet, base_url=url, sleep=no_sleep)
        meters = Meters(stripe, books, event_name=METER, log=quiet, probe=probe)
        if spend:
            credit = await books.load(ACCOUNT)
            assert credit is not None
            name = HoldId(f"r{now}")
            await books.apply(ACCOUNT, Hold(name, Pico(1), Pico(spend), access=credit.access))
            await books.apply(ACCOUNT, Settle(name, Pico(spend)))
        await meters.seal()
        await meters.send()


if __name__ == "__main__":
    kind, place, url, now, point, spend = sys.argv[1:]
    asyncio.run(main(kind, place, url, now=int(now), point=point, spend=int(spend)))
