"""Reading prompts for ``model: "auto"``: how well on the labelled ones, and never badly behaved on any."""

import importlib.util
import sys
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Ability
from mppnode.kernel.requests import Message, Role
from mppnode.routing.classify import (
    SIGNS_MAX,
    Complexity,
    Signs,
    Task,
    classify,
    features,
    language_of,
    parse_weights,
    rate,
    signs,
    words_of,
)

ROOT = Path(__file__).resolve().parents[3]
ORDER = list(Complexity)
COUNTS = st.builds(Signs, *(st.integers(0, most) for most in SIGNS_MAX))


@pytest.fixture(scope="module")
def bench():
    """The benchmark, which knows how to load the labelled prompts and to measure."""
    spec = importlib.util.spec_from_file_location("bench_classify", ROOT / "bench" / "classify.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_classify"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_classify"]


def user(text: str) -> tuple[Message, ...]:
    return (Message(Role.USER, text),)


# -------------------------------------------------------------------------------------------------------------- measured


def test_held_out_prompts_are_read_as_well_as_documented(bench):
    """On prompts that training never sees: 89.8 % of tasks, 82.0 % of complexities, 95.2 % of languages, less three points."""
    _, held = bench.load()
    score = bench.measure(held)
    bench.report(score)  # shown when it fails
    assert (score.task >= 87, score.complexity >= 79, score.language >= 92) == (True, True, True), score[:3]


def test_unseen_prompts_are_read_as_well_as_documented(bench):
    """On prompts written after the weights were settled: 81.7, 81.7 and 91.7 %, less a prompt or two of the sixty."""
    score = bench.measure(bench.load_from(bench.PROMPTS / "unseen"))
    bench.report(score)
    assert (score.task >= 78, score.complexity >= 78, score.language >= 88) == (True, True, True), score[:3]


def test_complex_prompts_are_never_taken_for_simple(bench):
    """The mistake that costs most, a weak model for hard work, does not happen on any labelled prompt."""
    known, held = bench.load()
    score = bench.measure([*known, *held, *bench.load_from(bench.PROMPTS / "unseen")])
    assert score.levels["complex", "simple"] == 0
    assert sum(count for (true, _), count in score.levels.items() if true == "complex") >= 40


def test_confidence_means_something(bench):
    """Above 0.9 at least nineteen in twenty held-out prompts are right, and below 0.6 clearly fewer."""
    _, held = bench.load()
    sure = bench.measure(held).sure
    high = [right for confidence, right in sure if confidence >= 900]
    low = [right for confidence, right in sure if confidence < 600]
    assert min(len(high), len(low)) >= 20
    assert sum(high) * 20 >= len(high) * 19
    assert sum(low) * 10 < len(low) * 8


def test_the_labelled_set_is_what_the_documentation_says(bench):
    """At least 400 prompts, every task in both parts, a dozen languages, and no prompt in two places."""
    known, held = bench.load()
    unseen = bench.load_from(bench.PROMPTS / "unseen")
    assert len(known) + len(held) >= 400
    assert len(held) >= 100
    assert {prompt.task for prompt in known} == {prompt.task for prompt in held} == set(Task)
    assert len({prompt.language for prompt in known}) >= 12
    texts = [prompt.text for prompt in (*known, *held, *unseen)]
    assert len(set(texts)) == len(texts)


def test_the_weights_are_of_these_prompts_and_words(bench):
    """Whoever changes a prompt, a cue word or how features are read runs ``python bench/classify.py --train``."""
    known, _ = bench.load()
    assert orjson.loads(bench.WEIGHTS.read_bytes())["trained_on"] == bench.fingerprint(known)


def test_training_learns_from_labels(bench):
    """The training finds the task of prompts it has not seen far above chance (a ninth part of the set, few rounds)."""
    known, held = bench.load()
    part = known[::3]
    bias, evidence = bench.train_tasks(part, epochs=4, decay=0.001)
    raw = {**orjson.loads(bench.WEIGHTS.read_bytes()), "bias": bias, "evidence": evidence}
    assert bench.measure(held, raw).task > 50


# ------------------------------------------------------------------------------------------------------------------ task


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("Write a Python function to sort a list", Task.CODE_GENERATION),
        ("Explain quantum computing in 3 sentences.", Task.QUESTION_ANSWERING),
        ("Hello!", Task.CONVERSATION),
        ("Analyze this contract and list the risks for the buyer.", Task.ANALYSIS),
    ],
)
def test_the_usual_examples(text, task):
    """The prompts everybody tries first are read as everybody expects."""
    assert classify(user(text)).task is task


def test_the_last_user_message_is_what_is_asked():
    """Earlier turns, answers and tool results do not decide."""
    said = (
        Message(Role.USER, "Write a poem about the sea."),
        Message(Role.ASSISTANT, "The sea, the sea ..."),
        Message(Role.USER, "Translate to German: I am tired."),
        Message(Role.ASSISTANT, ""),
        Message(Role.TOOL, "def f(): return 1"),
    )
    assert classify(said).task is Task.TRANSLATION


def test_a_system_prompt_can_say_what_the_assistant_is_for():
    """A text without an instruction is what the system prompt makes of it; small talk in it says nothing."""
    text = "The delivery could not be completed because nobody was at home."
    bare = classify(user(text))
    told = classify((Message(Role.SYSTEM, "You translate everything into German. Translation only."), *user(text)))
    polite = classify((Message(Role.SYSTEM, "You are a nice one."), *user(text)))
    assert told.task is Task.TRANSLATION
    assert bare.task is not Task.TRANSLATION
    assert (polite.task, polite.confidence) == (bare.task, bare.confidence)


