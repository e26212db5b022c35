"""TIP-20 balances in memory, and the storage below every model: values with history that a transaction can undo."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

from channels import tip20
from channels.abi import Log, Words, encode, selector
from channels.ids import Address, Hash32

K = TypeVar("K")
V = TypeVar("V")
_UINT256_MAX: Final = 2**256 - 1
_DECIMALS: Final = selector("decimals()")


class EscrowRevert(Exception):
    """The contract would revert here. ``name`` is its custom error where the interface publishes one."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


class Journal:
    """The block being built, how to undo what the running transaction wrote, and all values that have a history."""

    def __init__(self) -> None:
        self.block = 0
        self.logs: list[Log] = []
        self.undo: list[Callable[[], object]] = []
        self.rewinds: list[Callable[[int], None]] = []

    def rewind(self, block: int) -> None:
        """Forget everything written after ``block``, which is what a reorganisation does to a chain's state."""
        assert not self.undo, "a transaction is running"
        for rewind in self.rewinds:
            rewind(block)

    @contextmanager
    def attempt(self, *, commit: bool) -> Iterator[list[Log]]:
        """Run one transaction: yields its logs; every write is undone on an exception, or when not committing."""
        assert not self.undo, "transactions do not nest"
        self.logs = []
        keep = False
        try:
            yield self.logs
            keep = commit
        finally:
            while self.undo:
                step = self.undo.pop()
                if not keep:
                    step()


class Cells(Generic[K, V]):
    """A map that answers "what was it at block n", which is how a node reads state pinned to a receipt."""

    def __init__(self, journal: Journal, default: V) -> None:
        self._journal = journal
        self._default = default
        self._history: dict[K, list[tuple[int, V]]] = {}
        journal.rewinds.append(self._rewind)

    def __getitem__(self, key: K) -> V:
        history = self._history.get(key)
        return history[-1][1] if history else self._default

    def __setitem__(self, key: K, value: V) -> None:
        history = self._history.setdefault(key, [])
        entry = (self._journal.block, value)
        if history and history[-1][0] == entry[0]:
            before = history[-1]
            history[-1] = entry
            self._journal.undo.append(lambda: history.__setitem__(-1, before))
        else:
            history.append(entry)
            self._journal.undo.append(history.pop)

    def at(self, key: K, block: int) -> V:
        """The value at the end of ``block``."""
        history = self._history.get(key, [])
        index = bisect_right(history, block, key=lambda entry: entry[0])
        return history[index - 1][1] if index else self._default

    def _rewind(self, block: int) -> None:
        for history in self._history.values():
            del history[bisect_right(history, block, key=lambda entry: entry[0]) :]


class TokenModel:
    """Balances and allowances of every token; whoever is in ``blocked`` can neither send nor receive (TIP-403)."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.balances: Cells[tuple[Address, Address], int] = Cells(journal, 0)
        self.allowances: Cells[tuple[Address, Address, Address], int] = Cells(journal, 0)
        self.known: set[Address] = set()
        self.blocked: set[Address] = set()

    def mint(self, token: Address, owner: Address, amount: int) -> None:
        """Make base units from nothing, registering the token if it is new."""
        self.known.add(token)
        self.balances[token, owner] += amount

    def require_allowed(self, *parties: Address) -> None:
        """Revert when the token's policy blocks one of them."""
        if not self.blocked.isdisjoint(parties):
            raise EscrowRevert("PolicyForbids")

    def transfer(
        self, token: Address, sender: Address, to: Address, amount: int, memo: Hash32 | None = None
    ) -> None:
        """Move base units. Reverts for an unknown token, a blocked party or a short balance."""
        if token not in self.known:
            raise EscrowRevert("UnknownToken")
        self.require_allowed(sender, to)
        if self.balances[token, sender] < amount:
            raise EscrowRevert("InsufficientBalance")
        self.balances[token, sender] -= amount
        self.balances[token, to] += amount
        self._journal.logs.append(tip20.encode_event(tip20.Transferred(token, sender, to, amount)))
        if memo is not None:
            self._journal.logs.append(tip20.encode_event(tip20.Transferred(token, sender, to, amount, memo)))

    def transfer_from(self, token: Address, spender: Address, owner: Address, to: Address, amount: int) -> None:
        """Move base units with an allowance; an allowance of the whole uint256 range is never used up."""
        allowance = self.allowances[token, owner, spender]
        if allowance < amount:
            raise EscrowRevert("InsufficientAllowance")
        if allowance != _UINT256_MAX:
            self.allowances[token, owner, spender] = allowance - amount
        self.transfer(token, owner, to, amount)

    def call(self, token: Address, sender: Address, data: bytes, *, at_block: int) -> bytes:
        """One contract call to a token; reads see the state of ``at_block``."""
        match data[:4]:
            case tip20.TRANSFER | tip20.TRANSFER_WITH_MEMO:
                call = tip20.decode_transfer(data)
                self.transfer(token, sender, call.to, call.amount, call.memo)
                return encode(True)
            case tip20.APPROVE:
                approval = tip20.decode_approve(data)
                self.allowances[token, sender, approval.spender] = approval.amount
                return encode(True)
            case tip20.BALANCE_OF:
                return encode(self.balances.at((token, Words(data[4:], heads=1, field="data").address()), at_block))
            case tip20.ALLOWANCE:
                words = Words(data[4:], heads=2, field="data")
                return encode(self.allowances.at((token, words.address(), words.address()), at_block))
            case name if name == _DECIMALS:
                return encode(6)
            case _:
                raise EscrowRevert("UnknownFunction")
