"""The Accounting service: parse -> call -> render."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import grpc

from control_plane.api import convert
from control_plane.api.metrics import Metrics
from control_plane.api.orchestrator import served
from control_plane.api.tenant import tenant_of
from control_plane.domain.errors import draining
from control_plane.scheduling.budgets import Unit, Window
from control_plane.scheduling.usage import Tally
from modelyard.rpc.errors import Refusal, Violation, invalid
from modelyard.rpc.reasons import Reason
from modelyard.v1 import accounting_pb2

if TYPE_CHECKING:
    from control_plane.tasks.accounting import BudgetState, Dimension
    from control_plane.tasks.bookkeeper import Bookkeeper

MAX_ROWS = 10_000

_UNITS = {
    Unit.NANO_USD: accounting_pb2.BUDGET_UNIT_NANO_USD,
    Unit.TOKENS: accounting_pb2.BUDGET_UNIT_TOKENS,
}
_WINDOWS = {
    Window.HOUR: accounting_pb2.BUDGET_WINDOW_HOUR,
    Window.DAY: accounting_pb2.BUDGET_WINDOW_DAY,
    Window.MONTH: accounting_pb2.BUDGET_WINDOW_MONTH,
    Window.TOTAL: accounting_pb2.BUDGET_WINDOW_TOTAL,
}


class AccountingServicer:
    """All methods of the service. Once `stop_accepting` was called, new calls are refused with DRAINING."""

    def __init__(self, bookkeeper: Bookkeeper | None, metrics: Metrics) -> None:
        """`bookkeeper`: None where nothing is kept, so that every method answers UNSUPPORTED."""
        self.metrics = metrics
        self._kept = bookkeeper
        self._stopping = False

    def stop_accepting(self) -> None:
        """Refuse new calls from now on."""
        self._stopping = True

    @served
    async def GetUsage(
        self, request: accounting_pb2.GetUsageRequest, context: grpc.aio.ServicerContext
    ) -> accounting_pb2.GetUsageResponse:
        tenant = tenant_of(context)
        if self._stopping:
            raise draining()
        if self._kept is None:
            raise Refusal(Reason.UNSUPPORTED, "this control plane keeps no usage (setting tasks.store)")
        by = _dimensions(request)
        since, until = _time(request, "since", -math.inf), _time(request, "until", math.inf)
        if since >= until:
            raise invalid([Violation("until", "must be later than since")])
        bookkeeper, store = self._kept, self._kept.store
        await bookkeeper.flush()
        rows, total = await store.usage(tenant, since, until, by, MAX_ROWS + 1)
        budgets = await store.budgets(tenant, bookkeeper.accounts.ledger.budgets_of(tenant))
        return accounting_pb2.GetUsageResponse(
            rows=[_row(row.sums, by, row.group) for row in rows[:MAX_ROWS]],
            truncated=len(rows) > MAX_ROWS,
            total=_row(total),
            budgets=map(_budget, budgets),
            tenant=tenant,
        )


def _dimensions(request: accounting_pb2.GetUsageRequest) -> list[Dimension]:
    from control_plane.tasks.accounting import Dimension

    names = {
        number: Dimension[name.removeprefix("USAGE_DIMENSION_")]
        for name, number in accounting_pb2.UsageDimension.items()
        if number
    }
    violations = [
        Violation(f"group_by[{i}]", "is none of UsageDimension")
        for i, number in enumerate(request.group_by)
        if number not in names
    ]
    if violations:
        raise invalid(violations)
    found = [names[number] for number in request.group_by]
    if len(set(found)) < len(found):
        raise invalid([Violation("group_by", "names a dimension twice")])
    if Dimension.HOUR in found and Dimension.DAY in found:
        raise invalid([Violation("group_by", "HOUR and DAY exclude each other")])
    return found


def _time(request: accounting_pb2.GetUsageRequest, name: str, absent: float) -> float:
    if not request.HasField(name):
        return absent
    message = getattr(request, name)
    if not -62135596800 <= message.seconds <= 253402300799 or not 0 <= message.nanos < 10**9:
        raise invalid([Violation(name, "is no time between the years 1 and 9999")])
    return float(message.seconds + message.nanos * 1e-9)


def _row(sums: Tally, by: list[Dimension] | None = None, group: tuple[Any, ...] = ()) -> accounting_pb2.UsageRow:
    row = accounting_pb2.UsageRow(
        requests=sums.requests,
        failed=sums.failed,
        estimated=sums.estimated,
        prompt_tokens=sums.prompt_tokens,
        cached_prompt_tokens=sums.cached_prompt_tokens,
        completion_tokens=sums.completion_tokens,
        cost_nano_usd=min(sums.nano_usd, 2**63 - 1),
    )
    for dimension, value in zip(by or (), group, strict=True):
        if dimension.name in ("HOUR", "DAY"):
            row.start.seconds = int(value)
        else:
            setattr(row, dimension.value, value)
    return row


def _budget(state: BudgetState) -> accounting_pb2.BudgetStatus:
    status = accounting_pb2.BudgetStatus(
        unit=_UNITS[state.budget.unit],
        window=_WINDOWS[state.budget.window],
        limit=state.budget.limit,
        spent=state.spent,
        held=state.held,
        held_by_lost=state.held_by_lost,
    )
    if state.ends < math.inf:
        status.starts_at.CopyFrom(convert.timestamp(state.starts))
        status.renews_at.CopyFrom(convert.timestamp(state.ends))
    return status
