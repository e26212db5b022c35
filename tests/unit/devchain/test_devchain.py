"""Our chain client against the development chain: opens, top-ups, closes, sponsors, time, and refusals."""

import dataclasses
import json

import pytest

from channels import escrow as v2
from channels import escrow_v1 as v1
from channels import tip20
from channels.chain import Fate
from channels.descriptor import RESERVE_ADDRESS, ChainSnapshot, Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32, to_hex
from channels.signature import address_of
from channels.tempo_tx import EXPIRING_NONCE_KEY, Call, TempoTx, decode
from channels.units import Units
from channels.voucher import VoucherDomain, derive_channel_id
from mppnode.chain.devchain import FEE_MANAGER, PATH_USD, DevChain, LocalTransport
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.kernel.clock import ManualClock

PAYER_KEY, PAYEE_KEY, SPONSOR_KEY = b"\x11" * 32, b"\x22" * 32, b"\x44" * 32
PAYER, PAYEE, SPONSOR = address_of(PAYER_KEY), address_of(PAYEE_KEY), address_of(SPONSOR_KEY)
V1_ADDRESS = Address(b"\xe1" * 20)
V2 = Escrow(SessionProtocol.V2, 31337, RESERVE_ADDRESS)
V1 = Escrow(SessionProtocol.V1, 31337, V1_ADDRESS)
SALT = Hash32(b"\x77" * 32)
RICH = Units(1_000_000)


class World:
    """A development chain with a funded payer, and our client on it."""

    def __init__(self, **options):
        self.clock = ManualClock()
        self.dev = DevChain(self.clock, chain_id=31337, v1_address=V1_ADDRESS, **options)
        self.dev.fund(PAYER, RICH)
        self.dev.fund(PAYEE, Units(1_000))
        self.chain = RpcChain(LocalTransport(self.dev), self.clock, limits=RpcLimits(), sleep=self.sleep)
        self._entropy = 0

    async def sleep(self, seconds):
        self.clock.advance(seconds)

    async def prepared(self, sender, *calls, sponsored=False):
        self._entropy += 1
        return await self.chain.prepare(
            sender, calls, fee_token=PATH_USD, entropy=self._entropy.to_bytes(8), sponsored=sponsored
        )

    async def send(self, key, *calls):
        tx = await self.prepared(address_of(key), *calls)
        return await self.chain.broadcast(tx.sign(key).raw)

    async def open_v2(self, deposit=10_000, operator=ZERO_ADDRESS):
        call = v2.OpenCall(PAYEE, operator, PATH_USD, Units(deposit), SALT, PAYER)
        receipt = await self.send(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_open(call)))
        (opened,) = v2.decode_events(V2, receipt.logs)
        return opened.descriptor, opened.channel_id, receipt

    def rpc(self, method, *params):
        return self.dev.handle({"jsonrpc": "2.0", "id": 7, "method": method, "params": list(params)})


@pytest.fixture
def world():
    return World()


async def test_open_v2(world):
    """An open moves the deposit, emits one ChannelOpened whose id we derive, and shows in the pinned state."""
    descriptor, channel_id, receipt = await world.open_v2()
    assert receipt.succeeded
    assert channel_id == derive_channel_id(V2, descriptor)
    assert descriptor.payer == receipt.sender == PAYER
    state = await world.chain.channel_state(V2, channel_id, at_block=receipt.block)
    assert state == ChainSnapshot(Units(10_000), Units(0), None, receipt.block)
    assert await world.chain.balance_of(PATH_USD, PAYER) == RICH - 10_000
    assert await world.chain.balance_of(PATH_USD, RESERVE_ADDRESS) == 10_000


async def test_state_is_read_at_the_block_asked_for(world):
    """T-24: a read pinned to the open's block shows the deposit of that block, whatever happened later."""
    descriptor, channel_id, opened = await world.open_v2()
    topped = await world.send(PAYER_KEY, _top_up(descriptor, 500))
    assert (await world.chain.channel_state(V2, channel_id, at_block=opened.block)).deposit == 10_000
    assert (await world.chain.channel_state(V2, channel_id, at_block=opened.block - 1)).deposit == 0
    assert (await world.chain.channel_state(V2, channel_id, at_block=topped.block)).deposit == 10_500
    latest = await world.chain.channel_state(V2, channel_id)
    assert (latest.deposit, latest.block >= topped.block) == (10_500, True)


