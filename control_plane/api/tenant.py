"""Whose tasks, beliefs, budgets and usage a call means."""

from __future__ import annotations

from typing import Any, Protocol

from control_plane.tasks.model import Tenant
from modelyard.rpc.errors import Violation, invalid
from modelyard.rpc.validation import check_tenant

TENANT_KEY = "modelyard-tenant"
DEFAULT_TENANT = Tenant("default")


class Caller(Protocol):
    """A gRPC context, or the gateway's own."""

    def invocation_metadata(self) -> Any:
        """Pairs of key and value, or None."""
        ...


def tenant_of(context: Caller) -> Tenant:
    """The tenant that the metadata name, "default" without one. Raises INVALID_REQUEST for a name that is none, and
    for two different ones: whoever forwards calls must not be talked into another tenant by an addition."""
    found: str | bytes | None = None
    for key, value in context.invocation_metadata() or ():
        if key == TENANT_KEY:
            if found is not None and found != value:
                raise invalid([Violation(TENANT_KEY, "is given twice")])
            found = value
    if found is None:
        return DEFAULT_TENANT
    name = found if isinstance(found, str) else found.decode("utf-8", "replace")
    if violations := check_tenant(name):
        raise invalid(violations)
    return Tenant(name)
