"""Blocks that are final and blocks that are not: reorganisations, halts, freezes, fees, and reading many channels."""

import dataclasses

import pytest

from channels import escrow as v2
from channels import escrow_v1 as v1
from channels import tip20
from channels.chain import Fate, Receipt, fee_of
from channels.descriptor import RESERVE_ADDRESS, ChainSnapshot, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32, to_hex
from channels.signature import address_of
from channels.tempo_tx import Call
from channels.units import MAX_UINT96, Units
from channels.voucher import VoucherDomain
from mppnode.chain.devchain import PATH_USD, DevChain, LocalTransport
from mppnode.chain.rpc import STATES_PER_CALL, RpcChain, RpcLimits
from mppnode.kernel.clock import ManualClock

PAYER_KEY, PAYEE_KEY = b"\x11" * 32, b"\x22" * 32
PAYER, PAYEE = address_of(PAYER_KEY), address_of(PAYEE_KEY)
V1_ADDRESS = Address(b"\xe1" * 20)
V2 = Escrow(SessionProtocol.V2, 31337, RESERVE_ADDRESS)
V1 = Escrow(SessionProtocol.V1, 31337, V1_ADDRESS)
RICH = Units(1_000_000)


class Counting:
    """A transport that counts round trips."""

    def __init__(self, dev):
        self._inner = LocalTransport(dev)
        self.posts = 0

    async def post(self, body):
        self.posts += 1
        return await self._inner.post(body)


class World:
    """A development chain whose blocks are final three blocks later, and our client on it."""

    def __init__(self, **options):
        self.clock = ManualClock()
        self.dev = DevChain(self.clock, chain_id=31337, v1_address=V1_ADDRESS, **{"finality_lag": 3, **options})
        for owner in (PAYER, PAYEE):
            self.dev.fund(owner, RICH)
        self.wire = Counting(self.dev)
        self.chain = RpcChain(self.wire, self.clock, limits=RpcLimits(), sleep=self.sleep)
        self._entropy = 0

    async def sleep(self, seconds):
        self.clock.advance(seconds)

    async def signed(self, key, *calls):
        self._entropy += 1
        entropy = self._entropy.to_bytes(8)
        tx = await self.chain.prepare(address_of(key), calls, fee_token=PATH_USD, entropy=entropy)
        return tx.sign(key)

    async def run(self, key, *calls):
        return await self.chain.broadcast((await self.signed(key, *calls)).raw)

    async def open_v2(self, salt=7):
        call = v2.OpenCall(PAYEE, ZERO_ADDRESS, PATH_USD, Units(1_000), Hash32(salt.to_bytes(32)), PAYER)
        receipt = await self.run(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_open(call)))
        (opened,) = v2.decode_events(V2, receipt.logs)
        return opened.descriptor, opened.channel_id, receipt


@pytest.fixture
def world():
    return World()


def _pay(amount):
    return Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(amount))))


async def test_a_block_is_final_only_some_blocks_later(world):
    """The finalised head trails the head by the lag and catches up when blocks follow; without a lag they are one."""
    receipt = await world.run(PAYER_KEY, _pay(1))
    assert (await world.chain.finalised()).number < receipt.block == (await world.chain.head()).number
    world.clock.advance(10)
    final = await world.chain.finalised()
    assert final.number >= receipt.block
    assert final.timestamp < (await world.chain.head()).timestamp
    plain = World(finality_lag=0)
    assert await plain.chain.finalised() == await plain.chain.head()


async def test_a_reorganisation_takes_everything_back(world):
    """C4: balances, channels, logs, receipts and nonces are as before, and the same bytes may be sent again."""
    _, channel_id, opened = await world.open_v2()
    before = await world.chain.channel_state(V2, channel_id, at_block=opened.block)
    (raw,) = world.dev.reorg(1)
    assert world.dev.balance(PAYER) == RICH
    assert await world.chain.receipt(opened.tx_hash) is None
    assert (await world.chain.channel_state(V2, channel_id, at_block=opened.block)).deposit == 0
    assert await world.chain.logs(RESERVE_ADDRESS, topics=[], from_block=0, to_block=world.dev.head) == ()
    again = await world.chain.broadcast(raw)
    assert (again.tx_hash, again.logs[-1].topics) == (opened.tx_hash, opened.logs[-1].topics)
    assert again.block_hash != opened.block_hash
    assert (await world.chain.channel_state(V2, channel_id, at_block=again.block)).deposit == before.deposit


