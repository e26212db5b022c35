"""What a prompt asks for: kind of task, how much work it is, in which language. Read in microseconds, not by a model.

A linear model over hand-written cue words (``lexicon.py``), the words of the labelled prompts and a few marks of
structure; its weights are integers in ``weights.json``, trained by ``bench/classify.py``. It understands nothing: it
counts evidence. No float is computed, so every node reads a prompt alike.
"""

# ruff: noqa: RUF001 - punctuation of other scripts is meant

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import orjson

from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Ability
from mppnode.kernel.requests import Message, Role
from mppnode.routing.lexicon import CUES, EFFORT, SMALL_TALK, SMALL_WORDS, STEM

_HEAD: Final = 400  # characters: instructions stand at the beginning of a prompt or at its end, documents between
_TAIL: Final = 200
_SYSTEM: Final = 300  # a system prompt says in its first sentences what the assistant is for
_STRUCTURE: Final = 8192  # looked at for code, lists and marks; what is longer is not short in any other way
_BYTES_PER_TOKEN: Final = 4  # of English; for other scripts this counts too many rather than too few
_DENSITY: Final = 3  # a character of an unspaced script says as much as so many Latin letters
_PAIRED: Final = 12  # "show that" and "how many" say more than their words; later on a pair is chance
_WORDS_MAX: Final = 240  # of a window; text without spaces is cut into pairs, one for each character
_CERTAIN: Final = 1000
_FRACTION: Final = 64  # weights are 64ths of a bit of evidence
_POWERS: Final = tuple(round(2 ** (16 - step / _FRACTION)) for step in range(_FRACTION))  # rounds alike everywhere


class Task(StrEnum):
    """What kind of answer is asked for."""

    ANALYSIS = "analysis"
    CLASSIFICATION = "classification"
    CODE_GENERATION = "code_generation"
    CODE_REVIEW = "code_review"
    CONVERSATION = "conversation"
    CREATIVE_WRITING = "creative_writing"
    EXTRACTION = "extraction"
    MATH = "math"
    QUESTION_ANSWERING = "question_answering"
    SUMMARIZATION = "summarization"
    TRANSLATION = "translation"


class Complexity(StrEnum):
    """How much work the answer is."""

    SIMPLE = "simple"
    MODERATE = "moderate"
    COMPLEX = "complex"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a prompt was taken for.

    ``confidence`` is per mille. ``language`` is of the instructions, ISO 639-1, or ``und`` when nothing told it.
    ``prompt_tokens`` is an estimate and no bill is made of it.
    """

    task: Task
    complexity: Complexity
    confidence: int
    language: str
    prompt_tokens: int


class Signs(NamedTuple):
    """Counts that make a prompt more work, never less: more of any never lowers the complexity."""

    length: int
    """Of the instructions, in half binary digits of the number of characters."""
    document: int
    """Of the whole prompt, likewise."""
    items: int
    commas: int
    sentences: int
    steps: int
    limits: int
    depth: int
    parts: int
    demands: int
    """Tool definitions and an answer schema: one each."""


SIGNS_MAX: Final = Signs(20, 28, 8, 8, 6, 4, 4, 3, 4, 2)
"""Where each count stops: a thousand list items are no more work for the reader than eight."""


def classify(
    messages: Sequence[Message],
    *,
    needs: Ability = Ability(0),  # noqa: B008 - an immutable constant
    prompt_bytes: int | None = None,
    task: str | None = None,
) -> Reading:
    """Read a conversation: its last user message, and what the system prompt says the assistant is for.

    ``prompt_bytes`` are the UTF-8 bytes the model will read, where the caller has counted more than the messages (tool
    definitions). ``task`` is what the caller says it is: believed, and only the rest is read.

    Raises:
        NodeFault: ``INVALID_FIELD`` naming ``routing.task`` and the known tasks, when ``task`` is none of them.
    """
    known = None if task is None else _task(task)
    text = _asked(messages)
    words = words_of(text)
    system = next((message.text for message in messages if message.role in _INSTRUCTING), "")
    if known is None:
        known, confidence = _most_likely(features(text, words, system))
    else:
        confidence = _CERTAIN
    if prompt_bytes is None:
        prompt_bytes = sum(len(message.text.encode()) for message in messages)
    return Reading(
        task=known,
        complexity=rate(signs(text, words, needs), known),
        confidence=confidence,
        language=language_of(text, words),
        prompt_tokens=-(-prompt_bytes // _BYTES_PER_TOKEN),
    )


_INSTRUCTING: Final = frozenset({Role.SYSTEM, Role.DEVELOPER})


def _asked(messages: Sequence[Message]) -> str:
    """The last thing a person said; tool results and earlier answers are not what is asked."""
    for message in reversed(messages):
        if message.role is Role.USER and message.text:
            return message.text
    return messages[-1].text if messages else ""


def _task(name: str) -> Task:
    for task in Task:
        if task == name:
            return task
    raise NodeFault(NodeReason.INVALID_FIELD, field="routing.task", detail="is not one of " + ", ".join(Task))


# ------------------------------------------------------------------------------------------------------------ words

# Everything but spaces, digits and punctuation. Not "[^\W\d]": that tears Indic words apart at their vowel signs.
_WORD: Final = re.compile(
    r"[^\s!-@\[-`{-~\u00a1-\u00bf\u2010-\u206f\u3000-\u303f\uff01-\uff20\uff3b-\uff40\uff5b-\uff65]+"
)
_WIDE: Final = "\u2e80"  # from here on: Chinese, Japanese, Korean
_AFTER_WIDE: Final = "\ud7b0"  # where Hangul ends


def _window(text: str) -> str:
    """The instructions: a prompt's two ends."""
    return text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]}\n{text[-_TAIL:]}"


