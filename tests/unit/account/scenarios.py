"""What a ledger must do, as short stories told in units; ``test_mutants`` tells each of them to a broken machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from types import ModuleType
from typing import Any

import pytest

from channels.faults import ChannelFault, Reason
from channels.policy import Policy
from channels.units import PICO_PER_UNIT, Units
from tests.support.builders import CHANNEL, NOW, TX, V1, V2, chain, descriptor

DEEP = Policy(ladder_max=3, holds_max=4, unsettled_units_max=Units(500))


class Machine:
    """One build of the account machine, spoken to in units."""

    def __init__(self, model: ModuleType, account: ModuleType) -> None:
        self.m, self.a = model, account
        self.account: Any = None
        self.journal: list[Any] = []
        self.block = 1

    def do(self, command: Any) -> Any:
        made = self.a.plan(self.account, command, now=NOW, policy=DEEP)
        self.account = made.account
        self.journal.extend(made.events)
        assert reduce(self.a.fold, self.journal, None) == self.account
        return made.result

    def refuses(self, why: Reason, ask: Callable[[], Any]) -> None:
        with pytest.raises(ChannelFault) as caught:
            ask()
        assert caught.value.reason is why

    def signed(self, units: int) -> Any:
        return self.m.Voucher(units, units.to_bytes(65, "big"))

    def open(self, cumulative: int = 100, deposit: int = 1_000, escrow: Any = V2) -> Any:
        return self.do(self.m.Open(CHANNEL, escrow, descriptor(), chain(deposit), self.signed(cumulative)))

    def voucher(self, units: int) -> Any:
        return self.do(self.m.AcceptVoucher(self.signed(units)))

    def reserve(
        self,
        floor: float,
        want: float | None = None,
        *,
        hold: str = "h",
        ticket: str | None = None,
        preempt: bool = True,
        owner: str = "node-1",
        stream: bool = True,
    ) -> Any:
        least, most = int(floor * PICO_PER_UNIT), int((want or floor) * PICO_PER_UNIT)
        return self.do(self.m.Reserve(hold, ticket or hold, NOW + 300, least, most, preempt, owner, stream))

    def buffered(self, floor: float, *, hold: str = "g", owner: str = "node-1") -> Any:
        return self.reserve(floor, hold=hold, preempt=False, owner=owner, stream=False)

    def renew(self, consumed: float, want: float, hold: str = "h") -> Any:
        return self.do(self.m.Renew(hold, int(consumed * PICO_PER_UNIT), int(want * PICO_PER_UNIT)))

    def finish(self, total: float, hold: str = "h") -> Any:
        return self.do(self.m.Finish(hold, int(total * PICO_PER_UNIT)))

    def see(self, deposit: int, settled: int = 0, closing: int | None = None, block: int | None = None) -> Any:
        self.block += 1
        return self.do(self.m.ObserveChain(chain(deposit, settled, closing, self.block if block is None else block)))

    def close(self, cumulative: int | None = None) -> Any:
        return self.do(self.m.BeginClose("c", None if cumulative is None else self.signed(cumulative)))

    def capture(self) -> int:
        self.do(self.m.FixCapture())
        capture: int = self.account.close.capture
        return capture

    @property
    def owed(self) -> float:
        return float(self.account.owed_pico) / PICO_PER_UNIT


def two_requests_share_one_voucher(n: Machine) -> None:
    n.open()
    n.reserve(60)
    n.refuses(Reason.INSUFFICIENT_BALANCE, lambda: n.buffered(41))


def an_exact_fit_is_granted(n: Machine) -> None:
    n.open()
    assert n.reserve(100).granted == 100 * PICO_PER_UNIT


def a_fold_charges_what_was_delivered(n: Machine) -> None:
    n.open()
    n.reserve(10, 40)
    n.renew(7, 40)
    assert n.owed == 7


def a_grant_never_shrinks(n: Machine) -> None:
    n.open()
    n.reserve(50)
    assert n.renew(5, 10).granted == 50 * PICO_PER_UNIT


def a_renewal_takes_only_what_is_free(n: Machine) -> None:
    n.open()
    n.reserve(60)
    assert n.renew(10, 500).granted == 100 * PICO_PER_UNIT
    assert n.account.headroom_pico == 0


def recovery_gives_the_window_back(n: Machine) -> None:
    n.open()
    n.reserve(60)
    n.renew(12, 60)
    n.do(n.m.ReleaseOrphans())
    assert n.owed == 12
    assert n.account.headroom_pico == 88 * PICO_PER_UNIT


def a_newcomer_fences_the_older_request(n: Machine) -> None:
    n.open()
    n.reserve(60)
    n.reserve(60, hold="g")
    n.refuses(Reason.HOLD_FENCED, lambda: n.renew(20, 60))
    n.refuses(Reason.HOLD_FENCED, lambda: n.finish(20))


def a_channel_has_one_stream(n: Machine) -> None:
    n.open()
    n.reserve(60)
    n.refuses(Reason.CHANNEL_BUSY, lambda: n.reserve(10, hold="g", preempt=False))
    n.buffered(10)
    n.finish(5)
    n.reserve(10, hold="i", preempt=False)


def a_newcomer_spares_whole_requests(n: Machine) -> None:
    n.open()
    n.buffered(10)
    n.reserve(60)
    n.reserve(20, hold="i")
    assert set(n.account.holds) == {"g", "i"}
    n.finish(10, "g")


def an_asked_stream_ends_with_what_it_holds(n: Machine) -> None:
    n.open()
    n.buffered(10)
    n.reserve(20)
    n.do(n.m.EndStreams())
    assert n.do(n.m.EndStreams()).replayed
    assert n.renew(5, 50).granted == 20 * PICO_PER_UNIT
    assert n.renew(9, 50).granted == 20 * PICO_PER_UNIT, "a fold does not forget what was asked"
    assert n.renew(5, 30, "g").granted == 30 * PICO_PER_UNIT
    n.finish(12)
    assert n.owed == 17


def a_fold_keeps_whose_hold_it_is(n: Machine) -> None:
    n.open()
    n.buffered(10, owner="node-2")
    n.renew(4, 12, "g")
    hold = n.account.holds["g"]
    assert (hold.owner, hold.stream, hold.ending) == ("node-2", False, False)


def the_dead_take_only_their_own_along(n: Machine) -> None:
    n.open()
    n.reserve(30, owner="dead")
    n.buffered(10, owner="alive")
    n.do(n.m.ReleaseOrphans("dead"))
    assert set(n.account.holds) == {"g"}
    n.do(n.m.ReleaseOrphans("dead"))
    n.do(n.m.ReleaseOrphans())
    assert not n.account.holds


def settlement_waits_for_the_end_of_a_stream(n: Machine) -> None:
    n.open(10)
    n.voucher(40)
    n.reserve(12)
    n.finish(12)
    n.reserve(28, hold="g")
    n.renew(28, 28, "g")
    assert (n.account.final, n.account.settleable, n.account.unsettled) == (12, 10, 40)
    n.finish(3, "g")
    assert (n.account.final, n.account.settleable, n.account.unsettled) == (15, 10, 15)
    n.see(1_000, settled=10)
    assert (n.account.settleable, n.account.unsettled) == (10, 5)


def thinning_waits_for_the_end_of_a_stream(n: Machine) -> None:
    n.open(10)
    n.voucher(40)
    n.reserve(12)
    n.finish(12)
    n.reserve(28, hold="g")
    n.renew(28, 28, "g")
    n.voucher(60)
    n.finish(0, "g")
    assert n.account.settleable == 10


def the_closing_voucher_stays(n: Machine) -> None:
    n.open(10, escrow=V1)
    n.voucher(59)
    n.voucher(61)
    n.reserve(60)
    n.renew(60, 60)
    n.close(60)
    n.finish(60)
    assert n.capture() == 60


def a_settlement_never_goes_back(n: Machine) -> None:
    n.do(n.m.Open(CHANNEL, V2, descriptor(), chain(1_000, settled=60), n.signed(100)))
    assert n.account.settleable == 60


def a_use_is_remembered(n: Machine) -> None:
    n.open()
    n.reserve(1)
    assert n.account.active_at == NOW


def an_end_is_confirmed_once(n: Machine) -> None:
    n.open()
    n.close(100)
    n.capture()
    n.see(0)
    n.do(n.m.ConfirmClosed(TX, chain(0, block=9)))
    assert n.account.close.tx_hash == TX
    assert n.do(n.m.ConfirmClosed(TX, chain(0, block=9))).replayed
    n.refuses(Reason.CHANNEL_FINALIZED, lambda: n.do(n.m.ConfirmClosed(bytes(32), chain(0, block=9))))


def a_withdrawal_is_no_close_of_ours(n: Machine) -> None:
    n.open()
    n.close(100)
    n.see(0)
    n.refuses(Reason.CHANNEL_FINALIZED, lambda: n.do(n.m.ConfirmClosed(TX, chain(0, block=9))))


def restore(n: Machine, deposit: int, settled: int, *vouchers: int, block: int = 9) -> None:
    n.do(n.m.Restore(chain(deposit, settled, None, block), tuple(n.signed(amount) for amount in vouchers)))


def a_restore_believes_vouchers_and_the_chain(n: Machine) -> None:
    n.open()
    n.reserve(30)
    n.renew(5, 30)
    restore(n, 1_000, 120, 120, 250, 2_000)
    assert (n.account.accepted, n.owed, n.account.spent, n.account.settleable) == (250, 120, 120, 120)
    assert not n.account.holds
    n.refuses(Reason.CHAIN_UNAVAILABLE, lambda: restore(n, 200, 0, block=8))
    n.refuses(Reason.VOUCHER_TOO_LOW, lambda: restore(n, 1_000, 251))
    assert n.account.accepted == 250


def a_restore_never_forgets_what_was_shown(n: Machine) -> None:
    n.open()
    n.reserve(60)
    n.renew(60, 60)
    n.finish(20)
    n.refuses(Reason.VOUCHER_TOO_LOW, lambda: restore(n, 50, 0, 50))


def a_restore_drops_a_capture_that_was_overtaken(n: Machine) -> None:
    n.open()
    n.reserve(40)
    n.finish(40)
    n.close()
    assert n.capture() == 40
    restore(n, 1_000, 40)
    assert n.account.close is not None
    assert n.account.close.capture == 40
    restore(n, 1_000, 41)
    assert n.account.phase.value == "open"


def the_exposure_is_bounded(n: Machine) -> None:
    n.open(900)
    n.reserve(500)
    n.finish(500)
    n.refuses(Reason.EXPOSURE_LIMIT, lambda: n.reserve(1, hold="g"))
    n.see(1_000, settled=1)
    n.reserve(1, hold="g")


def vouchers_only_rise(n: Machine) -> None:
    n.open()
    n.refuses(Reason.VOUCHER_TOO_LOW, lambda: n.voucher(99))
    version = n.account.version
    assert n.voucher(100).replayed
    assert n.account.version == version
    n.refuses(Reason.VOUCHER_EXCEEDS_DEPOSIT, lambda: n.voucher(1_001))
    n.voucher(1_000)


def fractions_are_carried(n: Machine) -> None:
    n.open()
    for i in range(3):
        n.reserve(1, hold=f"h{i}")
        n.finish(0.4, hold=f"h{i}")
    assert n.account.owed_pico == 1_200_000
    assert n.account.spent == 1


def a_credit_is_given_and_spent_stands(n: Machine) -> None:
    n.open()
    n.reserve(60)
    n.renew(40, 60)
    n.finish(25)
    assert n.owed == 25
    assert n.account.spent == 40
    n.close()
    assert n.capture() == 25


def the_tail_is_not_charged(n: Machine) -> None:
    n.open()
    n.reserve(10)
    n.buffered(70)
    assert n.finish(45).unpaid == 15 * PICO_PER_UNIT
    assert n.owed == 30


def a_capture_is_what_was_consumed(n: Machine) -> None:
    n.open()
    n.reserve(50)
    n.finish(33.9)
    n.close(100)
    assert n.capture() == 33


def a_contract_channel_captures_a_rung(n: Machine) -> None:
    n.open(10, escrow=V1)
    n.voucher(30)
    n.voucher(90)
    n.reserve(50)
    n.finish(50)
    n.close()
    assert n.capture() == 30


def a_contract_channel_takes_the_exact_closing_voucher(n: Machine) -> None:
    n.open(10, escrow=V1)
    n.voucher(90)
    n.reserve(50)
    n.finish(50)
    n.close(50)
    assert n.capture() == 50


def the_capture_waits_for_the_last_request(n: Machine) -> None:
    n.open()
    n.reserve(50)
    n.close(100)
    n.refuses(Reason.CHANNEL_BUSY, n.capture)
    n.finish(20)
    assert n.capture() == 20
    n.refuses(Reason.CHANNEL_FINALIZED, lambda: n.finish(21))


def a_close_covers_what_was_spent(n: Machine) -> None:
    n.open()
    n.reserve(50)
    n.finish(50)
    n.refuses(Reason.CLOSE_BELOW_SPENT, lambda: n.close(49))
    n.close(50)


def a_credential_buys_once(n: Machine) -> None:
    n.open()
    n.reserve(5, ticket="t")
    n.finish(1)
    n.refuses(Reason.CREDENTIAL_USED, lambda: n.reserve(5, hold="g", ticket="t"))


def the_ladder_keeps_its_ends(n: Machine) -> None:
    n.open(10)
    n.reserve(10)
    n.finish(10)
    for units in (20, 30, 31, 500):
        n.voucher(units)
        assert n.account.accepted == units
    assert [rung.cumulative for rung in n.account.ladder] == [10, 31, 500]


def the_chain_is_believed(n: Machine) -> None:
    n.open()
    n.see(2_000)
    assert n.see(1_500, block=1).replayed, "an older block is no news"
    assert n.account.chain.deposit == 2_000
    n.see(900)
    assert n.account.chain.deposit == 900, "a newer block may say less"
    n.see(99)
    assert n.account.phase.value == "suspect"


def a_close_request_stops_new_work(n: Machine) -> None:
    n.open()
    n.reserve(10, 20)
    n.see(1_000, closing=5)
    n.refuses(Reason.CHANNEL_FINALIZED, lambda: n.voucher(200))
    n.refuses(Reason.CHANNEL_FINALIZED, lambda: n.reserve(1, hold="g"))
    assert n.renew(5, 90).granted == 20 * PICO_PER_UNIT
    n.close(100)
    n.finish(6)
    n.do(n.m.AbortClose())
    n.refuses(Reason.CHANNEL_FINALIZED, lambda: n.voucher(200))


def a_top_up_counts_once(n: Machine) -> None:
    n.open()
    assert not n.do(n.m.RecordTopUp(b"c" * 32, TX, chain(1_500, block=2))).replayed
    again = n.do(n.m.RecordTopUp(b"c" * 32, bytes(32), chain(9_000, block=3)))
    assert again.replayed
    assert again.tx_hash == TX
    assert n.account.chain.deposit == 1_500