def _top_up(descriptor, amount):
    return Call(RESERVE_ADDRESS, v2.encode_top_up(v2.TopUpCall(descriptor, Units(amount))))


def _close(descriptor, channel_id, cumulative, capture):
    signature = VoucherDomain(V2).sign(channel_id, cumulative, PAYER_KEY)
    return Call(RESERVE_ADDRESS, v2.encode_close(descriptor, Units(cumulative), Units(capture), signature))


async def test_top_up_takes_a_close_request_back(world):
    """A top-up adds to the deposit, cancels the close request and says both in its logs."""
    descriptor, channel_id, _ = await world.open_v2()
    await world.send(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_request_close(descriptor)))
    requested = (await world.chain.channel_state(V2, channel_id)).close_requested_at
    assert requested == world.clock.now()
    receipt = await world.send(PAYER_KEY, _top_up(descriptor, 500))
    cancelled, topped = v2.decode_events(V2, receipt.logs)
    assert cancelled == v2.CloseRequestCancelled(channel_id, PAYER, PAYEE)
    assert topped == v2.ToppedUp(channel_id, PAYER, PAYEE, Units(500), Units(10_500))
    assert (await world.chain.channel_state(V2, channel_id)).close_requested_at is None


async def test_settle_then_close(world):
    """A settle pays the voucher, a close pays up to the capture and refunds the rest, and the slot is gone."""
    descriptor, channel_id, _ = await world.open_v2()
    signature = VoucherDomain(V2).sign(channel_id, 300, PAYER_KEY)
    receipt = await world.send(PAYEE_KEY, Call(RESERVE_ADDRESS, v2.encode_settle(descriptor, Units(300), signature)))
    assert v2.decode_events(V2, receipt.logs) == [
        v2.Settled(channel_id, PAYER, PAYEE, Units(300), Units(300), Units(300))
    ]
    # the voucher may exceed the deposit; only the capture is bounded by it
    receipt = await world.send(PAYEE_KEY, _close(descriptor, channel_id, 20_000, 450))
    assert v2.decode_events(V2, receipt.logs) == [
        v2.ChannelClosed(channel_id, PAYER, PAYEE, Units(450), Units(9_550))
    ]
    assert world.dev.balance(PAYEE) == 1_450
    assert world.dev.balance(PAYER) == RICH - 450
    assert (await world.chain.channel_state(V2, channel_id)).deposit == 0


async def test_close_of_an_unused_channel_needs_no_signature(world):
    """T-73: a capture of nothing refunds everything and checks no signature."""
    descriptor, _, _ = await world.open_v2()
    await world.send(PAYEE_KEY, Call(RESERVE_ADDRESS, v2.encode_close(descriptor, Units(0), Units(0), b"")))
    assert world.dev.balance(PAYER) == RICH


@pytest.mark.parametrize(
    ("key", "call"),
    [
        (PAYEE_KEY, lambda d, c: _close(d, c, 100, 101)),  # capture above the voucher
        (PAYEE_KEY, lambda d, c: _close(d, c, 10_001, 10_001)),  # capture above the deposit
        (PAYER_KEY, lambda d, c: _close(d, c, 100, 100)),  # not the payee
        (PAYEE_KEY, lambda d, c: _close(d, ChannelId(bytes(32)), 100, 100)),  # a signature for another channel
        (PAYEE_KEY, lambda d, _: _top_up(d, 5)),  # not the payer
        (PAYER_KEY, lambda d, _: _top_up(d, 0)),
        (PAYER_KEY, lambda d, _: _top_up(d, RICH)),  # more than the balance
        (PAYER_KEY, lambda d, _: _top_up(dataclasses.replace(d, salt=Hash32(bytes(32))), 5)),  # no such channel
        (PAYER_KEY, lambda d, _: Call(RESERVE_ADDRESS, v2.encode_withdraw(d))),  # no close request
        (PAYEE_KEY, lambda d, _: Call(RESERVE_ADDRESS, v2.encode_request_close(d))),
        (PAYEE_KEY, lambda d, _: Call(RESERVE_ADDRESS, v2.encode_settle(d, Units(5), bytes(65)))),
        (PAYER_KEY, lambda _d, _c: Call(RESERVE_ADDRESS, b"\1\2\3\4")),
        (PAYER_KEY, lambda d, _: Call(RESERVE_ADDRESS, _top_up(d, 5).data + b"\0")),
        (PAYER_KEY, lambda d, _: dataclasses.replace(_top_up(d, 5), value=1)),
    ],
)
async def test_what_the_reserve_reverts(world, key, call):
    """T-25: every forbidden call is refused in simulation, and mined without logs or effect when sent anyway."""
    descriptor, channel_id, _ = await world.open_v2()
    forbidden = call(descriptor, channel_id)
    with pytest.raises(ChannelFault) as caught:
        await world.chain.simulate(address_of(key), [forbidden], fee_token=PATH_USD)
    assert caught.value.reason is Reason.CHAIN_REJECTED
    before = (world.dev.balance(PAYER), world.dev.balance(PAYEE))
    template = await world.prepared(address_of(key), Call(Address(b"\x09" * 20), b""))
    receipt = await world.chain.broadcast(dataclasses.replace(template, calls=(forbidden,)).sign(key).raw)
    assert not receipt.succeeded
    assert receipt.logs == ()
    assert (world.dev.balance(PAYER), world.dev.balance(PAYEE)) == before


