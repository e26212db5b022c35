"""The catalog in force: what is sold, at which price, and how it is swapped."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from channels.instants import UnixSeconds
from channels.units import Pico
from mppnode.config.schema import ModelConfig
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Ability, Listing, ProviderKind
from mppnode.pricing.catalog import Catalog, Shelf, build_catalog, sell_rates
from mppnode.pricing.entries import CatalogError, write_entries
from tests.unit.pricing.lists import NOW, config, entry, rates

OWN = ModelConfig("own/model", "infra", "own-up", Pico(7), Pico(6), Pico(9), 100, 50, image=Pico(3), quality=9)


def only(catalog: Catalog, model: str = "qwen/x") -> Listing:
    (listing,) = catalog.listings(model)
    return listing


@pytest.mark.parametrize(
    ("cost", "bps", "sold"),
    [
        (100_000, 0, 100_000),
        (100_000, 1, 100_010),
        (100_000, 2_000, 120_000),
        (1, 1, 2),
        (3, 5_000, 5),
        (0, 100_000, 0),
        (7, 100_000, 77),
        (55_000, 250, 56_375),
    ],
)
def test_the_markup_is_rounded_up_on_every_axis(cost: int, bps: int, sold: int) -> None:
    """R2: the price is the cost times one plus the markup, and never a fraction of a pico below it."""
    assert sell_rates(rates(*[cost] * 8), bps) == rates(*[sold] * 8)


def test_a_provider_s_own_markup_goes_first() -> None:
    """The provider's markup replaces the general one; zero is a markup too."""
    entries = [entry()]
    assert only(build_catalog(config(markup_bps=1_000), entries)).rates.input == 110_000
    base = config(markup_bps=1_000)
    own = replace(base, providers=(replace(base.providers[0], markup_bps=0),))
    assert only(build_catalog(own, entries)).rates.input == 100_000


def test_an_entry_becomes_a_listing() -> None:
    """Everything the router needs arrives, the kind from the provider unless the entry has one."""
    made = entry(upstream_model="up", abilities=Ability.VISION, quality=4)
    listing = only(build_catalog(config(kind=ProviderKind.QUOTA), [made]))
    assert (listing.provider, listing.kind, listing.upstream_model) == ("infra", ProviderKind.QUOTA, "up")
    assert (listing.context, listing.max_output, listing.abilities, listing.quality) == (8192, 1024, Ability.VISION, 4)
    assert (listing.priced_at, listing.source) == (NOW, "https://infra.example/models")
    special = build_catalog(config(), [replace(made, kind=ProviderKind.EXTERNAL)])
    assert only(special).kind is ProviderKind.EXTERNAL


def test_what_the_operator_wrote_is_the_price() -> None:
    """A price in the configuration gets no markup, goes before the file's and never goes stale."""
    catalog = build_catalog(config(models=(OWN,), markup_bps=5_000), [entry("own/model"), entry()])
    listing = only(catalog, "own/model")
    assert listing.rates == rates(7, 6, 9, 7, 9, 0, 3, 0)
    assert (listing.priced_at, listing.source, listing.quality) == (None, "configuration", 9)
    assert not catalog.stale(listing, UnixSeconds(2**40))
    assert catalog.models() == ("own/model", "qwen/x")


def test_a_model_without_a_price_is_not_sold() -> None:
    """P-42: named in the configuration and in no price list, a model has no listing and is reported."""
    base = config()
    named = replace(base, providers=(replace(base.providers[0], models=("qwen/x", "qwen/unknown")),))
    catalog = build_catalog(named, [entry(), entry("not/named")])
    assert catalog.models() == ("qwen/x",)
    assert catalog.unpriced == (("infra", "qwen/unknown"),)
    with pytest.raises(NodeFault) as caught:
        catalog.listings("qwen/unknown")
    assert (caught.value.reason, caught.value.excluded) == (NodeReason.NO_PROVIDER, {"price_unknown": 1})


def test_no_listing_promises_more_than_its_api_can_be_asked() -> None:
    """A request for what an API has no words for goes to somebody else at once, and not after a refusal."""
    name = config().providers[0].name
    (listing,) = build_catalog(config(), [entry()], able={name: Ability.TOOLS}).listings("qwen/x")
    assert listing.abilities in (Ability.TOOLS, Ability(0))
    (same,) = build_catalog(config(), [entry()]).listings("qwen/x")
    assert same.abilities & Ability.TOOLS == listing.abilities


def test_other_providers_entries_are_not_sold() -> None:
    """A catalog file may know more providers than the configuration; those are nobody's to sell."""
    assert len(build_catalog(config(), [entry(provider="somebody")])) == 0


