"""Keccak-256 as Ethereum uses it (not SHA3-256, which pads differently)."""

from __future__ import annotations

from tiny_keccak import keccak256 as _keccak256

from channels.ids import Hash32


def keccak256(data: bytes) -> Hash32:
    """Hash ``data`` to 32 bytes. Source: the Keccak submission with capacity 512 and the original 0x01 padding."""
    return Hash32(_keccak256(data))
