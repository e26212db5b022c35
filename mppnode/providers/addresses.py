"""Where a provider's name leads: the guard all rooms share, with a provider's fault."""

from __future__ import annotations

from mppnode.kernel import addresses
from mppnode.providers.base import UpstreamFault


async def public_address(host: str, port: int) -> str:
    """One address of ``host``, all of whose addresses are public, as :func:`mppnode.kernel.addresses.public_address`.

    Raises:
        UpstreamFault: ``connect`` when any address is private, loopback, link-local or otherwise not of the internet.
        OSError: the name cannot be resolved.
    """
    try:
        return await addresses.public_address(host, port)
    except addresses.PrivateAddress:
        # It would take the prompt and the provider's key to one of our neighbours.
        raise UpstreamFault("connect", detail="the provider's name leads into a private network") from None
