"""Billing as the rest of the node sees it: pages to pay on, a webhook, and the loops behind them."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from channels.credit import AccountId, CreditFault
from channels.model import NodeId
from mppnode.accounts.documents import read_account
from mppnode.accounts.model import Account, Postpaid
from mppnode.billing.alerts import AlertWorker
from mppnode.billing.booking import Bookkeeper, changed
from mppnode.billing.faults import told
from mppnode.billing.hearing import ENDED, FORGOTTEN, Hearer
from mppnode.billing.meters import Meters
from mppnode.billing.recharge import Recharger
from mppnode.billing.reconcile import Reconciled, Reconciler
from mppnode.billing.workers import Sleep, Workers
from mppnode.config.accounts import TrustLimits
from mppnode.config.billing import BillingConfig
from mppnode.gateways.alerts import AlertSender
from mppnode.gateways.stripe_events import StripeEvent, WebhookFault, WebhookReader
from mppnode.gateways.stripe_faults import StripeFault, StripeFaultKind
from mppnode.gateways.stripe_objects import Purpose
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.probe import Probe, unwatched
from mppnode.ledger.base import Ledger
from mppnode.ledger.credit_lists import By, find_account, tasks
from mppnode.ledger.credits import Credits
from mppnode.observe.logs import Level, Log

if TYPE_CHECKING:
    from mppnode.gateways.stripe_api import StripeGateway

_REFERENCE_BYTES: Final = 12
_WORDS: Final = re.compile("(?<=[a-z])([A-Z])")
_CUSTOMER: Final = "api credit"  # what a Checkout calls what is bought


class Billing:
    """The facade. ``entropy(n)`` gives n random bytes: names of Checkouts; ``node`` is this process's life."""

    def __init__(
        self,
        gateway: StripeGateway,
        books: Credits,
        *,
        ledger: Ledger,
        node: Callable[[], NodeId],
        clock: Clock,
        config: BillingConfig,
        trust: TrustLimits,
        entropy: Callable[[int], bytes],
        log: Log,
        alerts: AlertSender | None = None,
        probe: Probe = unwatched,
    ) -> None:
        self._stripe = gateway
        self._books = books
        self._clock = clock
        self._config = config
        self._entropy = entropy
        self._log = log
        self._reader: WebhookReader | None = None
        self.keeper = Bookkeeper(books, trust, probe=probe)
        self.hearer = Hearer(gateway, self.keeper, log=log)
        meter = config.meter
        self.meters = None if meter is None else Meters(gateway, books, event_name=meter, log=log, probe=probe)
        self.recharger = Recharger(gateway, self.keeper, log=log)
        self.reconciler = Reconciler(gateway, self.keeper, self.hearer, event_name=meter, log=log)
        sender = None if alerts is None else AlertWorker(books, alerts, log=log)
        self.workers = Workers(
            ledger, node, books, clock, log, self.recharger, self.meters, self.reconciler, sender
        )

    async def start(self) -> None:
        """Ask whose key this is, and in which mode; webhooks of any other account are refused from then on.

        Raises:
            NodeFault: ``BILLING_UNAVAILABLE``: Stripe is away, or the key is of the other mode. Without a successful
                start the first webhook asks again.
        """
        try:
            await self._ready()
        except StripeFault as fault:
            raise told(fault, self._log, "start") from None

    def rekey(self, config: BillingConfig) -> None:
        """Use the key and the webhook secrets of ``config`` from now on; what is sold, and how, stays as it is.

        The next webhook asks whose key it is, as the first one after a start does.
        """
        self._config = replace(
            self._config, secret_key=config.secret_key, webhook_secrets=config.webhook_secrets
        )
        self._stripe.rekey(config.secret_key)
        self._reader = None

    def daemons(self, sleep: Sleep) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """The loops to spawn, by name; each works on the node that leads."""
        return self.workers.daemons(sleep)

    # ----------------------------------------------------------------------------------------------------------- pages

    async def buy(self, account: Account, cents: int) -> str:
        """The URL of a page where ``account`` buys credit for ``cents``, one of the packs.

        Raises:
            NodeFault: ``INVALID_FIELD`` naming ``amount_cents``, or ``BILLING_UNAVAILABLE``.
        """
        if cents not in self._config.packs_cents:
            packs = ", ".join(map(str, self._config.packs_cents))
            raise NodeFault(NodeReason.INVALID_FIELD, field="amount_cents", detail=f"must be one of {packs}")
        try:
            customer, reference = await self._customer(account), self._reference("pack")
            page = await self._stripe.sell_pack(
                Purpose(account.id, reference),
                customer=customer,
                cents=cents,
                name=_CUSTOMER,
                success_url=self._config.success_url,
                cancel_url=self._config.cancel_url,
                save_card=account.billing.recharge is not None,
                key=reference,
            )
        except StripeFault as fault:
            raise told(fault, self._log, "buy") from None
        return page.url

    async def add_card(self, account: Account) -> str:
        """The URL of a page where ``account`` leaves a card for later. Raises NodeFault: ``BILLING_UNAVAILABLE``."""
        try:
            customer, reference = await self._customer(account), self._reference("card")
            page = await self._stripe.save_card(
                Purpose(account.id, reference),
                customer=customer,
                success_url=self._config.success_url,
                cancel_url=self._config.cancel_url,
                key=reference,
            )
        except StripeFault as fault:
            raise told(fault, self._log, "add_card") from None
        return page.url

    async def portal(self, account: Account) -> str:
        """The URL of a page with an account's cards and invoices. Raises NodeFault: ``BILLING_UNAVAILABLE``."""
        try:
            customer = await self._customer(account)
            return await self._stripe.open_portal(
                customer=customer, return_url=self._config.return_url, key=self._reference("portal")
            )
        except StripeFault as fault:
            raise told(fault, self._log, "portal") from None

    async def subscribe(self, account: Account) -> None:
        """Bill a post-paid account for its usage; a second time only lets it owe what its terms now allow.

        Raises:
            NodeFault: ``CONFLICT`` naming ``terms`` or ``card`` for an account that cannot be billed so, or whose card
                was declined; ``BILLING_UNAVAILABLE``.
        """
        price = self._config.meter_price
        if price is None or not isinstance(account.terms, Postpaid):
            raise NodeFault(NodeReason.CONFLICT, field="terms", detail="must be post-paid, and usage must be metered")
        current = await self._read(account.id)
        billing = current.billing
        if billing.subscription is not None:
            await self.keeper.renew_limit(account.id)
            return
        if billing.card is None or billing.customer is None:
            raise NodeFault(NodeReason.CONFLICT, field="card", detail="must be saved first")
        try:
            made = await self._subscribe(current, billing.customer, billing.card, price)
        except StripeFault as fault:
            if fault.kind is StripeFaultKind.INVALID:
                self._log("billing.stripe", level=Level.ERROR, doing="subscribe", kind="invalid", code=fault.code)
                raise NodeFault(NodeReason.CONFLICT, field="card", detail="is not there any more") from None
            raise told(fault, self._log, "subscribe") from None
        limit = self.keeper.trust_limit(current, await self.keeper.paid_cents(account.id))
        row = await self._books.change_account(
            account.id, partial(changed, partial(_subscribed, made)), overdraft=limit
        )
        if row is not None and read_account(row).billing.subscription != made:
            self._log("billing.two_subscriptions", level=Level.ERROR, account=account.id, second=made)

    async def _subscribe(self, account: Account, customer: str, card: str, price: str) -> str:
        name = f"{account.id}-{card}-{price}-{self._config.threshold_cents}"
        ended = await self._books.read(lambda: tasks(account.id, ENDED, None, 1))
        if ended:
            name = f"{name}-{ended[0].id}"
        await self._stripe.set_default_card(customer=customer, payment_method=card, key=name)
        # Looked for first: after a day Stripe has forgotten the key of one whose answer we never got.
        for known in await self._stripe.subscriptions_of(customer):
            if known.prices == (price,) and known.tags.account == account.id and known.status == "active":
                return known.id
        return await self._stripe.subscribe(
            Purpose(account.id, "postpaid"),
            customer=customer,
            price=price,
            key=name,
            threshold_cents=self._config.threshold_cents,
        )

    # -------------------------------------------------------------------------------------------------------- webhooks

    async def webhook(self, body: bytes, signature: str | None) -> None:
        """Take in a webhook: the raw body, and its ``Stripe-Signature``.

        Raises:
            WebhookFault: it is not Stripe's, not for this account or mode, or malformed.
            NodeFault: ``BILLING_UNAVAILABLE``: nothing was done; Stripe will send it again.
            ChannelFault: ``STORE_UNAVAILABLE``, as well.
        """
        try:
            reader = await self._ready()
            event = reader.read(body, signature)
            await self.hearer.hear(event)
            self._books.metrics.webhook(_WORDS.sub(r"_\1", type(event.what).__name__).lower())
        except WebhookFault as fault:
            self._books.metrics.webhook_refused(fault.reason.value)
            raise
        except StripeFault as fault:
            raise told(fault, self._log, "webhook") from None
        except CreditFault:
            raise NodeFault(NodeReason.BILLING_UNAVAILABLE, detail="the amount cannot be booked") from None

    async def hear(self, event: StripeEvent) -> None:
        """Take in an event that was verified already. Raises as :class:`mppnode.billing.hearing.Hearer`."""
        await self.hearer.hear(event)

    async def reconcile(self, since: int, until: int) -> Reconciled:
        """Compare Stripe's objects from ``since`` to before ``until`` (Unix seconds) with the ledger, and book them.

        Raises:
            NodeFault: ``BILLING_UNAVAILABLE``.
        """
        try:
            return await self.reconciler.run(since, until)
        except StripeFault as fault:
            raise told(fault, self._log, "reconcile") from None

    # ------------------------------------------------------------------------------------------------------------ ours

    async def _ready(self) -> WebhookReader:
        if self._reader is None:
            identity = await self._stripe.start(livemode=self._config.livemode)
            self._reader = WebhookReader(
                self._config.webhook_secrets,
                account=identity.account,
                livemode=identity.livemode,
                clock=self._clock,
            )
        return self._reader

    async def _customer(self, account: Account) -> str:
        """The account's customer at Stripe, made on first need; two that need it at once get the same."""
        if account.billing.customer is not None:
            return account.billing.customer
        current = await self._read(account.id)
        if current.billing.customer is not None:
            return current.billing.customer
        gone = await self._books.read(lambda: tasks(account.id, FORGOTTEN, None, 1))
        key = f"{account.id}-{gone[0].id}" if gone else f"{account.id}-first"
        made = await self._stripe.create_customer(Purpose(account.id, "account"), email=current.email, key=key)
        row = await self._books.change_account(account.id, partial(changed, partial(_named, made)))
        kept = None if row is None else row.customer
        if kept is None:
            raise NodeFault(NodeReason.CONFLICT, field="account", detail="is gone")
        return kept

    async def _read(self, account: AccountId) -> Account:
        row = await self._books.read(lambda: find_account(By.ID, account))
        if row is None:
            raise NodeFault(NodeReason.CONFLICT, field="account", detail="is gone")
        return read_account(row)

    def _reference(self, what: str) -> str:
        return f"{what}-{self._entropy(_REFERENCE_BYTES).hex()}"


def _named(customer: str, account: Account) -> Account:
    if account.billing.customer is not None:
        return account
    return replace(account, billing=replace(account.billing, customer=customer))


def _subscribed(subscription: str, account: Account) -> Account:
    if account.billing.subscription is not None:
        return account
    return replace(account, billing=replace(account.billing, subscription=subscription))
