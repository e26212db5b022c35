"""Traces as values: what a caller may say of its trace, who is recorded, and how little a running request keeps."""

from __future__ import annotations

import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mppnode.observe.traces import Failed, Parent, Trace, Tracer, attempt_number, parse_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"
KEPT_MAX = 150
"""Bytes a recorded stream may cost beyond one that is not, however long it waits for its payer."""


@given(
    st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255), st.sampled_from(["00", "01", "fe", "cc"])
)
def test_what_is_well_formed_is_read(trace: int, span: int, flags: int, version: str) -> None:
    """Every id and flag of this version, and of later ones."""
    text = f"{version}-{trace:032x}-{span:016x}-{flags:02x}"
    assert parse_traceparent([text]) == Parent(trace, span, flags % 2 == 1)


def test_a_later_version_may_say_more() -> None:
    """What a later version adds behind its flags is not ours to judge."""
    assert parse_traceparent([f"01-{TRACE}-{SPAN}-00-and-more"]) == Parent(int(TRACE, 16), int(SPAN, 16), False)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [GOOD, GOOD],
        [""],
        [f" {GOOD}"],
        [f"{GOOD}\n"],
        [GOOD.upper()],
        [f"{GOOD}-"],
        [f"{GOOD}-00"],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"0-{TRACE}-{SPAN}-01"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE[1:]}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}0-01"],
        [f"00-{TRACE}-{SPAN}-1"],
        [f"00-{TRACE}-{SPAN}-0x"],
        [f"00-{TRACE}-{SPAN[:-1]}g-01"],
        [f"00-{TRACE}-{SPAN[:-1]}\u0661-01"],
        [f"01-{TRACE}-{SPAN}-01and-more"],
        [f"01-{TRACE}-{SPAN}-01-{'x' * 201}"],
        [f"00_{TRACE}_{SPAN}_01"],
    ],
)
def test_what_is_malformed_is_ignored(values: list[str]) -> None:
    """Nothing is guessed: a broken parent is none."""
    assert parse_traceparent(values) is None


@given(st.text(max_size=80))
def test_no_text_breaks_the_parser(text: str) -> None:
    """Whatever a caller sends, the answer is a parent with ids, or None."""
    found = parse_traceparent([text])
    assert found is None or (found.trace_id and found.span_id)


def tracer(permille: int, seed: int = 1) -> Tracer:
    return Tracer(lambda _: None, sample_permille=permille, entropy=Random(seed).randbytes)


def test_nodes_with_one_rate_record_the_same_traces() -> None:
    """Whether a trace is recorded depends on its id and the rate alone, and a higher rate keeps what a lower one has."""
    ids = [Random(7).getrandbits(128) + number * 7**40 for number in range(2_000)]
    headers = [f"00-{number % 2**128:032x}-{SPAN}-01" for number in ids]

    def kept(permille: int, seed: int) -> set[str]:
        node = tracer(permille, seed)
        return {header for header in headers if node.begin([header], 0.0).sampled}

    assert kept(250, 1) == kept(250, 2)
    assert 400 < len(kept(250, 1)) < 600
    assert kept(0, 1) < kept(250, 1) < kept(700, 3) < kept(1000, 1) == set(headers)


def test_a_caller_can_keep_a_request_out_but_not_in() -> None:
    """``sampled=0`` is obeyed; ``sampled=1`` does not override the operator's rate."""
    assert not tracer(1000).begin([f"{GOOD[:-2]}00"], 0.0).sampled
    assert not tracer(0).begin([GOOD], 0.0).sampled
    assert tracer(1000).begin([GOOD], 0.0).sampled


def test_a_trace_of_our_own_has_fresh_ids_and_no_parent() -> None:
    """Without a parent both ids are the node's, different each time and never zero."""
    node = tracer(1000)
    traces = [node.begin([], 1.5) for _ in range(100)]
    assert len({trace.ids[0] for trace in traces}) == len({trace.ids[1] for trace in traces}) == 100
    assert {trace.ids[2] for trace in traces} == {0}
    assert {trace.begun for trace in traces} == {1.5}
    assert all(Tracer(lambda _: None, sample_permille=0, entropy=bytes).begin([], 0.0).ids[:2])


def test_each_provider_is_told_another_parent() -> None:
    """The header names the attempt's own span, which is the one its failure is told under."""
    trace = Trace(int(TRACE, 16), 2**64 - attempt_number(1), 5, 0.0, sampled=True)
    trace.provider = "one"
    first = trace.header()
    trace.failing("timeout", None, 2.0)
    second = trace.header()
    assert trace.failed == (Failed("one", "timeout", None, 2.0),)
    assert trace.provider == ""
    for header, index in ((first, 0), (second, 1)):
        assert parse_traceparent([header]) == Parent(int(TRACE, 16), trace.child(attempt_number(index)), True)
    assert trace.child(attempt_number(1)) != 0


def test_a_running_request_keeps_little() -> None:
    """What a stream that waits for its payer holds for its trace fits in its allowance."""
    trace = tracer(1000).begin([GOOD], 123.456)
    trace.provider = "dev"
    # The name is the catalog's own, and nothing has failed: both are shared by all.
    assert trace.failed is ()  # noqa: F632
    kept = sys.getsizeof(trace) + sys.getsizeof(trace._core)
    assert kept + 16 <= KEPT_MAX  # 16: the garbage collector's own, before the object