def words_of(text: str) -> list[str]:
    """The words of a prompt's instructions in lower case; a bounded number of them."""
    return _WORD.findall(_window(text).lower())[:_WORDS_MAX]


def _stems(words: Iterable[str]) -> list[str]:
    """Words by their first letters, unspaced scripts by pairs of characters."""
    made: list[str] = []
    for word in words:
        if _WIDE <= word[0] < _AFTER_WIDE:
            made += [word[at : at + 2] for at in range(min(len(word), _WORDS_MAX) - 1)] or [word]
        else:
            made.append(word[:STEM])
    return made


def _by_stem(groups: Mapping[str, str]) -> Mapping[str, str]:
    """Stem to group; of a longer word of an unspaced script its first pair."""
    return MappingProxyType({stem: name for name, text in groups.items() for stem in _firsts(text)})


def _firsts(text: str) -> set[str]:
    return {word[:2] if _WIDE <= word[0] < _AFTER_WIDE else word[:STEM] for word in text.split()}


_CUES: Final = _by_stem(dict(reversed(tuple(CUES.items()))))  # of two groups the first has the word
_EFFORT: Final = MappingProxyType({name: frozenset(_firsts(text)) for name, text in EFFORT.items()})


# ------------------------------------------------------------------------------------------------------------- task

_CODE_MARK: Final = re.compile(r"[;{}=]|\w\(|=>|->|</|::|\.\w+\(")
_SUM: Final = re.compile(r"\d\s*[-+*/^=%×÷]|[a-z]\^|[²³√∫π]|\w\(\w\)\s*=|\d[a-z]\b")
_CODE_MARKS: Final = ((1, "code:few"), (6, "code:some"), (16, "code:many"))
_LENGTHS: Final = ((0, "long:0"), (25, "long:25"), (60, "long:60"), (160, "long:160"), (500, "long:500"))


def features(text: str, words: Sequence[str], system: str = "") -> list[str]:
    """The evidence in a prompt, by name: cues, words, and marks of structure. Each once."""
    stems = _stems(words)
    cues = [_CUES[stem] for stem in stems if stem in _CUES]
    found = {f"#{cue}" for cue in cues}
    found.update(stems)
    if cues:
        found.add(f"^#{cues[0]}")
    if stems:
        found.add(f"^{stems[0]}")
    opening = stems[:_PAIRED]
    found.update(f"{one}_{two}" for one, two in pairwise(opening))
    if system:
        told = {_CUES.get(stem, "") for stem in _stems(words_of(system[:_SYSTEM]))}
        found.update(f"#{cue}" for cue in told - SMALL_TALK if cue)
    found.update(_marks(text))
    return sorted(found)  # a set of strings has another order in every process


