"""Two chain nodes asked as one: a single liar never yields service, and a single silent node stops nothing."""

import dataclasses

import pytest

from channels import escrow as v2
from channels import tip20
from channels.abi import Log
from channels.chain import Fate, Receipt
from channels.descriptor import RESERVE_ADDRESS, ChainSnapshot, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, ChannelId, Hash32
from channels.signature import address_of
from channels.tempo_tx import Call
from channels.units import Units
from mppnode.chain.agreeing import AGREE_ABOVE, AgreeingChain, worse
from mppnode.chain.devchain import PATH_USD, DevChain
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.kernel.clock import ManualClock
from tests.support import hostile_rpc as hostile
from tests.support.hostile_rpc import HostileRpc

PAYER_KEY, PAYEE_KEY = b"\x11" * 32, b"\x22" * 32
PAYER, PAYEE = address_of(PAYER_KEY), address_of(PAYEE_KEY)
V2 = Escrow(SessionProtocol.V2, 31337, RESERVE_ADDRESS)
SMALL, LARGE = Units(1_000), Units(AGREE_ABOVE + 1)
STATES = "eth_call"
RECEIPTS = "eth_getTransactionReceipt"
SIDES = pytest.mark.parametrize("side", [0, 1], ids=["primary", "second"])


class World:
    """One honest development chain behind two node addresses, each of which may be made hostile."""

    def __init__(self):
        self.clock = ManualClock()
        self.dev = DevChain(self.clock, chain_id=31337)
        for owner in (PAYER, PAYEE):
            self.dev.fund(owner, Units(10 * LARGE))
        self.wires = [HostileRpc(self.dev, self.clock) for _ in range(2)]
        nodes = [RpcChain(wire, self.clock, limits=RpcLimits(), chain_id=31337, sleep=self.sleep) for wire in self.wires]
        self.heard = []
        self.chain = AgreeingChain(*nodes, self.clock, on_disagreement=self.heard.append)
        self.honest = RpcChain(HostileRpc(self.dev, self.clock), self.clock, limits=RpcLimits(), sleep=self.sleep)
        self._entropy = 0

    async def sleep(self, seconds):
        self.clock.advance(seconds)

    async def signed(self, key, *calls):
        self._entropy += 1
        entropy = self._entropy.to_bytes(8)
        return (await self.honest.prepare(address_of(key), calls, fee_token=PATH_USD, entropy=entropy)).sign(key)

    async def opening(self, deposit=SMALL):
        call = v2.OpenCall(PAYEE, ZERO_ADDRESS, PATH_USD, deposit, Hash32(bytes(32)), PAYER)
        return await self.signed(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_open(call)))

    async def open(self, deposit=SMALL):
        receipt = await self.honest.broadcast((await self.opening(deposit)).raw)
        (opened,) = v2.decode_events(V2, receipt.logs)
        return opened.descriptor, opened.channel_id, receipt


@pytest.fixture
def world():
    return World()


async def _reason(awaitable):
    with pytest.raises(ChannelFault) as caught:
        await awaitable
    return caught.value.reason


# ----------------------------------------------------------------------------------------------- one liar, no service


@SIDES
async def test_an_invented_deposit_is_no_deposit(world, side):
    """C2: a channel only one node knows is not there when pinned, and worth nothing when looked at."""
    world.wires[side].lies[STATES] = hostile.invent_deposit(LARGE)
    channel = ChannelId(b"\x05" * 32)
    assert await _reason(world.chain.channel_state(V2, channel, at_block=1)) is Reason.CHAIN_UNAVAILABLE
    assert world.heard == ["channel state"]
    looked = await world.chain.channel_state(V2, channel)
    assert looked.close_requested_at is not None  # nothing new is sold on it


@SIDES
async def test_an_inflated_deposit_is_not_believed(world, side):
    """C2: of two deposits the lower one counts, and as proof of a top-up neither does."""
    _, channel, opened = await world.open()
    world.wires[side].lies[STATES] = hostile.invent_deposit(LARGE)
    assert await _reason(world.chain.channel_state(V2, channel, at_block=opened.block)) is Reason.CHAIN_UNAVAILABLE
    assert (await world.chain.channel_state(V2, channel)).deposit == SMALL
    assert [state.deposit for state in await world.chain.channel_states(V2, [channel])] == [SMALL]