async def test_a_batch_is_all_or_nothing(world):
    """When the second call reverts, the first one's transfer is undone."""
    template = await world.prepared(PAYER, Call(Address(b"\x09" * 20), b""), Call(Address(b"\x09" * 20), b""))
    calls = (
        Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(50)))),
        Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(RICH)))),
    )
    receipt = await world.chain.broadcast(dataclasses.replace(template, calls=calls).sign(PAYER_KEY).raw)
    assert not receipt.succeeded
    assert world.dev.balance(PAYEE) == 1_000


async def test_forced_close_after_the_grace_period(world):
    """The payer's withdrawal is refused one second before the grace period ends and works at its end."""
    descriptor, _, _ = await world.open_v2()
    await world.send(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_request_close(descriptor)))
    withdraw = Call(RESERVE_ADDRESS, v2.encode_withdraw(descriptor))
    world.clock.advance(899)
    with pytest.raises(ChannelFault):
        await world.chain.simulate(PAYER, [withdraw], fee_token=None)
    world.clock.advance(1)
    assert (await world.send(PAYER_KEY, withdraw)).succeeded
    assert world.dev.balance(PAYER) == RICH


async def test_an_operator_may_close(world):
    """A non-zero operator closes in the payee's place, and the money still goes to the payee."""
    descriptor, channel_id, _ = await world.open_v2(operator=SPONSOR)
    receipt = await world.send(SPONSOR_KEY, _close(descriptor, channel_id, 100, 100))
    assert receipt.succeeded
    assert world.dev.balance(PAYEE) == 1_100


async def test_v1_life(world):
    """A v1 channel: approve and open in one transaction, top-up, settle, close with the voucher as payout."""
    deposit, token = Units(10_000), PATH_USD
    open_call = v1.OpenCall(PAYEE, token, deposit, SALT, ZERO_ADDRESS)
    approve = Call(token, tip20.encode_approve(tip20.ApproveCall(V1_ADDRESS, 10_500)))
    with pytest.raises(ChannelFault):
        await world.chain.simulate(PAYER, [Call(V1_ADDRESS, v1.encode_open(open_call))], fee_token=None)
    receipt = await world.send(PAYER_KEY, approve, Call(V1_ADDRESS, v1.encode_open(open_call)))
    (opened,) = v1.decode_events(V1, receipt.logs)
    channel_id = derive_channel_id(V1, open_call.descriptor(PAYER))
    assert opened == v2.ChannelOpened(channel_id, open_call.descriptor(PAYER), deposit)
    state = await world.chain.channel_state(V1, channel_id, at_block=receipt.block)
    assert state == ChainSnapshot(deposit, Units(0), None, receipt.block)
    await world.send(PAYER_KEY, Call(V1_ADDRESS, v1.encode_top_up(v1.TopUpCall(channel_id, Units(500)))))
    domain = VoucherDomain(V1)
    settle = v1.encode_settle(channel_id, Units(100), domain.sign(channel_id, 100, PAYER_KEY))
    await world.send(PAYEE_KEY, Call(V1_ADDRESS, settle))
    assert (await world.chain.channel_state(V1, channel_id)).settled == 100
    close = Call(V1_ADDRESS, v1.encode_close(channel_id, Units(250), domain.sign(channel_id, 250, PAYER_KEY)))
    receipt = await world.send(PAYEE_KEY, close)
    assert v1.decode_events(V1, receipt.logs) == [
        v2.ChannelClosed(channel_id, PAYER, PAYEE, Units(250), Units(10_250))
    ]
    assert (world.dev.balance(PAYER), world.dev.balance(PAYEE)) == (RICH - 250, 1_250)
    assert (await world.chain.channel_state(V1, channel_id)).deposit == 0
    with pytest.raises(ChannelFault):  # finalized: nothing works any more
        await world.chain.simulate(PAYEE, [close], fee_token=None)


