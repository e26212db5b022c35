"""Rates and their headers, by examples; what holds for every sequence is in tests/property/test_budget.py."""

from __future__ import annotations

import pytest

from mppnode.accounts.limits import (
    MINUTE_US,
    Bound,
    Bucket,
    Pace,
    Taken,
    UnixMicros,
    Wait,
    admit,
    correct,
    go_duration,
    rate_headers,
    refusal,
    settle,
    take,
)
from mppnode.accounts.model import RateLimits
from mppnode.http.problem import retry_headers
from mppnode.kernel.faults import NodeReason

T0 = 1_900_000_000_000_000


def at(micros: int) -> UnixMicros:
    return UnixMicros(T0 + micros)


@pytest.mark.parametrize("limit", [1, 7, 60, 1_000_000_007])
def test_a_minute_holds_exactly_its_limit(limit: int) -> None:
    """All of a limit fits at once, not one more, and one fits again after its exact share of a minute."""
    bucket, verdict = take(Bucket(), limit, limit, at(0), Bound.REQUESTS)
    assert isinstance(verdict, Taken)
    share = -(-MINUTE_US // limit)
    assert take(bucket, 1, limit, at(0), Bound.REQUESTS)[1] == Wait(Bound.REQUESTS, share)
    assert isinstance(take(bucket, 1, limit, at(share - 1), Bound.REQUESTS)[1], Wait)
    assert isinstance(take(bucket, 1, limit, at(share), Bound.REQUESTS)[1], Taken)


def test_a_refusal_takes_nothing() -> None:
    """A request that waits for tokens keeps its place among the requests, and the other way round."""
    limits = RateLimits(rpm=1, tpm=10)
    pace, taken = admit(Pace(), limits, 4, at(0))
    assert isinstance(taken, Taken)
    assert admit(pace, limits, 4, at(0)) == (pace, Wait(Bound.REQUESTS, MINUTE_US))
    assert admit(Pace(), limits, 11, at(0)) == (Pace(), Wait(Bound.TOKENS, None))
    again, _ = admit(Pace(), limits, 10, at(0))
    assert again.requests.level == MINUTE_US


def test_the_longer_wait_is_told() -> None:
    """Who waits for both is not told to come back for a second refusal."""
    limits = RateLimits(rpm=2, tpm=60)
    pace, _ = admit(Pace(), limits, 60, at(0))
    pace, _ = admit(pace, limits, 0, at(0))
    assert admit(pace, limits, 59, at(0))[1] == Wait(Bound.TOKENS, 59_000_000)
    assert admit(pace, limits, 1, at(0))[1] == Wait(Bound.REQUESTS, 30_000_000)
    assert admit(pace, limits, 61, at(0))[1] == Wait(Bound.TOKENS, None)


def test_no_limit_is_no_bucket() -> None:
    """Without limits everything is admitted and nothing is kept."""
    pace, taken = admit(Pace(), RateLimits(), 10**9, at(0))
    assert pace == Pace()
    assert isinstance(taken, Taken)
    assert settle(pace, RateLimits(), taken, 5, at(9)) == pace
    assert rate_headers(pace, RateLimits(), at(0)) == {}


def test_unused_tokens_come_back_only_once() -> None:
    """What leaked out while a request ran is not given back a second time."""
    limits = RateLimits(tpm=60)
    pace, taken = admit(Pace(), limits, 60, at(0))
    assert isinstance(taken, Taken)
    assert settle(pace, limits, taken, 10, at(0)).tokens.level == 10 * MINUTE_US
    assert settle(pace, limits, taken, 10, at(20_000_000)).tokens.level == 0
    crowded, other = admit(pace, limits, 60, at(60_000_000))
    assert isinstance(other, Taken)
    assert settle(crowded, limits, taken, 0, at(60_000_000)).tokens.level == 60 * MINUTE_US


def test_a_hold_sinks_by_what_others_get_back() -> None:
    """What was given back below a hold moves it down: it has leaked out sooner, and is not given back on top."""
    bucket, below = take(Bucket(), 40, 60, at(0), Bound.TOKENS)
    bucket, above = take(bucket, 20, 60, at(0), Bound.TOKENS)
    assert isinstance(below, Taken)
    assert isinstance(above, Taken)
    bucket = correct(bucket, below, 0, 60, at(0))
    bucket, third = take(bucket, 60, 60, at(20_000_000), Bound.TOKENS)
    assert isinstance(third, Taken)
    assert correct(bucket, above, 0, 60, at(20_000_000)).level == 60 * MINUTE_US


def test_more_than_was_taken_is_waited_for() -> None:
    """An answer that took more than was reserved delays the next one."""
    bucket, taken = take(Bucket(), 5, 10, at(0), Bound.TOKENS)
    assert isinstance(taken, Taken)
    over = correct(bucket, taken, 20, 10, at(0))
    assert take(over, 1, 10, at(0), Bound.TOKENS)[1] == Wait(Bound.TOKENS, 66_000_000)


def test_a_clock_that_steps_back_gives_nothing() -> None:
    """Time that is measured twice leaks once."""
    bucket, _ = take(Bucket(), 10, 10, at(0), Bound.TOKENS)
    back, wait = take(bucket, 1, 10, at(-MINUTE_US), Bound.TOKENS)
    assert wait == Wait(Bound.TOKENS, 6_000_000)
    assert isinstance(take(back, 1, 10, at(5_999_999), Bound.TOKENS)[1], Wait)


def test_p25_a_refusal_says_when_to_come_back() -> None:
    """P-25: 429 carries Retry-After in whole seconds, rounded up; what never fits says not to retry."""
    fault = refusal(Wait(Bound.TOKENS, 1_000_001))
    assert fault.reason is NodeReason.LIMIT_REACHED
    assert retry_headers(fault) == {"Retry-After": "2", "retry-after-ms": "2000"}
    assert retry_headers(refusal(Wait(Bound.CONCURRENCY, 0)))["Retry-After"] == "1"
    never = refusal(Wait(Bound.TOKENS, None))
    assert retry_headers(never) == {"x-should-retry": "false"}
    assert "more than it ever allows" in never.message


def test_headers_are_openais() -> None:
    """Limit, what is left in whole requests and tokens, and the time until all of it is back."""
    limits = RateLimits(rpm=60, tpm=150_000)
    pace, _ = admit(Pace(), limits, 50_000, at(0))
    assert rate_headers(pace, limits, at(1_000)) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "999ms",
        "x-ratelimit-limit-tokens": "150000",
        "x-ratelimit-remaining-tokens": "100002",
        "x-ratelimit-reset-tokens": "19.999s",
    }
    over = Pace(tokens=Bucket(200_000 * MINUTE_US, at(0)))
    assert rate_headers(over, limits, at(0))["x-ratelimit-remaining-tokens"] == "0"


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (0, "0s"),
        (1, "1ms"),
        (17_000, "17ms"),
        (999_001, "1s"),
        (1_000_000, "1s"),
        (8_640_000, "8.64s"),
        (59_999_001, "1m0s"),
        (360_000_000, "6m0s"),
        (360_050_000, "6m0.05s"),
        (3_600_000_000, "1h0m0s"),
        (90_061_000_000, "25h1m1s"),
    ],
)
def test_durations_are_gos(micros: int, text: str) -> None:
    """Spans are printed as Go's time.Duration prints them."""
    assert go_duration(micros) == text