@SIDES
async def test_an_invented_receipt_is_no_receipt(world, side):
    """C2: what only one node has mined is not mined, be it an open or the end of a close."""
    _, _, opened = await world.open()
    signed = await world.opening()
    world.wires[side].lies[RECEIPTS] = hostile.invent_receipt(hostile.receipt_json(world.dev, opened.tx_hash))
    assert await world.chain.receipt(signed.tx_hash) is None
    outcome = world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before)
    assert await outcome is Fate.PENDING
    world.clock.advance(100)  # long after its validity one says mined and one says never: people must look
    outcome = world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before)
    assert await _reason(outcome) is Reason.CHAIN_UNAVAILABLE
    assert world.heard == ["outcome"]


@SIDES
async def test_a_forged_receipt_is_no_receipt(world, side):
    """C2: a receipt that differs between the nodes, in success or in its logs, counts for nothing."""
    _, _, opened = await world.open()
    true = hostile.receipt_json(world.dev, opened.tx_hash)
    for forged in ({"status": "0x0"}, {"logs": []}, {"blockHash": "0x" + "07" * 32}, {"from": true["to"]}):
        world.wires[side].lies[RECEIPTS] = lambda _params, _result, forged=forged: {**true, **forged}
        assert await _reason(world.chain.receipt(opened.tx_hash)) is Reason.CHAIN_UNAVAILABLE
    assert world.heard == ["receipt"] * 4


@SIDES
async def test_a_swallowed_open_is_an_unknown_outcome(world, side):
    """C2: when one node never shows the transaction, the broadcast says unknown, not success."""
    world.wires[side].lies[RECEIPTS] = hostile.no_receipts()
    signed = await world.opening()
    assert await _reason(world.chain.broadcast(signed.raw)) is Reason.CHAIN_OUTCOME_UNKNOWN
    del world.wires[side].lies[RECEIPTS]
    assert (await world.chain.broadcast(signed.raw)).succeeded


@SIDES
async def test_another_chain_is_refused(world, side):
    """C2: nodes of different chains are no chain, and nothing is prepared for the wrong one."""
    world.wires[side].lies["eth_chainId"] = hostile.other_chain(1)
    assert await _reason(world.chain.chain_id()) is Reason.CHAIN_UNAVAILABLE
    pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(1))))
    assert (await world.chain.prepare(PAYER, [pay], fee_token=PATH_USD, entropy=bytes(8))).chain_id == 31337


@SIDES
async def test_a_simulation_needs_no_refusal_at_all(world, side):
    """What one node would refuse is refused, whatever the other one says."""
    too_much = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(11 * LARGE))))
    world.wires[side].lies["eth_call"] = lambda _params, _result: "0x"
    assert await _reason(world.chain.simulate(PAYER, [too_much], fee_token=None)) is Reason.CHAIN_REJECTED


# ----------------------------------------------------------------------------------------- the more alarming answer


@SIDES
async def test_a_close_request_seen_by_either_counts(world, side):
    """P5: hiding a payer's exit from us takes both nodes."""
    descriptor, channel, _ = await world.open()
    await world.honest.broadcast((await world.signed(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_request_close(descriptor)))).raw)
    requested = world.clock.now()
    world.wires[side].lies[STATES] = hostile.hide_close_requests()
    assert (await world.chain.channel_state(V2, channel)).close_requested_at == requested
    world.wires[side].lies["eth_getLogs"] = lambda _params, _result: []
    logs = await world.chain.logs(RESERVE_ADDRESS, topics=[v2.CLOSE_REQUESTED], from_block=0, to_block=world.dev.head)
    assert len(logs) == 1
    assert world.heard == ["channel state", "logs"]


@SIDES
async def test_old_blocks_hide_nothing(world, side):
    """C2: a node that shows an old block for ever is left out, for reading and for declaring a transaction dead."""
    descriptor, channel, _ = await world.open()
    old = world.dev.head
    signed = await world.opening()
    world.clock.advance(120)
    await world.honest.broadcast((await world.signed(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_request_close(descriptor)))).raw)
    world.wires[side].lies["eth_getBlockByNumber"] = hostile.frozen_block(old, world.dev)
    assert (await world.chain.head()).number > old
    assert (await world.chain.finalised()).number > old
    assert (await world.chain.channel_state(V2, channel)).close_requested_at is not None
    assert await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before) is Fate.EXPIRED