async def test_the_same_bytes_count_once(world):
    """T-12: sending the same open again, in parallel or later, gives the same receipt and no second channel."""
    call = v2.OpenCall(PAYEE, ZERO_ADDRESS, PATH_USD, Units(10_000), SALT, PAYER)
    tx = await world.prepared(PAYER, Call(RESERVE_ADDRESS, v2.encode_open(call)))
    raw = tx.sign(PAYER_KEY).raw
    receipts = [await world.chain.broadcast(raw) for _ in range(3)]
    assert receipts[0] == receipts[1] == receipts[2]
    assert world.dev.balance(RESERVE_ADDRESS) == 10_000


async def test_two_equal_calls_are_two_transactions(world):
    """Entropy makes two equal batches of one second different transactions."""
    pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(1))))
    first, second = await world.send(PAYER_KEY, pay), await world.send(PAYER_KEY, pay)
    assert first.tx_hash != second.tx_hash
    assert world.dev.balance(PAYEE) == 1_002


async def test_a_late_broadcast_is_rejected(world):
    """T-22: a transaction broadcast after its validBefore is a clean refusal, and surely not mined."""
    pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(1))))
    signed = (await world.prepared(PAYER, pay)).sign(PAYER_KEY)
    world.clock.advance(25)
    with pytest.raises(ChannelFault) as caught:
        await world.chain.broadcast(signed.raw)
    assert caught.value.reason is Reason.CHAIN_REJECTED
    assert await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before) is Fate.PENDING
    world.clock.advance(60)
    assert await world.chain.outcome(signed.tx_hash, valid_before=signed.tx.valid_before) is Fate.EXPIRED
    assert world.dev.balance(PAYEE) == 1_000


@pytest.mark.parametrize(
    "change",
    [
        {"chain_id": 1},
        {"nonce": 1},
        {"valid_before": None},
        {"valid_before": 1_900_000_031},
        {"valid_after": 1_900_000_010},
        {"max_fee_per_gas": 1_000, "max_priority_fee_per_gas": 0},
        {"gas": 21_000},
        {"nonce_key": 3, "nonce": 1},
    ],
)
async def test_admission_rules(world, change):
    """Wrong chain, nonce, window, fee or gas keep a transaction out, as on the real chain."""
    tx = await world.prepared(PAYER, Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(1)))))
    with pytest.raises(ChannelFault) as caught:
        await world.chain.broadcast(dataclasses.replace(tx, **change).sign(PAYER_KEY).raw)
    assert caught.value.reason is Reason.CHAIN_REJECTED
    assert world.dev.balance(PAYEE) == 1_000


async def test_counted_nonces_work_too(world):
    """A nonce key other than the expiring one counts from zero, per sender and key."""
    tx = await world.prepared(PAYER, Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(1)))))
    for nonce in (0, 1):
        counted = dataclasses.replace(tx, nonce_key=3, nonce=nonce)
        assert (await world.chain.broadcast(counted.sign(PAYER_KEY).raw)).succeeded
    assert world.dev.balance(PAYEE) == 1_002


async def test_a_sponsor_pays_the_fee():
    """T-21: a sponsored open is mined with the payer as sender and the fee taken from the sponsor."""
    world = World(fees=True)
    world.dev.fund(SPONSOR, Units(4_000))
    call = v2.OpenCall(PAYEE, ZERO_ADDRESS, PATH_USD, Units(10_000), SALT, PAYER)
    tx = await world.prepared(PAYER, Call(RESERVE_ADDRESS, v2.encode_open(call)), sponsored=True)
    signed = decode(tx.sign(PAYER_KEY).raw)
    refused = world.rpc("eth_sendRawTransaction", to_hex(signed.raw))  # not without the sponsor
    assert "fee payer has not signed" in refused["error"]["message"]
    receipt = await world.chain.broadcast(signed.cosign(PATH_USD, SPONSOR_KEY).raw)
    (opened,) = v2.decode_events(V2, receipt.logs)
    assert opened.descriptor.expiring_nonce_hash == signed.expiring_nonce_hash
    assert (receipt.sender, world.dev.balance(PAYER)) == (PAYER, RICH - 10_000)
    fee = await world.chain.fee_units(160_000)
    assert fee == 3_360 == receipt.fee_paid(SPONSOR, PATH_USD)
    assert receipt.fee_paid(PAYER, PATH_USD) == 0
    assert (world.dev.balance(SPONSOR), world.dev.balance(FEE_MANAGER)) == (4_000 - fee, fee)


