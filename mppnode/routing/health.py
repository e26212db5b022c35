"""Which providers work, learnt from every request and from probes; nobody's status page is asked.

A request asks for a permit before it tries a provider and reports how it went. What belongs to one model at a provider
(failures, 429, speed) is kept apart from what belongs to the provider as a whole (never reached, our key refused), so
that one broken model does not take two hundred others with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from mppnode.kernel.clock import Clock
from mppnode.kernel.listing import Listing
from mppnode.routing.breaker import Below, Breaker, Speed, Standing
from mppnode.routing.policy import HealthPolicy

_KEY_REFUSED: Final = frozenset({401, 402, 403})
_TOO_MANY: Final = 429
_MEASURABLE_TOKENS: Final = 16  # of fewer, the rate is that of one network packet

Key = tuple[str, str]
"""Provider and model."""


class Verdict(Enum):
    """How an attempt went, as far as the provider's health is concerned."""

    SERVED = auto()
    FAILED = auto()
    UNREACHABLE = auto()
    DENIED = auto()
    """It refused our key or our account: no request can succeed until the operator acts."""
    THROTTLED = auto()
    DROPPED = auto()
    """Given up by us or by the caller, or the caller's own mistake: it says nothing about the provider."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One attempt's result, and what the provider said about waiting."""

    verdict: Verdict
    status: int | None = None
    retry_after_s: float | None = None
    tokens_per_s: float | None = None


DROPPED: Final = Outcome(Verdict.DROPPED)


def outcome_of(kind: str, *, status: int | None = None, retry_after_s: float | None = None) -> Outcome:
    """What a fault of ``providers.base`` says about the provider's health."""
    if status in _KEY_REFUSED:
        return Outcome(Verdict.DENIED, status)
    if status == _TOO_MANY:
        return Outcome(Verdict.THROTTLED, status, retry_after_s)
    return Outcome(Verdict.UNREACHABLE if kind == "connect" else Verdict.FAILED, status)


Alarm = Callable[[str, int | None], None]
"""Hears which provider has refused our key or account, and with which status. Must not raise."""


class _Provider:
    """One provider as a whole, and the model a probe of it would ask for."""

    __slots__ = ("breaker", "model")

    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker
        self.model = ""


class _Track:
    """One model at one provider."""

    __slots__ = ("breaker", "provider", "speed")

    def __init__(self, breaker: Breaker, provider: _Provider) -> None:
        self.breaker = breaker
        self.provider = provider
        self.speed = Speed()


class Permit:
    """The right to try one provider once. Releasing it again does nothing, so ``finally`` may always release it."""

    __slots__ = ("_health", "_key", "_number", "_track")

    def __init__(self, health: Health, key: Key, track: _Track, number: int) -> None:
        self._health = health
        self._key = key
        self._track: _Track | None = track
        self._number = number

    @property
    def probe(self) -> bool:
        """Whether this request is the one that finds out if the provider is back."""
        return self._number != 0

    def began(self, now: float, *, first_s: float | None) -> None:
        """The first output came, so many seconds after the request; None when that was not measured."""
        if self._track is not None:
            self._health.note_began(self._track, self._number, now, first_s)

    def release(self, outcome: Outcome, now: float) -> None:
        """Report how it went and give up the place."""
        track, self._track = self._track, None
        if track is not None:
            self._health.note_outcome(self._key, track, self._number, outcome, now)


