"""What the selector and the queue know of a request: never its text."""

from __future__ import annotations

import msgspec

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.domain.prompt import Blocks
from control_plane.domain.task import Feature, Priority, TaskType


class RouteRequest(msgspec.Struct, frozen=True):
    """Everything that routing may depend on."""

    request_id: str
    task_type: TaskType = TaskType.CHAT
    priority: Priority = Priority.NORMAL
    prompt_tokens: int = 0
    """Estimated."""
    max_tokens: int | None = None
    """None: the client left it open."""
    model: ModelName | None = None
    provider: Provider | None = None
    server_id: ServerId | None = None
    excluded: frozenset[ServerId] = frozenset()
    """By the request."""
    excluded_models: frozenset[tuple[ModelName, Provider | None]] = frozenset()
    """By the request; None: of any provider."""
    max_cost_nano_usd: int = 0
    """That prompt and answer may be expected to cost, 1e-9 US dollars; 0: any."""
    min_context_length: int = 0
    features: Feature = Feature.NONE
    labels: tuple[tuple[str, str], ...] = ()
    """That the server must have."""
    blocks: Blocks | None = None
    """Of the prompt, for servers that cache prefixes. None: not known."""
    preset: str = ""
    """Whose weights hold; empty: the selector's own."""
    tenant: str = "default"
    """Who shares the fleet with others, and whose budgets it is paid from."""
    more_prompt_tokens: int = 0
    """Estimated, of further prompts that are sent along: texts to embed beside the longest."""

    @property
    def context_needed(self) -> int:
        """Tokens of context that prompt and answer need at least."""
        return max(self.min_context_length, self.prompt_tokens + (self.max_tokens or 1))
