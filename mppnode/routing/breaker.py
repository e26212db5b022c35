"""The state of one provider, or of one model at one provider: trusted, avoided, or on probation."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final

from mppnode.routing.policy import HealthPolicy

_SMOOTHING: Final = 0.2  # of a speed: the last ten measurements make nine tenths of it
_ERROR_SMOOTHING: Final = 100  # of the share of errors, per mille: about the last twenty outcomes
_DOUBLINGS_MAX: Final = 16  # far past every cool-down's limit

Below = Callable[[int], int]
"""A uniformly random integer from 0 up to, not including, the argument."""


class Standing(IntEnum):
    """How good a choice a provider is now; the worst of what is known of it counts."""

    STEADY = 0
    SHAKY = 1
    """It failed within the last moments: behind its rivals, but not out."""
    PROBE = 2
    """Its cool-down is over and nobody is trying it: one request may."""
    THROTTLED = 3
    """It has asked us to wait, which is no failure."""
    OPEN = 4
    """It is avoided, or somebody is trying it right now."""


_STEADY, _SHAKY, _PROBE, _THROTTLED, _OPEN = Standing  # asked for every candidate of every decision


class Breaker:
    """One circuit breaker with its measurements; the caller gives the time, which never runs backwards."""

    __slots__ = (
        "_below",
        "_errors",
        "_lease",
        "_lease_until",
        "_open_until",
        "_outcomes",
        "_policy",
        "_row",
        "_shaky_until",
        "_throttled_until",
        "_tripped",
        "_trips",
    )

    def __init__(self, policy: HealthPolicy, below: Below) -> None:
        self._policy = policy
        self._below = below
        self._tripped = False
        self._trips = 0  # openings since it last served: the exponent of the cool-down
        self._row = 0
        self._errors = 0  # per mille, smoothed
        self._outcomes = 0
        self._open_until = self._shaky_until = self._throttled_until = self._lease_until = 0.0
        self._lease = 0  # 0: nobody is probing

    @property
    def tripped(self) -> bool:
        """Whether it is open or half-open."""
        return self._tripped

    def standing(self, now: float) -> Standing:
        """How good a choice it is now."""
        if self._tripped and (now < self._open_until or (self._lease and now < self._lease_until)):
            return _OPEN
        if now < self._throttled_until:
            return _THROTTLED
        if self._tripped:
            return _PROBE
        return _SHAKY if now < self._shaky_until else _STEADY

    def wait(self, now: float) -> float:
        """Seconds until it may be asked again, as far as we know; 0 when it may be asked now."""
        until = max(self._throttled_until, self._open_until if self._tripped else 0.0)
        return max(until - now, 0.0)

    def lease(self, number: int, now: float) -> None:
        """Half-open: this request alone may pass until it reports, is given up, or takes too long."""
        assert self.standing(now) is Standing.PROBE
        self._lease, self._lease_until = number, now + self._policy.probe_lease_s

    def give_back(self, number: int) -> None:
        """The probe ended without telling us anything: the next request may be the probe."""
        if self._lease == number:
            self._lease = 0

    def alive(self, number: int) -> None:
        """A probe's first output came: closed again, though the next failure opens it at once."""
        if not self._tripped or not number or self._lease != number:
            return
        self._tripped, self._lease = False, 0
        self._row = self._policy.failures_max - 1

    def served(self, number: int) -> None:
        """A whole answer came. A request that began before the breaker opened says nothing about now."""
        self.alive(number)
        if self._tripped:
            return
        self._row = self._trips = 0
        self._shaky_until = 0.0
        self._count(failed=False)

    def failed(self, number: int, now: float) -> bool:
        """A request failed; whether that opened the breaker."""
        self._shaky_until = now + self._policy.outage_s
        if self._tripped:
            # Only the probe counts: the hundred requests under way when it opened would double its cool-down each.
            if self._lease != number or not number:
                return False
            self.trip(now)
            return True
        self._row += 1
        self._count(failed=True)
        often = self._outcomes >= self._policy.error_samples and self._errors >= self._policy.error_per_mille
        if self._row < self._policy.failures_max and not often:
            return False
        self.trip(now)
        return True

    def throttled(self, retry_after_s: float | None, now: float) -> None:
        """It asked us to wait, for so long or without saying."""
        asked = self._policy.throttle_s if retry_after_s is None else retry_after_s
        self._throttled_until = max(self._throttled_until, now + min(max(asked, 1.0), self._policy.throttle_max_s))

    def trip(self, now: float) -> None:
        """Open, for longer every time it is opened without having served in between."""
        policy = self._policy
        pause = min(policy.cool_down_s * (1 << min(self._trips, _DOUBLINGS_MAX)), policy.cool_down_max_s)
        self._trips += 1
        self._open_until = now + pause * (1000 + self._below(policy.jitter_per_mille + 1)) / 1000
        self._shaky_until = now + policy.outage_s
        self._tripped = True
        self._lease = self._row = self._errors = self._outcomes = 0

    def _count(self, *, failed: bool) -> None:
        self._outcomes += 1
        self._errors += ((1000 if failed else 0) - self._errors) * _ERROR_SMOOTHING // 1000


class Speed:
    """Moving averages of one model at one provider: seconds to the first token, and tokens per second after it."""

    __slots__ = ("_at", "_samples", "first_s", "tokens_per_s")

    def __init__(self) -> None:
        self.first_s = 0.0
        self.tokens_per_s = 0.0
        self._samples = 0
        self._at = 0.0

    def began(self, first_s: float, now: float, policy: HealthPolicy) -> None:
        """The first output came after so many seconds."""
        if now - self._at > policy.speed_window_s:
            self._samples = 0
            self.tokens_per_s = 0.0
        self.first_s = _smooth(self.first_s if self._samples else None, first_s)
        self._samples += 1
        self._at = now

    def ended(self, tokens_per_s: float) -> None:
        """The rest came at this rate."""
        self.tokens_per_s = _smooth(self.tokens_per_s or None, tokens_per_s)

    def known(self, now: float, policy: HealthPolicy) -> bool:
        """Whether there are enough measurements, and recent ones."""
        return (
            self._samples >= policy.speed_samples and self.tokens_per_s > 0 and now - self._at <= policy.speed_window_s
        )


def _smooth(before: float | None, value: float) -> float:
    return value if before is None else before + (value - before) * _SMOOTHING