def _marks(text: str) -> Iterable[str]:
    near = _window(text)
    if "```" in near:
        yield "mark:fence"
    marks = len(_CODE_MARK.findall(near))
    yield from (name for least, name in _CODE_MARKS if marks >= least)
    if "Traceback" in near or "@@ " in near:
        yield "mark:trace"
    if _SUM.search(near[:_HEAD].lower()):
        yield "mark:sum"
    if any(digit in near for digit in "0123456789"):
        yield "mark:digit"
    last = near.rstrip()[-1:]
    if last and last in "?？؟;":  # the Greek question mark looks like a semicolon
        yield "mark:asks"
    elif "?" in near or "？" in near:
        yield "mark:asked"
    if ":" in near or "：" in near:
        yield "mark:colon"
    if '"' in near or "«" in near or "「" in near:
        yield "mark:quote"
    if "\n" in near:
        yield "mark:lines"
    yield [name for least, name in _LENGTHS if len(text) >= least][-1]


class _Weights(NamedTuple):
    bias: tuple[int, ...]
    evidence: Mapping[str, tuple[int, ...]]
    signs: Signs
    tasks: Mapping[str, int]
    moderate: int
    complex: int


def parse_weights(raw: Mapping[str, Any]) -> _Weights:
    """The weights as the training wrote them; more of a sign never counts less, whatever the data said."""
    effort = raw["complexity"]
    weights = _Weights(
        bias=tuple(raw["bias"]),
        evidence=MappingProxyType({name: tuple(row) for name, row in raw["evidence"].items()}),
        signs=Signs(**effort["signs"]),
        tasks=MappingProxyType({task.value: effort["tasks"][task.value] for task in Task}),
        moderate=effort["moderate"],
        complex=effort["complex"],
    )
    assert raw["tasks"] == [task.value for task in Task]
    assert all(len(row) == len(Task) for row in (weights.bias, *weights.evidence.values()))
    assert min(weights.signs) >= 0
    assert weights.moderate <= weights.complex
    return weights


_WEIGHTS: Final = parse_weights(orjson.loads(files("mppnode.routing").joinpath("weights.json").read_bytes()))
_TASKS: Final = tuple(Task)


def _most_likely(found: Iterable[str], weights: _Weights = _WEIGHTS) -> tuple[Task, int]:
    """The task with the most evidence, and how sure of it the model is, per mille."""
    evidence = weights.evidence
    rows = [evidence[name] for name in found if name in evidence]
    totals = [sum(column) for column in zip(weights.bias, *rows, strict=True)]
    best = max(totals)
    shares = [_power(best - total) for total in totals]
    return _TASKS[totals.index(best)], shares[totals.index(best)] * 1000 // sum(shares)


def _power(behind: int) -> int:
    """2 to the minus ``behind`` 64ths, in 65536ths."""
    whole, step = divmod(behind, _FRACTION)
    return _POWERS[step] >> whole


# ------------------------------------------------------------------------------------------------------- complexity

# Bounded, and no newlines in the indent: a page of empty lines must not be read once for each of them.
_ITEM: Final = re.compile(r"^[ \t]{0,8}(?:[-*•]|\d{1,2}[.)])[ \t]", re.MULTILINE)
_COMMA: Final = re.compile(r"[,，、;；]")
_SENTENCE: Final = re.compile(r"[.!?。！？](?:\s|$)|[。！？]")


def signs(text: str, words: Sequence[str], needs: Ability = Ability(0)) -> Signs:  # noqa: B008 - an immutable constant
    """Count what makes a prompt more work, each up to its limit."""
    near = _window(text)
    stems = set(_stems(words))
    wide = (_DENSITY - 1) * sum(len(word) for word in words if _WIDE <= word[0] < _AFTER_WIDE)
    size, whole = len(near) + wide, len(text) + wide
    counts = (
        (size * size).bit_length(),
        (whole * whole).bit_length(),
        len(_ITEM.findall(text[:_STRUCTURE])),
        len(_COMMA.findall(near)),
        len(_SENTENCE.findall(near)),
        len(stems & _EFFORT["steps"]),
        len(stems & _EFFORT["limits"]),
        len(stems & _EFFORT["depth"]),
        len(stems & _EFFORT["parts"]),
        (Ability.TOOLS in needs) + (Ability.JSON_SCHEMA in needs),
    )
    return Signs(*map(min, counts, SIGNS_MAX))