async def test_a_counted_nonce_comes_back_too(world):
    """After a reorganisation a counted nonce is free again, and the older ones stay used."""
    tx = (await world.signed(PAYER_KEY, _pay(1))).tx
    first, second = (dataclasses.replace(tx, nonce_key=3, nonce=nonce).sign(PAYER_KEY).raw for nonce in (0, 1))
    await world.chain.broadcast(first)
    await world.chain.broadcast(second)
    assert world.dev.reorg(1) == (second,)
    assert (await world.chain.broadcast(second)).succeeded
    assert world.dev.balance(PAYEE) == RICH + 2


async def test_replaced_blocks_have_other_hashes(world):
    """A block that is as empty as the one it replaces is still another block."""

    def blocks(last):
        asked = ({"id": 1, "method": "eth_getBlockByNumber", "params": [hex(last - ago)]} for ago in (2, 1, 0))
        return [world.dev.handle(request)["result"] for request in asked]

    for _ in range(3):
        world.dev.handle({"id": 1, "method": "evm_mine"})
    before = blocks(world.dev.head)
    world.dev.reorg(2)
    after = blocks(world.dev.head)
    assert before[0] == after[0]
    assert after[1]["parentHash"] == after[0]["hash"]
    assert before[1]["hash"] != after[1]["hash"]
    assert before[2]["hash"] != after[2]["hash"]


async def test_what_is_final_stays(world):
    """No reorganisation reaches a final block, nor the minting before it."""
    await world.run(PAYER_KEY, _pay(1))
    with pytest.raises(ValueError, match="final"):
        world.dev.reorg(2)
    world.dev.finality_lag = 0
    await world.run(PAYER_KEY, _pay(1))
    with pytest.raises(ValueError, match="final"):
        world.dev.reorg(1)
    assert world.dev.balance(PAYEE) == RICH + 2


async def test_expired_means_at_a_final_block(world):
    """A transaction whose validity the newest block has passed may still be pending: only a final block proves it."""
    world.dev.finality_lag = 400
    signed = await world.signed(PAYER_KEY, _pay(1))
    deadline = signed.tx.valid_before + 60
    while (await world.chain.head()).timestamp < deadline:
        world.clock.advance(1)
    assert await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before) is Fate.PENDING
    world.clock.advance(400)
    assert (await world.chain.finalised()).timestamp < deadline + 60
    world.clock.advance(60)
    assert (await world.chain.finalised()).timestamp >= deadline
    assert await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before) is Fate.EXPIRED


async def test_an_outcome_may_be_taken_back_until_it_is_final(world):
    """A receipt of a block that is replaced turns into pending, and the same bytes bring it back."""
    signed = await world.signed(PAYER_KEY, _pay(1))
    await world.chain.send(signed.raw)
    assert isinstance(await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before), Receipt)
    world.dev.reorg(1)
    assert await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before) is Fate.PENDING
    await world.chain.send(signed.raw)
    assert isinstance(await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before), Receipt)


async def test_a_halted_chain_keeps_what_it_is_sent(world):
    """C8: while no blocks are made time stands still, a sent transaction is pending, and it is mined on resumption."""
    head = await world.chain.head()
    world.dev.halt()
    signed = await world.signed(PAYER_KEY, _pay(1))
    await world.chain.send(signed.raw)
    await world.chain.send(signed.raw)
    world.clock.advance(20)
    assert await world.chain.head() == head
    assert await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before) is Fate.PENDING
    reply = world.dev.handle({"id": 1, "method": "eth_sendRawTransactionSync", "params": [to_hex(signed.raw)]})
    assert reply["error"]["code"] == -32003  # known already
    world.dev.resume()
    receipt = await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before)
    assert isinstance(receipt, Receipt)
    assert world.dev.balance(PAYEE) == RICH + 1


async def test_a_halt_longer_than_the_validity_loses_the_transaction(world):
    """What expired while the chain stood still is not mined when it goes on."""
    world.dev.halt()
    signed = await world.signed(PAYER_KEY, _pay(1))
    await world.chain.send(signed.raw)
    world.clock.advance(200)
    assert await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before) is Fate.PENDING
    world.dev.resume()
    world.clock.advance(1)
    assert await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before) is Fate.EXPIRED
    assert world.dev.balance(PAYEE) == RICH


