"""Paying a stranger's fee: what a fee payer signs, and what it never does.

A fee payer's signature is a blank cheque over everything in the transaction that costs gas, so the question is not
"does anything look wrong" but "is this byte for byte the one transaction we meant to pay for". The calldata is rebuilt
from what was verified and must be equal; every field with a price has a ceiling.

Source: Tempo transaction specification, fee payer signature; draft-tempo-session, sponsored open and top-up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from channels import escrow as escrow_v2
from channels.chain import fee_of
from channels.descriptor import Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import Address
from channels.instants import UnixSeconds
from channels.tempo_tx import EXPIRING_NONCE_KEY, UNPAID, Call, Form, SignedTx, decode
from channels.units import Units
from channels.verify import VerifiedOpen

FEE_UNITS_MAX: Final = Units(50_000)
"""0.05 USD: an open of a million gas costs 0.02 at the usual price."""


@dataclass(frozen=True, slots=True)
class SponsorPolicy:
    """The most a sponsor signs for. Attodollars per gas, base units, seconds."""

    fee_tokens: tuple[Address, ...]
    """Tokens a fee may be paid in; the first is the one we choose ourselves."""
    fee_per_gas_max: int = 100_000_000_000
    priority_fee_per_gas_max: int = 50_000_000_000
    """As the test network regularly asks for; the main network asks for a fiftieth of it."""
    fee_units_max: Units = FEE_UNITS_MAX
    """For one transaction, were all its gas used at its highest price."""
    validity_s_max: int = 60
    """How far ahead its validity may end: the chain takes 30 s, and clocks differ. A grant ties up budget so long."""


@dataclass(frozen=True, slots=True)
class Sponsorship:
    """A transaction that passed every check, and what co-signing it promises at most, in base units."""

    signed: SignedTx
    fee_token: Address
    fee_max: Units
    valid_before: UnixSeconds

    def cosign(self, key: bytes) -> SignedTx:
        """The complete transaction, with the fee payer's signature made from a 32-byte private key."""
        return self.signed.cosign(self.fee_token, key)


def open_call(opened: VerifiedOpen, escrow: Escrow) -> Call:
    """The one call a sponsored open consists of. Raises ``TRANSACTION_REJECTED`` for a v1 escrow."""
    terms = opened.descriptor
    call = escrow_v2.OpenCall(
        payee=terms.payee,
        operator=terms.operator,
        token=terms.token,
        deposit=opened.deposit,
        salt=terms.salt,
        authorized_signer=terms.authorized_signer,
    )
    return Call(_v2(escrow).address, escrow_v2.encode_open(call))


def top_up_call(descriptor: Descriptor, additional: Units, escrow: Escrow) -> Call:
    """The one call a sponsored top-up consists of. Raises ``TRANSACTION_REJECTED`` for a v1 escrow."""
    return Call(_v2(escrow).address, escrow_v2.encode_top_up(escrow_v2.TopUpCall(descriptor, additional)))


def gas_allowed(measured: int) -> int:
    """The highest gas limit to pay for, given what a transaction uses when it is tried: half as much again.

    State moves between the trial and the block, and clients add a margin of their own.
    """
    return measured + measured // 2


def check(
    signed: SignedTx,
    expected: Call,
    policy: SponsorPolicy,
    *,
    chain_id: int,
    gas_max: int,
    now: UnixSeconds,
    expires: UnixSeconds,
) -> Sponsorship:
    """Decide whether to pay for ``signed``, which must be exactly ``expected``; nothing is signed here.

    ``gas_max`` is the highest gas limit, see :func:`gas_allowed`; ``expires`` the end of the challenge it answers.

    Raises:
        ChannelFault: ``TRANSACTION_REJECTED``.
    """
    tx = signed.tx
    if signed.form not in UNPAID:
        raise _refused("does not leave its fee to a fee payer")
    if tx.chain_id != chain_id:
        raise _refused("is for another chain")
    if tx.calls != (expected,):
        raise _refused("is not exactly the call that is sponsored")
    if tx.nonce_key != EXPIRING_NONCE_KEY or tx.nonce != 0:
        raise _refused("does not use an expiring nonce")
    valid_before = _validity(signed, policy, now, expires)
    if not 0 < tx.gas <= gas_max:
        raise _refused("has a gas limit that is not sponsored", gas=tx.gas, most=gas_max)
    if not 0 < tx.max_fee_per_gas <= policy.fee_per_gas_max:
        raise _refused("has a fee per gas that is not sponsored")
    if tx.max_priority_fee_per_gas > min(tx.max_fee_per_gas, policy.priority_fee_per_gas_max):
        raise _refused("has a priority fee that is not sponsored")
    fee_max = fee_of(tx.gas, tx.max_fee_per_gas)
    if fee_max > policy.fee_units_max:
        raise _refused("has a total fee that is not sponsored", fee=fee_max, most=policy.fee_units_max)
    return Sponsorship(signed, policy.fee_tokens[0], fee_max, valid_before)


def _validity(signed: SignedTx, policy: SponsorPolicy, now: UnixSeconds, expires: UnixSeconds) -> UnixSeconds:
    """A budget is tied up until the transaction is mined or dead, so it must be able to be both, and soon."""
    valid_before, valid_after = signed.tx.valid_before, signed.tx.valid_after
    if valid_before is None or valid_before <= now:
        raise _refused("is no longer valid, or for ever")
    if valid_before > min(now + policy.validity_s_max, expires):
        raise _refused("is valid for longer than its challenge")
    if valid_after is not None and valid_after > now:
        raise _refused("is not valid yet")
    return valid_before


def accept_remote(asked: SignedTx, answer: bytes, policy: SponsorPolicy, *, sponsors: Collection[Address]) -> SignedTx:
    """The co-signed transaction a remote sponsor returned for ``asked``, if it is that and nothing else.

    Whoever co-signs could change what the sender did not commit to, and a compromised sponsor would try the rest too:
    the sponsor is recovered from its signature and every field of the sender's is compared.

    Raises:
        ChannelFault: ``TRANSACTION_REJECTED``.
    """
    assert asked.form in UNPAID
    signed = decode(answer)
    if signed.form is not Form.COSIGNED:
        raise _refused("came back without a fee payer's signature")
    if replace(signed.tx, fee_token=None) != asked.tx or signed.signature != asked.signature:
        raise _refused("came back changed")
    assert signed.sender == asked.sender, "the same payload and signature have one sender"
    if signed.fee_payer not in sponsors:
        raise _refused("came back signed by an unknown fee payer")
    if signed.tx.fee_token not in policy.fee_tokens:
        raise _refused("came back with a fee token that is not allowed")
    return signed


def _v2(escrow: Escrow) -> Escrow:
    # A v1 open is two calls, the first of which is an approval: nothing we want to pay for unseen.
    if escrow.protocol is not SessionProtocol.V2:
        raise _refused("opens or funds a v1 channel, whose fees are not sponsored")
    return escrow


def _refused(detail: str, **numbers: int) -> ChannelFault:
    return ChannelFault(Reason.TRANSACTION_REJECTED, field="transaction", detail=detail, **numbers)