async def test_fees_are_taken_even_from_a_reverted_transaction():
    """With fees the sender pays whether or not the calls succeed, and nobody can pay from nothing."""
    world = World(fees=True)
    template = await world.prepared(PAYER, Call(Address(b"\x09" * 20), b""))
    bad = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, RICH)))
    receipt = await world.chain.broadcast(dataclasses.replace(template, calls=(bad,)).sign(PAYER_KEY).raw)
    assert not receipt.succeeded
    assert receipt.fee_paid(PAYER, PATH_USD) == 3_360
    assert world.dev.balance(PAYER) == RICH - 3_360
    with pytest.raises(ChannelFault):
        await world.send(SPONSOR_KEY, Call(PAYEE, b""))


async def test_a_blocked_payee_makes_a_close_revert(world):
    """A token policy that blocks the payee reverts the close and leaves the channel as it was."""
    descriptor, channel_id, _ = await world.open_v2()
    world.dev.model.tokens.blocked.add(PAYEE)
    with pytest.raises(ChannelFault) as caught:
        await world.send(PAYEE_KEY, _close(descriptor, channel_id, 100, 100))
    assert caught.value.reason is Reason.CHAIN_REJECTED
    assert (await world.chain.channel_state(V2, channel_id)).deposit == 10_000


async def test_logs_are_found_by_contract_and_topic(world):
    """A watcher finds a channel's events by contract, name and channel id, within its block range."""
    descriptor, channel_id, opened = await world.open_v2()
    requested = await world.send(PAYER_KEY, Call(RESERVE_ADDRESS, v2.encode_request_close(descriptor)))
    find = world.chain.logs
    both = await find(
        RESERVE_ADDRESS, topics=[None, Hash32(channel_id)], from_block=opened.block, to_block=requested.block
    )
    assert [type(event) for event in v2.decode_events(V2, both)] == [v2.ChannelOpened, v2.CloseRequested]
    only = await find(RESERVE_ADDRESS, topics=[v2.CLOSE_REQUESTED], from_block=0, to_block=requested.block)
    assert [log.block for log in only] == [requested.block]
    assert await find(RESERVE_ADDRESS, topics=[], from_block=0, to_block=opened.block - 1) == ()
    assert await find(V1_ADDRESS, topics=[], from_block=0, to_block=requested.block) == ()


async def test_memo_transfers_emit_the_pair(world):
    """T-77: transferWithMemo emits a Transfer and a TransferWithMemo of the same amount."""
    memo = Hash32(b"\x05" * 32)
    call = tip20.TransferCall(PAYEE, Units(9), memo)
    receipt = await world.send(PAYER_KEY, Call(PATH_USD, tip20.encode_transfer(call)))
    assert tip20.decode_transfers(PATH_USD, receipt.logs) == [
        tip20.Transferred(PATH_USD, PAYER, PAYEE, 9),
        tip20.Transferred(PATH_USD, PAYER, PAYEE, 9, memo),
    ]


def test_the_reserves_views_agree_with_us(world):
    """The chain's own computeChannelId, getVoucherDigest and domainSeparator equal ours."""
    descriptor = Descriptor(PAYER, PAYEE, ZERO_ADDRESS, PATH_USD, SALT, PAYER, Hash32(b"\x09" * 32))

    def view(data):
        return world.rpc("eth_call", {"to": to_hex(RESERVE_ADDRESS), "data": to_hex(data)}, "latest")["result"]

    words = v2.encode_withdraw(descriptor)[4:]
    channel_id = derive_channel_id(V2, descriptor)
    domain = VoucherDomain(V2)
    assert view(v2.COMPUTE_CHANNEL_ID + words) == to_hex(channel_id)
    assert view(v2.DOMAIN_SEPARATOR) == to_hex(domain.separator)
    assert view(v2.GET_VOUCHER_DIGEST + channel_id + (25).to_bytes(32)) == to_hex(domain.digest(channel_id, 25))
    assert view(v2.GET_CHANNEL + words) == to_hex(words + bytes(96))


