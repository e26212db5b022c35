"""What happens at Stripe without anybody asking: cards are charged, invoices close, banks dispute, webhooks go out.

Each story changes the peer's objects and notes the events Stripe would send; ``deliver`` sends them, signed as Stripe does.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import aiohttp

from mppnode.kernel.clock import Clock

ACCOUNT = "acct_1PeerPeerPeer"
VERSION = "2026-10-28.endive"
NOW = 1_900_000_000
DAY = 86_400
CENTS_MIN = 50
"""What Stripe does not charge a card for is carried to the next invoice."""
DECLINED = {"pm_declined": ("card_declined", "insufficient_funds"), "pm_auth": ("authentication_required", "authentication_required")}


def sign(body: bytes, secret: str, at: int) -> str:
    """The ``Stripe-Signature`` header of a webhook. Source: docs.stripe.com/webhooks#verify-manually."""
    digest = hmac.new(secret.encode(), str(at).encode() + b"." + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


class StripeStories:
    """Mixed into the peer, which has the objects, the clock and the events."""

    objects: dict[str, dict[str, Any]]
    events: list[dict[str, Any]]
    livemode: bool
    clock: Clock | None

    def now(self) -> int:
        raise AssertionError("the peer's")

    def of(self, kind: str) -> list[dict[str, Any]]:
        raise AssertionError("the peer's")

    def add(self, kind: str, prefix: str, **fields: Any) -> dict[str, Any]:
        raise AssertionError("the peer's")

    # -------------------------------------------------------------------------------------------------- the webhooks

    def emit(self, kind: str, thing: dict[str, Any]) -> dict[str, Any]:
        """Note an event with the object as it is now."""
        event = {
            "id": f"evt_{len(self.events) + 1:06d}", "object": "event", "type": kind, "created": self.now(), "livemode": self.livemode,
            "api_version": VERSION, "data": {"object": copy.deepcopy(thing)}, "pending_webhooks": 1, "request": None,
        }
        self.events.append(event)
        return event

    async def deliver(
        self, session: aiohttp.ClientSession, url: str, secret: str, events: Iterable[dict[str, Any]] | None = None, *, times: int = 1, at: int | None = None
    ) -> list[int]:
        """Send these events (all, unless told) in this order, each ``times`` over; the statuses that came back."""
        statuses = []
        for event in list(self.events if events is None else events):
            body = json.dumps(event).encode()
            for _ in range(times):
                headers = {"Stripe-Signature": sign(body, secret, self.now() if at is None else at), "Content-Type": "application/json"}
                async with session.post(url, data=body, headers=headers) as response:
                    statuses.append(response.status)
        return statuses

    # ------------------------------------------------------------------------------------------------------ payments

    def intent(self, amount: int, customer: str | None, metadata: dict[str, str], *, currency: str = "usd", keep_card: bool = False) -> dict[str, Any]:
        """A PaymentIntent nobody has paid yet."""
        return self.add(
            "payment_intent", "pi", amount=amount, amount_received=0, currency=currency, customer=customer, payment_method=None, latest_charge=None,
            status="requires_payment_method", metadata=metadata, last_payment_error=None, setup_future_usage="off_session" if keep_card else None,
        )

    def confirm(self, intent: dict[str, Any], card: str | None) -> bool:
        """Try a card: whether the money came at once."""
        intent.update(payment_method=card, last_payment_error=None)
        if card in DECLINED:
            code, decline = DECLINED[card]
            error = {"type": "card_error", "code": code, "decline_code": decline, "message": "words of the bank"}
            intent.update(status="requires_payment_method", last_payment_error=error)
            self.emit("payment_intent.payment_failed", intent)
        elif card in ("pm_slow", "pm_action"):
            intent["status"] = "processing" if card == "pm_slow" else "requires_action"
        else:
            self.settle(intent["id"])
        return bool(intent["status"] == "succeeded")

    def settle(self, payment: str) -> dict[str, Any]:
        """The money of a payment arrives."""
        intent = self.objects[payment]
        charge = self.add(
            "charge", "ch", amount=intent["amount"], amount_refunded=0, currency=intent["currency"], customer=intent["customer"], payment_intent=payment,
            metadata=dict(intent["metadata"]), paid=True,
        )
        intent.update(status="succeeded", amount_received=intent["amount"], latest_charge=charge["id"], last_payment_error=None)
        self.emit("payment_intent.succeeded", intent)
        return intent

    def complete_checkout(self, session: str, card: str = "pm_visa") -> dict[str, Any]:
        """The customer pays on Checkout's page, or leaves a card there; what was made by it."""
        page = self.objects[session]
        sent: dict[str, str] = page["sent"]
        setup = sent["mode"] == "setup"
        prefix = "setup_intent_data[metadata][" if setup else "payment_intent_data[metadata]["
        metadata = {name[len(prefix) : -1]: value for name, value in sent.items() if name.startswith(prefix)}
        own = {name[len("metadata[") : -1]: value for name, value in sent.items() if name.startswith("metadata[")}
        page.update(mode=sent["mode"], customer=sent.get("customer"), metadata=own, client_reference_id=sent.get("client_reference_id"), status="complete", currency="usd")
        if setup:
            made = self.add("setup_intent", "seti", customer=sent["customer"], payment_method=card, usage="off_session", status="succeeded", metadata=metadata)
            page.update(payment_status="no_payment_required", payment_intent=None, amount_total=None)
            self.emit("setup_intent.succeeded", made)
        else:
            cents = int(sent["line_items[0][quantity]"]) * int(sent["line_items[0][price_data][unit_amount]"])
            keep = sent.get("payment_intent_data[setup_future_usage]") == "off_session"
            made = self.intent(cents, sent.get("customer"), metadata, keep_card=keep)
            if not self.confirm(made, card):
                return made  # the page stays open, for another card
            page.update(payment_status="paid", payment_intent=made["id"], amount_total=cents)
        self.emit("checkout.session.completed", page)
        return made

    def refund(self, payment: str, cents: int) -> dict[str, Any]:
        """Give some of a payment back."""
        charge = self.objects[self.objects[payment]["latest_charge"]]
        assert cents <= charge["amount"] - charge["amount_refunded"], "more than is left"
        made = self.add("refund", "re", amount=cents, currency=charge["currency"], payment_intent=payment, charge=charge["id"], status="succeeded")
        charge["amount_refunded"] += cents
        self.emit("charge.refunded", charge)
        return made

    def dispute(self, payment: str, *, inquiry: bool = False) -> dict[str, Any]:
        """A bank takes the money of a payment back, or only asks about it."""
        intent = self.objects[payment]
        status = "warning_needs_response" if inquiry else "needs_response"
        made = self.add(
            "dispute", "du", amount=intent["amount"], currency=intent["currency"], payment_intent=payment, charge=intent["latest_charge"], status=status, reason="fraudulent"
        )
        self.emit("charge.dispute.created", made)
        return made

    def close_dispute(self, dispute: str, status: str) -> dict[str, Any]:
        """The bank decides: ``won``, ``lost`` or, for an inquiry, ``warning_closed``."""
        found = self.objects[dispute]
        found["status"] = status
        self.emit("charge.dispute.closed", found)
        return found

    # ------------------------------------------------------------------------------------------------------ invoices

    def metered_price(self, event_name: str, cents_per_unit: str = "0.0001") -> dict[str, Any]:
        """The price for each unit an active meter counts, made when it is not there; the default is for micro-dollars."""
        meter = next((meter for meter in self.of("billing.meter") if meter["event_name"] == event_name), None)
        meter = meter or self.add("billing.meter", "mtr", event_name=event_name, status="active")
        recurring = {"interval": "month", "usage_type": "metered", "meter": meter["id"]}
        for price in self.of("price"):
            if (price["unit_amount_decimal"], price["recurring"]) == (cents_per_unit, recurring):
                return price
        return self.add("price", "price", currency="usd", unit_amount_decimal=cents_per_unit, recurring=recurring)

    def due(self, subscription: str, until: int | None = None) -> int:
        """Cents for what was used since the last invoice and before ``until``."""
        found = self.objects[subscription]
        item = found["items"]["data"][0]
        name = self.objects[item["price"]["recurring"]["meter"]]["event_name"]
        end = self.now() if until is None else until
        units = sum(
            int(event["payload"]["value"]) for event in self.of("billing.meter_event")
            if event["event_name"] == name and event["payload"]["stripe_customer_id"] == found["customer"]
            if item["current_period_start"] <= event["timestamp"] < end
        )  # fmt: skip
        exact = Fraction(item["price"]["unit_amount_decimal"]) * units
        return (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)

    def over_threshold(self) -> list[str]:
        """Subscriptions that are to be invoiced before their period ends."""
        return [found["id"] for found in self.of("subscription") if found["billing_thresholds"] and self.due(found["id"]) >= found["billing_thresholds"]["amount_gte"]]

    def close_invoice(self, subscription: str, *, until: int | None = None) -> dict[str, Any]:
        """Invoice what was used before ``until`` (now, unless told) and charge the customer's default card.

        Usage of the closed period that is reported later is never billed. Stripe waits about an hour before it closes: with an
        earlier ``until``, what was reported within that hour is counted.
        """
        assert self.clock is not None, "a period needs a clock: running_peer(clock=...)"
        found = self.objects[subscription]
        item, customer = found["items"]["data"][0], self.objects[found["customer"]]
        end = self.now() if until is None else until
        total = self.due(subscription, end)
        owed = total + customer["balance"]
        charged = owed if owed >= CENTS_MIN else 0
        details = {"subscription": subscription, "metadata": dict(found["metadata"]), "subscription_proration_date": None}
        invoice = self.add(
            "invoice", "in", status="open", customer=customer["id"], currency="usd", total=total, starting_balance=customer["balance"], amount_due=charged,
            amount_paid=0, amount_remaining=charged, attempt_count=0, attempted=False, billing_reason="subscription_cycle", last_finalization_error=None,
            collection_method="charge_automatically", period_start=item["current_period_start"], period_end=end, metadata={},
            parent={"type": "subscription_details", "quote_details": None, "subscription_details": details},
        )
        customer["balance"] = owed - charged
        item["current_period_start"] = end
        if charged == 0:
            invoice["status"] = "paid"
            self.emit("invoice.paid", invoice)
            return invoice
        made = self.intent(charged, customer["id"], {})  # a subscription's metadata does not reach its payments
        self.add(
            "invoice_payment", "inpay", invoice=invoice["id"], amount_requested=charged, amount_paid=None, currency="usd", is_default=True, status="open",
            payment={"type": "payment_intent", "payment_intent": made["id"]}, status_transitions={"canceled_at": None, "paid_at": None},
        )
        return self.retry_invoice(invoice["id"])

    def retry_invoice(self, invoice: str) -> dict[str, Any]:
        """Try the customer's default card for an open invoice."""
        found = self.objects[invoice]
        assert found["status"] == "open", f"the invoice is {found['status']}"
        link = next(link for link in self.of("invoice_payment") if link["invoice"] == invoice)
        card = self.objects[found["customer"]]["invoice_settings"]["default_payment_method"]
        assert card != "pm_slow", "not told here: an invoice whose money is on its way"
        found.update(attempted=True, attempt_count=found["attempt_count"] + 1)
        paid = self.confirm(self.objects[link["payment"]["payment_intent"]], card)
        if not paid:
            self.emit("invoice.payment_failed", found)
            return found
        link.update(status="paid", amount_paid=found["amount_due"], status_transitions={"canceled_at": None, "paid_at": self.now()})
        found.update(status="paid", amount_paid=found["amount_due"], amount_remaining=0)
        self.emit("invoice.paid", found)
        return found
