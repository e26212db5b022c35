"""The log lines of channels: one per command that changed whose money is whose, told once its commit is durable.

Reservations and their folds are not among them: a request's bill is one line at its end, and they come with every
second of every stream.
"""

from __future__ import annotations

from typing import Final

from channels.model import (
    AbortClose,
    AcceptVoucher,
    Account,
    BeginClose,
    Command,
    ConfirmClosed,
    ObserveChain,
    Open,
    Phase,
    RecordTopUp,
)
from mppnode.observe.logs import Level, Log

TOLD: Final = frozenset({AbortClose, AcceptVoucher, BeginClose, ConfirmClosed, ObserveChain, Open, RecordTopUp})
"""Commands that have a line."""


def tell(log: Log, command: Command, account: Account, *, before: Phase | None, accepted: int) -> None:
    """Write the line of a command that changed ``account``, which was in phase ``before`` with ``accepted`` units."""
    channel = "0x" + account.id.hex()
    match command:
        case Open():
            protocol, deposit = account.escrow.protocol.value, account.chain.deposit
            log("channel.opened", channel=channel, protocol=protocol, deposit=deposit, accepted=account.accepted)
        case AcceptVoucher():
            delta = account.accepted - accepted
            log("voucher.accepted", level=Level.DEBUG, channel=channel, accepted=account.accepted, delta=delta)
        case RecordTopUp():
            tx = "0x" + command.tx_hash.hex()
            log("channel.topped_up", channel=channel, deposit=account.chain.deposit, tx=tx)
        case BeginClose():
            log("channel.closing", channel=channel, why=command.challenge_id, earned=account.capturable)
        case AbortClose():
            log("channel.reopened", channel=channel)
        case ConfirmClosed():
            _closed(log, channel, account, "0x" + command.tx_hash.hex())
        case ObserveChain() if account.phase is not before:
            was = None if before is None else before.value
            settled = account.chain.settled
            log("channel.turned", channel=channel, before=was, phase=account.phase.value, settled=settled)
        case _:
            pass


def _closed(log: Log, channel: str, account: Account, tx: str) -> None:
    close = account.close
    why, captured = (None, None) if close is None else (close.challenge_id, close.capture)
    log("channel.closed", channel=channel, why=why, captured=captured or 0, tx=tx)
