"""What a request may cost: the bounds of its tenant's budgets, and the most that the request can come to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from control_plane.domain.model import Price
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import TaskType

UNLIMITED = 2**63 - 1
"""An amount that nothing exceeds."""


class Amounts(NamedTuple):
    """Of money and of tokens, both whole."""

    nano_usd: int = 0
    """1e-9 US dollars."""
    tokens: int = 0
    """Prompt and answer."""

    def covers(self, other: Amounts) -> bool:
        return other.nano_usd <= self.nano_usd and other.tokens <= self.tokens


@dataclass(frozen=True, slots=True)
class Reckoning:
    """How the most that a request can come to is reckoned, before anybody has counted its tokens.

    Raises:
        ValueError: a value is out of its range; names the field.
    """

    prompt_factor: float = 4.0
    """Tokens per estimated token of the prompt, >= 1. An estimated token stands for four bytes, and no tokenizer makes
    more than one token of a byte."""
    output_tokens: int = 4096
    """Most tokens of an answer whose request sets no max_tokens, >= 1."""

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_factor < math.inf:
            raise ValueError(f"prompt_factor must be finite and >= 1, is {self.prompt_factor}")
        if self.output_tokens < 1:
            raise ValueError(f"output_tokens must be >= 1, is {self.output_tokens}")

    def prompt(self, request: RouteRequest) -> int:
        """Most tokens of the prompt."""
        return math.ceil(self.prompt_factor * (request.prompt_tokens + request.more_prompt_tokens))

    def output(self, request: RouteRequest, context_length: int) -> int:
        """Most tokens of the answer of a model with that context; >= 0."""
        if request.task_type is TaskType.EMBEDDING:
            return 0
        if request.max_tokens is not None:
            return request.max_tokens
        return min(self.output_tokens, max(1, context_length - request.prompt_tokens))

    def most(self, request: RouteRequest, price: Price, context_length: int) -> Amounts:
        """The most that the request can come to on one model."""
        prompt, output = self.prompt(request), self.output(request, context_length)
        return Amounts(price.nano_usd(prompt, 0, output), prompt + output)


class Funds(NamedTuple):
    """What a tenant with budgets may spend on one request at this moment."""

    now: Amounts
    """At once."""
    later: Amounts
    """Once requests in hand have turned out to cost less, or other control planes give back what they do not need.
    >= `now`."""
    reckoning: Reckoning
