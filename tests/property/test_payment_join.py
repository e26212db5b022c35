"""What is known of a payment is a lattice: whatever is heard, in any order and however often, ends at one value."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from channels.credit import AccountId, FundsKind, MoveFunds, OpenAccount, plan
from channels.instants import UnixSeconds
from channels.payment import CENTS_MAX, PICO_PER_CENT, DisputeState, PaymentRecord, RefundState, joined
from mppnode.ledger.credit_rows import read_payment, write_payment

CENTS = st.one_of(st.integers(0, 9), st.integers(0, CENTS_MAX // 10))
RECORDS = st.builds(
    PaymentRecord,
    st.just("pi_1"),
    st.sampled_from(list(FundsKind)),
    st.none() | CENTS,
    st.dictionaries(st.sampled_from("ab"), st.tuples(CENTS, st.sampled_from(list(RefundState))), max_size=2),
    st.dictionaries(st.sampled_from("xy"), st.tuples(CENTS, st.sampled_from(list(DisputeState))), max_size=2),
)


def all_of(records: list[PaymentRecord]) -> PaymentRecord:
    known: PaymentRecord | None = None
    for record in records:
        known = joined(known, record)
    assert known is not None
    return known


@given(RECORDS, RECORDS, RECORDS)
def test_joining_is_a_lattice(a: PaymentRecord, b: PaymentRecord, c: PaymentRecord) -> None:
    """Commutative, associative, idempotent, and nothing that was known is lost by hearing it again."""
    assert joined(a, b) == joined(b, a)
    assert joined(joined(a, b), c) == joined(a, joined(b, c))
    assert joined(a, a) == a
    assert joined(joined(a, b), b) == joined(a, b)
    assert joined(None, a) == a


@given(RECORDS, RECORDS)
def test_a_payment_is_worth_at_most_what_was_paid(a: PaymentRecord, b: PaymentRecord) -> None:
    """Nothing that is announced adds money beside the payment itself, and without it there is none to take."""
    both = joined(a, b)
    assert both.worth <= (both.paid or 0)
    assert (both.paid is None) == (a.paid is None and b.paid is None)
    if both.paid is None:
        assert both.worth == 0
    assert both.worth_pico == both.worth * 10**10


@given(RECORDS)
def test_the_document_is_the_payment(record: PaymentRecord) -> None:
    """What is written is what is read."""
    assert read_payment(record.id, write_payment(record)) == record


def test_states_take_back_and_give_back() -> None:
    """Which states of a refund and of a dispute take money: pending and done, open and lost."""
    paid = PaymentRecord("pi_1", paid=1_000)
    for state, worth in ((RefundState.PENDING, 900), (RefundState.SUCCEEDED, 900), (RefundState.FAILED, 1_000)):
        assert joined(paid, PaymentRecord("pi_1", refunds={"re": (100, state)})).worth == worth
    for dispute, worth in zip(DisputeState, (1_000, 300, 300, 1_000), strict=True):
        assert joined(paid, PaymentRecord("pi_1", disputes={"dp": (700, dispute)})).worth == worth


STORY = [
    PaymentRecord("pi_1", paid=1_000),
    PaymentRecord("pi_1", kind=FundsKind.INVOICE, paid=1_000),
    PaymentRecord("pi_1", refunds={"re_1": (200, RefundState.PENDING)}),
    PaymentRecord("pi_1", refunds={"re_1": (200, RefundState.FAILED), "re_2": (50, RefundState.SUCCEEDED)}),
    PaymentRecord("pi_1", disputes={"dp_1": (950, DisputeState.OPEN)}),
    PaymentRecord("pi_1", disputes={"dp_1": (950, DisputeState.LOST)}),
]


def test_k6_every_order_of_a_story_ends_equal() -> None:
    """K6: 720 orders of six announcements, each ten times: one end, and what was booked on the way adds up to it."""
    ends = {all_of([*order * 10]).worth for order in permutations(STORY)}
    assert ends == {0}
    for order in permutations(STORY):
        known: PaymentRecord | None = None
        booked = 0
        for heard in order:
            after = joined(known, heard)
            booked += after.worth - (0 if known is None else known.worth)
            known = after
        assert booked == 0
        assert known == all_of(STORY)


@given(st.lists(RECORDS, min_size=1, max_size=6))
def test_a_payment_moves_with_its_kind(heard: list[PaymentRecord]) -> None:
    """Booked by differences, kind by kind, an account ends with the worth in one place and nothing in the other."""
    now = UnixSeconds(1)
    account = plan(None, OpenAccount(AccountId("a")), now=now).account
    known: PaymentRecord | None = None
    for record in heard:
        after = joined(known, record)
        for kind, amount in ((known.kind, -known.worth_pico) if known else (after.kind, 0), (after.kind, after.worth_pico)):
            account = plan(account, MoveFunds(kind, after.id, amount), now=now).account
        known = after
    end = reduce(joined, heard)
    worth = end.worth * PICO_PER_CENT
    assert (account.invoiced, account.prepaid) == ((worth, 0) if end.kind is FundsKind.INVOICE else (0, worth))
    assert replace(end) == known
