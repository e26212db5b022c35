"""The manual's table is the catalogue's."""

from pathlib import Path

import pytest

from mppnode.observe.metric_catalog import CATALOG, SERIES_MAX
from mppnode.observe.metric_docs import BEGIN, END, main, table, with_table
from mppnode.observe.metric_labels import MODELS_MAX, PROVIDERS_MAX

MANUAL = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


def test_the_manual_has_every_metric_as_it_is():
    """Whoever changes a metric changes its row: python -m mppnode.observe.metric_docs docs/metrics.md writes it."""
    text = MANUAL.read_text()
    assert with_table(text) == text
    assert table().count("\n") == len(CATALOG) + 1


def test_the_manual_tells_the_limits_there_are():
    """The numbers in its sentences are the program's."""
    text = MANUAL.read_text()
    assert f"first {MODELS_MAX} and {PROVIDERS_MAX} names" in text
    assert f"at most {SERIES_MAX:,} series" in text


def test_the_table_is_written_where_its_marks_are(tmp_path):
    """What stands around the marks stays, and writing twice changes nothing."""
    manual = tmp_path / "m.md"
    manual.write_text(f"above\n{BEGIN}old{END}\nbelow\n")
    main(manual)
    once = manual.read_text()
    main(manual)
    assert manual.read_text() == once == f"above\n{BEGIN}\n\n{table()}\n\n{END}\nbelow\n"


def test_a_document_without_marks_is_refused():
    """The table is never put where nobody has asked for it."""
    with pytest.raises(ValueError, match="no place"):
        with_table("# Nothing\n")
