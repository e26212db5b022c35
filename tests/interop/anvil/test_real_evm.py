"""Our transactions, ids, digests and vouchers before a real Tempo EVM."""

import contextlib
import dataclasses
import json
import os
import subprocess
import threading
from pathlib import Path

import aiohttp
import pytest

from channels import escrow as v2
from channels import escrow_v1 as v1
from channels import tip20
from channels.abi import encode
from channels.chain import fee_of
from channels.descriptor import ChainSnapshot, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, Address, Hash32, to_hex
from channels.signature import CURVE_ORDER, address_of
from channels.sponsor import gas_allowed
from channels.tempo_tx import Call
from channels.units import Units
from channels.voucher import VoucherDomain, derive_channel_id, domain_separator
from mppnode.chain.rpc import JsonRpc, RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.kernel.clock import SystemClock
from tests.interop.packages import node_modules, unavailable

pytestmark = pytest.mark.anvil

HERE = Path(__file__).parent
ARTIFACT = json.loads((HERE / "TempoStreamChannel.json").read_text())
PATH_USD = Address(bytes.fromhex("20c0000000000000000000000000000000000000"))
FEE_MANAGER = Address(bytes.fromhex("feec000000000000000000000000000000000000"))
# The first two accounts of the mnemonic every anvil starts with; public, and rich there only.
PAYER_KEY = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")
PAYEE_KEY = bytes.fromhex("59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d")
PAYER, PAYEE = address_of(PAYER_KEY), address_of(PAYEE_KEY)
STRANGER = Address(b"\x5a" * 20)
SALT = Hash32(b"\x77" * 32)


def _anvil():
    pattern = "@foundry-rs/anvil-*/bin/anvil*"
    return min(node_modules(pattern).glob(pattern))


