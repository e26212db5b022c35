"""A chain node that fails, lags and lies as told, in front of an honest development chain.

It is a transport, so the client above it is the real one. Time is the clock's it was given: nothing here sleeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import orjson

from channels import escrow as v2
from channels.abi import WORD
from channels.ids import Hash32, to_hex
from mppnode.chain.devchain import DevChain
from mppnode.chain.transport import TransportFailed
from mppnode.kernel.clock import Clock

Lie = Callable[[list[Any], Any], Any]
"""From the parameters and the honest result, ``None`` if that was an error, to the result that is given."""

_NOT_YET = {"code": -32001, "message": "header not found"}
_STATE_WORDS = 3


class HostileRpc:
    """One node address. Every attribute may be changed at any time."""

    def __init__(self, dev: DevChain, clock: Clock) -> None:
        self._dev = dev
        self._clock = clock
        self._dead: list[tuple[float, float]] = []
        self.down = False
        """Refuse every connection."""
        self.limited = False
        """Answer every request with HTTP 429."""
        self.lag = 0
        """How many of the newest blocks this replica has not got yet."""
        self.lost: Counter[str] = Counter()
        """How many further answers to a method are dropped after the request had its effect."""
        self.lies: dict[str, Lie] = {}
        """What is said instead, by method."""
        self.seen: Counter[str] = Counter()
        """How many requests came, by method, answered or not."""

    def dead_for(self, seconds: float, *, after: float = 0.0) -> None:
        """Be unreachable for an interval of the clock's monotonic time, from now or ``after`` some seconds."""
        start = self._clock.monotonic() + after
        self._dead.append((start, start + seconds))

    async def post(self, body: bytes) -> bytes:
        """See :class:`mppnode.chain.transport.Transport`."""
        request = orjson.loads(body)
        requests = request if isinstance(request, list) else [request]
        method = requests[0]["method"]
        self.seen[method] += 1
        now = self._clock.monotonic()
        if self.down or any(start <= now < end for start, end in self._dead):
            raise TransportFailed("cannot connect to the chain node", maybe_sent=False)
        if self.limited:
            raise TransportFailed("chain node answered HTTP 429", maybe_sent=False)
        answers = [self._answer(each) for each in requests]
        if self.lost[method]:
            self.lost[method] -= 1
            raise TransportFailed("chain node: ServerDisconnectedError", maybe_sent=True)
        return orjson.dumps(answers if isinstance(request, list) else answers[0])

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        method, params = request["method"], list(request.get("params") or [])
        visible = self._visible()
        shown = [self._shown(method, index, param, visible) for index, param in enumerate(params)]
        if _is_later(method, shown, visible):
            return {"jsonrpc": "2.0", "id": request["id"], "error": _NOT_YET}
        answer = self._dev.handle({**request, "params": shown})
        if "result" in answer:
            answer["result"] = self._result(method, answer["result"], visible)
        if method in self.lies:
            told = self.lies[method](params, answer.get("result"))
            return {"jsonrpc": "2.0", "id": request["id"], "result": told}
        return answer

    def _visible(self) -> int:
        self._dev.handle({"id": 0, "method": "eth_blockNumber"})  # the chain moves when somebody looks
        return max(self._dev.head - self.lag, 0)

    def _shown(self, method: str, index: int, param: Any, visible: int) -> Any:
        """A block parameter as this replica understands it."""
        if method == "eth_getLogs" and index == 0:
            return {
                **param,
                **{name: self._block(param[name], visible) for name in ("fromBlock", "toBlock") if name in param},
            }
        at = {"eth_getBlockByNumber": 0, "eth_call": 1}.get(method)
        return self._block(param, visible) if index == at else param

    def _block(self, tag: str, visible: int) -> str:
        if tag in ("latest", "pending"):
            return hex(visible)
        return hex(min(self._dev.final, visible)) if tag in ("safe", "finalized") else tag

    @staticmethod
    def _result(method: str, result: Any, visible: int) -> Any:
        if method == "eth_blockNumber":
            return hex(visible)
        if method in ("eth_getTransactionReceipt", "eth_getTransactionByHash") and result is not None:
            return None if int(result["blockNumber"] or "0x0", 16) > visible else result
        return result


def _is_later(method: str, params: list[Any], visible: int) -> bool:
    if method == "eth_call" and len(params) > 1:
        return int(params[1], 16) > visible
    if method == "eth_getLogs":
        return int(params[0].get("toBlock", "0x0"), 16) > visible
    return False


# --------------------------------------------------------------------------------------------------------------- lies


def states(change: Callable[[int, int, int], tuple[int, int, int]]) -> Lie:
    """Say something else of every v2 channel: ``change`` gets and gives settled, deposit and the close request's time."""

    def lie(params: list[Any], result: Any) -> Any:
        view = bytes.fromhex(params[0].get("data", "0x")[2:])[:4]
        if result is None or view not in (v2.GET_CHANNEL_STATE, v2.GET_CHANNEL_STATES):
            return result
        data = bytes.fromhex(result[2:])
        start = 0 if view == v2.GET_CHANNEL_STATE else 2 * WORD
        changed = data[:start]
        for at in range(start, len(data), _STATE_WORDS * WORD):
            told = [int.from_bytes(data[at + WORD * index : at + WORD * (index + 1)]) for index in range(_STATE_WORDS)]
            changed += b"".join(value.to_bytes(WORD) for value in change(*told))
        return to_hex(changed)

    return lie


def invent_deposit(amount: int) -> Lie:
    """Every channel exists and holds ``amount`` base units."""
    return states(lambda settled, _deposit, requested: (settled, amount, requested))


def gone() -> Lie:
    """No channel exists any more."""
    return states(lambda _settled, _deposit, _requested: (0, 0, 0))


def hide_close_requests() -> Lie:
    """No payer ever asks to close."""
    return states(lambda settled, deposit, _requested: (settled, deposit, 0))


def other_chain(chain_id: int) -> Lie:
    """The node is another chain's."""
    return lambda _params, _result: hex(chain_id)


def frozen_block(number: int, dev: DevChain) -> Lie:
    """Time stopped at a block, whatever is asked for."""

    def lie(_params: list[Any], _result: Any) -> Any:
        return dev.handle({"id": 0, "method": "eth_getBlockByNumber", "params": [hex(number), False]})["result"]

    return lie


def no_receipts() -> Lie:
    """Nothing was ever mined."""
    return lambda _params, _result: None


def invent_receipt(template: dict[str, Any]) -> Lie:
    """Every transaction was mined, successfully, with the logs of another one; ``template`` is a receipt's JSON."""

    def lie(params: list[Any], _result: Any) -> Any:
        logs = [{**log, "transactionHash": params[0]} for log in template["logs"]]
        return {**template, "status": "0x1", "transactionHash": params[0], "logs": logs}

    return lie


def receipt_json(dev: DevChain, tx_hash: Hash32) -> dict[str, Any]:
    """A mined transaction's receipt as the honest chain tells it."""
    reply = dev.handle({"id": 0, "method": "eth_getTransactionReceipt", "params": [to_hex(tx_hash)]})
    return dict(reply["result"])