def test_a_named_task_is_believed():
    """``routing.task`` settles the task with certainty, and the rest is still read."""
    read = classify(user("Bonjour, comment ça va ?"), task="math")
    assert (read.task, read.confidence, read.language) == (Task.MATH, 1000, "fr")


def test_an_unknown_task_is_refused_by_name():
    """The refusal names ``routing.task`` and every task there is, and repeats nothing of the caller's."""
    with pytest.raises(NodeFault) as caught:
        classify(user("Hi"), task="juggling")
    assert (caught.value.reason, caught.value.field) == (NodeReason.INVALID_FIELD, "routing.task")
    assert all(task.value in caught.value.message for task in Task)
    assert "juggling" not in caught.value.message


# ------------------------------------------------------------------------------------------------------------ complexity


@given(COUNTS, st.sampled_from(Task), st.integers(0, len(SIGNS_MAX) - 1))
def test_more_of_any_sign_is_never_less_complex(counted, task, place):
    """Complexity is monotone in every sign, for every task."""
    more = counted._replace(**{Signs._fields[place]: counted[place] + 1})
    assert ORDER.index(rate(more, task)) >= ORDER.index(rate(counted, task))


@given(st.lists(st.sampled_from(["- it must be fast", "- then compare both", "- list the limits, briefly."]), max_size=8))
def test_each_further_requirement_is_never_less_complex(lines):
    """Adding a line to a list of requirements never makes the same task simpler."""
    levels = []
    for count in range(len(lines) + 1):
        text = "\n".join(["Design a small service:", *lines[:count]])
        levels.append(ORDER.index(classify(user(text), task="code_generation").complexity))
    assert levels == sorted(levels)


def test_tools_and_a_schema_count_as_work():
    """The same prompt with tools and an answer schema has more signs of work."""
    text = "Plan my trip."
    needs = Ability.TOOLS | Ability.JSON_SCHEMA
    assert signs(text, words_of(text), needs).demands == 2
    assert signs(text, words_of(text), Ability.VISION).demands == 0


@pytest.mark.parametrize("text", ["What is 2 + 2?", "Hi", "Capital of Peru?", "Translate to French: yes"])
def test_the_simplest_are_simple(text):
    """A short question without conditions is simple."""
    assert classify(user(text)).complexity is Complexity.SIMPLE


# -------------------------------------------------------------------------------------------------------------- language


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Wie spät ist es in Tokio?", "de"),
        ("¿Dónde está la biblioteca?", "es"),
        ("東京の天気はどうですか", "ja"),
        ("北京的天气怎么样", "zh"),
        ("오늘 날씨 어때요", "ko"),
        ("Привет, как дела", "ru"),
        ("Як тебе звати і де ти живеш", "uk"),  # noqa: RUF001
        ("שלום לך", "he"),
        ("สวัสดีครับ", "th"),
        ("12345 !!", "und"),
        ("", "und"),
    ],
)
def test_languages(text, language):
    """Scripts tell the language at once, and small words where they are shared; without either it is ``und``."""
    assert language_of(text, words_of(text)) == language


def test_the_instruction_decides_the_language_not_the_text_it_is_about():
    """A German letter with an English instruction is an English prompt."""
    text = "Please translate this email to English:\nSehr geehrte Damen und Herren, hiermit kündige ich."
    assert classify(user(text)).language == "en"


# -------------------------------------------------------------------------------------------------------------- behaviour


@settings(max_examples=200)
@given(st.text(max_size=1500), st.sampled_from(Role))
def test_any_text_is_read_and_read_alike(text, role):
    """No text raises; the same text gives the same reading, with every field in its range."""
    read = classify((Message(role, text),))
    assert read == classify((Message(role, text),))
    assert 0 < read.confidence <= 1000
    assert read.prompt_tokens == -(-len(text.encode()) // 4)
    assert read.language == "und" or (len(read.language) == 2 and read.language.isascii())


@pytest.mark.parametrize("filler", ["a", "漢", "x ", "\n", "- ", "1. ", "?", "(", "a.b(", "1 + ", "́", "👍"])
def test_long_prompts_are_read_at_their_ends(filler):
    """A megabyte of anything leaves no more features and words than its two ends have, and the ends still count."""
    text = "Translate into German, please: " + filler * (1_000_000 // len(filler)) + "\nTranslation:"
    words = words_of(text)
    assert len(words) <= 240
    assert len(features(text, words)) < 1200
    assert all(count <= most for count, most in zip(signs(text, words), SIGNS_MAX, strict=True))
    assert classify(user(text)).task is Task.TRANSLATION


def test_features_come_in_one_order():
    """Features are sorted and unique, so that training does not depend on the order of a set."""
    text = "Write a poem, write a song, write a function f(x) = 3 * x."
    found = features(text, words_of(text))
    assert found == sorted(set(found))


def test_bytes_beyond_the_messages_count():
    """The estimate of tokens is of what the model will read, where the caller knows that better."""
    assert classify(user("Hi"), prompt_bytes=4001).prompt_tokens == 1001
    assert classify(()).prompt_tokens == 0


def test_weights_that_do_not_fit_are_refused(bench):
    """A file of weights with a short row, other tasks, or a sign that counts backwards is a programming error."""
    raw = orjson.loads(bench.WEIGHTS.read_bytes())
    effort = raw["complexity"]
    backwards = {**effort, "signs": {**effort["signs"], "steps": -1}}
    for wrong in ({"tasks": raw["tasks"][::-1]}, {"bias": raw["bias"][:-1]}, {"complexity": backwards}):
        with pytest.raises(AssertionError):
            parse_weights({**raw, **wrong})
