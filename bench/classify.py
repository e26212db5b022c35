"""How well and how fast ``model: "auto"`` reads a prompt, and the training of its weights.

    python bench/classify.py [--train] [--folds 5] [--rounds 40]

Measured on the labelled prompts in tests/fixtures/prompts: accuracy on the held-out ones (those whose CRC-32 is
divisible by four), which training never sees, on those in "unseen", which were written when the words and weights were
settled and are no measure any more once somebody has tuned by them, and microseconds per prompt, alone and with the
choice among 200 models. ``--train`` rewrites mppnode/routing/weights.json from the others; ``--folds`` cross-validates
on them, which is the figure to tune by. Pure Python and no chance: the same prompts give the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mppnode.kernel.listing import Ability
from mppnode.kernel.requests import Message, Role
from mppnode.kernel.wishes import Optimize
from mppnode.routing import classify as reader
from mppnode.routing.auto import Candidate, choose
from mppnode.routing.classify import SIGNS_MAX, Complexity, Signs, Task, classify, words_of

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "tests" / "fixtures" / "prompts"
WEIGHTS = ROOT / "mppnode" / "routing" / "weights.json"
TASKS = list(Task)
LEVELS = list(Complexity)
BITS = 64  # weights are 64ths of a bit
SEEN_MIN = 2  # a word of a single prompt teaches that prompt and nothing else
MODELS = 200


class Prompt(NamedTuple):
    """One labelled prompt."""

    text: str
    task: Task
    complexity: Complexity
    language: str


def load_from(folder: Path) -> list[Prompt]:
    """Every labelled prompt of a folder."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jsonl"))]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    return [Prompt(row["text"], Task(row["task"]), Complexity(row["complexity"]), row["language"]) for row in rows]


