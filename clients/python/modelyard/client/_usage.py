"""What a tenant has used, for asyncio: `AsyncClient.usage`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from modelyard.client import _answers as answers
from modelyard.client import _names as names
from modelyard.client import _values as values
from modelyard.client._service import Service
from modelyard.client._usage_types import BudgetStatus, UsageReport, UsageRow
from modelyard.v1 import accounting_pb2, accounting_pb2_grpc

if TYPE_CHECKING:
    from modelyard.client._async import AsyncClient


class AsyncAccounting(Service):
    """The Accounting service."""

    def __init__(self, client: AsyncClient) -> None:
        super().__init__(client, accounting_pb2_grpc.AccountingStub)

    async def usage(
        self, since: datetime | None, until: datetime | None, by: str | Sequence[str], timeout: float | None
    ) -> UsageReport:
        """See `AsyncClient.usage`."""
        dimensions = [by] if isinstance(by, str) else by
        request = accounting_pb2.GetUsageRequest(
            since=None if since is None else values.timestamp("since", values.utc("since", since)),
            until=None if until is None else values.timestamp("until", values.utc("until", until)),
            group_by=[names.USAGE_DIMENSION.number(one) for one in dimensions],  # type: ignore[misc]
        )
        response = await self._call("GetUsage", request, timeout)
        return UsageReport(
            tenant=response.tenant,
            rows=tuple(map(_row, response.rows)),
            total=_row(response.total),
            budgets=tuple(map(_budget, response.budgets)),
            truncated=response.truncated,
        )


def _row(message: accounting_pb2.UsageRow) -> UsageRow:
    return UsageRow(
        start=answers.time(message, "start"),
        model=message.model,
        provider=message.provider,
        server_id=message.server_id,
        task_type=names.TASK_TYPE.name(message.task_type),
        requests=message.requests,
        failed=message.failed,
        estimated=message.estimated,
        prompt_tokens=message.prompt_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
        completion_tokens=message.completion_tokens,
        cost_nano_usd=message.cost_nano_usd,
    )


def _budget(message: accounting_pb2.BudgetStatus) -> BudgetStatus:
    return BudgetStatus(
        unit=names.BUDGET_UNIT.name(message.unit),
        window=names.BUDGET_WINDOW.name(message.window),
        limit=message.limit,
        spent=message.spent,
        held=message.held,
        held_by_lost=message.held_by_lost,
        starts_at=answers.time(message, "starts_at"),
        renews_at=answers.time(message, "renews_at"),
    )
