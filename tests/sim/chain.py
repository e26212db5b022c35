"""The chain of a simulation: a development chain that tells an auditor what it includes, and the wires to it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest

from channels import tempo_tx
from channels.keccak import keccak256
from channels.tempo_tx import SignedTx
from mppnode.chain.devchain import DevChain
from mppnode.chain.transport import TransportFailed
from mppnode.kernel.clock import Clock
from tests.support.hostile_rpc import HostileRpc

CHAIN_ID = 1337


class SimChain(DevChain):
    """``on_included`` hears every transaction with its receipt right after its block."""

    def __init__(self, clock: Clock) -> None:
        self.on_included: Callable[[SignedTx, dict[str, Any]], None] = lambda _signed, _receipt: None
        super().__init__(clock, chain_id=CHAIN_ID, fees=True)

    def _include(self, signed: SignedTx) -> None:
        super()._include(signed)
        self.on_included(signed, self._receipts[signed.tx_hash])

    def send_raw(self, raw: bytes) -> str | None:
        """Hand bytes to an honest node of a stranger's; why it refused them, if it did."""
        answer = self.handle({"id": 0, "method": "eth_sendRawTransaction", "params": ["0x" + raw.hex()]})
        return None if "result" in answer else str(answer["error"]["message"])


@contextmanager
def remembering() -> Iterator[None]:
    """Encode and recover every transaction once: a simulation reads each a hundred times, and both are pure."""
    raw, decode = SignedTx.raw, tempo_tx.decode
    assert isinstance(raw, property)
    assert raw.fget is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SignedTx, "raw", property(lru_cache(None)(raw.fget)))
        patch.setattr(SignedTx, "tx_hash", property(lru_cache(None)(lambda signed: keccak256(signed.raw))))
        patch.setattr(tempo_tx, "decode", lru_cache(None)(decode))
        yield


class Wire:
    """One process's connection to one node address: mostly quick, sometimes slow, and gone with the process."""

    def __init__(self, node: HostileRpc, dice: random.Random, *, must_live: Callable[[], None]) -> None:
        self._node = node
        self._dice = dice
        self._must_live = must_live
        self.hang_s = 0.0
        """How long a node that is down keeps its callers waiting before they give up."""

    async def post(self, body: bytes) -> bytes:
        """See :class:`mppnode.chain.transport.Transport`."""
        self._must_live()
        if b"eth_sendRaw" in body or self._dice.random() < 0.05:
            await asyncio.sleep(self._dice.random() * 0.4)
            self._must_live()
        try:
            answer = await self._node.post(body)
        except TransportFailed:
            if self.hang_s:
                await asyncio.sleep(self._dice.random() * self.hang_s)
            raise
        if b"eth_sendRaw" in body:
            await asyncio.sleep(self._dice.random() * 0.4)
        self._must_live()
        return answer


class Fork:
    """A replica on a branch that will not last: its head moves on, nothing becomes final, and new blocks are empty."""

    def __init__(self, dev: DevChain) -> None:
        self._dev = dev
        self._since = dev.final

    def on(self, node: HostileRpc) -> None:
        node.lies["eth_getBlockByNumber"] = self._block
        node.lies["eth_getTransactionReceipt"] = self._receipt

    @staticmethod
    def off(node: HostileRpc) -> None:
        node.lies.pop("eth_getBlockByNumber", None)
        node.lies.pop("eth_getTransactionReceipt", None)

    def _block(self, params: list[Any], result: Any) -> Any:
        if params[0] != "finalized":
            return result
        request = {"id": 0, "method": "eth_getBlockByNumber", "params": [hex(self._since), False]}
        return self._dev.handle(request)["result"]

    def _receipt(self, _params: list[Any], result: Any) -> Any:
        return None if result is None or int(result["blockNumber"], 16) > self._since else result


