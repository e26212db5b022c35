"""What our chain client makes of a node that is slow, deaf, lagging or lying: nothing is ever guessed (T-24, T-28)."""

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web

from channels import tip20
from channels.chain import Receipt
from channels.descriptor import RESERVE_ADDRESS, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId
from channels.signature import address_of
from channels.tempo_tx import Call
from channels.units import Units
from mppnode.chain.devchain import PATH_USD, DevChain, LocalTransport
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport, TransportFailed
from mppnode.cli.devchain_server import start_devchain
from mppnode.kernel.clock import ManualClock

KEY = b"\x11" * 32
PAYER, PAYEE = address_of(KEY), address_of(b"\x22" * 32)
ESCROW = Escrow(SessionProtocol.V2, 31337, RESERVE_ADDRESS)
SEND = "eth_sendRawTransaction"
RECEIPT = "eth_getTransactionReceipt"


class Faulty:
    """A transport that consults a script, one entry per call of a method, before or instead of asking the chain."""

    def __init__(self, dev):
        self._inner = LocalTransport(dev)
        self.script = {}
        self.seen = []

    async def post(self, body):
        request = json.loads(body)
        method = request[0]["method"] + "[]" if isinstance(request, list) else request["method"]
        self.seen.append(method)
        steps = self.script.get(method, [])
        step = steps.pop(0) if steps else None
        if step == "down":
            raise TransportFailed("down", maybe_sent=False)
        if step == "lost request":
            raise TransportFailed("lost", maybe_sent=True)
        if step == "lost reply":
            await self._inner.post(body)
            raise TransportFailed("lost", maybe_sent=True)
        if isinstance(step, int):
            return json.dumps({"id": request["id"], "error": {"code": step, "message": "no"}}).encode()
        if callable(step):
            return json.dumps(step(json.loads(await self._inner.post(body)))).encode()
        return await self._inner.post(body)


class World:
    def __init__(self):
        self.clock = ManualClock()
        self.dev = DevChain(self.clock, chain_id=31337)
        self.dev.fund(PAYER, Units(1_000))
        self.wire = Faulty(self.dev)
        self.slept = []
        self.chain = RpcChain(self.wire, self.clock, limits=RpcLimits(), sleep=self.sleep)

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.clock.advance(seconds)

    async def payment(self):
        pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(5))))
        return (await self.chain.prepare(PAYER, [pay], fee_token=PATH_USD, entropy=bytes(8))).sign(KEY)


@pytest.fixture
def world():
    return World()


async def _reason(awaitable):
    with pytest.raises(ChannelFault) as caught:
        await awaitable
    return caught.value.reason


@pytest.mark.parametrize(
    "script",
    [
        ["lost reply"],
        ["lost request"],
        ["down", "lost request"],
        ["lost reply", -32003],
        ["lost reply", "lost reply", "lost reply"],
        [-32603, None],
        [-32005, "lost reply"],
        ["down", "down"],
    ],
)
async def test_lost_replies_end_in_one_payment(world, script):
    """Whatever is lost on the way, the same bytes are sent again and the payment happens once."""
    signed = await world.payment()
    world.wire.script[SEND] = list(script)
    receipt = await world.chain.broadcast(signed.raw)
    assert receipt.succeeded
    assert world.dev.balance(PAYEE) == 5


async def test_a_node_that_is_down_leaves_nothing_behind(world):
    """T-28: when no request left, the fault says so and a later broadcast of the same bytes completes."""
    signed = await world.payment()
    world.wire.script[SEND] = ["down"] * 3
    assert await _reason(world.chain.broadcast(signed.raw)) is Reason.CHAIN_UNAVAILABLE
    assert (await world.chain.broadcast(signed.raw)).succeeded


async def test_one_ambiguous_try_makes_the_whole_unknown(world):
    """A lost request followed by refused connections is unknown: the first may have arrived."""
    signed = await world.payment()
    world.wire.script[SEND] = ["lost request", "down", "down"]
    assert await _reason(world.chain.broadcast(signed.raw)) is Reason.CHAIN_OUTCOME_UNKNOWN
    assert sum(world.slept) >= 30


async def test_a_refusal_after_a_lost_try_is_not_believed(world):
    """A node that says no, after a try that may have arrived elsewhere, does not prove that nothing was sent."""
    signed = await world.payment()
    world.wire.script[SEND] = ["lost request", -32003]
    assert await _reason(world.chain.broadcast(signed.raw)) is Reason.CHAIN_OUTCOME_UNKNOWN


