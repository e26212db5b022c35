"""Stripe's ways to fail, as a request of ours tells them: an outage is 503, and never a matter of who asks or owes."""

from __future__ import annotations

from typing import Final

from mppnode.gateways.stripe_faults import StripeFault, StripeFaultKind
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.observe.logs import Level, Log

_OPERATORS: Final = frozenset({StripeFaultKind.REFUSED, StripeFaultKind.INVALID})
"""What no customer can help."""


def told(fault: StripeFault, log: Log, doing: str) -> NodeFault:
    """The fault a customer is told. Stripe's code goes to the log, and nothing else of what it said anywhere."""
    if fault.kind is StripeFaultKind.DECLINED:
        return NodeFault(NodeReason.CONFLICT, field="card", detail="was declined by its bank: save another one")
    level = Level.ERROR if fault.kind in _OPERATORS else Level.WARNING
    log("billing.stripe", level=level, doing=doing, kind=fault.kind.value, code=fault.code)
    return NodeFault(NodeReason.BILLING_UNAVAILABLE, detail="the payment processor cannot be asked: try again later")
