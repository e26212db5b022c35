"""Which model serves ``model: "auto"``: every model of the pool scored by written rules, the best first.

Scores and weights are integers, so the same request, prices and measurements give the same model on every node. What is
not known is never invented: it counts as the middle of what is known, and the decision says ``unknown``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Ability
from mppnode.kernel.wishes import Optimize
from mppnode.routing.classify import Complexity, Reading, Task
from mppnode.routing.decision import Exclusion

FALLBACKS_MAX: Final = 3  # with the chosen one: as many models as a caller waits for
_FULL: Final = 1000  # scores are per mille
_MIDDLE: Final = 50  # of the scale of quality, for a pool in which no model's quality is known
_SLOWEST_MS: Final = 3_600_000  # what takes longer than an hour is not told apart
_SCALE: Final = _FULL // 100  # quality is 0 to 100


class Weights(NamedTuple):
    """What each score counts for, in hundredths; together one hundred."""

    fit: int
    cost: int
    latency: int
    quality: int


WEIGHTS: Final[Mapping[Optimize, Weights]] = MappingProxyType(
    {
        Optimize.BALANCED: Weights(fit=40, cost=25, latency=15, quality=20),
        # Fit stays in every mode: the cheapest or fastest model that cannot do the work is no bargain.
        Optimize.QUALITY: Weights(fit=35, cost=5, latency=5, quality=55),
        Optimize.COST: Weights(fit=25, cost=65, latency=5, quality=5),
        Optimize.LATENCY: Weights(fit=25, cost=10, latency=60, quality=5),
    }
)
_DEMANDED: Final[Mapping[Complexity, int]] = MappingProxyType(
    {Complexity.SIMPLE: 30, Complexity.MODERATE: 50, Complexity.COMPLEX: 75}
)
"""The quality a prompt asks for, on the scale of :class:`~mppnode.kernel.listing.Listing`."""
_PER_POINT: Final = 20  # of fit, lost for each point of quality that is missing: fifty points too few is no fit at all
_THINKING: Final = frozenset({Task.ANALYSIS, Task.CODE_GENERATION, Task.CODE_REVIEW, Task.MATH})
_UNTHINKING: Final = 150  # of fit, lost by a model that cannot think ahead on complex work of these kinds
_CROWDED: Final = 200  # of fit, lost when prompt and answer fill more than three quarters of the context
_ANSWERS: Final[Mapping[Task, int]] = MappingProxyType(
    {
        Task.ANALYSIS: 600,
        Task.CLASSIFICATION: 30,
        Task.CODE_GENERATION: 500,
        Task.CODE_REVIEW: 400,
        Task.CONVERSATION: 80,
        Task.CREATIVE_WRITING: 400,
        Task.EXTRACTION: 150,
        Task.MATH: 300,
        Task.QUESTION_ANSWERING: 200,
        Task.SUMMARIZATION: 200,
        Task.TRANSLATION: 100,
    }
)
"""Tokens of a usual answer of moderate complexity. Assumed: models are compared by it, nobody is billed."""
_HALVES: Final[Mapping[Complexity, int]] = MappingProxyType(
    {Complexity.SIMPLE: 1, Complexity.MODERATE: 2, Complexity.COMPLEX: 6}
)
"""How long an answer is, in halves of the usual one."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model of the pool, as good as its sellers together.

    ``quality`` is 0 to 100, 0 unknown. ``cost`` is what this request would cost at the cheapest seller who may serve
    it, in pico-dollars, with an answer of :func:`answer_tokens`. ``first_s`` (seconds) and ``tokens_per_s`` are
    measured, None where they were not.
    """

    model: str
    quality: int
    cost: int
    abilities: Ability
    context: int
    first_s: float | None = None
    tokens_per_s: float | None = None


Score = int | Literal["unknown"]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A model with its scores, per mille; ``total`` is weighted, and counts the middle for what is unknown."""

    model: str
    total: int
    fit: Score
    cost: Score
    latency: Score
    quality: Score


