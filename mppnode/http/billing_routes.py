"""``/billing/*`` and ``/webhooks/stripe``: where customers pay, and where the payment processor tells of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

from aiohttp import web

from mppnode.accounts.directory import Admission, Directory
from mppnode.accounts.forms import read_checkout
from mppnode.accounts.keyring import require_owner
from mppnode.accounts.model import Account
from mppnode.gateways.stripe_events import WebhookFault
from mppnode.http.answers import body_of
from mppnode.http.reception import Reception, answer, answered
from mppnode.kernel.faults import NodeFault, NodeReason

CHECKOUT: Final = "/billing/checkout"
PORTAL: Final = "/billing/portal"
WEBHOOK: Final = "/webhooks/stripe"
SIGNATURE: Final = "Stripe-Signature"
WEBHOOK_BYTES_MAX: Final = 512 * 1024  # Stripe's largest objects are invoices of tens of kilobytes
_WEBHOOK_S: Final = 10.0  # Stripe sends its bodies at once; holding connections open is for those who have no secret


class BillingPort(Protocol):
    """What customers may ask of the payment processor, and what it tells us.

    Everything raises ``BILLING_UNAVAILABLE`` and ``STORE_UNAVAILABLE`` for outages; amounts are cents.
    """

    async def buy(self, account: Account, cents: int) -> str:
        """The page on which this much credit is paid for. Raises ``INVALID_FIELD`` for an amount that is not sold."""
        ...

    async def add_card(self, account: Account) -> str:
        """The page on which a card is put on file."""
        ...

    async def portal(self, account: Account) -> str:
        """The page on which cards and invoices are looked after."""
        ...

    async def subscribe(self, account: Account) -> None:
        """See to it that a post-paid account is billed; a repeat sees to what it may owe. Raises ``CONFLICT``."""
        ...

    async def webhook(self, body: bytes, signature: str) -> None:
        """Take an announcement in, durably. Raises ``WebhookFault``."""
        ...


class BillingSurface:
    """Payment pages and announcements; every route is 404 where nothing is sold through a payment processor."""

    def __init__(self, *, directory: Directory, billing: BillingPort | None) -> None:
        self._reception = Reception(directory)
        self._billing = billing

    def routes(self) -> Sequence[web.RouteDef]:
        """The routes of this surface."""
        return [
            web.post(CHECKOUT, self.checkout),
            web.post(PORTAL, self.portal),
            web.post(WEBHOOK, self.webhook),
        ]

    @answered
    async def checkout(self, request: web.Request) -> web.Response:
        """A page to pay on, or to put a card on file."""
        who = await self._owner(request)
        billing = self._configured()
        wanted = read_checkout(await body_of(request))
        if wanted.amount_cents is None:
            url = await billing.add_card(who.account)
        else:
            url = await billing.buy(who.account, wanted.amount_cents)
        return answer({"object": "checkout", "url": url})

    @answered
    async def portal(self, request: web.Request) -> web.Response:
        """The page for cards and invoices."""
        who = await self._owner(request)
        url = await self._configured().portal(who.account)
        return answer({"object": "portal", "url": url})

    @answered
    async def webhook(self, request: web.Request) -> web.Response:
        """Take in what the processor announces; its signature is the credential. It repeats what is not taken."""
        billing = self._configured()
        signatures = request.headers.getall(SIGNATURE, [])
        if len(signatures) != 1:
            raise NodeFault(NodeReason.INVALID_FIELD, field=SIGNATURE, detail="must be given once")
        try:
            await billing.webhook(await _raw(request), signatures[0])
        except WebhookFault as fault:
            raise NodeFault(NodeReason.INVALID_FIELD, field="webhook", detail=fault.reason.value) from None
        return answer({"received": True})

    async def _owner(self, request: web.Request) -> Admission:
        who = await self._reception.admit(request)
        require_owner(who)
        return who

    def _configured(self) -> BillingPort:
        if self._billing is None:
            raise NodeFault(NodeReason.NOT_FOUND, detail="nothing is sold through a payment processor here")
        return self._billing


async def _raw(request: web.Request) -> bytes:
    """The body as it was sent: a signature is over bytes. Read by chunks, as anybody may send here."""
    body = bytearray()
    try:
        async with asyncio.timeout(_WEBHOOK_S):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > WEBHOOK_BYTES_MAX:
                    words = f"the body is larger than {WEBHOOK_BYTES_MAX} bytes"
                    raise NodeFault(NodeReason.BODY_TOO_LARGE, detail=words)
    except TimeoutError:
        raise NodeFault(NodeReason.INVALID_FIELD, field="body", detail="did not arrive in time") from None
    return bytes(body)
