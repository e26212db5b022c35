"""Breakers, probes, 429 and the alarm: who is avoided, for how long, and how they come back (P-64, P-65)."""

import asyncio

import pytest

from mppnode.kernel.clock import ManualClock
from mppnode.kernel.strategy import Strategy
from mppnode.routing.breaker import Standing
from mppnode.routing.health import DROPPED, Outcome, PermitWatch, Verdict, outcome_of
from mppnode.routing.policy import HealthPolicy
from tests.unit.routing.kit import Draws, at, health_of, measure, names, permit_of, report, router, sells, wish

A, B = sells("a"), sells("b", 50_000)
KEY = ("a", "m")


def opened(health, listing=A, now=0.0):
    report(health, listing, Verdict.FAILED, now, times=5)
    assert health.admit(listing, now) is None


async def test_p64_one_probe_passes_among_a_hundred_callers():
    """P-64: a half-open breaker lets one of a hundred through; a cancelled one frees the place, a served one closes."""
    health = health_of()
    opened(health)

    async def caller():
        await asyncio.sleep(0)
        return health.admit(A, 6.0)

    async def passed():
        return [permit for permit in await asyncio.gather(*(caller() for _ in range(100))) if permit is not None]

    (probe,) = await passed()
    assert probe.probe
    probe.release(DROPPED, 6.0)
    (probe,) = await passed()
    probe.release(Outcome(Verdict.SERVED), 6.0)
    probe.release(Outcome(Verdict.FAILED), 6.0)  # a second report is none
    assert len(await passed()) == 100


def test_p64_a_lost_probe_is_given_up():
    """P-64: a probe that never reports loses its place after a minute, and its late report frees nobody else's."""
    health = health_of()
    opened(health)
    lost = permit_of(health, A, 6.0)
    assert health.admit(A, 65.9) is None
    second = permit_of(health, A, 66.0)
    lost.release(DROPPED, 66.0)
    assert health.admit(A, 66.0) is None
    second.began(66.0, first_s=None)
    assert health.admit(A, 66.0) is not None


def test_the_cool_down_doubles_with_jitter_and_has_an_end():
    """5, 10, 20 ... 300 s, each up to a quarter longer at random; serving starts over."""
    draws = Draws(*[0, 250, 0, 0, 0, 0, 0, 0, 0])
    health = health_of(draws=draws)
    now, pauses = 0.0, []
    report(health, A, Verdict.FAILED, now, times=5)
    for _ in range(8):
        pauses.append(health.wait(KEY, now))
        now += pauses[-1]
        report(health, A, Verdict.FAILED, now)
    assert pauses == [5, 12.5, 20, 40, 80, 160, 300, 300]
    assert set(draws.asked) == {251}
    now += health.wait(KEY, now)
    report(health, A, Verdict.SERVED, now)
    report(health, A, Verdict.FAILED, now, times=5)
    assert health.wait(KEY, now) == 5


def test_four_failures_are_forgiven_and_every_second_is_not():
    """Five in a row open; so does an error rate of a half, however evenly spread; nothing below does."""
    health = health_of()
    for _ in range(10):
        report(health, A, Verdict.FAILED, 0.0, times=4)
        report(health, A, Verdict.SERVED, 0.0, times=12)
    assert health.standing(KEY, 0.0) is Standing.STEADY
    for _ in range(30):
        for verdict in (Verdict.SERVED, Verdict.FAILED):
            if (permit := health.admit(B, 0.0)) is not None:
                permit.release(Outcome(verdict), 0.0)
    assert health.standing(("b", "m"), 0.0) is Standing.OPEN


def test_requests_under_way_do_not_move_an_open_breaker():
    """Late failures do not lengthen the cool-down and a late success does not close it: only the probe decides."""
    health = health_of()
    early = [permit_of(health, A, 0.0) for _ in range(20)]
    opened(health)
    for index, permit in enumerate(early):
        permit.release(Outcome(Verdict.SERVED if index % 2 else Verdict.FAILED), 1.0)
    assert health.wait(KEY, 1.0) == 4
    assert health.standing(KEY, 1.0) is Standing.OPEN


def test_a_probe_that_breaks_after_its_first_token_opens_again():
    """The first output closes the breaker for others, but the next failure opens it at once, and for longer."""
    health = health_of()
    opened(health)
    probe = permit_of(health, A, 5.0)
    probe.began(5.0, first_s=0.1)
    assert health.admit(A, 5.0) is not None
    probe.release(Outcome(Verdict.FAILED), 6.0)
    assert health.wait(KEY, 6.0) == 10


@pytest.mark.parametrize(("asked", "pause"), [(None, 5), (0.0, 1), (30.0, 30), (10.0**9, 600)])
def test_a_429_is_waited_for_and_is_no_failure(asked, pause):
    """However many: the provider rests for its Retry-After, within limits, and its breaker stays closed."""
    health = health_of()
    held = [permit_of(health, A, 0.0) for _ in range(50)]
    for permit in held:
        permit.release(outcome_of("status", status=429, retry_after_s=asked), 0.0)
    assert (health.standing(KEY, 0.0), health.wait(KEY, 0.0)) == (Standing.THROTTLED, pause)
    assert health.admit(A, pause - 0.01) is None
    assert health.standing(KEY, pause) is Standing.STEADY
    assert health.due_probes(pause) == ()


