"""A Tempo look-alike for development and tests. NOT A CHAIN: nothing on it has value or survives the process.

It answers JSON-RPC well enough that the unmodified reference client opens, tops up and closes channels on it:
transactions are decoded and their signatures checked, expiring nonces count once and only inside the chain's window,
sponsors are recovered, balances and escrow rules come from the judging model in ``channels.testing``. What it does not
know it refuses loudly, so a test never passes because a method quietly did nothing.

What differs from a real chain, on purpose: one block per transaction plus some for elapsed seconds that somebody looks;
gas is a formula; fees are quoted but charged only with ``fees``; logs blooms are empty; every block is final at once
unless ``finality_lag`` is set, and then only :meth:`DevChain.reorg` replaces one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import orjson

from channels import tempo_tx
from channels.abi import Log, selector
from channels.chain import FEE_MANAGER, fee_of
from channels.faults import ChannelFault
from channels.ids import Address, Hash32, to_hex
from channels.instants import UnixSeconds
from channels.keccak import keccak256
from channels.tempo_tx import EXPIRING_NONCE_KEY, Call, Form, SignedTx
from channels.testing.escrow_model import Context, EscrowModel, EscrowRevert
from channels.testing.token_model import Cells
from channels.units import Units
from mppnode.chain.wire import quantity
from mppnode.kernel.clock import Clock

PATH_USD: Final = Address(bytes.fromhex("20c0000000000000000000000000000000000000"))
EXPIRING_WINDOW_S: Final = 30
"""How far ahead an expiring nonce may end. Source: chain rule before hardfork T11."""
FAUCET_UNITS: Final = 1_000_000_000_000
"""What ``tempo_fundAddress`` gives: a million development dollars."""
BASE_FEE: Final = 20_000_000_000
"""Attodollars per gas at the start. Source: TIP-1010."""
_PRIORITY_FEE: Final = 1_000_000_000
_TIMED_OUT: Final = 4  # EIP-7966: taken, but not in a block in time
_GAS_PER_TX: Final = 100_000
_GAS_PER_CALL: Final = 60_000
_NO_HASH: Final = Hash32(bytes(32))
_NO_ADDRESS: Final = Address(bytes(20))
_BLOOM: Final = "0x" + "00" * 256
_NEVER: Final = UnixSeconds(0)
_EXPECTED_UNKNOWN: Final = frozenset({"eth_fillTransaction"})  # the reference client tries it first and falls back


class RpcRefusal(Exception):
    """A JSON-RPC error reply."""

    def __init__(self, code: int, message: str, data: str | None = None) -> None:
        self.code = code
        self.data = data
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class _Block:
    number: int
    timestamp: UnixSeconds
    hash: Hash32
    parent: Hash32
    transactions: tuple[Hash32, ...]


class DevChain:
    """One development chain; ``handle`` is the whole node. Not thread-safe, and it never waits.

    ``on_unknown`` hears every method the chain does not have; ``unknown`` counts them. Public attributes may be set at
    any time: ``fees`` says whether they are charged, ``base_fee`` is attodollars per gas, ``finality_lag`` blocks.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        chain_id: int,
        v1_address: Address | None = None,
        fees: bool = False,
        finality_lag: int = 0,
        on_unknown: Callable[[str], None] = lambda _method: None,
    ) -> None:
        self.chain_id = chain_id
        self.model = EscrowModel(chain_id=chain_id, v1_address=v1_address)
        self.unknown: Counter[str] = Counter()
        self.base_fee = BASE_FEE
        self.finality_lag = finality_lag
        self._clock = clock
        self._offset_s = 0
        self.fees = fees
        self._on_unknown = on_unknown
        self._blocks = [_Block(0, self._now(), keccak256(b"genesis"), _NO_HASH, ())]
        self._final = 0
        self._forks = 0
        self._halted = False
        self._receipts: dict[Hash32, dict[str, Any]] = {}
        self._logs: list[dict[str, Any]] = []
        self._included: dict[Hash32, bytes] = {}
        self._waiting: dict[Hash32, SignedTx] = {}
        self._nonces: Cells[tuple[Address, int], int] = Cells(self.model.journal, 0)
        self._expiring: Cells[Hash32, UnixSeconds] = Cells(self.model.journal, _NEVER)
        self._methods: dict[str, Callable[[list[Any]], Any]] = {
            "web3_clientVersion": lambda _: "mppnode-devchain/DEVELOPMENT-ONLY",
            "eth_chainId": lambda _: quantity(self.chain_id),
            "eth_blockNumber": lambda _: quantity(self.head),
            "eth_gasPrice": lambda _: quantity(self._price),
            "eth_maxPriorityFeePerGas": lambda _: quantity(_PRIORITY_FEE),
            "eth_getBlockByNumber": self._get_block,
            "eth_estimateGas": self._estimate,
            "eth_call": self._call,
            "eth_sendRawTransaction": lambda params: to_hex(self._send(params)),
            "eth_sendRawTransactionSync": self._send_sync,
            "eth_getTransactionReceipt": lambda params: self._receipts.get(_hash(params)),
            "eth_getTransactionByHash": self._get_transaction,
            "eth_getLogs": self._get_logs,
            "evm_increaseTime": self._increase_time,
            "evm_mine": lambda _: quantity(self._mine(())),
            "tempo_fundAddress": self._faucet,
        }
        self.fund(_NO_ADDRESS, Units(0))

    # ------------------------------------------------------------------------------------------------------ for tests

    @property
    def head(self) -> int:
        """The newest block's number."""
        return self._blocks[-1].number

    @property
    def final(self) -> int:
        """The newest block that :meth:`reorg` cannot replace."""
        return self._final

    def fund(self, owner: Address, amount: Units, *, token: Address = PATH_USD) -> None:
        """Mint base units of ``token``; a token exists from its first minting on.

        Everything up to here is final at once: no transaction carries the minting, so nobody could send it again.
        """
        self.model.journal.block = self.head + 1
        self.model.mint(token, owner, amount)
        self._final = self._mine(())

    def balance(self, owner: Address, *, token: Address = PATH_USD) -> int:
        """Base units of ``owner`` now."""
        return self.model.tokens.balances[token, owner]

    def travel(self, seconds: int) -> None:
        """Move this chain's time forward against the clock it was given."""
        self._offset_s += seconds
        self._catch_up()

    def freeze(self, owner: Address) -> None:
        """Let the token policy forbid ``owner`` every payment, also the ones out of an escrow (TIP-403)."""
        self.model.tokens.blocked.add(owner)

    def thaw(self, owner: Address) -> None:
        """Lift a freeze."""
        self.model.tokens.blocked.discard(owner)

    def halt(self) -> None:
        """Stop making blocks. The node still answers, and keeps valid transactions until :meth:`resume`."""
        self._halted = True

    def resume(self) -> None:
        """Make blocks again, first of all with the transactions that waited and are still valid."""
        self._halted = False
        waiting, self._waiting = self._waiting, {}
        for signed in waiting.values():
            try:
                self._admit(signed)
                self._include(signed)
            except RpcRefusal:
                continue  # it expired meanwhile, or its fee payer is poor now: as a node drops it

    def reorg(self, depth: int) -> tuple[bytes, ...]:
        """Replace the newest ``depth`` blocks by empty ones; the bytes of their transactions, which are nowhere now.

        Balances, channels, logs, receipts and used nonces are as before those blocks, so the same bytes may be sent
        again while they are valid.

        Raises:
            ValueError: when one of the blocks is final.
        """
        kept = self.head - depth
        if kept < self._final:
            raise ValueError("a final block cannot be replaced")
        lost = [tx_hash for block in self._blocks[kept + 1 :] for tx_hash in block.transactions]
        del self._blocks[kept + 1 :]
        self.model.journal.rewind(kept)
        self._logs = [log for log in self._logs if int(log["blockNumber"], 16) <= kept]
        for tx_hash in lost:
            del self._receipts[tx_hash]
        self._forks += 1  # enters the hashes: the new blocks are others, though they may be as empty as the old ones
        for _ in range(depth):
            self._mine(())
        return tuple(self._included.pop(tx_hash) for tx_hash in lost)

    # ------------------------------------------------------------------------------------------------------- JSON-RPC

    def handle_http_body(self, body: bytes) -> bytes:
        """Answer one HTTP request body, single or batch; never raises."""
        try:
            request = orjson.loads(body)
        except orjson.JSONDecodeError:
            return orjson.dumps(_error(None, RpcRefusal(-32700, "parse error")))
        if isinstance(request, list):
            return orjson.dumps([self.handle(entry) for entry in request])
        return orjson.dumps(self.handle(request))

    def handle(self, request: Any) -> dict[str, Any]:
        """Answer one JSON-RPC request object; never raises."""
        if not isinstance(request, dict) or not isinstance(request.get("method"), str):
            return _error(None, RpcRefusal(-32600, "invalid request"))
        request_id, method, params = request.get("id"), request["method"], request.get("params")
        self._catch_up()
        handler = self._methods.get(method)
        if handler is None:
            if method not in _EXPECTED_UNKNOWN:
                self.unknown[method] += 1
                self._on_unknown(method)
            return _error(request_id, RpcRefusal(-32601, "the development chain does not have this method"))
        try:
            result = handler(params if isinstance(params, list) else [])
        except RpcRefusal as refusal:
            return _error(request_id, refusal)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            # Parameters are read leniently, as nodes do; whatever does not fit ends up here.
            return _error(request_id, RpcRefusal(-32602, f"invalid params: {type(error).__name__}"))
        return {"jsonrpc": "2.0", "id": request_id, "result": result}

    # ---------------------------------------------------------------------------------------------------------- reads

    def _get_block(self, params: list[Any]) -> dict[str, Any] | None:
        number = self._number(params[0])
        if number > self.head:
            return None
        block = self._blocks[number]
        return {
            "number": quantity(block.number),
            "hash": to_hex(block.hash),
            "parentHash": to_hex(block.parent),
            "timestamp": quantity(block.timestamp),
            "baseFeePerGas": quantity(self.base_fee),
            "gasLimit": quantity(500_000_000),
            "gasUsed": quantity(_GAS_PER_TX * len(block.transactions)),
            "miner": to_hex(_NO_ADDRESS),
            "difficulty": "0x0",
            "totalDifficulty": "0x0",
            "extraData": "0x",
            "logsBloom": _BLOOM,
            "size": "0x0",
            "uncles": [],
            "transactions": [to_hex(tx_hash) for tx_hash in block.transactions],
        }

    def _estimate(self, params: list[Any]) -> str:
        sender, calls = _calls(params[0])
        self._run(sender, calls, at_block=self.head + 1)
        return quantity(_gas(len(calls)))

    def _call(self, params: list[Any]) -> str:
        number = self._number(params[1] if len(params) > 1 else "latest")
        if number > self.head:
            raise RpcRefusal(-32001, "header not found")
        sender, calls = _calls(params[0])
        self._check_fee(params[0], len(calls))
        # A batch must see its own writes, which are in the block after the head; older blocks are only read.
        outputs = self._run(sender, calls, at_block=self.head + 1 if number == self.head else number)
        return to_hex(outputs[-1] if outputs else b"")

    def _run(self, sender: Address, calls: list[Call], *, at_block: int) -> list[bytes]:
        self.model.journal.block = self.head + 1
        context = Context(sender, self._block_time(), _NO_HASH, at_block)
        try:
            return self.model.run(context, calls, commit=False)[0]
        except EscrowRevert as revert:
            data = to_hex(selector(f"{revert.name}()"))
            raise RpcRefusal(3, f"execution reverted: {revert.name}", data) from revert

    def _check_fee(self, request: dict[str, Any], calls: int) -> None:
        """What a dry run refuses when it names its gas or who pays for it."""
        gas = _gas(calls)
        if request.get("gas") is not None and int(request["gas"], 16) < gas:
            raise RpcRefusal(-32000, "intrinsic gas too low")
        if self.fees and isinstance(request.get("feePayer"), str):
            token, payer = (Address(_data(request[name], length=20)) for name in ("feeToken", "feePayer"))
            if self.model.tokens.balances[token, payer] < fee_of(gas, self._price):
                raise RpcRefusal(-32000, "insufficient funds for the fee")

    def _get_transaction(self, params: list[Any]) -> dict[str, Any] | None:
        tx_hash = _hash(params)
        shared = ("blockHash", "blockNumber", "transactionIndex", "from", "type")
        if tx_hash in self._waiting:
            sender = to_hex(self._waiting[tx_hash].sender)
            return {"hash": to_hex(tx_hash), **dict.fromkeys(shared), "from": sender, "type": "0x76"}
        receipt = self._receipts.get(tx_hash)
        if receipt is None:
            return None
        return {"hash": receipt["transactionHash"], **{name: receipt[name] for name in shared}}

    def _get_logs(self, params: list[Any]) -> list[dict[str, Any]]:
        query = params[0]
        first, last = self._number(query.get("fromBlock", "latest")), self._number(query.get("toBlock", "latest"))
        addresses = _options(query.get("address"))
        topics = [_options(topic) for topic in query.get("topics") or []]

        def wanted(log: dict[str, Any]) -> bool:
            return (
                first <= int(log["blockNumber"], 16) <= last
                and (addresses is None or log["address"] in addresses)
                and len(log["topics"]) >= len(topics)
                and all(want is None or have in want for want, have in zip(topics, log["topics"], strict=False))
            )

        return [log for log in self._logs if wanted(log)]

    # --------------------------------------------------------------------------------------------------- transactions

    def _send(self, params: list[Any]) -> Hash32:
        try:
            signed = tempo_tx.decode(_data(params[0]))
        except ChannelFault as fault:
            raise RpcRefusal(-32000, f"invalid transaction: {fault.message}") from fault
        self._admit(signed)
        if self._halted:
            self._waiting[signed.tx_hash] = signed
        else:
            self._include(signed)
        return signed.tx_hash

    def _send_sync(self, params: list[Any]) -> dict[str, Any]:
        receipt = self._receipts.get(self._send(params))
        if receipt is None:
            raise RpcRefusal(_TIMED_OUT, "the transaction was taken and is not in a block yet")
        return receipt

    def _include(self, signed: SignedTx) -> None:
        number = self.head + 1
        self.model.journal.block = number
        price = min(signed.tx.max_fee_per_gas, self.base_fee + signed.tx.max_priority_fee_per_gas)
        fee = fee_of(_gas(len(signed.tx.calls)), price) if self.fees else 0
        try:
            with self.model.journal.attempt(commit=True) as fee_logs:
                if fee:
                    token, payer = signed.tx.fee_token or PATH_USD, signed.fee_payer or signed.sender
                    self.model.tokens.transfer(token, payer, FEE_MANAGER, fee)
                self._use_nonce(signed)
        except EscrowRevert as revert:
            raise RpcRefusal(-32003, f"transaction rejected: fee: {revert.name}") from revert
        context = Context(signed.sender, self._now(), signed.expiring_nonce_hash, number)
        try:
            _, logs = self.model.run(context, signed.tx.calls, commit=True)
            succeeded = True
        except EscrowRevert:
            logs, succeeded = [], False
        self._mine((signed.tx_hash,))
        self._included[signed.tx_hash] = signed.raw
        self._record(signed, [*logs, *fee_logs], price, succeeded=succeeded)

    def _admit(self, signed: SignedTx) -> None:
        """What a node checks before it takes a transaction."""
        tx, now = signed.tx, self._now()
        refused: str | None = None
        if signed.form not in (Form.COMPLETE, Form.COSIGNED):
            refused = "the fee payer has not signed"
        elif tx.chain_id != self.chain_id:
            refused = "wrong chain id"
        elif signed.tx_hash in self._receipts or signed.tx_hash in self._waiting:
            refused = "already known"
        elif tx.max_fee_per_gas < self.base_fee or tx.max_priority_fee_per_gas > tx.max_fee_per_gas:
            refused = "fee too low"
        elif tx.gas < _gas(len(tx.calls)):
            refused = "gas too low"
        elif tx.valid_before is not None and tx.valid_before <= now:
            refused = "transaction expired"
        elif tx.valid_after is not None and tx.valid_after > now:
            refused = "transaction not valid yet"
        elif tx.nonce_key == EXPIRING_NONCE_KEY:
            if tx.nonce != 0 or tx.valid_before is None or tx.valid_before > now + EXPIRING_WINDOW_S:
                refused = "expiring nonce needs nonce 0 and validBefore within the window"
            elif self._expiring[signed.expiring_nonce_hash] > now:
                refused = "expiring nonce already used"
        elif tx.nonce != self._nonces[signed.sender, tx.nonce_key]:
            refused = "wrong nonce"
        if refused is not None:
            raise RpcRefusal(-32003, f"transaction rejected: {refused}")

    def _use_nonce(self, signed: SignedTx) -> None:
        if signed.tx.nonce_key == EXPIRING_NONCE_KEY:
            self._expiring[signed.expiring_nonce_hash] = signed.tx.valid_before or _NEVER
        else:
            self._nonces[signed.sender, signed.tx.nonce_key] = signed.tx.nonce + 1

    def _record(self, signed: SignedTx, logs: list[Log], price: int, *, succeeded: bool) -> None:
        block = self._blocks[-1]
        where = {
            "transactionHash": to_hex(signed.tx_hash),
            "transactionIndex": "0x0",
            "blockHash": to_hex(block.hash),
            "blockNumber": quantity(block.number),
        }
        entries = [
            {
                "address": to_hex(log.address),
                "topics": [to_hex(topic) for topic in log.topics],
                "data": to_hex(log.data),
                "logIndex": quantity(index),
                "removed": False,
                **where,
            }
            for index, log in enumerate(logs)
        ]
        self._logs.extend(entries)
        gas = quantity(_gas(len(signed.tx.calls)))
        self._receipts[signed.tx_hash] = {
            "type": "0x76",
            "status": quantity(int(succeeded)),
            "from": to_hex(signed.sender),
            "to": to_hex(signed.tx.calls[0].to),
            "contractAddress": None,
            "gasUsed": gas,
            "cumulativeGasUsed": gas,
            "effectiveGasPrice": quantity(price),
            "feeToken": to_hex(signed.tx.fee_token or PATH_USD),
            "feePayer": to_hex(signed.fee_payer or signed.sender),
            "logsBloom": _BLOOM,
            "logs": entries,
            **where,
        }

    # ------------------------------------------------------------------------------------------------ time and blocks

    def _now(self) -> UnixSeconds:
        return UnixSeconds(self._clock.now() + self._offset_s)

    def _block_time(self) -> UnixSeconds:
        """What contracts see: while no blocks are made, time stands still for them."""
        return self._blocks[-1].timestamp if self._halted else self._now()

    @property
    def _price(self) -> int:
        return self.base_fee + _PRIORITY_FEE

    def _catch_up(self) -> None:
        """A real chain's head moves by itself; here it moves when somebody looks.

        A block per second would make virtual weeks slow; as many as make the one before them final are enough.
        """
        elapsed = self._now() - self._blocks[-1].timestamp
        for left in reversed(range(0 if self._halted else min(elapsed, self.finality_lag + 1))):
            self._mine((), ago_s=left)

    def _mine(self, transactions: tuple[Hash32, ...], *, ago_s: int = 0) -> int:
        parent = self._blocks[-1]
        number, timestamp = parent.number + 1, UnixSeconds(max(self._now() - ago_s, parent.timestamp))
        content = parent.hash + timestamp.to_bytes(8) + self._forks.to_bytes(8) + b"".join(transactions)
        self._blocks.append(_Block(number, timestamp, keccak256(content), parent.hash, transactions))
        self._final = max(self._final, number - self.finality_lag)
        return number

    def _increase_time(self, params: list[Any]) -> str:
        seconds = params[0] if isinstance(params[0], int) else int(params[0], 16)
        self.travel(seconds)
        return quantity(seconds)

    def _faucet(self, params: list[Any]) -> list[str]:
        for token in sorted(self.model.tokens.known):
            self.fund(Address(_data(params[0], length=20)), Units(FAUCET_UNITS), token=token)
        return []  # minted outside any transaction, so there is no hash to give

    def _number(self, tag: str) -> int:
        if tag in ("latest", "pending"):
            return self.head
        if tag in ("safe", "finalized"):
            return self._final
        return 0 if tag == "earliest" else int(tag, 16)


