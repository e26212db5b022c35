"""What an operator wants to know of a Stripe account and the node never asks: may it charge, and whom does it tell."""

from __future__ import annotations

import re
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final

import stripe

from mppnode.gateways.stripe_api import StripeGateway, _get, _read
from mppnode.gateways.stripe_objects import Fields

_COUNTRY = re.compile(r"[A-Z]{2}", re.ASCII)  # ISO 3166-1
_EVENT = re.compile(r"[a-z0-9_.]{1,100}|\*", re.ASCII)
_PAGE: Final = 100


@dataclass(frozen=True)
class StripeAccount:
    """Whose key it is. None where the key may not see it, as a restricted one may not."""

    id: str
    livemode: bool
    country: str | None
    charges_enabled: bool | None


@dataclass(frozen=True)
class StripeWebhook:
    """An endpoint that is told of events; ``*`` among them is every event."""

    url: str
    events: frozenset[str]
    enabled: bool
    api_version: str | None
    """None is the account's own default."""


class StripeInspector(StripeGateway):
    """Reads an account and changes nothing. Raises as :class:`StripeGateway` does."""

    async def account(self) -> StripeAccount:
        """The account itself. Source: docs.stripe.com/api/accounts/object, docs.stripe.com/api/balance."""
        account, _ = await _get(self._api.accounts.retrieve_current_async())
        balance, _ = await _get(self._api.balance.retrieve_async())

        def read() -> StripeAccount:
            country, charges = account.raw("country"), account.raw("charges_enabled")
            return StripeAccount(
                account.id(),
                balance.flag("livemode"),
                country if isinstance(country, str) and _COUNTRY.fullmatch(country) else None,
                charges if isinstance(charges, bool) else None,
            )

        return _read(read)

    async def webhooks(self) -> tuple[StripeWebhook, ...]:
        """Every endpoint of the account. Source: docs.stripe.com/api/webhook_endpoints/list."""

        def page(after: str | None) -> Coroutine[Any, Any, stripe.ListObject[stripe.WebhookEndpoint]]:
            params: stripe.params.WebhookEndpointListParams = {"limit": _PAGE}
            if after is not None:
                params["starting_after"] = after
            return self._api.webhook_endpoints.list_async(params)

        return await self._all(page, _webhook)


def _webhook(item: Fields) -> StripeWebhook:
    events = item.raw("enabled_events")
    names = events if isinstance(events, list) else []
    return StripeWebhook(
        item.url("url"),
        frozenset(name for name in names if isinstance(name, str) and _EVENT.fullmatch(name)),
        item.token("status") == "enabled",
        item.maybe_token("api_version"),
    )
