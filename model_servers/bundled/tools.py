"""Conversations with tools: the tools, questions that need them, their results, and answers that use the results."""

# ruff: noqa: E501 - tables read best in long lines
from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .words import CITIES, NAMES, QUERIES, UNITS, made_up_word

_TYPES = {str: "string", int: "integer"}  # JSON Schema names


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool under several names; `make` returns arguments, result text and slots for the templates."""

    names: tuple[str, ...]
    description: str
    parameters: tuple[tuple[str, ...], ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    make: Callable[[random.Random], tuple[list[Any], Any, dict[str, Any]]]


def _place(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.85 else made_up_word(rng).capitalize()


def _weather(rng: random.Random) -> tuple[list[Any], Any, dict[str, Any]]:
    city, sky, degrees = _place(rng), rng.choice(("sunny", "rainy", "cloudy", "windy", "snowy")), rng.randint(-9, 35)
    result = rng.choice((
        {"city": city, "weather": sky, "temperature": degrees}, {"condition": sky, "temperature_c": degrees},
        {"weather": sky, "degrees": degrees}, f"{sky}, {degrees} degrees",
    ))  # fmt: skip
    return [city], result, {"city": city, "sky": sky, "degrees": degrees}


def _time(rng: random.Random) -> tuple[list[Any], Any, dict[str, Any]]:
    city, clock = _place(rng), f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    return [city], rng.choice(({"time": clock}, {"city": city, "time": clock}, clock)), {"city": city, "clock": clock}


def _sum(rng: random.Random) -> tuple[list[Any], Any, dict[str, Any]]:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return [a, b], rng.choice(({"result": a + b}, {"sum": a + b}, a + b)), {"a": a, "b": b, "c": a + b}


def _product(rng: random.Random) -> tuple[list[Any], Any, dict[str, Any]]:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return [a, b], rng.choice(({"result": a * b}, {"product": a * b}, a * b)), {"a": a, "b": b, "c": a * b}


def _servers(rng: random.Random) -> tuple[list[Any], Any, dict[str, Any]]:
    names = rng.sample(("mac-1", "mac-2", "gpu-1", "gpu-2", "cpu-1", "cpu-2", "box-3", "host-7"), rng.randint(1, 3))
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return [], rng.choice(({"servers": names}, names)), {"listed": listed}


def _server(rng: random.Random) -> tuple[list[Any], Any, dict[str, Any]]:
    name = rng.choice(("mac", "gpu", "cpu", "box", "host")) + f"-{rng.randint(1, 9)}"
    state = rng.choice(("LIVE", "SUSPECT", "LOST", "DRAINING"))
    return (
        [name],
        rng.choice(({"state": state}, {"server": name, "state": state}, state)),
        {"name": name, "state": state},
    )


def _search(rng: random.Random) -> tuple[list[Any], Any, dict[str, Any]]:
    query = rng.choice(QUERIES) if rng.random() < 0.8 else made_up_word(rng)
    count = rng.randint(1, 20)
    return (
        [query],
        rng.choice(({"count": count}, {"hits": count}, f"{count} results")),
        {"query": query, "count": count},
    )


def _convert(rng: random.Random) -> tuple[list[Any], Any, dict[str, Any]]:
    amount, (source, target) = rng.randint(1, 99), rng.choice(UNITS)
    value = rng.randint(1, 200)
    slots = {"amount": amount, "source": source, "target": target, "value": value}
    return [amount, source, target], rng.choice(({"result": value}, {"value": value}, value)), slots


def _mail(rng: random.Random) -> tuple[list[Any], Any, dict[str, Any]]:
    name, text = rng.choice(NAMES), rng.choice(("hello", "see you soon", "thank you", "the demo is ready", "good luck"))
    return [name, text], rng.choice(({"status": "sent"}, {"ok": True}, "sent")), {"name": name, "text": text}


def _remind(rng: random.Random) -> tuple[list[Any], Any, dict[str, Any]]:
    text, minutes = (
        rng.choice(("call Anna", "drink water", "check the queue", "drain gpu-1")),
        rng.choice((5, 10, 20, 30)),
    )
    slots = {"text": text, "minutes": minutes}
    return [text, minutes], rng.choice(({"status": "ok"}, {"ok": True}, "done")), slots


def _dice(rng: random.Random) -> tuple[list[Any], Any, dict[str, Any]]:
    sides = rng.choice((6, 8, 10, 12, 20))
    value = rng.randint(1, sides)
    return [sides], rng.choice(({"value": value}, {"result": value}, value)), {"sides": sides, "value": value}


TOOLS: tuple[Tool, ...] = (
    Tool(("get_weather", "get_weather", "get_current_weather", "weather", "weather_lookup"), "Get the weather of a city.",
         (("city", "location", "place"),),
         ("What is the weather in {city}?", "How is the weather in {city}?", "Is it warm in {city}?",
          "What's the weather like in {city}?", "Tell me the weather in {city}.", "Weather in {city}?",
          "Do I need a coat in {city}?", "Will it rain in {city} today?", "How warm is it in {city}?",
          "What is the temperature in {city}?", "I am going to {city}. What is the weather there?",
          "Is it raining in {city} right now?"),
         ("It is {sky} in {city}, with {degrees} degrees.", "The weather in {city} is {sky}, with {degrees} degrees."),
         _weather),
    Tool(("get_time", "get_time", "current_time", "get_current_time", "clock"), "Get the current time in a city.",
         (("city", "location", "place"),),
         ("What time is it in {city}?", "Tell me the time in {city}.", "What is the time in {city} now?",
          "How late is it in {city}?", "Current time in {city}?", "Can you check the time in {city}?"),
         ("It is {clock} in {city}.", "The time in {city} is {clock}."), _time),
    Tool(("add", "add", "add_numbers", "sum"), "Add two numbers.", (("a", "x"), ("b", "y")),
         ("What is {a} plus {b}?", "Add {a} and {b}.", "What is {a} + {b}?", "Calculate {a} + {b}.",
          "Please add {a} and {b}.", "What is the sum of {a} and {b}?", "How much is {a} plus {b}?", "{a} + {b}"),
         ("{a} plus {b} is {c}.", "The result is {c}."), _sum),
    Tool(("multiply", "multiply", "product", "mul"), "Multiply two numbers.", (("a", "x"), ("b", "y")),
         ("What is {a} times {b}?", "Multiply {a} by {b}.", "What is {a} * {b}?", "How much is {a} times {b}?",
          "Calculate {a} * {b}.", "What is the product of {a} and {b}?"),
         ("{a} times {b} is {c}.", "The result is {c}."), _product),
    Tool(("list_servers", "list_servers", "get_servers", "servers"), "List the model servers of the fleet.", (),
         ("Which servers are in the fleet?", "List the servers.", "Show me all servers.", "What servers are running?",
          "Which machines do we have?", "List all model servers, please.", "What is running in my fleet?"),
         ("The fleet has these servers: {listed}.", "These servers are in the fleet: {listed}."), _servers),
    Tool(("server_state", "get_server", "server_status", "check_server"), "Get the state of one model server.",
         (("name", "server"),),
         ("What is the state of {name}?", "Is {name} healthy?", "Check {name}.", "How is {name} doing?",
          "Tell me the state of server {name}.", "Is {name} live?", "What is the status of {name}?"),
         ("The server {name} is {state}.", "{name} is {state}."), _server),
    Tool(("search", "search", "web_search", "find", "lookup"), "Search for a text.", (("query", "q", "text"),),
         ("Search for {query}.", "Find {query}.", "Please look up {query}.", "Can you search for {query}?",
          "Look for {query}.", "I need information about {query}. Please search for it."),
         ("I found {count} results for {query}.", "The search for {query} gave {count} results."), _search),
    Tool(("convert", "convert_units", "unit_convert"), "Convert an amount from one unit to another.",
         (("amount", "value"), ("from", "source"), ("to", "target")),
         ("Convert {amount} {source} to {target}.", "How many {target} are {amount} {source}?",
          "What are {amount} {source} in {target}?"),
         ("{amount} {source} are {value} {target}.",), _convert),
    Tool(("send_message", "send_mail", "send_email"), "Send a message to a person.", (("to", "name"), ("text", "body")),
         ('Send "{text}" to {name}.', 'Tell {name} "{text}".', 'Write to {name}: "{text}".',
          'Please send {name} the message "{text}".'),
         ("I have sent the message to {name}.", "The message to {name} has been sent."), _mail),
    Tool(("set_reminder", "remind", "add_reminder"), "Set a reminder.", (("text", "title"), ("minutes", "in_minutes")),
         ("Remind me to {text} in {minutes} minutes.", "In {minutes} minutes, remind me to {text}.",
          "Set a reminder in {minutes} minutes: {text}."),
         ("I will remind you in {minutes} minutes.", "The reminder is set for {minutes} minutes from now."), _remind),
    Tool(("roll_dice", "roll", "dice"), "Roll a die with a number of sides.", (("sides", "n"),),
         ("Roll a die with {sides} sides.", "Please roll a {sides}-sided die.", "Throw a die with {sides} sides."),
         ("You rolled a {value}.", "The die shows {value}."), _dice),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ToolCase:
    """A question with the tool that answers it, as OpenAI-style specification and messages."""

    specification: dict[str, Any]
    messages: tuple[dict[str, Any], ...]


def specification(tool: Tool, rng: random.Random, values: list[Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Return the OpenAI-style specification of `tool` under one of its names, and the chosen parameter names."""
    if values is None:
        values = tool.make(rng)[0]
    names = [rng.choice(choice) for choice in tool.parameters]
    function: dict[str, Any] = {"name": rng.choice(tool.names)}
    if rng.random() < 0.85:
        function["description"] = tool.description
    properties: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        properties[name] = {"type": _TYPES[type(value)]}
        if rng.random() < 0.2:
            properties[name]["description"] = f"The {name}."
    function["parameters"] = {"type": "object", "properties": properties}
    if names and rng.random() < 0.8:
        function["parameters"]["required"] = names
    return {"type": "function", "function": function}, names