@pytest.fixture(scope="module")
def node_url():
    command = [_anvil(), "--network", "tempo", "--hardfork", "T4", "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    lines = []
    url = None
    for line in process.stdout:
        lines.append(line)
        if "Listening on" in line:
            url = "http://" + line.split()[-1]
            break
    watchdog.cancel()
    # anvil logs every request: an unread pipe would fill up and stop it
    drain = threading.Thread(target=lambda: [None for _ in process.stdout])
    drain.start()
    if url is None:
        process.wait()
        unavailable("anvil did not start: " + "".join(lines[-3:]))
    yield url
    process.kill()
    process.wait()
    drain.join()
    process.stdout.close()


@contextlib.asynccontextmanager
async def _connected(url):
    async with aiohttp.ClientSession() as session:
        yield Node(HttpTransport(session, url))


class Node:
    """Our chain client, and the raw JSON-RPC for what only a development node has."""

    def __init__(self, transport):
        self.rpc = JsonRpc(transport)
        self.chain = RpcChain(transport, SystemClock(), limits=RpcLimits())

    async def send(self, key, *calls):
        tx = await self.chain.prepare(address_of(key), calls, fee_token=PATH_USD, entropy=os.urandom(8))
        # this anvil estimates a batch without its calls, and a new storage slot costs 250,000 gas on Tempo
        return await self.chain.broadcast(dataclasses.replace(tx, gas=10_000_000).sign(key).raw)

    async def deploy(self):
        tx_hash = await self.rpc.call(
            "eth_sendTransaction", {"from": to_hex(PAYER), "data": ARTIFACT["bytecode"], "gas": hex(25_000_000)}
        )
        assert (await self.chain._await_receipt(Hash32(bytes.fromhex(tx_hash[2:])))).succeeded
        receipt = await self.rpc.call("eth_getTransactionReceipt", tx_hash)
        return Escrow(
            SessionProtocol.V1, await self.chain.chain_id(), Address(bytes.fromhex(receipt["contractAddress"][2:]))
        )

    async def view(self, to, data):
        reply = await self.rpc.call("eth_call", {"to": to_hex(to), "data": to_hex(data)}, "latest")
        return bytes.fromhex(reply[2:])

    async def open(self, escrow, deposit=10_000, signer=ZERO_ADDRESS):
        call = v1.OpenCall(PAYEE, PATH_USD, Units(deposit), SALT, signer)
        approve = tip20.encode_approve(tip20.ApproveCall(escrow.address, deposit))
        receipt = await self.send(PAYER_KEY, Call(PATH_USD, approve), Call(escrow.address, v1.encode_open(call)))
        assert receipt.succeeded
        return call, derive_channel_id(escrow, call.descriptor(PAYER)), receipt


async def test_a_transfer_in_our_transaction_is_mined(node_url):
    """A TIP-20 transfer in a 0x76 transaction with an expiring nonce, built by our code alone, moves the money."""
    async with _connected(node_url) as node:
        before = await node.chain.balance_of(PATH_USD, STRANGER)
        memo = Hash32(b"\x0e" * 32)
        transfer = tip20.encode_transfer(tip20.TransferCall(STRANGER, Units(1_234), memo))
        receipt = await node.send(PAYER_KEY, Call(PATH_USD, transfer))
        assert (receipt.succeeded, receipt.sender) == (True, PAYER)
        assert await node.chain.balance_of(PATH_USD, STRANGER) == before + 1_234
        plain, with_memo, *fee = tip20.decode_transfers(PATH_USD, receipt.logs)
        assert plain == tip20.Transferred(PATH_USD, PAYER, STRANGER, 1_234)
        assert with_memo == tip20.Transferred(PATH_USD, PAYER, STRANGER, 1_234, memo)
        assert [event.to for event in fee] == [FEE_MANAGER]


async def test_the_same_bytes_again_are_the_same_payment(node_url):
    """Broadcasting mined bytes again gives the same receipt and moves nothing; two prepared equals are two payments."""
    async with _connected(node_url) as node:
        pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(STRANGER, Units(7))))
        tx = await node.chain.prepare(PAYER, [pay], fee_token=PATH_USD, entropy=os.urandom(8))
        raw = tx.sign(PAYER_KEY).raw
        first = await node.chain.broadcast(raw)
        before = await node.chain.balance_of(PATH_USD, STRANGER)
        assert await node.chain.broadcast(raw) == first
        assert await node.chain.balance_of(PATH_USD, STRANGER) == before
        assert await node.chain.outcome(first.tx_hash, valid_before=tx.valid_before) == first
        assert (await node.send(PAYER_KEY, pay)).tx_hash != first.tx_hash


async def test_a_sponsored_transaction_is_mined(node_url):
    """The sender's half and the sponsor's half, both ours, are one valid transaction whose fee the sponsor pays."""
    async with _connected(node_url) as node:
        pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(STRANGER, Units(9))))
        tx = await node.chain.prepare(PAYER, [pay], fee_token=None, entropy=os.urandom(8), sponsored=True)
        before = await node.chain.balance_of(PATH_USD, STRANGER)
        signed = tx.sign(PAYER_KEY).cosign(PATH_USD, PAYEE_KEY)
        receipt = await node.chain.broadcast(signed.raw)
        assert (receipt.succeeded, receipt.sender) == (True, PAYER)
        assert await node.chain.balance_of(PATH_USD, STRANGER) == before + 9
        fees = [event for event in tip20.decode_transfers(PATH_USD, receipt.logs) if event.to == FEE_MANAGER]
        assert [event.sender for event in fees] == [PAYEE]
        assert (receipt.fee_paid(PAYEE, PATH_USD), receipt.fee_paid(PAYER, PATH_USD)) == (fees[0].amount, 0)


