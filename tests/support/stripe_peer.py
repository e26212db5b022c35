"""A Stripe on loopback that refuses whatever Stripe's published parameters do not have, and can fail at every point.

What it takes is in ``stripe_shapes``, what happens at Stripe by itself in ``stripe_stories``. It runs in the test's own process,
or in one of its own (``stripe_process``), where it outlives a node that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from aiohttp import web

from mppnode.kernel.clock import Clock
from tests.support.stripe_shapes import LISTS, SHAPES, RefusedError, check, invalid
from tests.support.stripe_stories import ACCOUNT, DAY, NOW, VERSION, StripeStories, sign

__all__ = ["ACCOUNT", "KEY", "NOW", "SHAPES", "VERSION", "Mishap", "RefusedError", "Seen", "StripePeer", "check", "running_peer", "sign"]

KEY = "sk_test_canaryCanaryCanary0123456789"
METER_PAST_S = 35 * DAY
METER_AHEAD_S = 300

class Mishap(Enum):
    """What goes wrong with one request."""

    LOSE_ANSWER = auto()
    """It is carried out, and the connection breaks before the answer."""
    LOSE_REQUEST = auto()
    """The connection breaks before anything is done."""
    SILENT = auto()
    """It is carried out, and nothing is ever said."""
    BUSY = auto()
    BROKEN = auto()
    """500 without an effect."""
    BROKEN_FOR_GOOD = auto()
    """500 without an effect, with the word that a repeat will not help."""
    LOCKED_OUT = auto()
    """401: the key was revoked."""
    BROKEN_AFTER = auto()
    """500 after the effect, saved under the key like any other answer."""
    IN_USE = auto()
    """409: the same key is at work."""
    GARBAGE = auto()
    """It is carried out, and the answer is not JSON."""
    HUGE = auto()
    """It is carried out, and the answer does not end."""
    REDIRECT = auto()


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    params: dict[str, str]
    key: str | None
    headers: Mapping[str, str]


@dataclass
class StripePeer(StripeStories):
    """The state of one Stripe account. Without a clock its time begins at ``NOW``, and each object takes a second."""

    base_url: str = ""
    livemode: bool = False
    account: str = ACCOUNT
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    mishaps: deque[Mishap] = field(default_factory=deque)
    answers: dict[str, tuple[str, int, dict[str, Any]]] = field(default_factory=dict)
    override: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Changes every answer: for tests of what the gateway takes for an answer."""
    clock: Clock | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    """What Stripe would have told by webhook, in the order it happened."""
    answered: dict[str, int] = field(default_factory=dict)
    """When each key was first used: Stripe forgets keys after a day."""
    _numbers: int = 0

    def now(self) -> int:
        """Unix seconds."""
        return NOW + self._numbers if self.clock is None else self.clock.now()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """All objects of one kind, oldest first."""
        return [item for item in self.objects.values() if item["object"] == kind]

    def add(self, kind: str, prefix: str, **fields: Any) -> dict[str, Any]:
        """Make an object."""
        self._numbers += 1
        made = {
            "id": f"{prefix}_{self._numbers:06d}", "object": kind, "created": self.now(),
            "livemode": self.livemode, **fields,
        }
        self.objects[made["id"]] = made
        return made

    # ------------------------------------------------------------------------------------------------- one request

    async def handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.post() if request.method == "POST" else request.query
        params = {str(name): str(value) for name, value in raw.items()}
        key = request.headers.get("Idempotency-Key")
        self.seen.append(Seen(request.method, request.path, params, key, dict(request.headers)))
        mishap = self.mishaps.popleft() if self.mishaps else None
        refused = {
            Mishap.BUSY: (429, "rate_limit"),
            Mishap.BROKEN: (500, None),
            Mishap.BROKEN_FOR_GOOD: (500, None),
            Mishap.IN_USE: (409, "idempotency_key_in_use"),
            Mishap.LOCKED_OUT: (401, "api_key_expired"),
        }
        if mishap in refused:
            status, code = refused[mishap]
            headers = {"Stripe-Should-Retry": "false"} if mishap is Mishap.BROKEN_FOR_GOOD else {}
            error = {"type": "api_error", "code": code, "message": f"upstream text {KEY}"}
            return web.json_response({"error": error}, status=status, headers=headers)
        if mishap is Mishap.LOSE_REQUEST:
            return self._hang_up(request)
        if mishap is Mishap.REDIRECT:
            return web.Response(status=307, headers={"Location": f"{self.base_url}/elsewhere"})
        status, body, replayed = self._answer(request, params, key, break_after=mishap is Mishap.BROKEN_AFTER)
        match mishap:
            case Mishap.LOSE_ANSWER:
                return self._hang_up(request)
            case Mishap.SILENT:
                await asyncio.Event().wait()  # until the caller hangs up, which cancels this
            case Mishap.GARBAGE:
                return web.Response(text="<html>a proxy's page</html>")
            case Mishap.HUGE:
                return await self._endless(request)
        if self.override is not None and status == 200:
            body = self.override(body)
        # A notice is for developers at a terminal: the package would raise a warning in the middle of a payment.
        headers = {"Stripe-Notice": "a notice", **({"Idempotent-Replayed": "true"} if replayed else {})}
        return web.json_response(body, status=status, headers=headers)

    @staticmethod
    def _hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    @staticmethod
    async def _endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"x" * 65_536)
        return response

    def _answer(
        self, request: web.Request, params: dict[str, str], key: str | None, *, break_after: bool
    ) -> tuple[int, dict[str, Any], bool]:
        print_of = json.dumps([request.path, params], sort_keys=True)
        if key is not None and self.answered.get(key, self.now()) <= self.now() - DAY:
            self.answers.pop(key, None)
            del self.answered[key]
        if request.method == "POST" and key in self.answers:
            then, status, body = self.answers[key]
            if then != print_of:
                error = {"type": "idempotency_error", "message": f"key {key} was used with other parameters"}
                return 400, {"error": error}, False
            return status, body, True
        try:
            if request.headers.get("Authorization") != f"Bearer {KEY}":
                raise invalid(f"Invalid API Key provided: {request.headers.get('Authorization')}", status=401)
            if request.headers.get("Stripe-Version") != VERSION:
                raise invalid("the version is not the pinned one")
            route, ident = _route(request)
            check(SHAPES[request.method, route], params)
            if request.method == "POST" and key is None:
                raise invalid("this peer wants an Idempotency-Key on every POST")
            body = self._create(route, ident, params) if request.method == "POST" else self._find(route, ident, params)
            body = copy.deepcopy(body)  # what was answered once does not change with the object
            status = 500 if break_after else 200
            body = {"error": {"type": "api_error", "message": "late"}} if break_after else body
        except RefusedError as refused:
            status, body = refused.status, {"error": refused.error}
            if refused.error["type"] == "invalid_request_error":
                return status, body, False  # Stripe saves nothing when validation failed
        if key is not None:
            self.answers[key] = (print_of, status, body)
            self.answered[key] = self.now()
        return status, body, False

    # -------------------------------------------------------------------------------------------------- the effects

    def _create(self, route: str, ident: str | None, params: dict[str, str]) -> dict[str, Any]:
        if (customer := params.get("customer", ident)) is not None and customer not in self.objects:
            raise _missing(customer)
        match route:
            case "/v1/customers":
                settings = {"default_payment_method": None}
                return self.add("customer", "cus", email=params.get("email"), metadata=_under(params, "metadata"), invoice_settings=settings, balance=0)
            case "/v1/customers/{id}":
                return self._default_card(str(ident), params["invoice_settings[default_payment_method]"])
            case "/v1/subscriptions":
                return self._subscribe(params)
            case "/v1/checkout/sessions":
                return self._checkout(params)
            case "/v1/billing_portal/sessions":
                return self.add("billing_portal.session", "bps", url=f"https://billing.example.com/{customer}")
            case "/v1/payment_intents":
                return self._charge(params)
            case _:
                return self._meter(params)

    def _meter(self, params: dict[str, str]) -> dict[str, Any]:
        now, at, identifier = self.now(), int(params["timestamp"]), params["identifier"]
        if not now - METER_PAST_S <= at <= now + METER_AHEAD_S:
            code = "timestamp_too_far_in_past" if at < now else "timestamp_in_future"
            raise RefusedError(400, {"type": "invalid_request_error", "code": code, "message": "the time is out of bounds", "param": "timestamp"})
        if any(event["identifier"] == identifier and event["created"] > now - DAY for event in self.of("billing.meter_event")):
            raise invalid(f"An event already exists with identifier {identifier}.", "identifier")
        payload = {"stripe_customer_id": params["payload[stripe_customer_id]"], "value": params["payload[value]"]}
        return self.add("billing.meter_event", "mev", event_name=params["event_name"], identifier=identifier, timestamp=at, payload=payload)

    def _default_card(self, customer: str, card: str) -> dict[str, Any]:
        if card == "pm_others":
            raise _missing(card)
        found = self.objects[customer]
        found["invoice_settings"] = {"default_payment_method": card}
        return found

    def _subscribe(self, params: dict[str, str]) -> dict[str, Any]:
        price, customer = self.objects.get(params["items[0][price]"]), self.objects[params["customer"]]
        if price is None:
            raise _missing(params["items[0][price]"])
        if customer["invoice_settings"]["default_payment_method"] is None:
            raise invalid("This customer has no attached payment source or default payment method.", status=400)
        most = params.get("billing_thresholds[amount_gte]")
        item = {"id": "si_1", "object": "subscription_item", "price": price, "current_period_start": self.now()}
        return self.add(
            "subscription", "sub", customer=customer["id"], status="active", metadata=_under(params, "metadata"), collection_method=params.get("collection_method"),
            items={"object": "list", "url": "/v1/subscription_items", "has_more": False, "data": [item]}, sent=params,
            billing_thresholds=None if most is None else {"amount_gte": int(most), "reset_billing_cycle_anchor": None},
        )

    def _checkout(self, params: dict[str, str]) -> dict[str, Any]:
        has_items = any(name.startswith("line_items") for name in params)
        if has_items is not (params["mode"] == "payment"):
            raise invalid("line_items are for mode payment, and only for it", "line_items")
        other = "setup_intent_data" if has_items else "payment_intent_data"
        if any(name.startswith(other) for name in params):
            raise invalid("not in this mode", other)
        if not has_items and "allowed_payment_method_types[0]" not in params:
            raise invalid("mode setup needs a currency or payment method types", "currency")
        if has_items and int(params["line_items[0][price_data][unit_amount]"]) < 50:
            raise RefusedError(400, {"type": "invalid_request_error", "code": "amount_too_small", "message": "too small"})
        made = self.add("checkout.session", "cs_test", expires_at=self.now() + DAY, sent=params, status="open")
        made["url"] = f"https://checkout.example.com/{made['id']}"
        return made

    def _charge(self, params: dict[str, str]) -> dict[str, Any]:
        made = self.intent(int(params["amount"]), params.get("customer"), _under(params, "metadata"), currency=params["currency"])
        self.confirm(made, params.get("payment_method"))
        if (error := made["last_payment_error"]) is not None:
            message = f"declined for owner@customer.example with {KEY}"
            raise RefusedError(402, {**error, "message": message, "payment_intent": copy.deepcopy(made)})
        return made

    def _find(self, route: str, ident: str | None, params: dict[str, str]) -> dict[str, Any]:
        if route == "/v1/account":
            return {"id": self.account, "object": "account", "email": "owner@customer.example"}
        if route == "/v1/balance":
            return {"object": "balance", "livemode": self.livemode}
        if route.endswith("event_summaries"):
            spans = [event for event in self.of("billing.meter_event") if int(params["start_time"]) <= event["timestamp"] < int(params["end_time"])]
            meter = self.objects.get(str(ident), {})
            mine = [event for event in spans if event["payload"]["stripe_customer_id"] == params["customer"] and event["event_name"] == meter.get("event_name", event["event_name"])]
            total = float(sum(int(event["payload"]["value"]) for event in mine))
            return {"object": "list", "url": route, "has_more": False, "data": [{"id": "mes_1", "object": "billing.meter_event_summary", "aggregated_value": total, "meter": ident}]}
        if ident is not None:
            if ident not in self.objects:
                raise _missing(ident, 404)
            return self.objects[ident]
        found = [item for item in reversed(self.of(LISTS[route])) if self._fits(item, params)]
        ids = [item["id"] for item in found]
        start = ids.index(params["starting_after"]) + 1 if "starting_after" in params else 0
        size = int(params.get("limit", 10))
        return {"object": "list", "url": route, "has_more": len(found) > start + size, "data": found[start : start + size]}

    @staticmethod
    def _fits(item: dict[str, Any], params: dict[str, str]) -> bool:
        since, until = int(params.get("created[gte]", 0)), int(params.get("created[lt]", 1 << 40))
        named = all(item.get(name) == params[name] for name in ("customer", "payment_intent", "status", "invoice") if name in params)
        return since <= item["created"] < until and named


def _route(request: web.Request) -> tuple[str, str | None]:
    """The path as the shapes have it, and the id in it."""
    for method, route in SHAPES:
        pattern = re.escape(route).replace(re.escape("{id}"), "([A-Za-z0-9_]+)")
        if method == request.method and (match := re.fullmatch(pattern, request.path)):
            return route, match.group(1) if match.groups() else None
    raise invalid(f"Unrecognized request URL ({request.method}: {request.path})", status=404)


def _under(params: Mapping[str, str], name: str) -> dict[str, str]:
    return {key[len(name) + 1 : -1]: value for key, value in params.items() if key.startswith(f"{name}[")}


def _missing(ident: str, status: int = 400) -> RefusedError:
    return RefusedError(status, {"type": "invalid_request_error", "code": "resource_missing", "message": f"No such object: {ident}"})


@asynccontextmanager
async def running_peer(*, livemode: bool = False, clock: Clock | None = None) -> AsyncIterator[StripePeer]:
    """A peer on a port of its own."""
    peer = StripePeer(livemode=livemode, clock=clock)
    app = web.Application(client_max_size=1 << 20)
    app.router.add_route("*", "/{path:.*}", peer.handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    peer.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield peer
    finally:
        await runner.cleanup()
