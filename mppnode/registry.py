"""What this node is made of: one line per entry. A new store or surface is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from mppnode.config.secrets import Secret
from mppnode.http.models import ModelsSurface
from mppnode.http.openai import ChatSurface
from mppnode.http.quote import QuoteSurface
from mppnode.ledger.base import Ledger, LedgerError
from mppnode.ledger.sqlite import SqliteStore


def _postgres(dsn: Secret[str], **parts: Any) -> Ledger:
    try:
        from mppnode.ledger.postgres import PostgresStore
    except ModuleNotFoundError:
        raise LedgerError("a PostgreSQL ledger needs the extra: pip install 'mppnode[postgres]'") from None
    return PostgresStore(dsn, **parts)


STORES: Final[Mapping[str, Callable[..., Ledger]]] = MappingProxyType({"sqlite": SqliteStore, "postgres": _postgres})
SURFACES: Final = (ChatSurface, QuoteSurface, ModelsSurface)
