"""Token base units and pico-dollars: the only two numbers money is ever counted in.

A *unit* is one token base unit (10**-6 of a dollar for the 6-decimal stablecoins the escrows hold). A *pico* is
10**-12 of a dollar, so one unit is exactly 1,000,000 pico and "1 USD per million tokens" is exactly 1,000,000 pico
per token. Every public price list is therefore an exact integer (design D1).
"""

from __future__ import annotations

import re
from typing import Final, NewType

from channels.faults import ChannelFault, Reason

Units = NewType("Units", int)
"""Base units, always made by :func:`units` or :func:`parse_units`: ``0 <= n < 2**96``."""

Pico = NewType("Pico", int)
"""Pico-dollars. May exceed 64 bits and, for a credited balance, may be negative."""

PICO_PER_UNIT: Final = 1_000_000
DECIMALS: Final = 6
MAX_UINT96: Final = 2**96 - 1  # the v2 channel reserve stores uint96, and v1 amounts beyond it exceed all supply
_MAX_DIGITS: Final = 29  # len(str(2**96 - 1)); checked before int() because int() of 5,000 digits raises
_UNITS = re.compile(r"0|[1-9][0-9]{0,28}", re.ASCII)
_DECIMAL = re.compile(r"([0-9]{1,23})(?:\.([0-9]{1,6}))?", re.ASCII)


def units(value: int, *, field: str = "amount") -> Units:
    """Check that an integer is a base-unit amount.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming ``field`` when ``value`` is outside ``[0, 2**96)``.
    """
    if not 0 <= value <= MAX_UINT96:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=field, detail="is outside the uint96 range")
    return Units(value)


def parse_units(text: object, *, field: str = "amount") -> Units:
    """Read a base-unit amount from its wire form, a canonical decimal string.

    Anything ``int()`` would also accept (``"1_000"``, ``" 12"``, ``"+5"``, other scripts' digits, a trailing newline)
    is refused, because the chain and the payer would read it differently.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming ``field``.

    Source: draft-payment numeric values; RFC 8259 has no integers this large, hence strings.
    """
    if not isinstance(text, str) or len(text) > _MAX_DIGITS or _UNITS.fullmatch(text) is None:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=field, detail="is not a decimal string of base units")
    return units(int(text), field=field)


def parse_decimal(text: str, *, field: str = "amount") -> Units:
    """Read a human amount such as ``"1.25"`` (dollars) as base units, exactly.

    Digits are moved as text: ``Decimal`` keeps 28 digits by default and would change the largest amounts silently.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming ``field``.
    """
    match = _DECIMAL.fullmatch(text)
    if match is None:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=field, detail="is not a decimal amount with at most 6 places")
    whole, fraction = match.group(1), match.group(2) or ""
    return units(int(whole + fraction.ljust(DECIMALS, "0")), field=field)


def format_decimal(amount: int) -> str:
    """Write base units as dollars with six places, for people: ``1250000 -> "1.250000"``."""
    sign, digits = ("-", -amount) if amount < 0 else ("", amount)
    return f"{sign}{digits // PICO_PER_UNIT}.{digits % PICO_PER_UNIT:06d}"


def units_floor(pico: int) -> Units:
    """Whole units contained in ``pico``; rounds in the payer's favour, so it is the one used to charge."""
    return units(pico // PICO_PER_UNIT)


def units_ceil(pico: int) -> Units:
    """Whole units that cover ``pico``; used to ask for money, never to take it."""
    return units(-(-pico // PICO_PER_UNIT))