@SIDES
async def test_blocks_of_the_future_are_not_believed(world, side):
    """A node whose newest block is ahead of the time of day is left out; when both are, there is no head."""
    honest = await world.chain.head()

    def ahead(_params, result):
        return {**result, "number": hex(10**6), "timestamp": hex(world.clock.now() + 61)}

    world.wires[side].lies["eth_getBlockByNumber"] = ahead
    assert await world.chain.head() == honest
    world.wires[1 - side].lies["eth_getBlockByNumber"] = ahead
    assert await _reason(world.chain.head()) is Reason.CHAIN_UNAVAILABLE


async def test_the_lower_head_counts_while_they_are_near(world):
    """A replica a few blocks behind is not a liar: both are read where both can answer."""
    _, channel, opened = await world.open()
    world.wires[1].lag = 1
    assert (await world.chain.head()).number == opened.block - 1
    assert (await world.chain.channel_state(V2, channel)).deposit == 0
    world.clock.advance(1)
    assert (await world.chain.channel_state(V2, channel)).deposit == SMALL
    assert world.heard == []


STATE = ChainSnapshot(Units(100), Units(10), None, 7)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({}, {}),
        ({"deposit": Units(50)}, {"deposit": Units(50)}),
        ({"deposit": Units(500)}, {}),
        ({"settled": Units(5)}, {"settled": Units(5)}),
        ({"settled": Units(50)}, {}),
        ({"close_requested_at": 900}, {"close_requested_at": 900}),
        ({"deposit": Units(0), "settled": Units(0)}, {"close_requested_at": 1}),
        ({"deposit": Units(0), "close_requested_at": 900}, {"close_requested_at": 1}),
    ],
)
def test_the_worse_of_two_states(other, told):
    """Less deposited, less paid out, an exit under way; a channel only one calls gone is leaving, not gone."""
    second = dataclasses.replace(STATE, **other)
    assert worse(STATE, second) == worse(second, STATE) == dataclasses.replace(STATE, **told)


def test_the_earlier_close_request_counts():
    """Two times of one request: the one that leaves us less time."""
    one, two = (dataclasses.replace(STATE, close_requested_at=at) for at in (900, 905))
    assert worse(one, two) == worse(two, one) == one


@SIDES
async def test_prices_and_balances_are_the_lower_ones(world, side):
    """A node cannot keep us from settling by quoting an absurd fee, nor make us richer than we are."""
    fee, balance = await world.chain.fee_units(100_000), await world.chain.balance_of(PATH_USD, PAYER)
    world.wires[side].lies["eth_maxPriorityFeePerGas"] = lambda _params, _result: hex(10**30)
    world.wires[side].lies["eth_call"] = lambda _params, _result: "0x" + (2**95).to_bytes(32).hex()
    assert await world.chain.fee_units(100_000) == fee
    assert await world.chain.balance_of(PATH_USD, PAYER) == balance


async def test_one_nodes_tip_is_bounded(world):
    """The only fee a node could make us overpay is clamped where the transaction is built."""
    for wire in world.wires:
        wire.lies["eth_maxPriorityFeePerGas"] = lambda _params, _result: hex(10**30)
    pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(1))))
    tx = await world.chain.prepare(PAYER, [pay], fee_token=PATH_USD, entropy=bytes(8))
    assert tx.max_priority_fee_per_gas == 50_000_000_000


@SIDES
async def test_a_false_refusal_does_not_stop_a_close(world, side):
    """Either node is enough to build and send a transaction of ours."""
    world.wires[side].lies["eth_estimateGas"] = lambda _params, _result: {"not": "a quantity"}
    pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(1))))
    tx = await world.chain.prepare(PAYER, [pay], fee_token=PATH_USD, entropy=bytes(8))
    world.wires[side].down = True
    await world.chain.send(tx.sign(PAYER_KEY).raw)
    assert world.dev.balance(PAYEE) == 10 * LARGE + 1


# ------------------------------------------------------------------------------------------------------ one node down


