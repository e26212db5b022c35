"""Stripe: whose key it is, whether it may charge, and whether this node will hear of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from mppnode.config.billing import BillingConfig
from mppnode.doctor.findings import Case, Check, Finding, fail, ok, skip, warn
from mppnode.http.billing_routes import WEBHOOK
from mppnode.observe.logs import quiet

if TYPE_CHECKING:
    from mppnode.gateways.stripe_account import StripeInspector

_SHOWN: Final = 3

_Look = Callable[["Case", "BillingConfig", "StripeInspector"], Awaitable[Finding]]


def _with_stripe(look: _Look, what: str) -> Callable[[Case, str], Awaitable[Finding]]:
    async def looked(case: Case, _: str) -> Finding:
        billing = case.config.billing
        if billing is None:
            return skip("no [billing]")
        try:
            from mppnode.gateways.stripe_account import StripeInspector
            from mppnode.gateways.stripe_api import BASE_URL
            from mppnode.gateways.stripe_faults import StripeFault, StripeFaultKind
            from mppnode.gateways.stripe_http import StripeLimits
        except ModuleNotFoundError:
            return fail("the extra is not installed", "pip install 'mppnode[stripe]'")

        def below(limit: int) -> int:
            return int.from_bytes(case.entropy(8)) % limit

        gateway = StripeInspector(
            billing.secret_key,
            session=case.http,
            below=below,
            log=quiet,
            base_url=billing.api_base or BASE_URL,
            limits=StripeLimits(attempts=1),
        )
        try:
            return await look(case, billing, gateway)
        except StripeFault as fault:
            if fault.kind is StripeFaultKind.REFUSED:
                return fail(
                    f"the key is not accepted for this ({fault.code})", f"let billing.secret_key name a key that {what}"
                )
            return fail(f"no usable answer ({fault.kind.value}, {fault.code})", "see status.stripe.com")

    return looked


async def _account(_: Case, billing: BillingConfig, stripe: StripeInspector) -> Finding:
    found = await stripe.account()
    mode = "live" if found.livemode else "test"
    if found.livemode is not billing.livemode:
        return fail(f"the key is of {mode} mode", "make billing.livemode and billing.secret_key agree")
    text = f"{found.id}, {mode} mode, country {found.country or 'unknown'}"
    if found.charges_enabled is False:
        return fail(f"{text}: it may not charge", "finish the account's activation in Stripe's dashboard")
    return ok(text + (", may charge" if found.charges_enabled else ""))


async def _webhook(case: Case, _: BillingConfig, stripe: StripeInspector) -> Finding:
    from mppnode.gateways.stripe_api import API_VERSION
    from mppnode.gateways.stripe_events import HANDLED

    # Those with the other spelling are told to event destinations, which this list does not have.
    wanted = {name for name in HANDLED if not name.startswith("v1.")}
    host = case.config.node.realm.partition(":")[0].lower()
    found = await stripe.webhooks()
    ours = [each for each in found if _leads_here(each.url, host)]
    url = f"https://{case.config.node.realm}{WEBHOOK}"
    if not ours:
        return fail(f"none of {len(found)} endpoints is {url}", "register it in Stripe's dashboard under Webhooks")
    living = [each for each in ours if each.enabled]
    if not living:
        return fail(f"{url} is disabled", "enable it in Stripe's dashboard, and see there why it was disabled")
    heard = frozenset[str]().union(*(each.events for each in living))
    missing = [] if "*" in heard else sorted(wanted - heard)
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (" and more" if len(missing) > _SHOWN else "")
        return fail(f"{url} is not told of {len(missing)} events: {shown}", "subscribe that endpoint to them")
    if any(each.api_version not in {None, API_VERSION} for each in living):
        return warn(
            f"{url} is told in another API version than {API_VERSION}", "make the endpoint anew with that version"
        )
    return ok(f"{url} is told of everything")


def _leads_here(url: str, host: str) -> bool:
    parts = urlsplit(url)
    return parts.hostname == host and parts.path == WEBHOOK


async def _meter(_: Case, billing: BillingConfig, stripe: StripeInspector) -> Finding:
    if billing.meter is None:
        return skip("no billing.meter: nobody is post-paid")
    if await stripe.find_meter(billing.meter) is None:
        return fail(
            f"no active meter counts {billing.meter}", "make one in Stripe's dashboard, or correct billing.meter"
        )
    return ok(f"an active meter counts {billing.meter}")


CHECKS: Final = (
    Check(
        "stripe-account",
        "the key is valid and of the mode `billing.livemode` says, and the account may charge",
        _with_stripe(_account, "may read the account"),
    ),
    Check(
        "stripe-webhook",
        f"an enabled endpoint at `https://<node.realm>{WEBHOOK}` is told of every event we handle, in our API version",
        _with_stripe(_webhook, "may read webhook endpoints"),
    ),
    Check("stripe-meter", "the meter of `billing.meter` is there", _with_stripe(_meter, "may read meters")),
)
"""In the order of the report."""
