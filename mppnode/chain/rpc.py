"""A Tempo chain over JSON-RPC.

Two rules run through this file. A read may be repeated, so it is, a few times; and a transaction's bytes may be sent
again, because the chain counts an expiring nonce once, so a lost reply is answered by sending the same bytes and asking
for the receipt, never by building another transaction.

``eth_sendRawTransactionSync`` would save polling, but its own timeout answers "I do not know" in yet another form, and
public nodes do not all have it: one path for money is better than two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import orjson

from channels import escrow as v2
from channels import escrow_v1 as v1
from channels import tempo_tx, tip20
from channels.abi import Log
from channels.chain import Fate, Head, Receipt, Topic, TxOutcome, fee_of
from channels.descriptor import ChainSnapshot, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, Hash32, to_hex
from channels.instants import UnixSeconds
from channels.tempo_tx import Call, TempoTx
from channels.units import Units
from mppnode.chain import wire
from mppnode.chain.transport import Transport, TransportFailed
from mppnode.kernel.clock import Clock

T = TypeVar("T")

VALIDITY_S: Final = 25
"""How long our transactions may be mined: inside the chain's 30 s window with room for clock skew."""
EXPIRY_MARGIN_S: Final = 60
"""Added before a missing receipt means "never": two replicas behind one address may be this far apart."""
CLOCK_APART_S: Final = 60
"""How far the chain's time may be ahead of our clock when we sign; see :meth:`RpcChain.prepare`."""
ENTROPY_BYTES: Final = 8
STATES_PER_CALL: Final = 100
"""Channels per round trip: 10 KB of reply, and what public nodes still take as one batch."""
_LIMITED: Final = -32005  # EIP-1474 "limit exceeded": the node did not look at the request
_INTERNAL: Final = -32603  # JSON-RPC 2.0 "internal error": anything may have happened
_REVERTS: Final = frozenset({3, -32000, -32003, -32015})  # as geth, reth and OpenEthereum report a failing call


@dataclass(frozen=True, slots=True)
class RpcLimits:
    """How patient the client is. Seconds, and counts of attempts."""

    read_attempts: int = 3
    read_delay_s: float = 0.25
    pinned_attempts: int = 6  # the first and five more, as the reference server: 1.25 s of replica lag
    send_attempts: int = 3
    receipt_wait_s: float = 30.0  # VALIDITY_S and a few blocks
    receipt_poll_s: float = 0.25
    priority_fee_max: int = 50_000_000_000
    """Attodollars per gas. The tip is all a node could make us overpay: the base fee is the chain's own."""


class RpcError(Exception):
    """The node understood and said no. Its message is its own words: never shown to a payer."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(f"{code}: {message}")


class JsonRpc:
    """JSON-RPC 2.0 over a transport: one request or one batch at a time, the reply must be to it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._last_id = 0

    async def call(self, method: str, *params: Any) -> Any:
        """The result of one call.

        Raises:
            RpcError: when the node reports an error.
            TransportFailed: when there is no usable reply.
        """
        request = self._request(method, params)
        return _result(await self._post(request), request["id"])

    async def call_many(self, method: str, each: Sequence[Sequence[Any]]) -> list[Any]:
        """The results of one batch of calls of one method, in the order of ``each``. Raises as :meth:`call`."""
        requests = [self._request(method, params) for params in each]
        answers = await self._post(requests)
        if not isinstance(answers, list):  # a node may refuse the whole batch with one error
            raise _refusal(answers) or _unusable("is not a batch")
        by_id = {}
        for answer in answers:
            if isinstance(answer, dict) and isinstance(answer.get("id"), int):  # a hostile id need not be hashable
                by_id[answer["id"]] = answer
        return [_result(by_id.get(request["id"]), request["id"]) for request in requests]

    def _request(self, method: str, params: Sequence[Any]) -> dict[str, Any]:
        self._last_id += 1
        return {"jsonrpc": "2.0", "id": self._last_id, "method": method, "params": params}

    async def _post(self, body: object) -> Any:
        reply = await self._transport.post(orjson.dumps(body))
        try:
            return orjson.loads(reply)
        except orjson.JSONDecodeError:
            raise _unusable("is not JSON") from None


