"""Which version this is, for whoever reads a log years later."""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.1.0"
"""As in pyproject.toml; a test compares them."""
