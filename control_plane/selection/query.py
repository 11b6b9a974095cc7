"""One question to the selector: everything that its answer depends on."""

from __future__ import annotations

import math

import msgspec

from control_plane.domain.funds import Funds
from control_plane.domain.model import ServerId
from control_plane.domain.request import RouteRequest
from control_plane.selection.forecast import Forecast, Planned, forecast
from control_plane.selection.policy import Policy
from control_plane.selection.table import CandidateTable, Floats


class Query(msgspec.Struct, eq=False):
    """A request at one moment, and the table as it stands then. What is computed of it is computed once."""

    table: CandidateTable
    request: RouteRequest
    policy: Policy
    avoid: frozenset[ServerId] = frozenset()
    """Servers that failed in earlier attempts of this request."""
    queued: int = 0
    """Requests with the same needs that the control plane lets wait behind this one."""
    funds: Funds | None = None
    """What its tenant may spend. None: as much as it likes."""
    now: float = 0.0
    """Monotonic seconds."""
    waited: float = 0.0
    """Seconds since the request arrived."""
    cached: Floats | None = None
    """Tokens of the prompt that each row is expected to have in its prefix cache, shape (rows,). None: nothing."""
    planned: Planned | None = None
    """What servers will do first. None: nothing."""
    late: bool = False
    """It is too late to serve it well: wherever it has to wait, others go first."""
    left: float = math.inf
    """Seconds until its client leaves."""
    content: bool = False
    """Whether it takes what is free, and does not wait for better."""
    draw: float = 0.0
    """By which chance decides whether to explore, uniform in [0, 1)."""
    most: tuple[Floats, Floats] | None = None
    """The most that the request can come to in each row, once that was asked for: see `filters`."""
    _forecast: Forecast | None = None

    @property
    def forecast(self) -> Forecast:
        """What is expected of every row."""
        if self._forecast is None:
            self._forecast = forecast(
                self.table,
                self.request,
                self.policy,
                self.now,
                self.waited,
                self.output_tokens,
                self.cached,
                self.planned,
            )
        return self._forecast

    @property
    def output_tokens(self) -> int:
        """As many as the request may generate, or as are expected where it leaves that open."""
        tokens = self.request.max_tokens
        return self.policy.expected_output_tokens if tokens is None else tokens