async def test_a_plain_refusal_is_final(world):
    """A first-try refusal of a transaction the node does not hold is a rejection, without waiting."""
    signed = await world.payment()
    world.wire.script[SEND] = [-32003]
    assert await _reason(world.chain.broadcast(signed.raw)) is Reason.CHAIN_REJECTED
    assert world.slept == []


async def test_a_refusal_by_a_node_that_cannot_look_is_not_final(world):
    """If the node refuses and then cannot say whether it holds the bytes, the outcome is unknown."""
    signed = await world.payment()
    world.wire.script[SEND] = [-32003]
    world.wire.script["eth_getTransactionByHash"] = ["down"] * 3
    assert await _reason(world.chain.broadcast(signed.raw)) is Reason.CHAIN_OUTCOME_UNKNOWN


async def test_rate_limited_sends_are_unavailable(world):
    """A rate limit on every try means the node never looked."""
    signed = await world.payment()
    world.wire.script[SEND] = [-32005] * 3
    assert await _reason(world.chain.broadcast(signed.raw)) is Reason.CHAIN_UNAVAILABLE


async def test_receipts_are_waited_for(world):
    """A receipt that comes late, or is unreadable at first, is found by polling."""
    signed = await world.payment()
    world.wire.script[RECEIPT] = [
        lambda reply: reply | {"result": None},
        "down",
        "down",
        "down",
        lambda reply: reply | {"result": {"status": "0x1"}},
    ]
    receipt = await world.chain.broadcast(signed.raw)
    assert (receipt.tx_hash, receipt.succeeded) == (signed.tx_hash, True)


async def test_a_sent_transaction_is_not_waited_for(world):
    """send() ends when a node has taken the bytes, and again when it has them already; no receipt is asked for."""
    world.dev.halt()
    signed = await world.payment()
    for _ in range(2):
        await world.chain.send(signed.raw)
    assert RECEIPT not in world.wire.seen[: world.wire.seen.index(SEND) + 1]
    assert world.slept == []
    world.dev.resume()
    assert world.dev.balance(PAYEE) == 5


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (["down"] * 3, Reason.CHAIN_UNAVAILABLE),
        ([-32005] * 3, Reason.CHAIN_UNAVAILABLE),
        ([-32003], Reason.CHAIN_REJECTED),
        (["down", -32003], Reason.CHAIN_REJECTED),
        (["lost request"] * 3, Reason.CHAIN_OUTCOME_UNKNOWN),
        (["lost request", "down", "down"], Reason.CHAIN_OUTCOME_UNKNOWN),
        (["lost request", -32003], Reason.CHAIN_OUTCOME_UNKNOWN),
        ([-32603, -32603, -32603], Reason.CHAIN_OUTCOME_UNKNOWN),
        (["lost reply"], None),
        (["down", None], None),
        ([-32603, None], None),
    ],
)
async def test_how_a_send_ends(world, script, reason):
    """What surely never left, what was surely refused and what may be on its way are three different answers."""
    signed = await world.payment()
    world.wire.script[SEND] = list(script)
    if reason is None:
        await world.chain.send(signed.raw)
    else:
        assert await _reason(world.chain.send(signed.raw)) is reason
    assert sum(world.slept) <= 1


async def test_a_refusal_nobody_can_check_is_unknown(world):
    """A node that refuses bytes and cannot say whether it holds them may be refusing what it has."""
    signed = await world.payment()
    world.wire.script[SEND] = [-32003]
    world.wire.script[RECEIPT] = ["down"] * 3
    assert await _reason(world.chain.send(signed.raw)) is Reason.CHAIN_OUTCOME_UNKNOWN


async def test_nothing_is_prepared_for_another_chain(world):
    """A client that knows its chain's id builds no transaction from the word of a node that names another one."""
    pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(5))))
    for chain_id in (31337, 1):
        chain = RpcChain(world.wire, world.clock, limits=RpcLimits(), chain_id=chain_id, sleep=world.sleep)
        prepared = chain.prepare(PAYER, [pay], fee_token=PATH_USD, entropy=bytes(8))
        if chain_id == 31337:
            assert (await prepared).chain_id == chain_id
        else:
            assert await _reason(prepared) is Reason.CHAIN_UNAVAILABLE


async def test_gas_is_measured_without_sending(world):
    """gas_of() tells what a transaction would use, and a revert is a rejection."""
    tx = (await world.payment()).tx
    assert await world.chain.gas_of(tx, PAYER) == 160_000
    assert await _reason(world.chain.gas_of(tx, PAYEE)) is Reason.CHAIN_REJECTED
    world.wire.script["eth_estimateGas"] = ["down"] * 3
    assert await _reason(world.chain.gas_of(tx, PAYER)) is Reason.CHAIN_UNAVAILABLE


