"""JWTs as bearers: the key a token is verified with is found, the token verified, and an issuer's outage told apart."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from mppnode.accounts.bearer import PinnedKey, TokenPolicy, key_id, verify
from mppnode.accounts.model import Identity
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault, NodeReason


class TokenReader:
    """Implements :class:`mppnode.accounts.directory.Tokens`."""

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        shared: PinnedKey | None = None,
        published: Callable[[str], Awaitable[PinnedKey | None]] | None = None,
        away: type[Exception] = ConnectionError,
        clock: Clock,
    ) -> None:
        """``shared`` verifies every token, or ``published`` finds the issuer's key by ``kid`` and raises ``away``."""
        assert (shared is None) != (published is None)
        self._policy = policy
        self._shared = shared
        self._published = published
        self._away = away
        self._clock = clock

    async def identity(self, token: str) -> Identity:
        """See :meth:`Tokens.identity`."""
        return verify(token, await self._key(token), self._policy, self._clock.now())

    async def _key(self, token: str) -> PinnedKey | None:
        kid = key_id(token)
        if self._published is None:
            return self._shared
        if kid is None:
            return None
        try:
            return await self._published(kid)
        except self._away:
            raise NodeFault(
                NodeReason.IDENTITY_UNAVAILABLE, detail="the issuer of the token cannot be asked for its keys"
            ) from None
