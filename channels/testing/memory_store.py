"""A store of accounts in a dictionary, for tests and simulations. It keeps nothing and forgives nothing.

It runs every step twice, as the contract allows, so a step that is not pure shows at once; and it checks that the
events of a plan really lead to the plan's account, which a store on disk has no time for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TypeVar

from channels.account import check, fold
from channels.ids import ChannelId
from channels.model import Account, Event, Plan
from channels.store import Step

R = TypeVar("R")


class MemoryStore:
    """A :class:`channels.store.ChannelStore` that ends with its process."""

    def __init__(self) -> None:
        self._accounts: dict[ChannelId, Account] = {}
        self._journals: dict[ChannelId, list[Event]] = {}
        self._listeners: list[Callable[[Account], None]] = []
        self._soft: dict[ChannelId, Account] = {}

    async def load(self, channel: ChannelId) -> Account | None:
        """See :meth:`ChannelStore.load`."""
        self._answered(channel)
        return self._accounts.get(channel)

    async def transact(self, channel: ChannelId, step: Step[R], *, relaxed: bool = False) -> Plan[R]:
        """See :meth:`ChannelStore.transact`; nothing is awaited, so steps are serial by themselves."""
        before = self._accounts.get(channel)
        if not relaxed:
            self._answered(channel)
        plan = step(before)
        assert step(before) == plan, "a step is pure"
        if plan.events:
            check(plan.account)
            assert reduce(fold, plan.events, before) == plan.account, "the events are the account"
            self._accounts[channel] = plan.account
            self._journals.setdefault(channel, []).extend(plan.events)
            self._soft[channel] = plan.account
            if not relaxed:
                self._answered(channel)
        return plan

    def _answered(self, channel: ChannelId) -> None:
        """Tell what is firm now: like a store on disk, what was relaxed is told when somebody may be shown it."""
        account = self._soft.pop(channel, None)
        if account is not None:
            for listener in self._listeners:
                listener(account)

    def subscribe(self, listener: Callable[[Account], None]) -> None:
        """See :meth:`ChannelStore.subscribe`."""
        self._listeners.append(listener)

    async def accounts(self) -> Sequence[Account]:
        """See :meth:`ChannelStore.accounts`."""
        return [self._accounts[channel] for channel in sorted(self._accounts)]

    async def journal(self, channel: ChannelId) -> Sequence[Event]:
        """See :meth:`ChannelStore.journal`."""
        return list(self._journals.get(channel, ()))
