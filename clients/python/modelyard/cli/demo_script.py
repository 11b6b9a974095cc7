"""The fleet of `modelyard demo` and what it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelyard.cli.extras import missing
from modelyard.cli.plan import ServerPlan, bundled_model

CONTROL_PLANE = (
    "--port", "0", "--metrics-port", "-1", "--gateway.port", "-1", "--log-level", "warning", "--fleet.warm-up", "0",
    "--tasks.store", "",
)  # fmt: skip

_BIG: dict[str, Any] = {
    "models": [
        {
            "name": "sim-70b",
            "context_length": 32768,
            "capabilities": {
                "code_generation": 0.9,
                "code_review": 0.9,
                "reasoning": 0.9,
                "summarization": 0.9,
                "translation": 0.9,
            },
            "features": ["streaming", "json", "prefix_cache"],
            "price": {"prompt": 0.6, "completion": 1.8},
        }
    ],
    "prefill_tokens_per_second": 8000,
    "decode_tokens_per_second": 90,
    "answer_tokens": 45,
    # The second request fails before its first token: the demo shows the retry.
    "faults": [{"kind": "error", "at_request": 2}],
}
_SLOW: dict[str, Any] = {
    "models": [
        {
            "name": "sim-3b",
            "context_length": 4096,
            "capabilities": {"classification": 0.4, "code_generation": 0.4, "summarization": 0.4},
            "features": ["streaming", "json"],
        }
    ],
    "prefill_tokens_per_second": 300,
    "decode_tokens_per_second": 15,
    "answer_tokens": 30,
}
_SMALL: dict[str, Any] = {
    "models": [
        {
            "name": "sim-yardling",
            "context_length": 2048,
            "capabilities": {"chat": 0.2, "classification": 0.2, "tool_use": 0.2, "translation": 0.1},
            "features": ["streaming", "json", "json_schema", "function_calling"],
        }
    ],
    "answer_tokens": 30,
}


def servers() -> tuple[tuple[ServerPlan, ...], str]:
    """The fleet, and a remark if no real model can run here."""
    quiet = {"log_level": "warning"}
    simulated = (
        ServerPlan("sim-big", "simulated", {**quiet, "engine_settings": _BIG}),
        ServerPlan("sim-slow", "simulated", {**quiet, "engine_settings": _SLOW}),
    )
    absent = missing("mlx")
    if not absent and bundled_model():
        return (ServerPlan("mlx-1", "mlx", quiet), *simulated), ""
    why = f"{', '.join(absent)} not installed" if absent else "this installation has no bundled model"
    remark = f"No real model answers here: {why}. All servers are simulated; pip install 'modelyard[local]' helps."
    return (ServerPlan("sim-small", "simulated", {**quiet, "engine_settings": _SMALL}), *simulated), remark


@dataclass(frozen=True, slots=True)
class Step:
    """One request of the demo."""

    title: str
    prompt: str
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    """What to look at."""
    shown: str = ""
    """Instead of a prompt that is too long to show."""
    refused: bool = False
    """The point is that nobody can do it."""

    @property
    def task_type(self) -> str:
        return str(self.options.get("task_type", "chat"))

    @property
    def priority(self) -> str:
        return str(self.options.get("priority", "normal"))


_REVIEW = {
    "title": "review",
    "type": "object",
    "properties": {"sentiment": {"enum": ["positive", "negative", "neutral"]}},
    "required": ["sentiment"],
    "additionalProperties": False,
}
_TOOLS = [
    {"name": "list_servers", "description": "List the model servers of the fleet."},
    {
        "name": "roll_dice",
        "description": "Roll a die with a number of sides.",
        "parameters": {
            "type": "object",
            "properties": {"sides": {"type": "integer"}},
            "required": ["sides"],
            "additionalProperties": False,
        },
    },
]
_LINE = "12:00:07 INFO worker-3 request 4711 finished in 231 ms\n"
_LOG_LINES = 4000

STEPS = (
    Step("A question", "What is modelyard?", {"max_tokens": 64, "temperature": 0}),
    Step(
        "Small talk, urgent",
        "Hello, how are you?",
        {"priority": "high", "max_tokens": 64, "temperature": 0},
        note="Before those of lower priority in the queue. By now the latency is measured, no longer assumed.",
    ),
    Step(
        "A judgement as JSON",
        "The coffee was cold and the staff was rude. Answer in JSON with the key sentiment.",
        {"task_type": "classification", "response_format": _REVIEW, "max_tokens": 64, "temperature": 0},
        note="The answer is held to a JSON Schema, so only servers that can do this are considered.",
    ),
    Step(
        "A tool call",
        "Roll a die with 12 sides.",
        {"task_type": "tool_use", "tools": _TOOLS, "tool_choice": "required", "max_tokens": 64, "temperature": 0},
        note="Two tools are offered, and one must be called: which, and with what, is up to the model.",
    ),
    Step(
        "Code",
        "Write a Python function that adds two numbers.",
        {"task_type": "code_generation", "max_tokens": 48, "temperature": 0},
        note="All three offer it; the bigger model is better at it, though slower.",
    ),
    Step(
        "A failure on the way",
        "Translate 'water' into French.",
        {"task_type": "translation", "max_tokens": 32, "temperature": 0},
        note="The simulated server is told to fail this one; another takes over.",
    ),
    Step(
        "Too much for every server",
        "Summarize this log:\n" + _LINE * _LOG_LINES,
        {"task_type": "summarization", "max_tokens": 100},
        shown=f"Summarize this log: ... ({_LOG_LINES:,} lines)",
        refused=True,
    ),
)
