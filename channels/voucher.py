"""Vouchers and channel ids: the bytes a payer signs, for both escrows.

A voucher says "of this channel, the payee may take up to ``cumulative`` base units in total". The two escrows differ in
the EIP-712 domain name and the width of the amount, hence in every digest.
"""

from __future__ import annotations

from typing import Final

from channels.descriptor import Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, Hash32
from channels.keccak import keccak256
from channels.signature import Signature65, recover, sign

_DOMAIN_TYPEHASH: Final = keccak256(
    b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
)
_VERSION_HASH: Final = keccak256(b"1")
_NAME: Final = {
    SessionProtocol.V1: keccak256(b"Tempo Stream Channel"),
    SessionProtocol.V2: keccak256(b"TIP20 Channel Reserve"),
}
_TYPEHASH: Final = {
    SessionProtocol.V1: keccak256(b"Voucher(bytes32 channelId,uint128 cumulativeAmount)"),
    SessionProtocol.V2: keccak256(b"Voucher(bytes32 channelId,uint96 cumulativeAmount)"),
}
_AMOUNT_MAX: Final = {SessionProtocol.V1: 2**128 - 1, SessionProtocol.V2: 2**96 - 1}


class VoucherDomain:
    """Digests, signs and verifies the vouchers of one escrow; build it once per escrow and keep it."""

    __slots__ = ("_amount_max", "_prefix", "_typehash", "escrow", "separator")

    def __init__(self, escrow: Escrow) -> None:
        self.escrow = escrow
        self.separator = domain_separator(escrow)
        # A voucher costs two hashes, not five: everything that depends on the escrow alone is hashed here.
        self._prefix = b"\x19\x01" + self.separator
        self._typehash = _TYPEHASH[escrow.protocol]
        self._amount_max = _AMOUNT_MAX[escrow.protocol]

    def digest(self, channel_id: ChannelId, cumulative: int) -> Hash32:
        """The 32 bytes a payer signs to release up to ``cumulative`` base units in total.

        Raises:
            ChannelFault: ``INVALID_PAYLOAD`` when the amount exceeds the escrow's type (v1 uint128, v2 uint96).

        Source: EIP-712; TIP-1034 ``getVoucherDigest``.
        """
        if not 0 <= cumulative <= self._amount_max:
            raise ChannelFault(
                Reason.INVALID_PAYLOAD, field="cumulativeAmount", detail="is outside the escrow's amount range"
            )
        return keccak256(self._prefix + keccak256(self._typehash + channel_id + cumulative.to_bytes(32)))

    def sign(self, channel_id: ChannelId, cumulative: int, key: bytes) -> Signature65:
        """Sign a voucher for ``cumulative`` base units with a 32-byte private key; raises as :meth:`digest` does."""
        return sign(self.digest(channel_id, cumulative), key)

    def verify(self, channel_id: ChannelId, cumulative: int, signature: Signature65, signer: Address) -> None:
        """Return only if ``signer`` signed this voucher; ``signer`` comes from the channel, never from the payload.

        Raises:
            ChannelFault: ``INVALID_SIGNATURE`` for any other signer, or as :meth:`digest` does.
        """
        if recover(self.digest(channel_id, cumulative), signature) != signer:
            raise ChannelFault(
                Reason.INVALID_SIGNATURE, field="signature", detail="is not by the channel's authorised signer"
            )


def domain_separator(escrow: Escrow) -> Hash32:
    """The EIP-712 domain separator of an escrow. Source: EIP-712 ``hashStruct(eip712Domain)``."""
    return keccak256(
        _DOMAIN_TYPEHASH
        + _NAME[escrow.protocol]
        + _VERSION_HASH
        + escrow.chain_id.to_bytes(32)
        + escrow.address.rjust(32, b"\0")
    )


def derive_channel_id(escrow: Escrow, descriptor: Descriptor) -> ChannelId:
    """The id an escrow gives the channel of ``descriptor``; two different channels never share one.

    The v1 contract hashes neither an operator nor an expiring nonce: both are ignored there.

    Source: TIP-1034 ``computeChannelId``; ``TempoStreamChannel.computeChannelId`` for v1. All words are static, so
    ``abi.encode`` is their plain concatenation.
    """
    if escrow.protocol is SessionProtocol.V1:
        words: tuple[bytes, ...] = (
            descriptor.payer,
            descriptor.payee,
            descriptor.token,
            descriptor.salt,
            descriptor.authorized_signer,
        )
    else:
        words = (
            descriptor.payer,
            descriptor.payee,
            descriptor.operator,
            descriptor.token,
            descriptor.salt,
            descriptor.authorized_signer,
            descriptor.expiring_nonce_hash,
        )
    place = (escrow.address, escrow.chain_id.to_bytes(32))
    return ChannelId(keccak256(b"".join(word.rjust(32, b"\0") for word in (*words, *place))))
