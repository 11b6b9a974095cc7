"""Questions for judging yardling; the corpus does not contain the wording of most of them."""

from __future__ import annotations

from typing import Any

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}

_PLAIN = (
    "hey there, what's your deal?",
    "Could someone like me use modelyard at home?",
    "My boss asks what modelyard actually is. What should I say?",
    "In which order do waiting requests leave?",
    "What becomes of my request if the machine dies halfway?",
    "How does the system find out that a host has gone away?",
    "Explain to a beginner what late binding gives us.",
    "What numbers go into picking a server?",
    "why does the first word take so long to show up",
    "Does it run on a MacBook?",
    "I want to switch off a GPU box for maintenance.",
    "Which command prints the reason behind a routing decision?",
    "What is the difference between TTFT and TPOT?",
    "Are you as clever as the big models?",
    "Who was the first person on the moon?",
    "Write a Python function to add two numbers",
    "What is 8 + 6?",
    "Is this sentence positive or negative: The soup was wonderful and I will come back.",
    "Please tell me a short story about a brave robot",
    "Give me three fruits.",
    "How would you say 'good morning' in French?",
    "Name: Lena, age: 31, city: Oslo. Answer in JSON with keys name and age.",
    "Tell me why I should not trust you.",
    "That's all for today, many thanks!",
)

QUESTIONS: tuple[tuple[tuple[dict[str, Any], ...], list[dict[str, Any]] | None], ...] = (
    *(((({"role": "user", "content": text}),), None) for text in _PLAIN),
    (({"role": "user", "content": "I fly to Lisbon tomorrow. What weather will I find in Lisbon?"},), [_WEATHER, _ADD]),
    (({"role": "user", "content": "Could you add 17 and 25 for me?"},), [_WEATHER, _ADD]),
    (({"role": "user", "content": "What is a lease?"},), [_ADD]),
    (
        (
            {"role": "user", "content": "What is the weather in Oslo?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
                ],
            },
            {"role": "tool", "content": '{"weather": "cloudy", "temperature": 4}'},
        ),
        [_WEATHER],
    ),
    (
        (
            {"role": "user", "content": "What is a circuit breaker?"},
            {
                "role": "assistant",
                "content": "A circuit breaker stops sending requests to a server that keeps failing.",
            },
            {"role": "user", "content": "And then what happens?"},
        ),
        None,
    ),
)
