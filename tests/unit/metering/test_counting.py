"""D8: what is counted while a stream runs is too low or exact, whoever counts, and never runs away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from channels.units import Pico
from mppnode.kernel.rates import Rates, price
from mppnode.kernel.usage import Usage
from mppnode.metering.calibration import Calibration
from mppnode.metering.tally import Tally, TokenSource, prompt_tokens_charged, prompt_tokens_held, size
from mppnode.metering.tokenizer import TokenizerError, TokenizerFile
from mppnode.providers.base import Chunk
from mppnode.providers.presets import PRESETS, adapter_for

RATES = Rates(Pico(2), Pico(1), Pico(10))
STREAMS = sorted(Path(__file__).resolve().parents[2].joinpath("fixtures/streams").glob("*.sse"))


def tally(**more: Any) -> Tally:
    return Tally(RATES, **({"prompt_bytes": 60, "completion_max": 1_000} | more))


def run(made: Tally, *chunks: Chunk) -> list[int]:
    """The running count after each chunk."""
    counts = []
    for chunk in chunks:
        if chunk.tokens:
            made.take(chunk, made.after(chunk))
        if chunk.usage is not None:
            made.report = chunk.usage
        counts.append(made.tokens)
    return counts


def said(text: str, tokens: int = 1, **more: Any) -> Chunk:
    return Chunk(b"data: {}\n\n", tokens, text=text, **more)


# ------------------------------------------------------------------------------------------------ while it streams


def test_without_experience_an_event_is_a_token() -> None:
    """At least one token made it, and nobody knows how many more."""
    assert run(tally(), said("a long piece of text"), said("x"), said("")) == [1, 2, 3]


def test_with_experience_bytes_are_counted_too() -> None:
    """A provider that sends many tokens in an event is counted by what it sends, where that is more."""
    assert run(tally(ratio=4_000), said("x" * 40), said("y"), said("z" * 39)) == [10, 11, 20]


def test_running_reports_are_counted_as_they_come() -> None:
    """vLLM says after each event how many tokens there were; a report that jumps is followed only so far."""
    made = tally(running=True)
    counts = run(made, said("a", usage=Usage(9, 0, 3)), said("b", usage=Usage(9, 0, 5)), said("c"))
    assert counts == [3, 5, 6]
    assert run(tally(running=True, completion_max=10**6), said("a", usage=Usage(9, 0, 900_000)))[0] <= 128


@given(st.lists(st.tuples(st.text(max_size=20), st.integers(1, 3)), max_size=30), st.one_of(st.none(), st.integers(1_000, 9_000)))
def test_a_count_never_falls_and_never_exceeds_events_and_bytes(pieces: list[tuple[str, int]], ratio: int | None) -> None:
    """Whatever arrives: monotone, at least the events, at most the larger of events and bytes."""
    made = tally(ratio=ratio, completion_max=10**6)
    counts = run(made, *(said(text, tokens) for text, tokens in pieces))
    assert counts == sorted(counts)
    events, length = sum(tokens for _, tokens in pieces), sum(size(text) for text, _ in pieces)
    assert events <= made.tokens <= events + length


# ---------------------------------------------------------------------------------------------- what is learned


def test_what_is_learned_is_the_most_bytes_a_token_has_had() -> None:
    """P-37: a count made with it is too low for nearly every answer; few and short answers teach nothing."""
    known = Calibration()
    known.learn("p", "m", text_bytes=400, tokens=20)
    assert known.ratio("p", "m") is None
    for text_bytes in (400, 500, 450, 420):
        known.learn("p", "m", text_bytes=text_bytes, tokens=100)
    assert 4_900 < (known.ratio("p", "m") or 0) <= 5_000
    assert known.ratio("p", "other") is None


def test_a_new_tokenizer_is_learned_and_nonsense_is_not() -> None:
    """It comes down within some hundred reports, and a report that cannot be true moves nothing."""
    known = Calibration()
    for _ in range(8):
        known.learn("p", "m", text_bytes=600, tokens=100)
    known.learn("p", "m", text_bytes=10**6, tokens=100)
    known.learn("p", "m", text_bytes=10, tokens=100)
    assert known.ratio("p", "m") == 6_000
    for _ in range(400):
        known.learn("p", "m", text_bytes=400, tokens=100)
    assert 4_000 <= (known.ratio("p", "m") or 0) < 4_200


@example([(32, 1_000), (32, 1_000), (32, 1_000), (1_001, 1_001)])
@given(st.lists(st.tuples(st.integers(32, 3_000), st.integers(1_000, 9_000)), min_size=4, max_size=40))
def test_an_estimate_never_exceeds_what_was_reported_last(reports: list[tuple[int, int]]) -> None:
    """For the answer just learned from, the estimate is at most its report: calibration favours the payer."""
    known = Calibration()
    for tokens, ratio in reports:
        text_bytes = tokens * ratio // 1_000
        known.learn("p", "m", text_bytes=text_bytes, tokens=tokens)
        learned = known.ratio("p", "m")
        if learned is not None:
            assert text_bytes * 1_000 // learned <= tokens


# ------------------------------------------------------------------------------------------------- at the end


def test_no_report_is_charged_by_the_count_and_marked() -> None:
    """P-37: the estimate is the bill, and its source says so."""
    made = tally()
    run(made, said("a"), said("b"))
    assert (made.source, made.usage().completion) == (TokenSource.ESTIMATED, 2)
    made.counted = 5
    assert (made.source, made.usage().completion) == (TokenSource.TOKENIZER, 5)


@pytest.mark.parametrize(
    ("reported", "source"),
    [(0, "reported"), (100, "reported"), (110, "reported"), (111, "tokenizer"), (300, "tokenizer")],
)
def test_u3_a_claim_beyond_the_tokenizer_is_not_believed(reported: int, source: str) -> None:
    """U3: two per cent and eight tokens are room enough; beyond it the tokenizer's count is the bill."""
    made = tally()
    run(made, *(said("x") for _ in range(100)))
    made.counted, made.report = 100, Usage(10, 0, reported)
    assert made.source.value == source
    assert made.usage().completion == (reported if source == "reported" else 100)


