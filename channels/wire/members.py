"""Typed access to the members of decoded JSON objects, so that no decoder below passes ``Any`` around.

Unknown members are ignored everywhere: newer peers add some. Known members have exactly one type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, TypeVar

from channels.descriptor import Descriptor
from channels.faults import ChannelFault, Reason
from channels.ids import parse_address, parse_hash32, to_hex
from channels.wire.strict_json import SAFE_INTEGER_MAX

T = TypeVar("T")
Members = Mapping[str, object]

SHORT_TEXT_MAX: Final = 1024
"""Characters in a member that is a name, a time or a header value; large ones have their own limits."""


@contextmanager
def faults_as(reason: Reason) -> Iterator[None]:
    """Give every fault raised inside the reason of the object it was found in, keeping field and words."""
    try:
        yield
    except ChannelFault as fault:
        raise ChannelFault(reason, field=fault.field, detail=fault.detail, **fault.numbers) from None


def members_of(value: object, *, field: str, reason: Reason = Reason.INVALID_PAYLOAD) -> Members:
    """The members of a JSON object. Raises ``reason`` naming ``field`` for any other value."""
    if not isinstance(value, dict):
        raise ChannelFault(reason, field=field, detail="is not an object")
    return value


def text(members: Members, name: str, *, length_max: int = SHORT_TEXT_MAX) -> str:
    """A member that must be text of at most ``length_max`` characters. Raises ``INVALID_PAYLOAD`` naming it."""
    value = members.get(name)
    if not isinstance(value, str) or len(value) > length_max:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=name, detail="is missing, too long or not text")
    return value


def optional_text(members: Members, name: str, *, length_max: int = SHORT_TEXT_MAX) -> str | None:
    """As :func:`text`, but the member may be absent. ``null`` is not absence: no peer writes it."""
    return text(members, name, length_max=length_max) if name in members else None


def integer(members: Members, name: str) -> int:
    """A member that must be a whole number in ``[0, 2**53)``. Raises ``INVALID_PAYLOAD`` naming it."""
    value = members.get(name)
    # bool is a subclass of int: without this line `true` would be chain 1.
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= SAFE_INTEGER_MAX:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=name, detail="is not a whole number")
    return value


def flag(members: Members, name: str) -> bool:
    """A member that is true or false; absent means false. Raises ``INVALID_PAYLOAD`` naming it."""
    value = members.get(name, False)
    if not isinstance(value, bool):
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=name, detail="is not true or false")
    return value


def optional(members: Members, name: str, parse: Callable[[object], T]) -> T | None:
    """``parse`` applied to a member, or None where it is absent."""
    return parse(members[name]) if name in members else None


def parse_descriptor(value: object, *, field: str = "descriptor") -> Descriptor:
    """Read the seven members of a channel descriptor. Raises ``INVALID_PAYLOAD`` naming the member."""
    members = members_of(value, field=field)

    return Descriptor(
        payer=parse_address(members.get("payer"), field=f"{field}.payer"),
        payee=parse_address(members.get("payee"), field=f"{field}.payee"),
        operator=parse_address(members.get("operator"), field=f"{field}.operator"),
        token=parse_address(members.get("token"), field=f"{field}.token"),
        salt=parse_hash32(members.get("salt"), field=f"{field}.salt"),
        authorized_signer=parse_address(members.get("authorizedSigner"), field=f"{field}.authorizedSigner"),
        expiring_nonce_hash=parse_hash32(members.get("expiringNonceHash"), field=f"{field}.expiringNonceHash"),
    )


def descriptor_to_json(descriptor: Descriptor) -> dict[str, str]:
    """The wire form of a descriptor, addresses in lower case."""
    return {
        "payer": to_hex(descriptor.payer),
        "payee": to_hex(descriptor.payee),
        "operator": to_hex(descriptor.operator),
        "token": to_hex(descriptor.token),
        "salt": to_hex(descriptor.salt),
        "authorizedSigner": to_hex(descriptor.authorized_signer),
        "expiringNonceHash": to_hex(descriptor.expiring_nonce_hash),
    }
