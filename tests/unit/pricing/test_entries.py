"""The catalog file: strict to read, stable to write, replaced as a whole."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from channels.instants import UnixSeconds
from mppnode.config.rates import parse_rate
from mppnode.kernel.listing import Ability, ProviderKind
from mppnode.pricing.entries import (
    HISTORY_MAX,
    CatalogError,
    Dated,
    Entry,
    Held,
    format_entries,
    parse_entries,
    read_entries,
    write_entries,
)
from tests.unit.pricing.lists import NOW, entry, rates

FULL = Entry(
    "infra",
    "qwen/x",
    "accounts/9/x",
    rates(100_000, 10_000, 400_000, 125_000, 500_000, 10**9, 1, 10**8),
    8192,
    1024,
    "https://infra.example/models",
    NOW,
    ProviderKind.EXTERNAL,
    Ability.VISION | Ability.TOOLS,
    71,
    vouched=True,
    rounded=("input", "image"),
    held=Held(NOW, "output rose more than 10 times", rates(1, 1, 0)),
    history=(Dated(UnixSeconds(NOW - 9), "https://infra.example/old", rates(1, 1, 1)),),
)


def row(**changes: Any) -> dict[str, Any]:
    made = json.loads(format_entries([FULL]))["listings"][0]
    return {key: value for key, value in (made | changes).items() if value != "ABSENT"}


def document(**changes: Any) -> bytes:
    return json.dumps({"version": 1, "listings": [row(**changes)]}).encode()


def test_everything_in_an_entry_survives_the_file() -> None:
    """Writing and reading gives the same entries, the sparse and the full one."""
    assert parse_entries(format_entries([FULL, entry("a")])) == (replace(entry("a")), FULL)


def test_the_file_is_the_same_for_the_same_entries() -> None:
    """Order of arrival does not show, so version control shows price changes only."""
    assert format_entries([entry("b"), entry("a")]) == format_entries([entry("a"), entry("b")])


def test_prices_left_out_cost_what_they_are_part_of() -> None:
    """Two prices are enough; cached and written cost as input, reasoning as output (never nothing)."""
    cost = {"input_usd_per_million": "0.30", "output_usd_per_million": "0.90"}
    (read,) = parse_entries(document(cost=cost))
    assert read.cost == rates(300_000, 300_000, 900_000, 300_000, 900_000, 0, 0, 0)


COST = row()["cost"]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"provider": "Infra"}, "listings[0].provider"),
        ({"provider": 1}, "listings[0].provider"),
        ({"model": "has space"}, "listings[0].model"),
        ({"model": "ABSENT"}, "listings[0].model"),
        ({"upstream_model": ""}, "listings[0].upstream_model"),
        ({"kind": "cloud"}, "listings[0].kind"),
        ({"kind": ["native"]}, "listings[0].kind"),
        ({"context": 0}, "listings[0].context"),
        ({"context": -1}, "listings[0].context"),
        ({"context": 1.5}, "listings[0].context"),
        ({"context": "8192"}, "listings[0].context"),
        ({"context": True}, "listings[0].context"),
        ({"context": 10**30}, "listings[0].context"),
        ({"max_output": None}, "listings[0].max_output"),
        ({"abilities": ["telepathy"]}, "listings[0].abilities"),
        ({"abilities": [["tools"]]}, "listings[0].abilities"),
        ({"quality": 101}, "listings[0].quality"),
        ({"source": "ftp://x"}, "listings[0].source"),
        ({"source": "https://x\nsecond line"}, "listings[0].source"),
        ({"time": 1_900_000_000}, "listings[0].time"),
        ({"time": "2030-13-01T00:00:00Z"}, "listings[0].time"),
        ({"time": "2030-01-01"}, "listings[0].time"),
        ({"vouched": 1}, "listings[0].vouched"),
        ({"rounded": ["input", "input"]}, "listings[0].rounded"),
        ({"rounded": ["tokens"]}, "listings[0].rounded"),
        ({"held": {"time": "2030-01-01T00:00:00Z"}}, "listings[0].held.reason"),
        ({"held": 1}, "listings[0].held"),
        ({"history": [{"time": "2030-01-01T00:00:00Z", "source": "https://x", "cost": {}}]}, "listings[0].history[0].cost.input_usd_per_million"),
        ({"history": row()["history"] * (HISTORY_MAX + 1)}, "listings[0].history"),
        ({"history": {}}, "listings[0].history"),
        ({"history": [1]}, "listings[0].history[0]"),
        ({"colour": "red"}, "listings[0].colour"),
        ({"cost": "ABSENT"}, "listings[0].cost"),
        ({"cost": []}, "listings[0].cost"),
        ({"cost": COST | {"output_usd_per_million": "-0.40"}}, "listings[0].cost.output_usd_per_million"),
        ({"cost": COST | {"output_usd_per_million": "NaN"}}, "listings[0].cost.output_usd_per_million"),
        ({"cost": COST | {"output_usd_per_million": "1e3"}}, "listings[0].cost.output_usd_per_million"),
        ({"cost": COST | {"output_usd_per_million": "0.1234567"}}, "listings[0].cost.output_usd_per_million"),
        ({"cost": COST | {"output_usd_per_million": 0.4}}, "listings[0].cost.output_usd_per_million"),
        ({"cost": COST | {"output_usd_per_million": "1000001"}}, "listings[0].cost.output_usd_per_million"),
        ({"cost": COST | {"output_usd_per_million": "0,40"}}, "listings[0].cost.output_usd_per_million"),
        ({"cost": COST | {"output_usd_per_million": "٤"}}, "listings[0].cost.output_usd_per_million"),
        ({"cost": COST | {"request_usd": "1000.01"}}, "listings[0].cost.request_usd"),
        ({"cost": COST | {"audio_usd": "1"}}, "listings[0].cost.audio_usd"),
        ({"cost": {"input_usd_per_million": "0", "output_usd_per_million": "0.00"}}, "listings[0].cost"),
    ],
)
def test_each_bad_field_is_named_with_its_entry(changes: dict[str, Any], where: str) -> None:
    """One wrong field refuses the file and says which entry and which key."""
    good = json.dumps({"version": 1, "listings": [row(model="fine/one")]}).encode()
    assert len(parse_entries(good)) == 1
    with pytest.raises(CatalogError) as caught:
        parse_entries(document(**changes))
    assert str(caught.value).startswith(f"{where}:")


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"", "file"),
        (b"<html>", "file"),
        (b"[]", "file"),
        (b"\xff\xfe", "file"),
        (b'{"version": 1, "listings": NaN}', "file"),
        (b'{"version": 1, "version": 1, "listings": []}', "file"),
        (b"[" * 100_000, "file"),
        (b'{"version": 2, "listings": []}', "version"),
        (b'{"version": "1", "listings": []}', "version"),
        (b'{"version": 1}', "listings"),
        (b'{"version": 1, "listings": {}}', "listings"),
        (b'{"version": 1, "listings": [1]}', "listings[0]"),
        (b'{"version": 1, "listings": [], "extra": 1}', "extra"),
    ],
)
def test_what_is_no_catalog_is_refused(data: bytes, where: str) -> None:
    """A file of another shape gives one error and no entries."""
    with pytest.raises(CatalogError) as caught:
        parse_entries(data)
    assert str(caught.value).startswith(f"{where}:")


def test_a_model_twice_at_one_provider_is_refused() -> None:
    """Which of two prices holds would be a guess."""
    twice = json.dumps({"version": 1, "listings": [row(), row()]}).encode()
    with pytest.raises(CatalogError, match=r"listings\[1\]\.model: is listed twice"):
        parse_entries(twice)


def test_a_file_that_is_not_there_has_no_entries(tmp_path: Path) -> None:
    """Before the first synchronisation there is nothing to read, unless the caller needs it."""
    assert read_entries(tmp_path / "prices.json") == ()
    with pytest.raises(CatalogError, match="cannot be read"):
        read_entries(tmp_path / "prices.json", required=True)
    with pytest.raises(CatalogError, match="cannot be read"):
        read_entries(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong while writing, the old prices are still there and no half file is."""
    path = tmp_path / "prices.json"
    write_entries(path, [entry()])
    before = path.read_bytes()

    def broken(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mppnode.pricing.entries.os.fsync", broken)
    with pytest.raises(OSError, match="No space"):
        write_entries(path, [entry(), entry("b")])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    """An entry the parser refuses never reaches the file."""
    path = tmp_path / "prices.json"
    with pytest.raises(CatalogError, match="free model"):
        write_entries(path, [entry(cost=rates(0, 0, 0))])
    assert not path.exists()


def test_the_example_is_the_published_table() -> None:
    """Models and prices digit for digit as the table has them (of an inference API, "Available Models")."""
    table = {
        "meta-llama/Meta-Llama-3.1-70B-Instruct": ("0.59", "0.79"),
        "meta-llama/Meta-Llama-3.1-8B-Instruct": ("0.055", "0.055"),
        "meta-llama/Meta-Llama-3.3-70B-Instruct": ("0.59", "0.79"),
        "mistralai/Mistral-7B-Instruct-v0.3": ("0.055", "0.055"),
        "Qwen/Qwen2.5-72B-Instruct": ("0.35", "0.40"),
        "deepinfra/airoboros-70b": ("0.70", "0.70"),
    }
    entries = parse_entries(files("mppnode.pricing").joinpath("example_catalog.json").read_bytes())
    assert {entry.model: (entry.cost.input, entry.cost.output) for entry in entries} == {
        model: tuple(parse_rate(price) for price in prices) for model, prices in table.items()
    }