@dataclass(frozen=True, slots=True)
class Choice:
    """The models for a request, best first: the chosen one and at most three to fall back on."""

    reading: Reading
    optimize: Optimize
    ranked: tuple[Ranked, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """The models to try, in order."""
        return tuple(each.model for each in self.ranked)

    def decision(self, routing_time_ms: float) -> dict[str, Any]:
        """What the caller is told: the fields of the routing event, without ``object``. Scores are 0 to 1."""
        best = self.ranked[0]
        return {
            "task": self.reading.task.value,
            "complexity": self.reading.complexity.value,
            "confidence": _share(self.reading.confidence),
            "language": self.reading.language,
            "model": best.model,
            "optimize": self.optimize.value,
            "score": _share(best.total),
            "scores": {
                "fit": _share(best.fit),
                "cost": _share(best.cost),
                "latency": _share(best.latency),
                "quality": _share(best.quality),
            },
            "alternatives": [{"model": other.model, "score": _share(other.total)} for other in self.ranked[1:]],
            "routing_time_ms": routing_time_ms,
        }


def _share(score: Score) -> float | str:
    return score if isinstance(score, str) else score / _FULL


# ------------------------------------------------------------------------------------------------------------- pool


def pool_of(
    asked: Sequence[str] | None,
    defaults: Iterable[Sequence[str] | None],
    *,
    on_sale: Iterable[str],
    lookup: Callable[[str], object],
) -> tuple[str, ...]:
    """The models to choose from, each once: the request's pool, else the first default there is, else all on sale.

    ``defaults`` come from the most specific: key, account, node. ``lookup`` is the catalog's, which refuses a name it
    does not have.

    Raises:
        NodeFault: ``UNKNOWN_MODEL`` naming the entry of the request's pool that is not sold, with near names;
            ``NO_PROVIDER`` when a default pool has no model left on sale, or nothing is on sale.
    """
    if asked is not None:
        return tuple(dict.fromkeys(_sold(name, index, lookup) for index, name in enumerate(asked)))
    sold = dict.fromkeys(on_sale)
    given = next((pool for pool in defaults if pool is not None), None)
    # A model may leave the catalog after a default was set, and who asks now cannot help it: the rest serves.
    pool = tuple(sold if given is None else (name for name in dict.fromkeys(given) if name in sold))
    if not pool:
        whose = "no model is" if given is None else "no model of the default pool is"
        raise NodeFault(NodeReason.NO_PROVIDER, field="model", detail=f"is auto, and {whose} on sale")
    return pool


def _sold(name: str, index: int, lookup: Callable[[str], object]) -> str:
    try:
        lookup(name)
    except NodeFault as fault:
        if fault.reason is not NodeReason.UNKNOWN_MODEL:
            raise
        where = f"routing.model_pool[{index}]"
        raise NodeFault(NodeReason.UNKNOWN_MODEL, field=where, detail=fault.detail) from None
    return name


# ----------------------------------------------------------------------------------------------------------- choice


def answer_tokens(reading: Reading, max_tokens: int) -> int:
    """The output tokens that models are compared by: a usual answer to such a prompt, at most ``max_tokens``."""
    return min(max_tokens, _ANSWERS[reading.task] * _HALVES[reading.complexity] // 2)


def choose(
    reading: Reading,
    models: Sequence[Candidate],
    optimize: Optimize,
    *,
    max_tokens: int,
    needs: Ability = Ability(0),  # noqa: B008 - an immutable constant
) -> Choice:
    """Rank the models that can serve the request; equals go by lower cost, then higher quality, then name.

    ``models`` is the pool, each model once.

    Raises:
        NodeFault: ``NO_PROVIDER`` with counts by reason when no model has the abilities and the context.
    """
    answer = answer_tokens(reading, max_tokens)
    able = _able(models, needs, reading.prompt_tokens)
    assumed = _median([each.quality for each in able if each.quality], _MIDDLE)
    took = [_milliseconds(each, answer) for each in able]
    fastest = min(filter(None, took), default=0)
    middle = _median([_FULL * fastest // ms for ms in took if ms], _FULL // 2)
    least = max(1, min(each.cost for each in able))
    weights = WEIGHTS[optimize]
    fit_of = _fit(reading, answer)
    scored: list[_Row] = []
    for each, ms in zip(able, took, strict=True):
        quality = each.quality or assumed
        fit = fit_of(each, quality)
        cost = _FULL * least // max(each.cost, least)
        latency = _FULL * fastest // ms if ms else middle
        # Not divided yet: scores that differ by less than the per mille that is shown are not equal.
        total = weights.fit * fit + weights.cost * cost + weights.latency * latency + weights.quality * quality * _SCALE
        scored.append((-total, each.cost, -quality, each.model, fit, cost, latency if ms else _NONE, each.quality))
    scored.sort()
    return Choice(reading, optimize, tuple(map(_ranked, scored[: 1 + FALLBACKS_MAX])))



_NONE: Final = -1
_Row = tuple[int, int, int, str, int, int, int, int]
"""What is compared, in this order (total, cost, quality, name), then the scores that are shown."""


def _ranked(row: _Row) -> Ranked:
    total, _, _, model, fit, cost, latency, quality = row
    return Ranked(
        model=model,
        total=-total // 100,
        fit=fit,
        cost=cost,
        latency="unknown" if latency == _NONE else latency,
        quality=quality * _SCALE or "unknown",
    )


def _able(models: Sequence[Candidate], needs: Ability, prompt_tokens: int) -> list[Candidate]:
    """Who can do what the request needs and read all of it. How long the answer may be is for each seller to say."""
    skilled = [each for each in models if needs in each.abilities] if needs else models
    able = [each for each in skilled if each.context > prompt_tokens]
    if not able:
        counts = {
            Exclusion.REQUIRE_PARAMETERS.value: len(models) - len(skilled),
            Exclusion.CONTEXT_LENGTH.value: len(skilled),
        }
        excluded = {reason: count for reason, count in counts.items() if count}
        shown = "".join(f"; {count} by {reason}" for reason, count in excluded.items())
        raise NodeFault(
            NodeReason.NO_PROVIDER,
            field="model",
            detail=f"is auto, and no model of the pool can serve this request{shown}",
            excluded=excluded,
        )
    return able


def _milliseconds(each: Candidate, answer: int) -> int:
    """Until a usual answer is complete, at least one; 0 if that was not measured."""
    if each.first_s is None or each.tokens_per_s is None or each.tokens_per_s <= 0:
        return 0
    return max(1, round(min(_SLOWEST_MS, 1000 * (each.first_s + answer / each.tokens_per_s))))


def _fit(reading: Reading, answer: int) -> Callable[[Candidate, int], int]:
    """How well a model of some quality suits a prompt, per mille."""
    demanded = _DEMANDED[reading.complexity]
    thinking = reading.complexity is Complexity.COMPLEX and reading.task in _THINKING
    roomy = (reading.prompt_tokens + answer) * 4

    def fit(each: Candidate, quality: int) -> int:
        value = _FULL if quality >= demanded else _FULL - (demanded - quality) * _PER_POINT
        if thinking and Ability.REASONING not in each.abilities:
            value -= _UNTHINKING
        if roomy > each.context * 3:
            value -= _CROWDED
        return max(0, value)

    return fit


def _median(values: list[int], otherwise: int) -> int:
    """The middle of what is known; of an even number, the lower middle and the upper one's mean, rounded down."""
    if not values:
        return otherwise
    values.sort()
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) // 2
