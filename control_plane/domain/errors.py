"""Everything the control plane refuses, each with the reason that the contract's error table lists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DomainError(Exception):
    """A refusal. `reason` is a reason of the table in modelyard/v1/orchestrator.proto."""

    reason: str
    message: str
    retry_after: float | None = None
    """Seconds after which a retry may help."""

    def __post_init__(self) -> None:
        super().__init__(self.message)


def unknown_model(name: str, known: tuple[str, ...]) -> DomainError:
    listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    return DomainError("UNKNOWN_MODEL", f"no model {name!r}; known: {listed or 'none'}")


def unknown_request(request_id: str) -> DomainError:
    return DomainError("UNKNOWN_REQUEST", f"no answer to a request {request_id[:100]!r} is remembered")


def unknown_server(server_id: str, known: tuple[str, ...]) -> DomainError:
    listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    return DomainError("UNKNOWN_SERVER", f"no model server {server_id!r}; known: {listed or 'none'}")


def no_capable_server(summary: str) -> DomainError:
    return DomainError("NO_CAPABLE_SERVER", summary)


def budget_exhausted(tenant: str, left: str, summary: str, retry_after: float | None) -> DomainError:
    return DomainError("BUDGET_EXHAUSTED", f"tenant {tenant} has {left}; {summary}", retry_after)


def queue_full(waiting: int, bound: int, retry_after: float) -> DomainError:
    return DomainError(
        "QUEUE_FULL", f"{waiting} requests are waiting, {bound} may: retry in {retry_after:.1f} s", retry_after
    )


def queue_bytes_full(waiting: int, bound: int, retry_after: float) -> DomainError:
    return DomainError(
        "QUEUE_FULL",
        f"requests of {waiting / 1e6:.1f} MB are waiting, {bound / 1e6:.1f} MB may (queue.max_bytes): "
        f"retry in {retry_after:.1f} s",
        retry_after,
    )


def queue_timeout(waited: float, summary: str) -> DomainError:
    return DomainError("QUEUE_TIMEOUT", f"waited {waited:.1f} s in the queue: {summary}")


def fleet_warming_up(retry_after: float) -> DomainError:
    return DomainError(
        "FLEET_WARMING_UP",
        "servers are still coming up: it is not known yet what the fleet can do",
        retry_after,
    )


def servers_away(summary: str, retry_after: float) -> DomainError:
    return DomainError("SERVERS_AWAY", summary, retry_after)


def agent_superseded(agent_id: str) -> DomainError:
    return DomainError("SUPERSEDED", f"agent {agent_id!r} was registered anew by somebody: stop this one or rename it")


def unknown_agent(agent_id: str) -> DomainError:
    return DomainError("UNKNOWN_AGENT", f"there is no agent {agent_id!r}")


def unknown_assignment(assignment_id: str) -> DomainError:
    return DomainError("UNKNOWN_ASSIGNMENT", f"there is no assignment {assignment_id!r}, or it ended long ago")


def too_many_agents(most: int) -> DomainError:
    return DomainError("TOO_MANY_AGENTS", f"there are too many agents, a tenant may have {most} (agents.max_agents)")


def no_capable_agent(summary: str) -> DomainError:
    return DomainError("NO_CAPABLE_AGENT", summary)


def agents_busy(summary: str, retry_after: float) -> DomainError:
    return DomainError("AGENTS_BUSY", summary, retry_after)


def agents_warming_up(retry_after: float) -> DomainError:
    return DomainError(
        "FLEET_WARMING_UP", "agents are still coming back: it is not known yet what they can do", retry_after
    )


def draining() -> DomainError:
    return DomainError("DRAINING", "this control plane is shutting down", 1.0)