def load() -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and those held out, by a rule that no new prompt changes for the old ones."""
    prompts = load_from(PROMPTS)
    held = [prompt for prompt in prompts if zlib.crc32(prompt.text.encode()) % 4 == 0]
    return [prompt for prompt in prompts if zlib.crc32(prompt.text.encode()) % 4], held


# ---------------------------------------------------------------------------------------------------------- training


def train_tasks(prompts: Sequence[Prompt], *, epochs: int, decay: float, rate: float = 0.25) -> tuple[list[int], dict]:
    """Multinomial logistic regression by gradient descent, quadratically damped; weights in 64ths of a bit."""
    found = [reader.features(prompt.text, words_of(prompt.text)) for prompt in prompts]
    seen = Counter(name for names in found for name in names)
    rows = [[name for name in names if seen[name] >= SEEN_MIN or name[0] in "#^"] for names in found]
    weights = {name: [0.0] * len(TASKS) for names in rows for name in names}
    bias = [0.0] * len(TASKS)
    for epoch in range(epochs):
        step = rate / (1 + 4 * epoch / epochs)
        for prompt, names in zip(prompts, rows, strict=True):
            vectors = [weights[name] for name in names]
            totals = [sum(column) for column in zip(bias, *vectors, strict=True)]
            top = max(totals)
            shares = [math.exp(total - top) for total in totals]
            whole = sum(shares)
            right = TASKS.index(prompt.task)
            # A long prompt has more features; without the division it would move the weights more.
            scale = step / math.sqrt(len(names))
            for place, share in enumerate(shares):
                move = scale * ((place == right) - share / whole)
                bias[place] += move * 0.1
                for vector in vectors:
                    vector[place] += move - step * decay * vector[place]
    to_bits = BITS / math.log(2)
    evidence = {name: [round(value * to_bits) for value in vector] for name, vector in sorted(weights.items())}
    return [round(value * to_bits) for value in bias], {name: row for name, row in evidence.items() if any(row)}


def train_effort(prompts: Sequence[Prompt], *, epochs: int = 400, rate: float = 0.02) -> dict:
    """Ordinal logistic regression with two thresholds; weights of signs are kept from going below zero."""
    rows = [(reader.signs(p.text, words_of(p.text)), p.task.value, LEVELS.index(p.complexity)) for p in prompts]
    counts = Counter(level for _, _, level in rows)
    weights, tasks, cuts = [0.1] * len(Signs._fields), dict.fromkeys((task.value for task in TASKS), 0.0), [1.0, 4.0]
    for epoch in range(epochs):
        step = rate / (1 + 3 * epoch / epochs)
        for counted, task, level in rows:
            points = tasks[task] + sum(a * b for a, b in zip(counted, weights, strict=True))
            # The few complex prompts weigh more, or the best guess would be that none is.
            weight = min(3.0, len(rows) / len(LEVELS) / counts[level])
            for index, cut in enumerate(cuts):
                miss = weight * ((level > index) - 1 / (1 + math.exp(min(60.0, cut - points))))
                cuts[index] -= step * miss
                tasks[task] += step * (miss - 0.01 * tasks[task])
                for place, count in enumerate(counted):
                    scaled = count / SIGNS_MAX[place]
                    weights[place] = max(0.0, weights[place] + step * (miss * scaled - 0.002 * weights[place]))
    return {
        "signs": {name: round(value * 100) for name, value in zip(Signs._fields, weights, strict=True)},
        "tasks": {name: round(value * 100) for name, value in tasks.items()},
        "moderate": round(cuts[0] * 100),
        "complex": round(cuts[1] * 100),
    }


def train(prompts: Sequence[Prompt], *, epochs: int = 60, decay: float = 0.0015) -> dict:
    """Everything that goes into the file of weights."""
    bias, evidence = train_tasks(prompts, epochs=epochs, decay=decay)
    effort = train_effort(prompts)
    effort["signs"] |= {"demands": 60}  # no labelled prompt has tools or a schema: set by hand
    tasks = [task.value for task in TASKS]
    return {
        "trained_on": fingerprint(prompts),
        "tasks": tasks,
        "bias": bias,
        "complexity": effort,
        "evidence": evidence,
    }


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """What the training saw of the prompts. It changes with their texts and labels and with how they are read."""
    digest = hashlib.sha256()
    for prompt in prompts:
        words = words_of(prompt.text)
        seen = [*reader.features(prompt.text, words), *map(str, reader.signs(prompt.text, words))]
        digest.update("\t".join([*seen, prompt.task, prompt.complexity]).encode() + b"\n")
    return digest.hexdigest()[:16]


def written(raw: dict) -> str:
    """One line for each word, so that a change of the weights can be read."""
    rows = ",\n".join(f"  {json.dumps(name, ensure_ascii=False)}: {row}" for name, row in raw["evidence"].items())
    rest = {name: value for name, value in raw.items() if name != "evidence"}
    return json.dumps(rest, indent=1)[:-2] + ',\n "evidence": {\n' + rows + "\n }\n}\n"


# --------------------------------------------------------------------------------------------------------- measuring


class Score(NamedTuple):
    """Correct answers in per cent, and who was taken for whom."""

    task: float
    complexity: float
    language: float
    confusion: Counter[tuple[str, str]]
    levels: Counter[tuple[str, str]]
    sure: list[tuple[int, bool]]
    wrong: list[tuple[Prompt, str]]


def measure(prompts: Sequence[Prompt], raw: dict | None = None) -> Score:
    """Read every prompt, with other weights if given, and compare."""
    weights = reader._WEIGHTS if raw is None else reader.parse_weights(raw)  # noqa: SLF001
    confusion, levels = Counter(), Counter()
    sure, wrong, languages = [], [], 0
    for prompt in prompts:
        words = words_of(prompt.text)
        task, confidence = reader._most_likely(reader.features(prompt.text, words), weights)  # noqa: SLF001
        level = reader.rate(reader.signs(prompt.text, words), task, weights)
        language = reader.language_of(prompt.text, words)
        languages += language == prompt.language
        confusion[prompt.task.value, task.value] += 1
        levels[prompt.complexity.value, level.value] += 1
        sure.append((confidence, task is prompt.task))
        if task is not prompt.task or language != prompt.language or level is not prompt.complexity:
            wrong.append((prompt, f"{task.value} {confidence} {level.value} {language}"))
    right = [sum(n for (a, b), n in table.items() if a == b) for table in (confusion, levels)]
    shares = [100 * count / len(prompts) for count in (*right, languages)]
    return Score(*shares, confusion, levels, sure, wrong)


def folded(prompts: Sequence[Prompt], folds: int) -> tuple[float, float]:
    """Mean accuracy, in per cent, of task and complexity over prompts that the weights have not seen."""
    tasks = levels = 0.0
    for fold in range(folds):
        rest = [p for p in prompts if zlib.crc32(p.text.encode()) // 4 % folds != fold]
        score = measure(part := [p for p in prompts if zlib.crc32(p.text.encode()) // 4 % folds == fold], train(rest))
        tasks += score.task * len(part) / len(prompts)
        levels += score.complexity * len(part) / len(prompts)
    return tasks, levels


def timed(call: Callable[[int], object], times: int) -> tuple[float, float]:
    """Median and 99th percentile, in microseconds."""
    took = []
    for turn in range(times):
        begun = time.perf_counter_ns()
        call(turn)
        took.append(time.perf_counter_ns() - begun)
    took.sort()
    return took[times // 2] / 1000, took[times * 99 // 100] / 1000


def candidates() -> list[Candidate]:
    """Models of many qualities and prices; a third unmeasured, a fifth of unknown quality."""
    every = Ability(127)
    return [
        Candidate(
            model=f"maker/model-{at}",
            quality=0 if at % 5 == 0 else 20 + at * 37 % 80,
            cost=1_000_000 + at * 7_919_113 % 90_000_000,
            abilities=every if at % 2 else every & ~Ability.REASONING,
            context=8_192 << at % 5,
            first_s=None if at % 3 == 0 else 0.1 + at % 17 / 10,
            tokens_per_s=None if at % 3 == 0 else 20.0 + at % 90,
        )
        for at in range(MODELS)
    ]


def report(score: Score) -> None:
    """Print the confusion, a row for each true task."""
    print(f"{'true, read as':>20} " + " ".join(task.value[:6].rjust(6) for task in TASKS))
    for true in TASKS:
        row = " ".join(str(score.confusion[true.value, read.value] or ".").rjust(6) for read in TASKS)
        print(f"{true.value:>20} {row}")
    for true in LEVELS:
        print(f"{true.value:>20} " + " ".join(str(score.levels[true.value, read.value]).rjust(6) for read in LEVELS))
    for low, high in ((0, 400), (400, 600), (600, 800), (800, 900), (900, 1001)):
        band = [right for confidence, right in score.sure if low <= confidence < high]
        if band:
            print(f"  confidence {low / 1000} to {min(high, 1000) / 1000}: {sum(band)} of {len(band)} right")


def speed(prompts: Sequence[Prompt], rounds: int) -> None:
    """Print the microseconds."""
    asked = [(Message(Role.USER, prompt.text),) for prompt in prompts]
    rain = "Rain fell, 14 mm, on the old town: (see) x = 3; " * 200
    long = (Message(Role.USER, f"Summarize what follows. {rain}"[:8192]),)
    pool = candidates()
    ready = classify(asked[0])

    def both(turn: int) -> object:
        reading = classify(asked[turn % len(asked)])
        return choose(reading, pool, Optimize.BALANCED, max_tokens=1000)

    for name, call, times in (
        ("classify, labelled prompts", lambda turn: classify(asked[turn % len(asked)]), rounds * len(asked)),
        ("classify, 8 KB", lambda _: classify(long), rounds * 50),
        (f"choose among {MODELS}", lambda _: choose(ready, pool, Optimize.BALANCED, max_tokens=1000), rounds * 50),
        ("both", both, rounds * 50),
    ):
        timed(call, times // 4 + 1)
        median, p99 = timed(call, times)
        print(f"{name:<28} us: p50 {median:7.1f}   p99 {p99:7.1f}")


def main() -> None:
    """Train if asked to, then print what the weights in force are worth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--wrong", action="store_true", help="list the misread training prompts")
    given = parser.parse_args()
    known, held = load()
    if given.folds:
        tasks, levels = folded(known, given.folds)
        print(f"cross-validated on the training part: task {tasks:.1f} %, complexity {levels:.1f} %")
    raw = train(known) if given.train else json.loads(WEIGHTS.read_text())
    if given.train:
        WEIGHTS.write_text(written(raw))
    unseen = load_from(PROMPTS / "unseen")
    for name, prompts in (("training part", known), ("unseen", unseen), ("held out", held)):
        score = measure(prompts, raw)
        print(f"{name}: {len(prompts)} prompts, task {score.task:.1f} %, complexity {score.complexity:.1f} %,", end=" ")
        print(f"language {score.language:.1f} %")
        if given.wrong and prompts is known:
            for prompt, read in score.wrong:
                true = f"{prompt.task.value} {prompt.complexity.value} {prompt.language}"
                print(f"  {true} <- {read}: {prompt.text[:90]!r}")
    report(score)
    speed(held, given.rounds)


if __name__ == "__main__":
    main()