V1_ESCROW = Escrow(SessionProtocol.V1, 31337, Address(b"\xe1" * 20))
V1_REPLY = "0x" + bytes(256).hex()
BATCHES = {
    "another order": (lambda batch: batch[::-1], True),
    "one missing": (lambda batch: batch[:1], False),
    "one twice": (lambda batch: [batch[0], batch[0]], False),
    "one refused": (lambda batch: [batch[0], {"id": batch[1]["id"], "error": {"code": -32001, "message": "no"}}], False),
    "all refused at once": (lambda _batch: {"id": None, "error": {"code": -32600, "message": "no batches"}}, False),
    "not a batch": (lambda batch: batch[0], False),
    "noise": (lambda _batch: [7, None], False),
    "an id that is none": (lambda batch: [batch[0], {**batch[1], "id": [2]}], False),
    "one malformed": (lambda batch: [batch[0], {**batch[1], "result": "0x00"}], False),
}


@pytest.mark.parametrize("name", BATCHES)
async def test_replies_to_a_batch(world, name):
    """Answers are matched by their ids; a batch that lacks one is no answer at all."""
    change, fine = BATCHES[name]

    def reply(batch):
        return change([{"jsonrpc": "2.0", "id": entry["id"], "result": V1_REPLY} for entry in batch])

    world.wire.script["eth_call[]"] = [reply] * 6
    states = world.chain.channel_states(V1_ESCROW, [ChannelId(bytes(32)), ChannelId(b"\1" * 32)], at_block=1)
    if fine:
        assert [state.deposit for state in await states] == [0, 0]
    else:
        assert await _reason(states) is Reason.CHAIN_UNAVAILABLE


def _edit_receipt(**changes):
    return lambda reply: reply | {"result": reply["result"] | changes}


@pytest.mark.parametrize(
    "broken",
    [
        _edit_receipt(transactionHash="0x" + "00" * 32),
        _edit_receipt(status="0x2"),
        _edit_receipt(status=1),
        _edit_receipt(status="0x01"),
        _edit_receipt(logs=None),
        _edit_receipt(logs=[7]),
        _edit_receipt(blockNumber="latest"),
        _edit_receipt(blockHash=None),
        _edit_receipt(**{"from": "0x00"}),
        lambda reply: reply | {"result": "0x1"},
        lambda reply: reply | {"id": 999_999},
        lambda _reply: [],
        lambda reply: {"id": reply["id"]},
        lambda reply: {"id": reply["id"], "error": "x"},
        lambda reply: {"id": reply["id"], "error": {"code": "x", "message": {}}},
    ],
)
async def test_malformed_receipts_are_no_receipts(world, broken):
    """A receipt of another transaction, or one that is not a receipt, is the node's fault and never a success."""
    receipt = await world.chain.broadcast((await world.payment()).raw)
    assert isinstance(receipt, Receipt)
    world.wire.script[RECEIPT] = [broken] * 3
    assert await _reason(world.chain.receipt(receipt.tx_hash)) is Reason.CHAIN_UNAVAILABLE


async def test_a_removed_or_foreign_log_spoils_the_receipt(world):
    """A log that a reorganisation removed, or that belongs to another transaction, is never counted."""
    receipt = await world.chain.broadcast((await world.payment()).raw)
    for change in ({"removed": True}, {"transactionHash": "0x" + "00" * 32}, {"topics": ["0x00"]}):

        def edit(reply, change=change):
            log = reply["result"]["logs"][0] | change
            return reply | {"result": reply["result"] | {"logs": [log]}}

        world.wire.script[RECEIPT] = [edit]
        assert await _reason(world.chain.receipt(receipt.tx_hash)) is Reason.CHAIN_UNAVAILABLE


async def test_lagging_replicas_are_waited_for(world):
    """T-24: a pinned read repeats, 250 ms apart and at most 5 times, until the replica has the block."""
    world.wire.script["eth_call"] = [-32001] * 5
    state = await world.chain.channel_state(ESCROW, ChannelId(bytes(32)), at_block=1)
    assert (state.deposit, state.block) == (0, 1)
    assert world.slept == [0.25] * 5
    world.wire.script["eth_call"] = [-32001] * 6
    assert await _reason(world.chain.channel_state(ESCROW, ChannelId(bytes(32)), at_block=1)) is Reason.CHAIN_UNAVAILABLE