def tool_case(rng: random.Random) -> ToolCase:
    """Return one question, the call, its result and the closing answer."""
    tool = rng.choice(TOOLS)
    values, result, slots = tool.make(rng)
    described, names = specification(tool, rng, values)
    question = rng.choice(tool.questions).format(**slots)
    if rng.random() < 0.2:
        question = rng.choice(("Please use a tool. ", "Use the tool: ", "Hi! ", "Hello, ", "Please: ")) + question
    if rng.random() < 0.5:
        question = question.rstrip(".?") if rng.random() < 0.5 else question
    call = {"name": described["function"]["name"], "arguments": dict(zip(names, values, strict=True))}
    messages = (
        {"role": "user", "content": question},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": result if isinstance(result, str) else json.dumps(result)},
        {"role": "assistant", "content": rng.choice(tool.answers).format(**slots)},
    )
    return ToolCase(described, messages)


def other_tools(rng: random.Random, count: int, taken: str = "") -> list[dict[str, Any]]:
    """Return `count` specifications that differ from the tool called `taken`."""
    free = [tool for tool in TOOLS if taken not in tool.names]
    return [specification(tool, rng)[0] for tool in rng.sample(free, count)]


__all__ = ["TOOLS", "Tool", "ToolCase", "other_tools", "specification", "tool_case"]