async def test_the_fee_is_gas_times_price_rounded_up(node_url):
    """What we compute from gas used and effective price is what the chain took, to the unit."""
    async with _connected(node_url) as node:
        pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(STRANGER, Units(3))))
        receipt = await node.send(PAYER_KEY, pay)
        raw = await node.rpc.call("eth_getTransactionReceipt", to_hex(receipt.tx_hash))
        gas, price = int(raw["gasUsed"], 16), int(raw["effectiveGasPrice"], 16)
        assert receipt.fee_paid(PAYER, PATH_USD) == fee_of(gas, price) > 0
        assert receipt.block_hash == bytes.fromhex(raw["blockHash"][2:])
        # This anvil lets its base fee fall block by block, so a quote of now is near what was paid, and never zero.
        assert 0 < await node.chain.fee_units(gas) <= 2 * fee_of(gas, price)


async def test_blocks_become_final(node_url):
    """The finalised head trails the newest one and reaches a transaction's block when enough blocks follow."""
    async with _connected(node_url) as node:
        pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(STRANGER, Units(3))))
        receipt = await node.send(PAYER_KEY, pay)
        assert (await node.chain.finalised()).number < receipt.block
        await node.rpc.call("anvil_mine", hex(130), hex(0))  # at one moment: time must not run ahead
        final = await node.chain.finalised()
        assert receipt.block <= final.number < (await node.chain.head()).number


async def test_a_late_transaction_is_refused(node_url):
    """A transaction whose validity has ended is refused by the node and reported as surely not mined."""
    async with _connected(node_url) as node:
        pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(STRANGER, Units(7))))
        tx = await node.chain.prepare(PAYER, [pay], fee_token=PATH_USD, entropy=os.urandom(8))
        late = dataclasses.replace(tx, valid_before=SystemClock().now() - 5)
        with pytest.raises(ChannelFault) as caught:
            await node.chain.broadcast(late.sign(PAYER_KEY).raw)
        assert caught.value.reason is Reason.CHAIN_REJECTED


async def test_the_evm_computes_our_ids_and_digests(node_url):
    """Channel id, domain separator and voucher digest of an EVM equal ours, for signer and payer alike."""
    async with _connected(node_url) as node:
        escrow = await node.deploy()
        domain = VoucherDomain(escrow)
        assert await node.view(escrow.address, v1.DOMAIN_SEPARATOR) == domain_separator(escrow)
        for signer in (ZERO_ADDRESS, PAYEE, STRANGER):
            call = v1.OpenCall(PAYEE, PATH_USD, Units(1), SALT, signer)
            channel_id = derive_channel_id(escrow, call.descriptor(PAYER))
            terms = v1.COMPUTE_CHANNEL_ID + encode(PAYER, PAYEE, PATH_USD, SALT, signer)
            assert await node.view(escrow.address, terms) == channel_id
            for amount in (0, 25, 2**96 - 1, 2**128 - 1):
                digest = await node.view(escrow.address, v1.GET_VOUCHER_DIGEST + encode(channel_id, amount))
                assert digest == domain.digest(channel_id, amount)