def rate(counted: Signs, task: Task, weights: _Weights = _WEIGHTS) -> Complexity:
    """The complexity: a weighted sum against two thresholds, with an offset for each kind of task."""
    points = weights.tasks[task.value] + sum(map(int.__mul__, counted, weights.signs))
    if points >= weights.complex:
        return Complexity.COMPLEX
    return Complexity.MODERATE if points >= weights.moderate else Complexity.SIMPLE


# --------------------------------------------------------------------------------------------------------- language

_UNKNOWN: Final = "und"
_SMALL: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        word: tuple(code for code, text in SMALL_WORDS.items() if word in text.split())
        for words in SMALL_WORDS.values()
        for word in words.split()
    }
)
_LETTERS: Final[Mapping[str, str]] = MappingProxyType(
    {"de": "äöüß", "fr": "çèêœàùû", "es": "ñ¿¡", "pt": "ãõ", "pl": "ąęłńśźż", "cs": "řěůž", "tr": "ğış", "ro": "țșă"}
    | {"vi": "ơưđạảấầậềếễệịọốồộớờợủứừữựỳ", "sv": "åä", "da": "åæø", "fi": "äö", "it": "ìòù"}
)
_SCRIPTS: Final[tuple[tuple[str, re.Pattern[str]], ...]] = tuple(
    (code, re.compile(f"[{spans}]"))
    for code, spans in (
        ("ja", "\u3040-\u30ff"),
        ("ko", "\uac00-\ud7a3"),
        ("zh", "\u4e00-\u9fff"),
        ("ru", "\u0400-\u04ff"),
        ("ar", "\u0600-\u06ff"),
        ("hi", "\u0900-\u097f"),
        ("bn", "\u0980-\u09ff"),
        ("ta", "\u0b80-\u0bff"),
        ("th", "\u0e00-\u0e7f"),
        ("el", "\u0370-\u03ff"),
        ("he", "\u0590-\u05ff"),
        ("ka", "\u10a0-\u10ff"),
        ("hy", "\u0530-\u058f"),
    )
)
"""Scripts that are mostly one language's. Chinese characters in a text with kana are Japanese."""
_UKRAINIAN: Final = re.compile("[іїєґ]")
_PERSIAN: Final = re.compile("[پچژگی]")
_LATIN: Final = re.compile("[a-z\u00e0-\u024f\u1ea0-\u1eff]")
_LANGUAGE_CHARS: Final = 400
_OPENING: Final = 8


def language_of(text: str, words: Sequence[str]) -> str:
    """The language of the instructions, ISO 639-1: by script, and for Latin script by its commonest words."""
    near = text[:_LANGUAGE_CHARS].lower()
    if not near.isascii():
        counts = {code: len(pattern.findall(near)) for code, pattern in _SCRIPTS}
        if counts["ja"]:
            counts["ja"] += counts["zh"]
            counts["zh"] = 0
        code = max(counts, key=counts.__getitem__)  # the first of equals
        if counts[code] * _DENSITY > len(_LATIN.findall(near)):
            return _relative(code, near)
    return _latin(near, words)


def _relative(code: str, near: str) -> str:
    """Which of the languages that share a script."""
    if code == "ru" and _UKRAINIAN.search(near):
        return "uk"
    if code == "ar" and _PERSIAN.search(near):
        return "fa"
    return code


def _latin(near: str, words: Sequence[str]) -> str:
    scores = dict.fromkeys(SMALL_WORDS, 0)
    for place, word in enumerate(dict.fromkeys(words)):
        for code in _SMALL.get(word, ()):
            # The first words give the instruction; what follows may be in the language that it is about.
            scores[code] += 4 if place < _OPENING else 2
    if not near.isascii():
        for code, letters in _LETTERS.items():
            scores[code] += sum(letter in near for letter in letters)
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] else _UNKNOWN