async def test_reads_are_repeated_and_then_fail(world):
    """Two lost replies are bridged, three are an unavailable chain."""
    world.wire.script["eth_chainId"] = ["lost reply", -32603]
    assert await world.chain.chain_id() == 31337
    world.wire.script["eth_chainId"] = ["down"] * 3
    assert await _reason(world.chain.chain_id()) is Reason.CHAIN_UNAVAILABLE


@pytest.mark.parametrize(("step", "reason"), [(3, Reason.CHAIN_REJECTED), (-32000, Reason.CHAIN_REJECTED)])
async def test_a_reverting_simulation_is_a_rejection(world, step, reason):
    """A revert is an answer: it is not retried."""
    world.wire.script["eth_call"] = [step]
    assert await _reason(world.chain.simulate(PAYER, [Call(PAYEE, b"")], fee_token=None)) is reason
    assert world.slept == []


async def test_a_simulation_without_answer_is_not_a_rejection(world):
    """T-28: an unreachable or rate-limiting node makes a simulation unavailable, not a payer's mistake."""
    world.wire.script["eth_call"] = ["down", -32005, "lost reply"]
    assert await _reason(world.chain.simulate(PAYER, [Call(PAYEE, b"")], fee_token=None)) is Reason.CHAIN_UNAVAILABLE


async def test_logs_of_another_contract_are_refused(world):
    """A node that answers a log query with somebody else's logs is not believed."""
    await world.chain.broadcast((await world.payment()).raw)
    head = world.dev.head
    (log,) = await world.chain.logs(PATH_USD, topics=[], from_block=0, to_block=head)
    assert log.block == head
    world.wire.script["eth_getLogs"] = [
        lambda reply: reply | {"result": [entry | {"address": "0x" + "09" * 20} for entry in reply["result"]]}
    ]
    assert await _reason(world.chain.logs(PATH_USD, topics=[], from_block=0, to_block=head)) is Reason.CHAIN_UNAVAILABLE


# ------------------------------------------------------------------------------------------------- the HTTP transport


async def _serve(handler):
    app = web.Application()
    app.router.add_post("/", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def _failure(url, **options):
    async with aiohttp.ClientSession() as session:
        with pytest.raises(TransportFailed) as caught:
            await HttpTransport(session, url, **options).post(b"{}")
    return caught.value


async def test_the_http_transport_reaches_the_served_chain():
    """Our client, over a real socket, against the served development chain."""
    clock = ManualClock()
    dev = DevChain(clock, chain_id=31337)
    dev.fund(PAYER, Units(1_000))
    runner, url = await start_devchain(dev, "127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        chain = RpcChain(HttpTransport(session, url), clock, limits=RpcLimits())
        assert await chain.balance_of(PATH_USD, PAYER) == 1_000
        pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(PAYEE, Units(5))))
        tx = await chain.prepare(PAYER, [pay], fee_token=PATH_USD, entropy=bytes(8))
        assert (await chain.broadcast(tx.sign(KEY).raw)).succeeded
    await runner.cleanup()
    assert dev.balance(PAYEE) == 5


async def test_a_closed_port_is_surely_not_sent():
    """A refused connection proves that the node saw nothing."""

    async def answer(_request):
        return web.Response()

    runner, url = await _serve(answer)
    await runner.cleanup()
    assert (await _failure(url)).maybe_sent is False


@pytest.mark.parametrize(("status", "maybe_sent"), [(429, False), (403, False), (502, True), (302, True)])
async def test_http_statuses(status, maybe_sent):
    """A 4xx comes from a gateway before the node; anything else may have passed it. Redirects are not followed."""

    async def answer(_request):
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    runner, url = await _serve(answer)
    failure = await _failure(url)
    await runner.cleanup()
    assert failure.maybe_sent is maybe_sent


async def test_endless_replies_are_cut():
    """A reply beyond the limit is dropped while it arrives."""

    async def answer(_request):
        return web.Response(body=b" " * 5_000)

    runner, url = await _serve(answer)
    failure = await _failure(url, reply_bytes_max=4_096)
    await runner.cleanup()
    assert failure.maybe_sent is True


async def test_a_silent_node_times_out_as_maybe_sent():
    """A node that takes the request and says nothing may still act on it."""
    release = asyncio.Event()

    async def answer(_request):
        await release.wait()
        return web.Response()

    runner, url = await _serve(answer)
    failure = await _failure(url, timeout_s=0.05)
    release.set()
    await runner.cleanup()
    assert failure.maybe_sent is True


async def test_the_url_is_in_no_message():
    """A node URL often holds an API key; no fault of ours repeats it."""
    failure = await _failure("http://127.0.0.1:1/secret-key")
    assert "secret-key" not in str(failure)