async def test_a_channel_lives_and_pays_on_a_real_evm(node_url):
    """Approve and open in one batch, settle, top up, close: every event and balance is what our code expects."""
    async with _connected(node_url) as node:
        escrow = await node.deploy()
        domain = VoucherDomain(escrow)
        call, channel_id, opened = await node.open(escrow)
        assert v1.decode_events(escrow, opened.logs) == [
            v2.ChannelOpened(channel_id, call.descriptor(PAYER), Units(10_000))
        ]
        state = await node.chain.channel_state(escrow, channel_id, at_block=opened.block)
        assert state == ChainSnapshot(Units(10_000), Units(0), None, opened.block)
        both = await node.chain.channel_states(escrow, [Hash32(bytes(32)), channel_id], at_block=opened.block)
        assert list(both) == [ChainSnapshot(Units(0), Units(0), None, opened.block), state]
        names = [v1.CHANNEL_OPENED, v1.SETTLED]
        logs = await node.chain.logs(
            escrow.address, topics=[names, Hash32(channel_id)], from_block=0, to_block=opened.block
        )
        assert [log.topics[0] for log in logs] == [v1.CHANNEL_OPENED]

        settle = v1.encode_settle(channel_id, Units(300), domain.sign(channel_id, 300, PAYER_KEY))
        settled = await node.send(PAYEE_KEY, Call(escrow.address, settle))
        assert v1.decode_events(escrow, settled.logs) == [
            v2.Settled(channel_id, PAYER, PAYEE, Units(300), Units(300), Units(300))
        ]
        approve = tip20.encode_approve(tip20.ApproveCall(escrow.address, 500))
        top_up = v1.encode_top_up(v1.TopUpCall(channel_id, Units(500)))
        topped = await node.send(PAYER_KEY, Call(PATH_USD, approve), Call(escrow.address, top_up))
        assert v1.decode_events(escrow, topped.logs) == [
            v2.ToppedUp(channel_id, PAYER, PAYEE, Units(500), Units(10_500))
        ]
        close = v1.encode_close(channel_id, Units(450), domain.sign(channel_id, 450, PAYER_KEY))
        closed = await node.send(PAYEE_KEY, Call(escrow.address, close))
        assert v1.decode_events(escrow, closed.logs) == [
            v2.ChannelClosed(channel_id, PAYER, PAYEE, Units(450), Units(10_050))
        ]
        moved = [(event.sender, event.to, event.amount) for event in tip20.decode_transfers(PATH_USD, closed.logs)]
        assert (escrow.address, PAYEE, 150) in moved
        assert (escrow.address, PAYER, 10_050) in moved
        assert await node.chain.balance_of(PATH_USD, escrow.address) == 0
        final = v1.decode_get_channel(await node.view(escrow.address, v1.encode_get_channel(channel_id)))
        assert (final.finalized, final.payer, final.deposit) == (True, ZERO_ADDRESS, 0)


async def test_the_evm_refuses_what_we_refuse(node_url):
    """A high-s twin, a foreign signer, an amount above the deposit: the contract pays none of them."""
    async with _connected(node_url) as node:
        escrow = await node.deploy()
        domain = VoucherDomain(escrow)
        _, channel_id, _ = await node.open(escrow)
        good = domain.sign(channel_id, 300, PAYER_KEY)
        twin = good[:32] + (CURVE_ORDER - int.from_bytes(good[32:64])).to_bytes(32) + bytes((55 - good[64],))
        for amount, signature in (
            (300, twin),
            (301, good),
            (300, domain.sign(channel_id, 300, PAYEE_KEY)),
            (10_001, domain.sign(channel_id, 10_001, PAYER_KEY)),
        ):
            data = v1.encode_settle(channel_id, Units(amount), signature)
            receipt = await node.send(PAYEE_KEY, Call(escrow.address, data))
            assert not receipt.succeeded
            assert v1.decode_events(escrow, receipt.logs) == []
        assert (await node.chain.channel_state(escrow, channel_id)).settled == 0
        assert (await node.send(PAYEE_KEY, Call(escrow.address, v1.encode_settle(channel_id, Units(300), good)))).succeeded


async def test_a_sponsors_rehearsal_is_a_question_the_node_understands(node_url):
    """Gas is measured for a half-signed transaction and its final envelope is tried, fee payer, token and gas named."""
    async with _connected(node_url) as node:
        pay = Call(PATH_USD, tip20.encode_transfer(tip20.TransferCall(STRANGER, Units(9))))
        tx = await node.chain.prepare(PAYER, [pay], fee_token=None, entropy=os.urandom(8), sponsored=True)
        measured = await node.chain.gas_of(tx, PAYER)
        assert tx.gas <= gas_allowed(measured)
        await node.chain.rehearse(dataclasses.replace(tx, fee_token=PATH_USD), PAYER, fee_payer=PAYEE)
