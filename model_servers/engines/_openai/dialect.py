"""In what the servers that speak OpenAI's API differ, as far as requests go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MOST_STOPS = 16
"""As many as the contract allows."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one server understands. The defaults suit most servers that people run themselves."""

    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    completions: bool = True
    """POST /completions exists; else a raw prompt is sent as a message of the user."""
    extra_sampling: bool = True
    """Knows top_k, min_p and repetition_penalty, or ignores them; else they are left out."""
    max_stops: int = MOST_STOPS
    """Stop strings that the server takes. With more of them none is sent, and the engine looks for them itself."""
    strict: Literal["never", "where possible", "always"] = "never"
    """When to ask that calls and JSON keep to their schema. OpenAI takes only certain schemas then; vLLM takes any,
    and checks the arguments of calls only if asked to."""
    says_json: bool = False
    """JSON mode is refused unless the word JSON stands in the conversation."""
    continuous_usage: bool = False
    """Tells the tokens generated so far with every piece, if asked."""
