"""Prices: read exactly, charged exactly, quoted in a unit that starts a stream without another round trip."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from channels.faults import ChannelFault
from channels.units import PICO_PER_UNIT, Pico
from mppnode.config.rates import parse_rate
from mppnode.kernel.rates import Rates, price
from mppnode.kernel.usage import Usage
from mppnode.pricing.book import choose_unit, describe

RATE = st.integers(0, 10**9).map(Pico)
COUNT = st.integers(0, 10**6)


def rates(given_input=500_000, cached=50_000, output=1_500_000):
    return Rates(Pico(given_input), Pico(cached), Pico(output))


@pytest.mark.parametrize(
    ("text", "pico"),
    [("0", 0), ("1", 1_000_000), ("0.50", 500_000), ("0.000001", 1), ("15.1", 15_100_000), ("1000000", 10**12)],
)
def test_rates_are_read_exactly(text, pico):
    """One dollar per million tokens is a million pico per token, to the last of six places."""
    assert parse_rate(text) == pico


@pytest.mark.parametrize(
    "text", ["", ".5", "1.", "-1", "+1", "1e3", "0.0000001", "1,5", " 1", "1\n", "\u0661", "1_0", "1000000.000001", "NaN"]
)
def test_rates_that_are_not_plain_decimals_are_refused(text):
    """A price nobody would write, or one with more places than we keep, is never rounded into one."""
    with pytest.raises(ChannelFault):
        parse_rate(text)


def test_a_price_adds_up_by_hand():
    """100 prompt tokens, 40 of them cached, and 10 of output at 0.50, 0.05 and 1.50 per million."""
    usage = Usage(prompt=100, cached_prompt=40, completion=10, reasoning=7)
    assert price(usage, rates()) == 60 * 500_000 + 40 * 50_000 + 10 * 1_500_000


@given(st.tuples(COUNT, COUNT), st.tuples(COUNT, COUNT), st.tuples(RATE, RATE, RATE))
def test_a_bill_does_not_depend_on_how_it_is_cut(first, second, numbers):
    """Two parts cost together what the whole costs: nothing is rounded on the way."""
    terms = Rates(*numbers)
    parts = [Usage(prompt=prompt, completion=completion) for prompt, completion in (first, second)]
    whole = Usage(prompt=first[0] + second[0], completion=first[1] + second[1])
    assert sum(price(part, terms) for part in parts) == price(whole, terms)


def test_impossible_usage_is_never_priced():
    """More cached than prompt would make a negative charge, so it stops here."""
    with pytest.raises(AssertionError):
        price(Usage(prompt=1, cached_prompt=2), rates())


def test_a_version_names_exactly_its_rates():
    """Equal numbers share a version; any change of any of them, or a swap, has another."""
    versions = {rates().version, rates(500_001).version, rates(cached=50_001).version, rates(output=1).version}
    swapped = rates(50_000, 500_000).version
    assert len(versions | {swapped}) == 5
    assert rates().version == rates().version
    assert len(rates().version) == 12


def test_a_negative_rate_cannot_exist():
    """A node that pays its callers is a typing mistake."""
    with pytest.raises(ValueError):
        rates(-1)


@given(RATE, RATE, st.integers(0, 10_000), st.integers(0, 10_000))
def test_one_unit_covers_the_prompt_and_the_window_and_no_smaller_one_does(rate_in, rate_out, prompt, window):
    """The first voucher buys the start of a usual request; a tenth of the unit would not."""
    assume(rate_in or rate_out)
    unit = choose_unit(
        Rates(rate_in, rate_in, rate_out), usual_prompt_tokens=prompt, first_window_tokens=window
    )
    each, need = rate_out or rate_in, prompt * rate_in + window * rate_out
    assert unit.amount * PICO_PER_UNIT >= need
    assert unit.amount >= 1
    assert unit.tokens == 1 or (unit.tokens // 10) * each < need
    assert set(str(unit.tokens)) <= {"1", "0"}
    assert 0 <= unit.amount * PICO_PER_UNIT - unit.tokens * each < PICO_PER_UNIT


def test_the_unit_of_a_usual_model():
    """512 tokens of prompt at 0.50 and 64 of output at 1.50 need 352 base units; 1,000 tokens make 1,500."""
    unit = choose_unit(rates(), usual_prompt_tokens=512, first_window_tokens=64)
    assert (unit.tokens, unit.unit_type, unit.amount) == (1000, "1000-tokens", 1500)


def test_a_single_token_unit_is_called_token():
    """The word clients know is used where it is true."""
    unit = choose_unit(rates(0, 0, 5_000_000), usual_prompt_tokens=9, first_window_tokens=1)
    assert (unit.tokens, unit.unit_type, unit.amount) == (1, "token", 5)


def test_a_free_model_cannot_be_quoted():
    """There is no unit that covers anything at a price of nothing."""
    with pytest.raises(ValueError):
        choose_unit(rates(0, 0, 0), usual_prompt_tokens=1, first_window_tokens=1)


@given(RATE, RATE, RATE)
def test_the_description_states_the_exact_rates(rate_in, rate_cached, rate_out):
    """It is ASCII, fits a header, and its three numbers read back as the rates."""
    terms = Rates(rate_in, rate_cached, rate_out)
    text = describe(terms)
    assert text.isascii()
    assert '"' not in text
    assert "\\" not in text
    assert terms.version in text
    numbers = [word.strip(",;") for word in text.split() if word[0].isdigit() and "." in word]
    assert [parse_rate(number) for number in numbers[:3]] == [rate_in, rate_cached, rate_out]


def test_the_description_is_written_as_prices_are():
    """At least two places, and no zeros beyond them."""
    assert describe(rates(500_000, 50_001, 15_000_000)).startswith(
        "At most, in USD per million tokens: input 0.50, cached input 0.050001, output 15.00; "
    )
