"""Which command is heard in which phase, and where it leads: the whole table, written out by hand."""

from __future__ import annotations

from typing import get_args

import pytest

from channels.account import TRANSITIONS
from channels.faults import Reason
from channels.ids import Hash32
from channels.model import (
    AbortClose,
    AcceptVoucher,
    BeginClose,
    Command,
    ConfirmClosed,
    EndStreams,
    Finish,
    FixCapture,
    HoldId,
    ObserveChain,
    Open,
    Phase,
    RecordTopUp,
    ReleaseOrphans,
    Renew,
    Reserve,
    Restore,
)
from tests.support.builders import (
    TX,
    account_in,
    after,
    chain,
    decide,
    opening,
    pico,
    reason,
    reserve,
    voucher,
)

COMMANDS: dict[type[Command], Command] = {
    Open: opening(),
    AcceptVoucher: AcceptVoucher(voucher(200)),
    RecordTopUp: RecordTopUp(Hash32(b"\x0c" * 32), TX, chain(2_000, block=9)),
    Reserve: reserve(5, hold="next", ticket="next"),
    Renew: Renew(HoldId("h"), pico(4), pico(20)),
    Finish: Finish(HoldId("h"), pico(7)),
    EndStreams: EndStreams(),
    ReleaseOrphans: ReleaseOrphans(),
    ObserveChain: ObserveChain(chain(1_000, block=9)),
    BeginClose: BeginClose("another", voucher(100)),
    FixCapture: FixCapture(),
    AbortClose: AbortClose(),
    ConfirmClosed: ConfirmClosed(TX, chain(0, block=9)),
    Restore: Restore(chain(1_000, block=9), (voucher(150),)),
}
P, N, S, L, C, X = Phase.OPEN, Phase.CONTESTED, Phase.SUSPECT, Phase.CLOSING, Phase.CAPTURED, Phase.CLOSED
LEADS_TO: dict[type[Command], dict[Phase, Phase]] = {
    Open: {P: P},
    AcceptVoucher: {P: P},
    RecordTopUp: {P: P, N: P},
    Reserve: {P: P},
    Renew: {P: P, N: N, L: L, S: S},
    Finish: {P: P, N: N, L: L, S: S},
    EndStreams: {P: P},
    ReleaseOrphans: {P: P, N: N, L: L, S: S},
    ObserveChain: {P: P, N: P, L: L, C: C, S: P},
    BeginClose: {P: L, N: L},
    FixCapture: {L: C, C: C},
    AbortClose: {L: P, C: P},
    ConfirmClosed: {C: X, X: X},
    Restore: {P: P, N: P, L: L, C: C, S: P},
}
"""What is not here is refused as ``CHANNEL_FINALIZED``."""


@pytest.mark.parametrize("phase", list(Phase), ids=lambda phase: phase.value)
@pytest.mark.parametrize("kind", list(COMMANDS), ids=lambda kind: kind.__name__)
def test_every_phase_and_command(kind: type[Command], phase: Phase) -> None:
    """Each of the 84 pairs leads where the table says or is refused as finalized."""
    account = account_in(phase, held=kind is not FixCapture)
    before = repr(account)
    target = LEADS_TO[kind].get(phase)
    if target is None:
        assert reason(account, COMMANDS[kind]) is Reason.CHANNEL_FINALIZED
    else:
        made = decide(account, COMMANDS[kind])
        assert made.account.phase is target
        assert made.account.version == account.version + len(made.events)
    assert repr(account) == before, "an account is a value"


def test_the_table_is_complete() -> None:
    """Every command of the language is in the table, and the product's own table hears no more than ours."""
    assert set(COMMANDS) == set(LEADS_TO) == set(get_args(Command))
    for kind, phases in TRANSITIONS.items():
        assert set(LEADS_TO[kind]) <= set(phases)


@pytest.mark.parametrize("kind", [kind for kind in COMMANDS if kind is not Open], ids=lambda kind: kind.__name__)
def test_nothing_happens_to_a_channel_nobody_opened(kind: type[Command]) -> None:
    """Every command but Open needs a channel."""
    assert reason(None, COMMANDS[kind]) is Reason.CHANNEL_NOT_FOUND


@pytest.mark.parametrize("phase", [N, S, L, C, X], ids=lambda phase: phase.value)
def test_an_equal_voucher_outside_open_is_refused(phase: Phase) -> None:
    """A repeat of the accepted voucher is a repeat only while vouchers count at all."""
    assert reason(account_in(phase), AcceptVoucher(voucher(100))) is Reason.CHANNEL_FINALIZED


@pytest.mark.parametrize("phase", [L, C], ids=lambda phase: phase.value)
@pytest.mark.parametrize("onward", [chain(50, block=8), chain(1_000, settled=200, block=8)], ids=["deposit", "settled"])
def test_a_chain_that_contradicts_a_closing_channel_makes_it_suspect(phase: Phase, onward: object) -> None:
    """A lost top-up or a foreign settlement stops a close too, and the close goes on where it was once they agree."""
    account = account_in(phase)
    doubted = after(account, ObserveChain(onward))  # type: ignore[arg-type]
    assert doubted.phase is S
    assert doubted.close == account.close
    again = after(doubted, ObserveChain(chain(1_000, block=9)))
    assert again.phase is phase
    assert again.close == account.close


@pytest.mark.parametrize("captured", [False, True])
def test_an_aborted_close_remembers_the_payers_close_request(captured: bool) -> None:
    """A payer who asked the chain to close is still asking after our own close came to nothing."""
    closing = after(account_in(N, held=False), BeginClose("c", None), *([FixCapture()] if captured else []))
    assert after(closing, AbortClose()).phase is N
    asked_late = after(account_in(L), ObserveChain(chain(1_000, closing=5, block=9)), AbortClose())
    assert asked_late.phase is N
