"""Every point of a node's life at which a test can end it, in the order of the story that passes them all.

``.before`` and ``.after`` stand around one change of the world outside: a commit, bytes to the chain, bytes to a client.
Between two of them nothing outside changes, so dying there is dying at one of them.
"""

from __future__ import annotations

from typing import Final


def around(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{side}" for name in names for side in ("before", "after"))


STORY: Final = (
    "start.before",
    *around("listen"),
    # a payer opens, streams, signs vouchers, tops up
    *around("payer_broadcast", "Open", "Reserve", "connect", "write", "Renew", "need_voucher", "AcceptVoucher"),
    *around("RecordTopUp", "Finish", "receipt"),
    # the node stops and starts again, settles what was earned, and closes when the payer asks
    *around("drain", "ObserveChain", "plan", "signed", "sent", "broadcast", "mined", "final"),
    *around("BeginClose", "FixCapture", "ConfirmClosed"),
)
"""Points of one node that is never killed."""

AFTER_A_DEATH: Final = around("ReleaseOrphans")
"""Points of the node that comes after a killed one."""

ELSEWHERE: Final = {
    **dict.fromkeys(around("EndStreams"), "two nodes: tests/fault/test_many_nodes.py"),
    **dict.fromkeys(around("AbortClose", "dead", "reverted"), "a chain that refuses: tests/fault/test_close_recovery.py, tests/sim"),
    **dict.fromkeys(around("Restore"), "an operator's command: tests/cli/test_money.py"),
}
"""Points no story of one healthy chain and one node passes, and where they are passed."""
