"""The node's handle on its accounts: the pure machine, the store, the clock and the policy, put together once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from channels.account import plan
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.model import Account, Command, Event, Outcome, Phase, Plan, ReleaseOrphans
from channels.policy import Policy
from channels.store import ChannelStore
from mppnode.kernel.clock import Clock


class Books:
    """Applies commands to accounts. The only way a balance changes (design D14)."""

    def __init__(self, store: ChannelStore, *, clock: Clock, policy: Policy) -> None:
        self._store = store
        self._clock = clock
        self._policy = policy

    async def apply(self, channel: ChannelId, command: Command) -> Plan[Outcome]:
        """Decide and commit ``command``; when this returns, its effect is durable.

        Raises:
            ChannelFault: the refusal, or ``STORE_UNAVAILABLE``; nothing changed.
        """
        now, policy = self._clock.now(), self._policy
        return await self._store.transact(channel, lambda account: plan(account, command, now=now, policy=policy))

    def require_deposit(self, deposit: int) -> None:
        """Refuse a deposit below the policy before anything is broadcast for it. Raises ``DEPOSIT_TOO_SMALL``."""
        if deposit < self._policy.deposit_units_min:
            raise ChannelFault(
                Reason.DEPOSIT_TOO_SMALL,
                field="deposit",
                detail="is too small",
                deposit=deposit,
                least=self._policy.deposit_units_min,
            )

    async def load(self, channel: ChannelId) -> Account | None:
        """The last committed account. Raises ``STORE_UNAVAILABLE``."""
        return await self._store.load(channel)

    async def accounts(self) -> Sequence[Account]:
        """Every account."""
        return await self._store.accounts()

    async def journal(self, channel: ChannelId) -> Sequence[Event]:
        """The events of one channel, in order."""
        return await self._store.journal(channel)

    def subscribe(self, listener: Callable[[Account], None]) -> None:
        """Hear every committed account."""
        self._store.subscribe(listener)

    async def recover(self) -> int:
        """Release the holds of requests that died with the last process; returns how many accounts had some.

        What was recorded as consumed stays charged, what was merely held is given back: the node loses at most one
        window per stream, and nobody pays for tokens that may never have arrived.
        """
        orphaned = [a for a in await self.accounts() if a.holds and a.phase not in (Phase.CAPTURED, Phase.CLOSED)]
        for account in orphaned:
            await self.apply(account.id, ReleaseOrphans())
        return len(orphaned)