async def test_contract_time_stops_with_the_chain(world):
    """C8: a halted chain does not let the payer's grace period end."""
    descriptor, _, _ = await world.open_v2()
    await world.run(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_request_close(descriptor)))
    withdraw = Call(RESERVE_ADDRESS, v2.encode_withdraw(descriptor))
    world.dev.halt()
    world.clock.advance(1_000)
    with pytest.raises(ChannelFault):
        await world.chain.simulate(PAYER, [withdraw], fee_token=None)
    world.dev.resume()
    await world.chain.simulate(PAYER, [withdraw], fee_token=None)


@pytest.mark.parametrize("frozen", [PAYER, PAYEE])
async def test_a_frozen_party_stops_every_payout(world, frozen):
    """P24: a token policy that blocks payer or payee reverts settles and closes, until it is lifted."""
    descriptor, channel_id, _ = await world.open_v2()
    signature = VoucherDomain(V2).sign(channel_id, 300, PAYER_KEY)
    settle = Call(RESERVE_ADDRESS, v2.encode_settle(descriptor, Units(300), signature))
    close = Call(RESERVE_ADDRESS, v2.encode_close(descriptor, Units(300), Units(300), signature))
    world.dev.freeze(frozen)
    for call in (settle, close):
        with pytest.raises(ChannelFault) as caught:
            await world.chain.simulate(PAYEE, [call], fee_token=None)
        assert caught.value.reason is Reason.CHAIN_REJECTED
    world.dev.thaw(frozen)
    assert (await world.run(PAYEE_KEY, settle)).succeeded


# ------------------------------------------------------------------------------------------------------ many channels


async def test_many_channels_are_read_in_one_round_trip(world):
    """Open, topped up, unknown and closed channels come back in order, all of one block, with one call of the view."""
    opened = [await world.open_v2(salt) for salt in range(1, 4)]
    ids = [channel_id for _, channel_id, _ in opened]
    await world.run(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_request_close(opened[1][0])))
    block = world.dev.head
    await world.run(PAYEE_KEY, Call(RESERVE_ADDRESS, v2.encode_close(opened[2][0], Units(0), Units(0), b"")))
    asked = [*ids, ChannelId(bytes(32))]
    world.wire.posts = 0
    states = await world.chain.channel_states(V2, asked, at_block=block)
    assert world.wire.posts == 1
    now = world.clock.now()
    rich, none = ChainSnapshot(Units(1_000), Units(0), None, block), ChainSnapshot(Units(0), Units(0), None, block)
    assert list(states) == [rich, dataclasses.replace(rich, close_requested_at=now), rich, none]
    latest = await world.chain.channel_states(V2, asked)
    assert [state.deposit for state in latest] == [1_000, 1_000, 0, 0]
    assert list(latest) == [await world.chain.channel_state(V2, each, at_block=latest[0].block) for each in asked]
    assert await world.chain.channel_states(V2, []) == []


def test_the_view_has_the_published_selector():
    """getChannelStatesBatch(bytes32[]) is the name the reference client's interface gives it."""
    assert v2.GET_CHANNEL_STATES.hex() == "d1f4cda2"


async def test_v1_channels_are_read_in_one_round_trip_too(world):
    """The contract has no view over many, so one JSON-RPC batch reads them."""
    call = v1.OpenCall(PAYEE, PATH_USD, Units(1_000), Hash32(bytes(32)), ZERO_ADDRESS)
    approve = Call(PATH_USD, tip20.encode_approve(tip20.ApproveCall(V1_ADDRESS, 1_000)))
    receipt = await world.run(PAYER_KEY, approve, Call(V1_ADDRESS, v1.encode_open(call)))
    (opened,) = v1.decode_events(V1, receipt.logs)
    world.wire.posts = 0
    states = await world.chain.channel_states(V1, [ChannelId(bytes(32)), opened.channel_id], at_block=receipt.block)
    assert world.wire.posts == 1
    assert [state.deposit for state in states] == [0, 1_000]


