"""The node's handle on its accounts: the pure machine, the store, the clock and the policy, put together once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from channels.account import plan
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.model import (
    AcceptVoucher,
    Account,
    Command,
    Event,
    Finish,
    HoldId,
    ObserveChain,
    Open,
    Outcome,
    Phase,
    Plan,
)
from channels.policy import Policy
from channels.store import ChannelStore
from channels.units import PICO_PER_UNIT, Pico
from mppnode.kernel.clock import Clock
from mppnode.kernel.probe import Probe, unwatched
from mppnode.ledger.telling import TOLD, tell
from mppnode.observe.logs import Log, quiet
from mppnode.observe.metrics import Metrics


class Books:
    """Applies commands to accounts. The only way a balance changes (design D14)."""

    def __init__(
        self,
        store: ChannelStore,
        *,
        clock: Clock,
        policy: Policy,
        probe: Probe = unwatched,
        metrics: Metrics | None = None,
        log: Log = quiet,
    ) -> None:
        self._log = log
        self._metrics = metrics if metrics is not None else Metrics.unseen(clock)
        self._store = store
        self._clock = clock
        self._policy = policy
        self._probe = probe

    async def apply(self, channel: ChannelId, command: Command) -> Plan[Outcome]:
        """Decide and commit ``command``; when this returns, its effect is durable.

        Raises:
            ChannelFault: the refusal, or ``STORE_UNAVAILABLE``; nothing changed.
        """
        now, policy, name = self._clock.now(), self._policy, type(command).__name__
        begun, accepted = self._clock.monotonic(), 0
        before: Phase | None = None

        def step(account: Account | None) -> Plan[Outcome]:
            nonlocal accepted, before
            accepted, before = (0, None) if account is None else (account.accepted, account.phase)
            return plan(account, command, now=now, policy=policy)

        self._probe(f"{name}.before")
        made = await self._store.transact(channel, step, relaxed=_may_be_lost(command))
        self._probe(f"{name}.after")
        if made.events and isinstance(command, (Open, AcceptVoucher)):
            delta = (made.account.accepted - accepted) * PICO_PER_UNIT
            self._metrics.voucher_accepted(delta, self._clock.monotonic() - begun)
            if isinstance(command, Open):
                self._metrics.channel_opened()
        if made.events and type(command) in TOLD:
            tell(self._log, command, made.account, before=before, accepted=accepted)
        return made

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

    async def release(self, channel: ChannelId, hold: HoldId) -> None:
        """End a hold whose request is unknown at what it last recorded; gone already is as good."""
        account = await self.load(channel)
        if account is None or hold not in account.holds:
            return
        # A final total equal to what was recorded charges nothing more, and gives nothing back.
        total = Pico(account.holds[hold].consumed)
        try:
            await self.apply(channel, Finish(hold, total))
        except ChannelFault as fault:
            if fault.reason not in (Reason.HOLD_FENCED, Reason.CHANNEL_FINALIZED):
                raise


def _may_be_lost(command: Command) -> bool:
    """What a power cut may undo: a look at the chain can be repeated.

    Nobody is shown it before a later, durable commit has made it last.
    """
    return isinstance(command, ObserveChain)