@pytest.mark.parametrize("status", [401, 402, 403])
def test_p65_a_refused_key_takes_the_provider_out_and_calls_the_operator(status):
    """P-65: one such answer opens the breaker of all its models, once alarmed; others serve on."""
    alarms = []
    health = health_of(alarms)
    other = sells("a", model="other")
    under_way = permit_of(health, other, 0.0)
    permit_of(health, A, 0.0).release(outcome_of("status", status=status), 0.0)
    under_way.release(outcome_of("status", status=status), 0.0)
    assert alarms == [("a", status)]
    assert health.admit(A, 0.0) is None
    assert health.admit(other, 0.0) is None
    decided = router(A, B, health=health).decide(wish(strategy=Strategy.CHEAPEST), now=at(-1000))
    assert (names(decided.chain), decided.excluded) == (["b"], {"health": 1})
    assert health.due_probes(5.0) == (("a", "other"),)
    probe = permit_of(health, other, 5.0)
    assert health.admit(A, 5.0) is None  # the probe stands for the whole provider
    probe.release(Outcome(Verdict.SERVED), 5.0)
    assert health.standing(KEY, 5.0) is Standing.STEADY


def test_one_broken_model_does_not_take_the_provider_with_it():
    """Failures stay with the model; not being reached at all belongs to the provider."""
    health = health_of()
    other = sells("a", model="other")
    report(health, A, Verdict.FAILED, 0.0, times=5)
    assert health.admit(other, 0.0) is not None
    for index in range(5):
        report(health, sells("a", model=f"m{index}"), Verdict.UNREACHABLE, 0.0)
    assert health.admit(other, 0.0) is None


def test_due_probes_name_who_waits_for_one():
    """Half-open without traffic is named; cooling down, being probed and healthy are not."""
    health = health_of()
    opened(health)
    report(health, B, Verdict.SERVED, 0.0)
    assert health.due_probes(4.9) == ()
    assert health.due_probes(5.0) == (KEY,)
    probe = permit_of(health, A, 5.0)
    assert health.due_probes(5.0) == ()
    probe.release(DROPPED, 5.0)
    assert health.due_probes(5.0) == (KEY,)


def test_an_outage_pushes_behind_for_thirty_seconds_and_half_open_goes_last():
    """One failure puts the cheapest behind its rivals, half a minute long or until it serves; half-open is last always."""
    a, b, c = sells("a", 10, 10), sells("b", 20, 20), sells("c", 30, 30)
    health = health_of()
    route = router(a, b, c, health=health)
    def order(now):
        return names(route.decide(wish(strategy=Strategy.CHEAPEST), now=at(now)).chain)
    report(health, a, Verdict.FAILED, at().monotonic)
    assert (order(29.9), order(30)) == (["b", "c", "a"], ["a", "b", "c"])
    report(health, a, Verdict.SERVED, at(1).monotonic)
    assert order(1) == ["a", "b", "c"]
    opened(health, a, at(50).monotonic)
    assert order(51) == ["b", "c"]
    assert order(90) == ["b", "c", "a"]
    assert names(route.decide(wish(order=("a",)), now=at(90)).chain) == ["b", "c", "a"]


def test_what_is_remembered_is_bounded():
    """A stream of new models forgets the oldest."""
    health = health_of(policy=HealthPolicy(tracks_max=2))
    opened(health)
    for model in ("x", "y"):
        report(health, sells("a", model=model), Verdict.SERVED, 0.0)
    assert health.standing(KEY, 0.0) is Standing.STEADY


def test_a_watch_reports_with_the_clocks_time():
    """The engine's reports become outcomes: speed only of streams, failures by kind, nothing from a cancelled one."""
    clock, health = ManualClock(), health_of()
    for _ in range(5):
        watch = PermitWatch(permit_of(health, A, clock.monotonic()), clock, streamed=True)
        watch.began(0.5)
        watch.ended(tokens=100, seconds=2.0)
        whole = PermitWatch(permit_of(health, B, clock.monotonic()), clock, streamed=False)
        whole.began(9.0)
        whole.ended(tokens=100, seconds=2.0)
    speed = health.speed(KEY, clock.monotonic())
    assert speed is not None
    assert (speed.first_s, speed.tokens_per_s) == (0.5, 50.0)
    assert health.speed(("b", "m"), clock.monotonic()) is None
    PermitWatch(permit_of(health, A, clock.monotonic()), clock, streamed=True).dropped()
    assert health.standing(KEY, clock.monotonic()) is Standing.STEADY
    PermitWatch(permit_of(health, A, clock.monotonic()), clock, streamed=True).broke("closed")
    assert health.standing(KEY, clock.monotonic()) is Standing.SHAKY
    PermitWatch(permit_of(health, A, clock.monotonic()), clock, streamed=True).failed("status", status=429, retry_after_s=7.0)
    assert health.wait(KEY, clock.monotonic()) == 7


def test_speed_follows_with_a_moving_average():
    """A measurement moves the average by a fifth."""
    health = health_of()
    measure(health, A, first_s=1.0, rate=100.0, now=0.0)
    measure(health, A, first_s=2.0, rate=50.0, now=1.0, times=1)
    speed = health.speed(KEY, 1.0)
    assert speed is not None
    assert (speed.first_s, speed.tokens_per_s) == (1.2, 90.0)


@pytest.mark.parametrize(("kind", "status", "verdict"), [("connect", None, Verdict.UNREACHABLE), ("timeout", None, Verdict.FAILED), ("status", 500, Verdict.FAILED), ("status", 404, Verdict.FAILED), ("status", 402, Verdict.DENIED), ("status", 429, Verdict.THROTTLED)])
def test_faults_are_judged(kind, status, verdict):
    """What an upstream fault says about health."""
    assert outcome_of(kind, status=status).verdict is verdict
