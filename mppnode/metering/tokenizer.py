"""A model's own tokenizer, read from the file its makers publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TokenizerError(Exception):
    """A tokenizer cannot be used; the message is for the operator."""


class TokenizerFile:
    """Counts tokens with a ``tokenizer.json``; needs the extra ``mppnode[tokenizers]``."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ``TokenizerError``."""
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise TokenizerError(f"{path}: counting needs the extra: pip install 'mppnode[tokenizers]'") from None
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise TokenizerError(f"{path}: is not a tokenizer file") from error

    def count(self, text: str) -> int:
        """Tokens of ``text``, without those a chat template would add around it."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