def test_u3_hidden_reasoning_is_no_lie() -> None:
    """Reasoning that is not shown cannot be counted: it is believed up to what was asked for."""
    made = tally(completion_max=500)
    run(made, *(said("x") for _ in range(100)))
    made.counted, made.report = 100, Usage(10, 0, 400, 300)
    assert made.source is TokenSource.REPORTED
    made.report = Usage(10, 0, 600, 500)
    assert made.source is TokenSource.TOKENIZER


def test_p51_pictures_and_sounds_are_reserved_and_believed() -> None:
    """P-51: a report of thousands of prompt tokens for a picture is believed, for a sentence it is not."""
    report = Usage(prompt=5_500, completion=1)
    assert not tally(prompt_bytes=60).believes(report)
    shown = tally(prompt_bytes=60, images=1)
    shown.tokens = 1
    assert shown.believes(report)
    assert shown.usage().images == 1
    assert prompt_tokens_held(60, images=2, audio_bytes=19_200) == prompt_tokens_held(60) + 2 * 2_048 + 100


def test_rates_of_their_own_for_reasoning_cache_images_and_requests() -> None:
    """P-38, P-39: every part once, at its own rate; what a list leaves out costs what it is part of."""
    full = Rates(Pico(4), Pico(1), Pico(10), Pico(5), Pico(7), Pico(1_000), Pico(50), Pico(3))
    usage = Usage(prompt=100, cached_prompt=40, completion=30, reasoning=10, cache_write=20, images=2, audio_seconds=6)
    assert price(usage, full) == 40 * 4 + 40 * 1 + 20 * 5 + 20 * 10 + 10 * 7 + 1_000 + 2 * 50 + 6 * 3
    assert Rates(Pico(4), Pico(1), Pico(10)) == Rates(Pico(4), Pico(1), Pico(10), Pico(4), Pico(10))


@pytest.mark.parametrize(("text", "charged"), [("", 0), ("x", 1), ("x" * 60, 10), ("é" * 30, 10)])
def test_an_answer_in_one_piece_is_counted_low(text: str, charged: int) -> None:
    """Six bytes to a token until reports have taught better; nothing for nothing."""
    made = tally()
    made.count_whole(text)
    assert made.usage().completion == charged
    taught = tally(ratio=3_000)
    taught.count_whole("x" * 60)
    assert taught.usage().completion == 20


def test_p58_recorded_streams_are_billed_by_their_reports() -> None:
    """Every recorded stream with a report and an end: our running count is at most it, and the bill is exactly it."""
    billed = 0
    for path in STREAMS:
        about = json.loads(path.with_suffix(".json").read_text())
        expected = about["expected"]
        if not expected["done"] or expected["error"] or not expected["usage"] or not expected["usage"]["completion"]:
            continue
        preset = PRESETS[about["preset"]]
        adapter = adapter_for(preset.api, preset.quirks)
        decoder, made = adapter.decoder(), tally(prompt_bytes=20_000, completion_max=10**5, running=adapter.running_usage)
        run(made, *decoder.feed(path.read_bytes()), *decoder.end())
        assert made.source is TokenSource.REPORTED, path.name
        usage = made.usage()
        assert (usage.prompt, usage.completion) == (expected["usage"]["prompt"], expected["usage"]["completion"])
        assert made.total() == price(usage, RATES)
        billed += 1
    assert billed >= 15


# -------------------------------------------------------------------------------------------- a model's own tokenizer


def test_a_tokenizer_file_counts_as_its_model_does(tmp_path: Path) -> None:
    """The file its makers publish; without the tokens a chat template adds."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "a", "channel", "opens", "once"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    counter = TokenizerFile(tmp_path / "tokenizer.json")
    assert [counter.count(text) for text in ("", "a channel opens once", "a b c")] == [0, 4, 3]


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    """At the start, not at the first answer."""
    (tmp_path / "t.json").write_text("{}")
    for name in ("t.json", "absent.json"):
        with pytest.raises(TokenizerError, match=name):
            TokenizerFile(tmp_path / name)


def test_prompts_are_charged_low_and_held_high() -> None:
    """Between the two lies what tokenizers count of prose and code."""
    for length in range(0, 2_000, 7):
        assert prompt_tokens_charged(length) <= length // 4 <= prompt_tokens_held(length)
