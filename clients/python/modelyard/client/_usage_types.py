"""What a tenant has used and may use, as the client shows it: plain immutable values, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from modelyard.client._types import Value


@dataclass(frozen=True, slots=True)
class UsageRow(Value):
    """What some attempts have used. Dimensions that were not asked for are empty."""

    start: datetime | None = None
    """Begin of the hour or day."""
    model: str = ""
    provider: str = ""
    server_id: str = ""
    task_type: str = ""
    requests: int = 0
    """Attempts that gave a whole answer."""
    failed: int = 0
    """Attempts that did not."""
    estimated: int = 0
    """Of all these, attempts whose tokens nobody has counted."""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Of the prompt tokens, those that servers found in their caches."""
    completion_tokens: int = 0
    cost_nano_usd: int = 0
    """1e-9 US dollars."""

    @property
    def cost_usd(self) -> float:
        """US dollars."""
        return self.cost_nano_usd / 1e9


@dataclass(frozen=True, slots=True)
class BudgetStatus(Value):
    """How a budget stands. Amounts are in its unit."""

    unit: str
    """"nano_usd" (1e-9 US dollars) or "tokens"."""
    window: str
    """"hour", "day", "month" (by the calendar in UTC) or "total"."""
    limit: int
    spent: int
    """In this window."""
    held: int = 0
    """By control planes, for requests in hand and those to come."""
    held_by_lost: int = 0
    """Of `held`, by control planes that have not been heard of."""
    starts_at: datetime | None = None
    renews_at: datetime | None = None
    """When the next window begins; None: never."""

    @property
    def left(self) -> int:
        """Neither spent nor held."""
        return max(0, self.limit - self.spent - self.held)


@dataclass(frozen=True, slots=True)
class UsageReport(Value):
    """What a tenant has used, and its budgets."""

    tenant: str
    rows: tuple[UsageRow, ...]
    """The dearest first."""
    total: UsageRow
    budgets: tuple[BudgetStatus, ...] = ()
    truncated: bool = False
    """There are more rows; `total` has them."""
