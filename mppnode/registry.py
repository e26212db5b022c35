"""What this node is made of: one line per entry. A new store or surface is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from mppnode.http.openai import ChatSurface
from mppnode.ledger.sqlite import SqliteStore
from mppnode.providers.base import ChunkDecoder
from mppnode.providers.openai_compatible import OpenAIDecoder

STORES: Final = MappingProxyType({"sqlite": SqliteStore})
SURFACES: Final = (ChatSurface,)
DECODERS: Final[Mapping[str, Callable[[], ChunkDecoder]]] = MappingProxyType({"openai": OpenAIDecoder})
