"""Pays the fees of payers' opens and top-ups, within a budget that a crash cannot forget.

The order is the law: check, rehearse, write the grant down, and only then let a signature leave. A grant ties up the
most the transaction can cost until the chain has shown what it did cost, or that it can never be mined; so thousands of
opens that revert, or that are never sent, cost no more than the budget of their hour.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from channels import sponsor as rules
from channels.chain import Chain, Fate, Receipt
from channels.descriptor import Descriptor, Escrow
from channels.faults import ChannelFault, Reason
from channels.instants import UnixSeconds
from channels.signature import address_of
from channels.sponsor import SponsorPolicy, Sponsorship
from channels.tempo_tx import Call, SignedTx
from channels.units import PICO_PER_UNIT, Units
from channels.verify import VerifiedOpen
from mppnode.config.secrets import Secret
from mppnode.kernel.clock import Clock
from mppnode.ledger.base import Budget, BudgetSpent, Grant, Ledger
from mppnode.observe.metrics import Metrics

GAS_CEILING: Final = 2_000_000
"""No measurement is believed beyond this: as much as the reference server pays for."""
_PAUSE_S: Final = 60  # how long no sponsorship is offered after everybody's budget was found spent


class Sponsor:
    """One fee payer. Nothing here is sent: the caller broadcasts what it gets back."""

    def __init__(
        self,
        ledger: Ledger,
        chain: Chain,
        *,
        key: Secret[bytes],
        policy: SponsorPolicy,
        budget: Budget,
        clock: Clock,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics if metrics is not None else Metrics.unseen(clock)
        self._ledger = ledger
        self._chain = chain
        self._key = key
        self._policy = policy
        self._budget = budget
        self._clock = clock
        self._paused_until: float = 0
        self.address = address_of(key.reveal())
        """Who pays: needs a balance in the first of the policy's fee tokens."""

    @property
    def offering(self) -> bool:
        """Whether challenges should say that fees are paid.

        Not while the budget is spent: a payer told to pay its own fee still gets in, one promised a sponsor would not.
        """
        return self._clock.monotonic() >= self._paused_until

    async def pay_for_open(self, opened: VerifiedOpen, escrow: Escrow, *, expires: UnixSeconds) -> SignedTx:
        """Co-sign a verified open; the same one again gives the same bytes. ``expires`` is its challenge's end.

        The voucher must have been verified before: what is paid for here should bring in money.

        Raises:
            ChannelFault: ``TRANSACTION_REJECTED``, ``CHAIN_REJECTED`` when it would revert, ``RATE_LIMITED`` when the
                budget is spent, ``CHAIN_UNAVAILABLE``, ``STORE_UNAVAILABLE``. Nothing was signed away then.
        """
        return await self._pay(opened.signed, rules.open_call(opened, escrow), escrow, expires)

    async def pay_for_top_up(
        self, signed: SignedTx, descriptor: Descriptor, additional: Units, escrow: Escrow, *, expires: UnixSeconds
    ) -> SignedTx:
        """Co-sign a verified top-up of ``additional`` base units. Raises as :meth:`pay_for_open`."""
        return await self._pay(signed, rules.top_up_call(descriptor, additional, escrow), escrow, expires)

    async def find(self, signed: SignedTx) -> SignedTx | None:
        """What became of ``signed`` if this sponsor has paid for it and the chain has it; promises nothing new.

        A repeat may fail its trial because the first one has taken the payer's money. Raises ``CHAIN_UNAVAILABLE``.
        """
        cosigned = signed.cosign(self._policy.fee_tokens[0], self._key.reveal())
        return None if await self._chain.receipt(cosigned.tx_hash) is None else cosigned

    async def _pay(self, signed: SignedTx, call: Call, escrow: Escrow, expires: UnixSeconds) -> SignedTx:
        def check(gas_max: int) -> Sponsorship:
            return rules.check(
                signed,
                call,
                self._policy,
                chain_id=escrow.chain_id,
                gas_max=gas_max,
                now=self._clock.now(),
                expires=expires,
            )

        check(GAS_CEILING)  # what is wrong by itself does not even cost a question to the chain
        measured = await self._chain.gas_of(signed.tx, signed.sender)
        promise = check(rules.gas_allowed(measured))
        # The very envelope that will be sent, with its own gas limit: too low a limit reverts at our expense.
        final = replace(signed.tx, fee_token=promise.fee_token)
        await self._chain.rehearse(final, signed.sender, fee_payer=self.address)
        cosigned = promise.cosign(self._key.reveal())
        await self._grant(Grant(cosigned.tx_hash, signed.sender, promise.fee_max, promise.valid_before))
        return cosigned

    async def _grant(self, grant: Grant) -> None:
        try:
            # A repeat needs no second grant: signing is deterministic and the chain counts an expiring nonce once.
            await self._ledger.grant(grant, self._budget)
        except BudgetSpent as spent:
            if spent.total:
                self._paused_until = self._clock.monotonic() + _PAUSE_S
            raise ChannelFault(Reason.RATE_LIMITED, detail="no more fees are paid for others at the moment") from spent

    async def settle_open_grants(self) -> int:
        """Replace grants by what was really paid, where that is final; how many there were.

        Raises:
            ChannelFault: ``CHAIN_UNAVAILABLE`` or ``STORE_UNAVAILABLE``, after the others were looked at.
        """
        final = (await self._chain.finalised()).number
        settled = 0
        failed: ChannelFault | None = None
        for grant in await self._ledger.open_grants():
            try:
                fee = await self._fee_paid(grant, final)
            except ChannelFault as fault:
                failed = fault  # one that the chain's nodes dispute must not tie up the rest
                continue
            if fee is not None:
                await self._ledger.settle_grant(grant.tx_hash, fee)
                self._metrics.gas_sponsored(fee * PICO_PER_UNIT)
                settled += 1
        if failed is not None:
            raise failed
        return settled

    async def _fee_paid(self, grant: Grant, final: int) -> Units | None:
        """What a grant cost us in the end, in base units; None while nobody can know."""
        outcome = await self._chain.outcome(grant.tx_hash, valid_before=grant.valid_before)
        if outcome is Fate.EXPIRED:
            return Units(0)
        if not isinstance(outcome, Receipt) or outcome.block > final:
            return None
        return Units(sum(outcome.fee_paid(self.address, token) for token in self._policy.fee_tokens))
