"""P21: 352 envelopes around four vouchers, and exactly one form of them counts.

``signature_set.py`` makes the file with curve arithmetic of its own, so the verdicts do not come from what is tested.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from channels.descriptor import Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import parse_address, parse_channel_id
from channels.model import AcceptVoucher, Voucher
from channels.signature import Signature65, parse_signature, recover
from channels.units import Units
from channels.voucher import VoucherDomain
from tests.support.builders import after, decide, opened
from tests.vectors import signature_set
from tests.vectors.signature_set import KEY, pack, signed

SET: dict[str, Any] = json.loads(signature_set.FILE.read_text())
VERDICTS = ("accepted", "another form", "another signer")


def _cases(verdict: str) -> list[Any]:
    return [
        pytest.param(voucher, bytes.fromhex(signature[2:]), id=f"{number}-{name}")
        for number, voucher in enumerate(SET["vouchers"])
        for name, signature in voucher["cases"][verdict].items()
    ]


def _verify(voucher: dict[str, Any], signature: Signature65) -> None:
    escrow = Escrow(
        SessionProtocol(voucher["protocol"]), voucher["chainId"], parse_address(voucher["escrow"], field="escrow")
    )
    signer = parse_address(voucher["signer"], field="signer")
    VoucherDomain(escrow).verify(parse_channel_id(voucher["channelId"]), int(voucher["cumulative"]), signature, signer)


def test_the_set_is_what_its_maker_makes() -> None:
    """The committed file has not drifted from the code that explains it, and it is not small."""
    assert signature_set.FILE.read_text() == signature_set.text()
    sizes = [len(voucher["cases"][verdict]) for voucher in SET["vouchers"] for verdict in VERDICTS]
    assert sum(sizes) >= 200
    assert min(sizes) >= 6


@pytest.mark.parametrize(("voucher", "raw"), _cases("accepted"))
def test_the_canonical_form_is_accepted(voucher: dict[str, Any], raw: bytes) -> None:
    """P21: low s, v of 27 or 28, 65 bytes, by the signer: accepted whatever nonce was used, and unchanged."""
    signature = parse_signature(raw)
    assert signature == raw
    _verify(voucher, signature)


@pytest.mark.parametrize(("voucher", "raw"), _cases("another form"))
def test_every_other_form_is_refused_before_the_curve(voucher: dict[str, Any], raw: bytes) -> None:
    """P21: the signer's own signature in another spelling is not a second permission; it is none at all."""
    with pytest.raises(ChannelFault) as caught:
        parse_signature(raw)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_SIGNATURE, "signature")
    assert raw.hex() not in str(caught.value) or not raw


@pytest.mark.parametrize(("voucher", "raw"), _cases("another signer"))
def test_a_canonical_form_by_nobody_or_somebody_else_is_refused(voucher: dict[str, Any], raw: bytes) -> None:
    """P21: right in form, wrong in content, the point at infinity included: invalid, and never a crash."""
    signature = parse_signature(raw)
    with pytest.raises(ChannelFault) as caught:
        _verify(voucher, signature)
    assert caught.value.reason is Reason.INVALID_SIGNATURE


def test_nobody_is_no_address() -> None:
    """P21: a signature that recovers to the point at infinity is refused, also where the zero address would count."""
    digest = bytes.fromhex(SET["vouchers"][0]["digest"][2:])
    with pytest.raises(ChannelFault) as caught:
        recover(digest, parse_signature(pack(*signature_set.to_nobody(digest))))
    assert caught.value.reason is Reason.INVALID_SIGNATURE


@pytest.mark.parametrize(("voucher", "raw"), _cases("accepted") + _cases("another signer"))
def test_whose_signature_it_is_agrees_with_plain_arithmetic(voucher: dict[str, Any], raw: bytes) -> None:
    """P21: the address behind every well-formed envelope is the one the curve's definition gives, or none in both."""
    digest = bytes.fromhex(voucher["digest"][2:])
    expected = signature_set.recovered(digest, raw)
    try:
        found = recover(digest, parse_signature(raw))
    except ChannelFault:
        assert expected is None
    else:
        assert found == expected


def test_identity_is_the_channel_and_the_amount() -> None:
    """P21: a second canonical signature of the same amount is a repeat: no rung, no event, and the first bytes stay."""
    digest = bytes.fromhex(SET["vouchers"][2]["digest"][2:])
    first, second = (parse_signature(pack(*signed(digest, KEY, nonce))) for nonce in (b"\0", b"\1"))
    assert first != second
    account = after(opened(), AcceptVoucher(Voucher(Units(500), first)))
    again = decide(account, AcceptVoucher(Voucher(Units(500), second)))
    assert again.events == ()
    assert again.result.replayed
    assert again.account.ladder[-1].signature == first