def test_unknown_methods_are_loud():
    """A method the chain does not have is -32601, counted and reported; the one clients probe is not reported."""
    heard = []
    dev = DevChain(ManualClock(), chain_id=1, on_unknown=heard.append)
    for method in ("eth_fillTransaction", "eth_getProof"):
        reply = dev.handle({"jsonrpc": "2.0", "id": 3, "method": method})
        assert (reply["error"]["code"], reply["id"]) == (-32601, 3)
    assert heard == ["eth_getProof"]
    assert dev.unknown == {"eth_getProof": 1}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", -32700),
        (b"7", -32600),
        (b'{"id":1}', -32600),
        (b'{"id":1,"method":"eth_call","params":[]}', -32602),
        (b'{"id":1,"method":"eth_call","params":[{"to":"0x1"}]}', -32602),
        (b'{"id":1,"method":"eth_call","params":[7,"latest"]}', -32602),
        (b'{"id":1,"method":"eth_call","params":[{"to":"0x' + b"00" * 20 + b'"},"0xffff"]}', -32001),
        (b'{"id":1,"method":"eth_getTransactionReceipt","params":["0x00"]}', -32602),
        (b'{"id":1,"method":"eth_sendRawTransaction","params":["0x76c0"]}', -32000),
        (b'{"id":1,"method":"eth_getLogs","params":[[]]}', -32602),
    ],
)
def test_bad_requests_get_an_error(world, body, code):
    """No request body makes the chain raise; each gets the matching JSON-RPC error."""
    assert json.loads(world.dev.handle_http_body(body))["error"]["code"] == code


def test_batches_and_absent_params(world):
    """A JSON-RPC batch is answered in order, and params may be left out."""
    body = b'[{"id":1,"method":"eth_chainId"},{"id":2,"method":"eth_blockNumber"}]'
    first, second = json.loads(world.dev.handle_http_body(body))
    assert (first["id"], first["result"], second["id"]) == (1, "0x7a69", 2)


def test_time_travel_and_faucet(world):
    """evm_increaseTime moves the head's timestamp, evm_mine adds a block, the faucet gives every known token."""
    before = int(world.rpc("eth_getBlockByNumber", "latest", False)["result"]["timestamp"], 16)
    assert world.rpc("evm_increaseTime", 900)["result"] == "0x384"
    head = world.rpc("eth_getBlockByNumber", "latest", False)["result"]
    assert int(head["timestamp"], 16) == before + 900
    assert int(world.rpc("evm_mine")["result"], 16) == int(head["number"], 16) + 1
    world.rpc("tempo_fundAddress", to_hex(SPONSOR))
    assert world.dev.balance(SPONSOR) == 1_000_000_000_000


def test_a_zero_value_may_be_written_empty(world):
    """The reference client writes value "0x"; estimate and call take it."""
    request = {
        "from": to_hex(PAYER),
        "calls": [{"to": to_hex(PATH_USD), "value": "0x", "data": to_hex(tip20.encode_balance_of(PAYER))}],
    }
    assert world.rpc("eth_call", request, "latest")["result"] == to_hex(RICH.to_bytes(32))
    assert int(world.rpc("eth_estimateGas", request)["result"], 16) > 21_000


def test_sync_send_returns_the_receipt(world):
    """eth_sendRawTransactionSync answers with the receipt object itself."""
    signed = decode_sample(world)
    receipt = world.rpc("eth_sendRawTransactionSync", to_hex(signed.raw))["result"]
    assert (receipt["status"], receipt["type"], receipt["transactionHash"]) == ("0x1", "0x76", to_hex(signed.tx_hash))
    assert world.rpc("eth_getTransactionByHash", to_hex(signed.tx_hash))["result"]["hash"] == to_hex(signed.tx_hash)


def decode_sample(world):
    now = world.clock.now()
    pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(1))))
    return TempoTx(
        chain_id=31337,
        max_priority_fee_per_gas=0,
        max_fee_per_gas=25_000_000_000,
        gas=500_000,
        calls=(pay,),
        nonce_key=EXPIRING_NONCE_KEY,
        nonce=0,
        valid_before=now + 25,
        valid_after=5,
        fee_token=PATH_USD,
    ).sign(PAYER_KEY)
