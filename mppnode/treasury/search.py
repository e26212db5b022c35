"""Finds how a channel ended on chain, when no receipt of ours tells."""

from __future__ import annotations

from typing import Final

from channels import escrow as escrow_v2
from channels import escrow_v1
from channels.chain import Chain
from channels.descriptor import SessionProtocol
from channels.escrow import ChannelClosed
from channels.ids import Hash32
from channels.model import Account
from channels.verify import closed_in

SPAN: Final = 2_000
"""Blocks per query: RPC providers refuse much wider ones."""
_BLOCKS_BACK: Final = 100_000  # more than a day of half-second blocks; fifty queries at the most, for one channel


async def find_end(chain: Chain, account: Account, *, until: int) -> tuple[ChannelClosed, Hash32] | None:
    """The end of a channel at or before block ``until``, and its transaction; looked for backwards, for about a day.

    Raises:
        ChannelFault: ``CHAIN_UNAVAILABLE``.
    """
    names = escrow_v2 if account.escrow.protocol is SessionProtocol.V2 else escrow_v1
    last, oldest = until, max(until - _BLOCKS_BACK, 0)
    while last >= oldest:
        first = max(last - SPAN + 1, oldest)
        logs = await chain.logs(
            account.escrow.address,
            topics=(names.CHANNEL_CLOSED, Hash32(account.id)),
            from_block=first,
            to_block=last,
        )
        closed = closed_in(account.id, account.escrow, logs)
        if closed is not None:
            return closed, logs[-1].tx_hash
        last = first - 1
    return None