class LocalTransport:
    """A transport to a chain in the same process, for tests and demonstrations without a socket."""

    def __init__(self, chain: DevChain) -> None:
        self._chain = chain

    async def post(self, body: bytes) -> bytes:
        return self._chain.handle_http_body(body)


def _gas(calls: int) -> int:
    return _GAS_PER_TX + _GAS_PER_CALL * calls


def _error(request_id: Any, refusal: RpcRefusal) -> dict[str, Any]:
    error: dict[str, Any] = {"code": refusal.code, "message": str(refusal)}
    if refusal.data is not None:
        error["data"] = refusal.data
    return {"jsonrpc": "2.0", "id": request_id, "error": error}


def _calls(request: dict[str, Any]) -> tuple[Address, list[Call]]:
    """Sender and calls of a request object: the batch form, or the one-call form of other chains."""
    entries = request.get("calls") or [request]
    sender = Address(_data(request["from"], length=20)) if request.get("from") else _NO_ADDRESS
    calls = []
    for entry in entries:
        value = entry.get("value") or "0x"
        data = entry.get("data") or entry.get("input") or "0x"
        # The reference client writes a zero value as "0x", which no specification has and every node takes.
        calls.append(
            Call(Address(_data(entry["to"], length=20)), _data(data), 0 if value == "0x" else int(value, 16))
        )
    return sender, calls


def _options(value: Any) -> list[str] | None:
    if value is None:
        return None
    return [entry.lower() for entry in (value if isinstance(value, list) else [value])]


def _data(value: Any, *, length: int | None = None) -> bytes:
    if not isinstance(value, str) or value[:2] != "0x":
        raise ValueError("not hex")
    data = bytes.fromhex(value[2:])
    if length is not None and len(data) != length:
        raise ValueError("wrong length")
    return data


def _hash(params: list[Any]) -> Hash32:
    return Hash32(_data(params[0], length=32))