@pytest.mark.parametrize(
    ("asked", "near"),
    [("qwen/qwen3.5-9c", "qwen/qwen3.5-9b"), ("QWEN/QWEN3.5-9B", "qwen/qwen3.5-9b"), ("qwen3.5-9b", "qwen/qwen3.5-9b"), ("zzz", None), ("", None)],
)
def test_unknown_names_are_answered_with_near_ones(asked: str, near: str | None) -> None:
    """A typing error gets a suggestion out of our own names, and nonsense gets none."""
    many = [entry(f"vendor{index}/model-{index}b") for index in range(500)]
    catalog = build_catalog(config(), [*many, entry("qwen/qwen3.5-9b"), entry("other/thing")])
    with pytest.raises(NodeFault) as caught:
        catalog.listings(asked)
    if near is None:
        assert caught.value.message == "model is not sold here"
    else:
        assert f"did you mean {near}" in caught.value.message


def test_the_same_listing_twice_is_a_mistake_of_ours() -> None:
    """Two prices of one provider for one model cannot both hold."""
    listing = only(build_catalog(config(), [entry()]))
    with pytest.raises(ValueError, match="twice"):
        Catalog([listing, listing], stale_s=1)


@pytest.mark.parametrize(("age", "stale"), [(0, False), (3600, False), (3601, True), (-60, False), (-86_401, True)])
def test_synchronised_prices_expire(age: int, stale: bool) -> None:
    """A price is sold at until it is older than the limit; one from the future does not live for ever."""
    catalog = build_catalog(config(stale_s=3600), [entry()])
    assert catalog.stale(only(catalog), UnixSeconds(NOW + age)) is stale


def test_vouched_prices_do_not_expire() -> None:
    """What the operator imported is the operator's to renew."""
    catalog = build_catalog(config(stale_s=60), [entry(vouched=True)])
    assert not catalog.stale(only(catalog), UnixSeconds(NOW + 10**9))


async def test_a_changed_file_is_swapped_in_whole(tmp_path: Path) -> None:
    """The new prices hold from one moment on, and who took the old catalog keeps the old prices."""
    path = tmp_path / "prices.json"
    write_entries(path, [entry()])
    swapped: list[Catalog] = []
    shelf = Shelf(config(catalog=path), on_swap=swapped.append)
    old = shelf.current
    assert not await shelf.refresh()
    write_entries(path, [entry(cost=rates(1, 1, 1)), entry("b")])
    assert await shelf.refresh()
    assert swapped == [shelf.current]
    assert only(shelf.current).rates.output == 1
    assert only(old).rates.output == 400_000
    assert old.models() == ("qwen/x",)


async def test_a_replacement_of_equal_size_and_time_is_noticed(tmp_path: Path) -> None:
    """An atomic replacement within one tick of the file system's clock is still another file."""
    path = tmp_path / "prices.json"
    write_entries(path, [entry(cost=rates(100_000, 100_000, 100_000))])
    stat = path.stat()
    shelf = Shelf(config(catalog=path))
    write_entries(path, [entry(cost=rates(200_000, 200_000, 200_000))])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert await shelf.refresh()
    assert only(shelf.current).rates.input == 200_000


async def test_a_broken_file_changes_nothing_but_the_log(tmp_path: Path) -> None:
    """Prices in force survive a bad edit and a deletion; each is reported once."""
    path = tmp_path / "prices.json"
    write_entries(path, [entry()])
    errors: list[str] = []
    shelf = Shelf(config(catalog=path), on_error=errors.append)
    before = shelf.current
    path.write_text("{")
    assert not await shelf.refresh()
    assert not await shelf.refresh()
    path.unlink()
    assert not await shelf.refresh()
    assert not await shelf.refresh()
    assert shelf.current is before
    assert errors == ["file: is not JSON", "file: is gone; the prices read before stay in force"]
    write_entries(path, [entry("back")])
    assert await shelf.refresh()
    assert shelf.current.models() == ("back",)


async def test_the_shelf_looks_again_and_again(tmp_path: Path) -> None:
    """The keeper refreshes after every sleep."""
    path = tmp_path / "prices.json"
    shelf = Shelf(config(catalog=path))
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise InterruptedError
        write_entries(path, [entry(f"model-{len(slept)}")])

    with pytest.raises(InterruptedError):
        await shelf.keep(sleep, 7)
    assert slept == [7, 7, 7]
    assert shelf.current.models() == ("model-2",)


def test_a_broken_file_stops_the_start(tmp_path: Path) -> None:
    """There are no old prices yet that could stay in force."""
    path = tmp_path / "prices.json"
    path.write_text("[]")
    with pytest.raises(CatalogError):
        Shelf(config(catalog=path))
