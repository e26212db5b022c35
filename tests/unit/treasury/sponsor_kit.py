"""A sponsor with its chain, its grants and its payers, for the tests of both."""

import asyncio
import dataclasses

import pytest

from channels import escrow as v2
from channels.descriptor import RESERVE_ADDRESS, Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault
from channels.ids import ZERO_ADDRESS, Hash32
from channels.signature import address_of
from channels.sponsor import SponsorPolicy
from channels.tempo_tx import EXPIRING_NONCE_KEY, Call, TempoTx
from channels.units import Units
from channels.verify import Terms, verify_open
from channels.voucher import VoucherDomain, derive_channel_id
from channels.wire.credential import OpenPayload
from mppnode.chain.devchain import PATH_USD, DevChain
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.kernel.clock import ManualClock
from mppnode.ledger.base import Budget, BudgetSpent
from mppnode.treasury.sponsor import Sponsor
from tests.support.hostile_rpc import HostileRpc

PAYER_KEY, SPONSOR_KEY = b"\x11" * 32, b"\x44" * 32
PAYER, PAYEE, SPONSOR = address_of(PAYER_KEY), address_of(b"\x22" * 32), address_of(SPONSOR_KEY)
CHAIN_ID, NOW = 31337, 1_900_000_000
V2 = Escrow(SessionProtocol.V2, CHAIN_ID, RESERVE_ADDRESS)
TERMS = Terms(V2, PAYEE, PATH_USD, sponsored=True)
SALT, DEPOSIT = Hash32(b"\x07" * 32), Units(10_000)
OPEN = v2.OpenCall(PAYEE, ZERO_ADDRESS, PATH_USD, DEPOSIT, SALT, PAYER)
DATA = v2.encode_open(OPEN)
GAS = 200_000  # an open uses 160,000 on the development chain, so 240,000 are allowed
FEE = 3_360  # what it pays for them
POLICY = SponsorPolicy(fee_tokens=(PATH_USD,), fee_units_max=Units(10_000))
BUDGET = Budget(grants_per_sender=3, total=Units(50_000))
RICH = Units(1_000_000)
TX = TempoTx(
    chain_id=CHAIN_ID,
    max_priority_fee_per_gas=1_000_000_000,
    max_fee_per_gas=25_000_000_000,
    gas=GAS,
    calls=(Call(RESERVE_ADDRESS, DATA),),
    nonce_key=EXPIRING_NONCE_KEY,
    nonce=0,
    valid_before=NOW + 25,
    valid_after=5,
    fee_token=None,
    sponsored=True,
)


class Grants:
    """The grants of a ledger in memory: one critical section, an hour's window, and open grants never forgotten."""

    def __init__(self, clock):
        self._clock = clock
        self.rows = {}
        self.fails = None

    async def grant(self, grant, budget):
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails
        if grant.tx_hash in self.rows:
            return False
        counted = [row for row in self.rows.values() if row[2] is None or row[1] > self._clock.now() - 3_600]
        if sum(1 for row in counted if row[0].sender == grant.sender) >= budget.grants_per_sender:
            raise BudgetSpent("the sender's")
        if sum(row[0].fee_max if row[2] is None else row[2] for row in counted) + grant.fee_max > budget.total:
            raise BudgetSpent("everybody's", total=True)
        self.rows[grant.tx_hash] = [grant, self._clock.now(), None]
        return True

    async def settle_grant(self, tx_hash, fee):
        self.rows[tx_hash][2] = fee

    async def open_grants(self, *, limit=200):
        return [grant for grant, _, fee in self.rows.values() if fee is None][:limit]

    @property
    def fees(self):
        return [fee for _, _, fee in self.rows.values()]


class Key:
    """A secret that counts how often it was needed."""

    def __init__(self, value):
        self._value = value
        self.revealed = 0

    def reveal(self):
        self.revealed += 1
        return self._value


class World:
    """A development chain with fees, behind one node address, and a sponsor on it."""

    def __init__(self, *, finality_lag=0, budget=BUDGET):
        self.clock = ManualClock(NOW)
        self.dev = DevChain(self.clock, chain_id=CHAIN_ID, fees=True, finality_lag=finality_lag)
        for owner in (PAYER, SPONSOR):
            self.dev.fund(owner, RICH)
        self.wire = HostileRpc(self.dev, self.clock)
        self.chain = RpcChain(self.wire, self.clock, limits=RpcLimits(), sleep=self.sleep)
        self.ledger = Grants(self.clock)
        self.key = Key(SPONSOR_KEY)
        self.sponsor = Sponsor(
            self.ledger, self.chain, key=self.key, policy=POLICY, budget=budget, clock=self.clock
        )
        self.key.revealed = 0

    async def sleep(self, seconds):
        self.clock.advance(seconds)

    async def pay(self, payload, *, expires=None):
        """What the node does with an open credential, up to the bytes that would be broadcast."""
        now = self.clock.now()
        opened = verify_open(payload, TERMS, now=now)
        return await self.sponsor.pay_for_open(opened, V2, expires=expires or now + 300)

    def fresh(self, *, key=PAYER_KEY, salt=0, **changes):
        """An open of now that is unlike every other one."""
        call = dataclasses.replace(OPEN, salt=Hash32(salt.to_bytes(32)), authorized_signer=address_of(key))
        changes = {"valid_before": self.clock.now() + 25, "calls": (Call(RESERVE_ADDRESS, v2.encode_open(call)),), **changes}
        return opening(dataclasses.replace(TX, **changes), key=key)


def opening(tx, *, key=PAYER_KEY, raw=None):
    """An open credential whose descriptor is what the transaction says, as far as it can be read."""
    signed = tx.sign(key)
    try:
        call = v2.decode_open(tx.calls[-1].data)
    except ChannelFault:
        call = OPEN
    descriptor = Descriptor(
        signed.sender, call.payee, call.operator, call.token, call.salt, call.authorized_signer, signed.expiring_nonce_hash
    )
    channel = derive_channel_id(V2, descriptor)
    signature = VoucherDomain(V2).sign(channel, 100, key)
    return OpenPayload(channel, raw or signed.raw, descriptor, None, Units(100), signature)


@pytest.fixture
def world():
    return World()


async def reason(awaitable):
    with pytest.raises(ChannelFault) as caught:
        await awaitable
    return caught.value.reason


def field(**changes):
    return opening(dataclasses.replace(TX, **changes))


GOOD = Call(RESERVE_ADDRESS, DATA)
SIGNED = TX.sign(PAYER_KEY)