async def test_large_reads_are_split(world):
    """More channels than one call may carry become several calls at the same block."""
    ids = [ChannelId(number.to_bytes(32)) for number in range(2 * STATES_PER_CALL + 1)]
    world.wire.posts = 0
    states = await world.chain.channel_states(V2, ids, at_block=1)
    assert (len(states), world.wire.posts) == (len(ids), 3)


@pytest.mark.parametrize("change", [b"", bytes(31), bytes(32), bytes(32 * 5), bytes(31) + b"\x20" + bytes(31) + b"\x02"])
def test_replies_of_another_shape_are_refused(change):
    """The view's reply must be one array of exactly as many states as were asked for."""
    good = (32).to_bytes(32) + (1).to_bytes(32) + bytes(96)
    assert v2.decode_channel_states(good, 1, block=5) == (ChainSnapshot(Units(0), Units(0), None, 5),)
    for data in (change, good + bytes(32), good[:-32], change + good[64:]):
        with pytest.raises(ChannelFault) as caught:
            v2.decode_channel_states(data, 1, block=5)
        assert caught.value.reason is Reason.CHAIN_UNAVAILABLE


# --------------------------------------------------------------------------------------------------------------- fees


@pytest.mark.parametrize(
    ("gas", "price", "fee"),
    [
        (0, 20_000_000_000, 0),
        (50_000, 20_000_000_000, 1_000),  # a plain transfer, the published example
        (306_746, 21_000_000_000, 6_442),  # measured on a Tempo EVM
        (1, 1, 1),
        (2**64, 2**128, MAX_UINT96),
    ],
)
def test_the_price_of_gas(gas, price, fee):
    """Attodollars per gas become base units, rounded up, and absurd numbers stay in the type."""
    assert fee_of(gas, price) == fee


async def test_quoted_and_charged_fees_agree():
    """What fee_units says is what the chain takes, also after the base fee has risen."""
    world = World(fees=True)
    for base_fee in (20_000_000_000, 90_000_000_001):
        world.dev.base_fee = base_fee
        quoted = await world.chain.fee_units(160_000)
        before = world.dev.balance(PAYER)
        receipt = await world.run(PAYER_KEY, _pay(1))
        assert quoted == fee_of(160_000, base_fee + 1_000_000_000) == receipt.fee_paid(PAYER, PATH_USD)
        assert world.dev.balance(PAYER) == before - 1 - quoted


async def test_a_dry_run_names_its_gas_and_who_pays(world):
    """Too little gas, or a fee payer without money, is refused before anything is signed."""
    rich = World(fees=True)
    tx = dataclasses.replace((await rich.signed(PAYER_KEY, _pay(1))).tx, gas=160_000, sponsored=True)
    await rich.chain.rehearse(tx, PAYER, fee_payer=PAYEE)
    poor = Address(b"\x09" * 20)
    for change, who in (({"gas": 159_999}, PAYEE), ({}, poor), ({"calls": (_pay(RICH + 1),)}, PAYEE)):
        with pytest.raises(ChannelFault) as caught:
            await rich.chain.rehearse(dataclasses.replace(tx, **change), PAYER, fee_payer=who)
        assert caught.value.reason is Reason.CHAIN_REJECTED


async def test_logs_match_any_of_several_topics(world):
    """One query finds the events of several names and of several channels."""
    one, other, third = [await world.open_v2(salt) for salt in range(1, 4)]
    await world.run(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_request_close(one[0])))
    await world.run(PAYEE_KEY, Call(RESERVE_ADDRESS, v2.encode_close(other[0], Units(0), Units(0), b"")))
    await world.run(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_request_close(third[0])))

    async def found(*topics):
        logs = await world.chain.logs(RESERVE_ADDRESS, topics=topics, from_block=0, to_block=world.dev.head)
        return [type(event) for event in v2.decode_events(V2, logs)]

    names = [v2.CLOSE_REQUESTED, v2.CHANNEL_CLOSED]
    assert await found(names) == [v2.CloseRequested, v2.ChannelClosed, v2.CloseRequested]
    assert await found(names, [Hash32(one[1]), Hash32(other[1])]) == [v2.CloseRequested, v2.ChannelClosed]
    assert await found(None, Hash32(third[1])) == [v2.ChannelOpened, v2.CloseRequested]
