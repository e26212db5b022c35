"""Who signs for the payer. The machine in ``session`` decides what may be signed; a signer only signs."""

from __future__ import annotations

from typing import Protocol

from channels.ids import Address, ChannelId
from channels.signature import Signature65, address_of, sign
from channels.units import Units
from channels.voucher import VoucherDomain


class Signer(Protocol):
    """Holds a key, here or in a device, and signs 32-byte digests of transactions and vouchers."""

    @property
    def address(self) -> Address:
        """The account the signatures recover to."""
        ...

    def sign(self, digest: bytes) -> Signature65:
        """Sign a digest in the canonical 65-byte form."""
        ...


class LocalSigner:
    """A signer whose private key is in this process. The key is never shown."""

    __slots__ = ("_key", "address")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.address = address_of(key)

    def __repr__(self) -> str:
        return f"LocalSigner(0x{self.address.hex()})"

    def sign(self, digest: bytes) -> Signature65:
        """Sign a digest; the same digest always gives the same bytes (RFC 6979)."""
        return sign(digest, self._key)


def sign_voucher(signer: Signer, domain: VoucherDomain, channel_id: ChannelId, cumulative: Units) -> Signature65:
    """Sign a voucher for ``cumulative`` base units; call it only for amounts an action of the machine names."""
    return signer.sign(domain.digest(channel_id, cumulative))