def _result(answer: Any, expected: int) -> Any:
    if not isinstance(answer, dict) or answer.get("id") != expected:
        raise _unusable("is to another request")
    refusal = _refusal(answer)
    if refusal is not None:
        raise refusal
    if "result" not in answer:
        raise _unusable("has neither result nor error")
    return answer["result"]


def _refusal(answer: Any) -> RpcError | None:
    error = answer.get("error") if isinstance(answer, dict) else None
    if error is None:
        return None
    code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, None)
    return RpcError(code if isinstance(code, int) else _INTERNAL, str(message)[:200])


def _unusable(why: str) -> TransportFailed:
    return TransportFailed(f"chain node's reply {why}", maybe_sent=True)


class RpcChain:
    """The :class:`channels.chain.Chain` of one node address; with ``chain_id`` it prepares for that chain only."""

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        *,
        limits: RpcLimits,
        chain_id: int | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._rpc = JsonRpc(transport)
        self._chain_id = chain_id
        self._clock = clock
        self._limits = limits
        self._sleep = sleep

    # ---------------------------------------------------------------------------------------------------------- reads

    async def chain_id(self) -> int:
        return wire.read_quantity(await self._read("eth_chainId"), "eth_chainId")

    async def head(self) -> Head:
        return (await self._block("latest"))[0]

    async def finalised(self) -> Head:
        return (await self._block("finalized"))[0]

    async def channel_state(
        self, escrow: Escrow, channel_id: ChannelId, *, at_block: int | None = None
    ) -> ChainSnapshot:
        if escrow.protocol is SessionProtocol.V2:
            data = v2.encode_get_channel_state(channel_id)
        else:
            data = v1.encode_get_channel(channel_id)
        # Never "latest": the stamp must be the block that was read, or an older state could replace a newer one.
        block = (await self.head()).number if at_block is None else at_block
        reply = await self._eth_call(escrow.address, data, wire.quantity(block))
        if escrow.protocol is SessionProtocol.V2:
            return v2.decode_channel_state(reply, block=block)
        return v1.decode_get_channel(reply).snapshot(block=block)

    async def channel_states(
        self, escrow: Escrow, ids: Sequence[ChannelId], *, at_block: int | None = None
    ) -> Sequence[ChainSnapshot]:
        block = (await self.head()).number if at_block is None else at_block
        states: list[ChainSnapshot] = []
        for start in range(0, len(ids), STATES_PER_CALL):
            page = ids[start : start + STATES_PER_CALL]
            read = self._v2_states if escrow.protocol is SessionProtocol.V2 else self._v1_states
            states += await read(escrow, page, block)
        return states

    async def _v2_states(self, escrow: Escrow, ids: Sequence[ChannelId], block: int) -> Sequence[ChainSnapshot]:
        reply = await self._eth_call(escrow.address, v2.encode_get_channel_states(ids), wire.quantity(block))
        return v2.decode_channel_states(reply, len(ids), block=block)

    async def _v1_states(self, escrow: Escrow, ids: Sequence[ChannelId], block: int) -> Sequence[ChainSnapshot]:
        # The v1 contract has no view over many channels; a JSON-RPC batch is the same round trip, though some nodes
        # count its entries one by one.
        where, at = to_hex(escrow.address), wire.quantity(block)
        calls = [({"to": where, "data": to_hex(v1.encode_get_channel(channel))}, at) for channel in ids]
        replies = await self._repeat(
            "eth_call", lambda: self._rpc.call_many("eth_call", calls), attempts=self._limits.pinned_attempts
        )
        return [v1.decode_get_channel(wire.read_data(reply, "eth_call")).snapshot(block=block) for reply in replies]

    async def fee_units(self, gas: int) -> Units:
        _, base_fee = await self._block("latest")
        return fee_of(gas, base_fee + await self._priority())

    async def balance_of(self, token: Address, owner: Address) -> Units:
        data = tip20.encode_balance_of(owner)
        return tip20.decode_balance(await self._eth_call(token, data, "latest"))

    async def view(self, to: Address, data: bytes) -> bytes:
        """What a view of a contract gives at the newest block; empty where there is no contract."""
        return await self._eth_call(to, data, "latest")

    async def receipt(self, tx_hash: Hash32) -> Receipt | None:
        reply = await self._read("eth_getTransactionReceipt", to_hex(tx_hash))
        return None if reply is None else wire.read_receipt(reply, expected=tx_hash)

    async def outcome(self, tx_hash: Hash32, *, valid_before: UnixSeconds) -> TxOutcome:
        # The final block before the receipt: the other way round a transaction mined between the two reads would look
        # expired. And the final block, not the newest: a block that is replaced gives its transactions back, and the
        # replacement may carry an earlier time.
        final = await self.finalised()
        receipt = await self.receipt(tx_hash)
        if receipt is not None:
            return receipt
        return Fate.EXPIRED if final.timestamp >= valid_before + EXPIRY_MARGIN_S else Fate.PENDING

    async def logs(
        self, address: Address, *, topics: Sequence[Topic], from_block: int, to_block: int
    ) -> tuple[Log, ...]:
        query = {
            "address": to_hex(address),
            "topics": [wire.topic(topic) for topic in topics],
            "fromBlock": wire.quantity(from_block),
            "toBlock": wire.quantity(to_block),
        }
        reply = wire.read_list(await self._read("eth_getLogs", query), "eth_getLogs")
        logs = tuple(wire.read_log(entry) for entry in reply)
        if any(log.address != address for log in logs):
            raise wire.malformed("eth_getLogs")
        return logs

    async def gas_of(self, tx: TempoTx, sender: Address) -> int:
        reply = await self._trial("eth_estimateGas", wire.request_object(tx, sender))
        return wire.read_quantity(reply, "eth_estimateGas")

    async def rehearse(self, tx: TempoTx, sender: Address, *, fee_payer: Address) -> None:
        # With its nonce key and validity: what an envelope costs before its first call runs depends on them.
        request = wire.request_object(tx, sender) | {"gas": wire.quantity(tx.gas), "feePayer": to_hex(fee_payer)}
        await self._trial("eth_call", request, "latest")

    async def simulate(self, sender: Address, calls: Sequence[Call], *, fee_token: Address | None) -> None:
        request: dict[str, Any] = {
            "from": to_hex(sender),
            "type": "0x76",
            "calls": [wire.call_object(call) for call in calls],
        }
        if fee_token is not None:
            request["feeToken"] = to_hex(fee_token)
        await self._trial("eth_call", request, "latest")

    # ---------------------------------------------------------------------------------------------------- transactions

    async def prepare(
        self,
        sender: Address,
        calls: Sequence[Call],
        *,
        fee_token: Address | None,
        entropy: bytes,
        sponsored: bool = False,
    ) -> TempoTx:
        assert len(entropy) == ENTROPY_BYTES
        chain_id = await self.chain_id()
        if self._chain_id not in (None, chain_id):
            raise ChannelFault(Reason.CHAIN_UNAVAILABLE, field="eth_chainId", detail="is another chain's")
        head, base_fee = await self._block("latest")
        priority = await self._priority()
        # The chain's time, which is the one that is compared: signed by a clock that is an hour fast, a transaction the
        # chain refuses today could be valid in an hour, and nothing else may be signed until it surely is not. For the
        # same reason not far beyond our own clock, should the node make its time up.
        now = UnixSeconds(min(head.timestamp, self._clock.now() + CLOCK_APART_S))
        draft = TempoTx(
            chain_id=chain_id,
            max_priority_fee_per_gas=priority,
            max_fee_per_gas=base_fee * 12 // 10 + priority,
            gas=0,
            calls=tuple(calls),
            nonce_key=tempo_tx.EXPIRING_NONCE_KEY,
            nonce=0,
            valid_before=UnixSeconds(now + VALIDITY_S),
            # An expiring nonce has no counter, so two equal batches of one second would be one transaction. Any past
            # time is a valid start, which makes this field the place for entropy.
            valid_after=UnixSeconds(1 + int.from_bytes(entropy) % (now - EXPIRY_MARGIN_S)),
            fee_token=None if sponsored else fee_token,
            sponsored=sponsored,
        )
        estimate = await self.gas_of(draft, sender)
        # State moves between estimate and inclusion; unused gas is not paid for, too little of it is a lost settle.
        return replace(draft, gas=estimate + estimate // 5)

    async def send(self, raw: bytes) -> None:
        tx_hash = tempo_tx.decode(raw).tx_hash
        maybe_sent = False
        for attempt in range(self._limits.send_attempts):
            if attempt:
                await self._sleep(self._limits.read_delay_s)
            try:
                await self._rpc.call("eth_sendRawTransaction", to_hex(raw))
            except TransportFailed as failure:
                maybe_sent = maybe_sent or failure.maybe_sent
            except RpcError as error:
                if error.code in (_LIMITED, _INTERNAL):
                    maybe_sent = maybe_sent or error.code == _INTERNAL
                    continue
                held = await self._holds(tx_hash)
                if held:
                    return
                if held is None or maybe_sent:
                    # A refusal proves nothing about a try that may have reached another replica.
                    maybe_sent = True
                    break
                raise ChannelFault(
                    Reason.CHAIN_REJECTED, field="transaction", detail="was refused by the chain node"
                ) from error
            else:
                return
        if not maybe_sent:
            raise ChannelFault(Reason.CHAIN_UNAVAILABLE, detail="the transaction could not be sent")
        raise ChannelFault(
            Reason.CHAIN_OUTCOME_UNKNOWN, field="transaction", detail="may have been sent, no node has confirmed it"
        )

    async def broadcast(self, raw: bytes) -> Receipt:
        try:
            await self.send(raw)
        except ChannelFault as fault:
            if fault.reason is not Reason.CHAIN_OUTCOME_UNKNOWN:
                raise
        return await self._await_receipt(tempo_tx.decode(raw).tx_hash)

    async def _await_receipt(self, tx_hash: Hash32) -> Receipt:
        deadline = self._clock.monotonic() + self._limits.receipt_wait_s
        while True:
            try:
                receipt = await self.receipt(tx_hash)
            except ChannelFault:
                receipt = None  # an unreadable answer is not "no": keep asking until the deadline
            if receipt is not None:
                return receipt
            if self._clock.monotonic() >= deadline:
                raise ChannelFault(
                    Reason.CHAIN_OUTCOME_UNKNOWN, field="transaction", detail="was sent and has no receipt yet"
                )
            await self._sleep(self._limits.receipt_poll_s)

    async def _holds(self, tx_hash: Hash32) -> bool | None:
        """Whether the node has these bytes already; ``None`` when it cannot tell."""
        try:
            if await self.receipt(tx_hash) is not None:
                return True
            return await self._read("eth_getTransactionByHash", to_hex(tx_hash)) is not None
        except ChannelFault:
            return None

    # -------------------------------------------------------------------------------------------------------- requests

    async def _block(self, tag: str) -> tuple[Head, int]:
        return wire.read_head(await self._read("eth_getBlockByNumber", tag, False))

    async def _priority(self) -> int:
        asked = wire.read_quantity(await self._read("eth_maxPriorityFeePerGas"), "eth_maxPriorityFeePerGas")
        return min(asked, self._limits.priority_fee_max)

    async def _eth_call(self, to: Address, data: bytes, block: str) -> bytes:
        request = {"to": to_hex(to), "data": to_hex(data)}
        reply = await self._read("eth_call", request, block, attempts=self._limits.pinned_attempts)
        return wire.read_data(reply, "eth_call")

    async def _read(self, method: str, *params: Any, attempts: int | None = None) -> Any:
        return await self._repeat(method, lambda: self._rpc.call(method, *params), attempts=attempts)

    async def _repeat(self, method: str, ask: Callable[[], Awaitable[T]], *, attempts: int | None = None) -> T:
        """Repeat a harmless call. An error reply counts as a failure too: a lagging replica gives one."""
        last: Exception | None = None
        for attempt in range(attempts or self._limits.read_attempts):
            if attempt:
                await self._sleep(self._limits.read_delay_s)
            try:
                return await ask()
            except (TransportFailed, RpcError) as error:
                last = error
        raise ChannelFault(Reason.CHAIN_UNAVAILABLE, field=method, detail="got no answer from the chain node") from last

    async def _trial(self, method: str, *params: Any) -> Any:
        """A dry run, where a refusal of the node is the answer and not a failure to get one."""
        for attempt in range(self._limits.read_attempts):
            if attempt:
                await self._sleep(self._limits.read_delay_s)
            try:
                return await self._rpc.call(method, *params)
            except RpcError as error:
                if error.code in _REVERTS:
                    raise ChannelFault(
                        Reason.CHAIN_REJECTED, field="transaction", detail="would fail on the chain"
                    ) from error
            except TransportFailed:
                continue
        raise ChannelFault(Reason.CHAIN_UNAVAILABLE, field=method, detail="got no answer from the chain node")