@SIDES
async def test_with_one_node_down_small_deposits_still_count(world, side):
    """C1: everything works on one node, except the proof of a deposit above the limit."""
    world.wires[side].down = True
    signed = await world.opening(SMALL)
    receipt = await world.chain.broadcast(signed.raw)
    (opened,) = v2.decode_events(V2, receipt.logs)
    state = await world.chain.channel_state(V2, opened.channel_id, at_block=receipt.block)
    assert state.deposit == SMALL
    assert isinstance(await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before), Receipt)
    _, large, opened_large = await world.open(LARGE)
    pinned = world.chain.channel_state(V2, large, at_block=opened_large.block)
    assert await _reason(pinned) is Reason.CHAIN_UNAVAILABLE
    assert (await world.chain.channel_state(V2, large)).deposit == LARGE  # watching and closing go on
    world.wires[side].down = False  # and asked again for a large one, the node is not left alone any longer
    assert (await world.chain.channel_state(V2, large, at_block=opened_large.block)).deposit == LARGE


@SIDES
async def test_a_silent_node_is_left_alone_for_a_while(world, side):
    """A node that did not answer does not slow every request; half a minute later it is asked again."""
    world.wires[side].dead_for(20)
    await world.chain.head()
    tries = world.wires[side].seen.total()
    assert tries == RpcLimits().read_attempts
    await world.chain.head()
    assert world.wires[side].seen.total() == tries
    world.clock.advance(31)
    await world.chain.head()
    assert world.wires[side].seen.total() > tries


async def test_death_has_a_margin(world):
    """A transaction is not dead the moment its validity ends: two replicas may be a minute apart."""
    signed = await world.opening()
    end = signed.tx.valid_before
    world.clock.advance(end + 59 - world.clock.now())
    assert await world.chain.outcome(signed.tx_hash, valid_before=end) is Fate.PENDING
    world.clock.advance(1)
    assert await world.chain.outcome(signed.tx_hash, valid_before=end) is Fate.EXPIRED


async def test_with_both_down_nothing_is_known(world):
    """C1: unavailable, and nothing else; a send says that nothing left."""
    signed = await world.opening()
    for wire in world.wires:
        wire.limited = True
    assert await _reason(world.chain.head()) is Reason.CHAIN_UNAVAILABLE
    assert await _reason(world.chain.channel_state(V2, ChannelId(bytes(32)))) is Reason.CHAIN_UNAVAILABLE
    assert await _reason(world.chain.send(signed.raw)) is Reason.CHAIN_UNAVAILABLE
    assert await _reason(world.chain.broadcast(signed.raw)) is Reason.CHAIN_UNAVAILABLE
    pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(1))))
    assert await _reason(world.chain.simulate(PAYER, [pay], fee_token=None)) is Reason.CHAIN_UNAVAILABLE
    prepared = world.chain.prepare(PAYER, [pay], fee_token=PATH_USD, entropy=bytes(8))
    assert await _reason(prepared) is Reason.CHAIN_UNAVAILABLE


async def test_the_least_sure_failure_of_a_send_is_told(world):
    """One node may have taken it and the other surely has not: unknown; both refuse: rejected."""
    signed = await world.opening()
    world.wires[0].down = True
    world.wires[1].lost["eth_sendRawTransaction"] = 3
    assert await _reason(world.chain.send(signed.raw)) is Reason.CHAIN_OUTCOME_UNKNOWN
    late = await world.opening()
    world.wires[0].down = False
    world.clock.advance(60)
    assert await _reason(world.chain.send(late.raw)) is Reason.CHAIN_REJECTED


async def test_dropped_answers_end_in_one_payment(world):
    """Whatever both nodes lose on the way back, the bytes are one transaction."""
    for wire in world.wires:
        wire.lost["eth_sendRawTransaction"] = 2
    receipt = await world.chain.broadcast((await world.opening()).raw)
    assert receipt.succeeded
    assert world.dev.balance(RESERVE_ADDRESS) == SMALL


async def test_disputed_logs_come_last(world):
    """What both report comes first, so that the first match is the one both know."""
    _, _, opened = await world.open()
    forged = {**hostile.receipt_json(world.dev, opened.tx_hash)["logs"][-1], "data": "0x" + bytes(192).hex()}
    world.wires[0].lies["eth_getLogs"] = lambda _params, result: [forged, *result]
    logs = await world.chain.logs(RESERVE_ADDRESS, topics=[], from_block=0, to_block=world.dev.head)
    assert [isinstance(log, Log) and any(log.data) for log in logs] == [True, False]