class Health:
    """What is known of every provider. Callers give the time; nothing here waits, and nothing runs by itself."""

    def __init__(self, *, below: Below, alarm: Alarm, policy: HealthPolicy | None = None) -> None:
        """``below`` is the random source of the cool-downs' jitter."""
        self._policy = policy or HealthPolicy()
        self._below = below
        self._alarm = alarm
        self._tracks: dict[Key, _Track] = {}
        self._providers: dict[str, _Provider] = {}
        self._probes = 0

    def standing(self, key: Key, now: float) -> Standing:
        """How good a choice this provider is for this model now."""
        track = self._tracks.get(key)
        if track is None:
            whole = self._providers.get(key[0])
            return Standing.STEADY if whole is None else whole.breaker.standing(now)
        mine, theirs = track.breaker.standing(now), track.provider.breaker.standing(now)
        return max(mine, theirs)

    def speed(self, key: Key, now: float) -> Speed | None:
        """The measured speed, if there are enough recent measurements."""
        track = self._tracks.get(key)
        return track.speed if track is not None and track.speed.known(now, self._policy) else None

    def wait(self, key: Key, now: float) -> float:
        """Seconds until this provider may be asked again, as far as we know."""
        track, whole = self._tracks.get(key), self._providers.get(key[0])
        return max(
            0.0 if track is None else track.breaker.wait(now),
            0.0 if whole is None else whole.breaker.wait(now),
        )

    def admit(self, listing: Listing, now: float) -> Permit | None:
        """Leave to try a provider now, or None: it is avoided, it asked us to wait, or somebody else is the probe."""
        key = (listing.provider, listing.model)
        if self.standing(key, now) >= Standing.THROTTLED:
            return None
        track = self._track(key)
        number = 0
        for breaker in (track.breaker, track.provider.breaker):
            if breaker.standing(now) is Standing.PROBE:
                if not number:
                    self._probes += 1
                    number = self._probes
                breaker.lease(number, now)
        return Permit(self, key, track, number)

    def forget(self, provider: str) -> None:
        """Know nothing of a provider any more: another server, or another key, stands behind its name.

        Attempts under way report to what they began with, which nobody reads.
        """
        self._providers.pop(provider, None)
        for key in [key for key in self._tracks if key[0] == provider]:
            del self._tracks[key]

    def due_probes(self, now: float) -> tuple[Key, ...]:
        """Providers and models whose cool-down is over and whom nobody tries: a probe need not wait for a caller."""
        due: list[Key] = []
        for name, whole in self._providers.items():
            if whole.breaker.tripped and self.standing((name, whole.model), now) is Standing.PROBE:
                due.append((name, whole.model))
        for key, track in self._tracks.items():
            # One probe of a provider that is down as a whole is enough; it is in the list already.
            alone = track.breaker.tripped and not track.provider.breaker.tripped
            if alone and self.standing(key, now) is Standing.PROBE:
                due.append(key)
        return tuple(due)

    def note_began(self, track: _Track, number: int, now: float, first_s: float | None) -> None:
        """Take a permit's first report."""
        track.breaker.alive(number)
        track.provider.breaker.alive(number)
        if first_s is not None:
            track.speed.began(first_s, now, self._policy)

    def note_outcome(self, key: Key, track: _Track, number: int, outcome: Outcome, now: float) -> None:
        """Take a permit's last report."""
        breaker, whole = track.breaker, track.provider
        match outcome.verdict:
            case Verdict.SERVED:
                breaker.served(number)
                whole.breaker.served(number)
                if outcome.tokens_per_s is not None:
                    track.speed.ended(outcome.tokens_per_s)
            case Verdict.FAILED:
                breaker.failed(number, now)
                # It answered. Whether it serves is then the models' affair, unless it is on probation as a whole.
                if whole.breaker.tripped:
                    whole.breaker.failed(number, now)
            case Verdict.UNREACHABLE:
                breaker.failed(number, now)
                whole.model = key[1]
                whole.breaker.failed(number, now)
            case Verdict.DENIED:
                self._denied(key, whole, number, outcome.status, now)
            case Verdict.THROTTLED:
                breaker.throttled(outcome.retry_after_s, now)
            case Verdict.DROPPED:
                pass
        breaker.give_back(number)
        whole.breaker.give_back(number)

    def _denied(self, key: Key, whole: _Provider, number: int, status: int | None, now: float) -> None:
        opened = True
        if whole.breaker.tripped:
            opened = whole.breaker.failed(number, now)  # only the probe's refusal counts again
        else:
            whole.breaker.trip(now)
        whole.model = key[1]
        if opened:
            self._alarm(key[0], status)

    def _track(self, key: Key) -> _Track:
        track = self._tracks.get(key)
        if track is None:
            if len(self._tracks) >= self._policy.tracks_max:
                del self._tracks[next(iter(self._tracks))]
            whole = self._providers.get(key[0])
            if whole is None:
                if len(self._providers) >= self._policy.tracks_max:
                    del self._providers[next(iter(self._providers))]
                whole = self._providers[key[0]] = _Provider(Breaker(self._policy, self._below))
            track = self._tracks[key] = _Track(Breaker(self._policy, self._below), whole)
        return track


class PermitWatch:
    """A permit in the hands of an attempt: the engine says what happens, the clock says when."""

    __slots__ = ("_clock", "_permit", "_streamed")

    def __init__(self, permit: Permit, clock: Clock, *, streamed: bool) -> None:
        """``streamed``: whether the first output and the whole answer are different moments."""
        self._permit = permit
        self._clock = clock
        self._streamed = streamed

    def began(self, first_s: float) -> None:
        """The first output came after so many seconds."""
        self._permit.began(self._clock.monotonic(), first_s=first_s if self._streamed else None)

    def failed(self, kind: str, *, status: int | None, retry_after_s: float | None) -> None:
        """The attempt failed before any output."""
        outcome = outcome_of(kind, status=status, retry_after_s=retry_after_s)
        self._permit.release(outcome, self._clock.monotonic())

    def dropped(self) -> None:
        """The attempt was cut short by us or by the caller."""
        self._permit.release(DROPPED, self._clock.monotonic())

    def ended(self, *, tokens: int, seconds: float) -> None:
        """The answer is complete: so many tokens, in so many seconds since the first."""
        measured = self._streamed and seconds > 0 and tokens >= _MEASURABLE_TOKENS
        rate = tokens / seconds if measured else None
        self._permit.release(Outcome(Verdict.SERVED, tokens_per_s=rate), self._clock.monotonic())

    def broke(self, kind: str) -> None:
        """The provider failed in the middle of its answer."""
        self._permit.release(outcome_of(kind), self._clock.monotonic())
