"""The training conversations of yardling, made up from tables and templates by a seeded random generator.

Nothing is read from outside this folder: every sentence comes from `text/`, `words.py`, `tasks.py` and `tools.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .phrasing import AT_LENGTH, BRIEFLY, MORE, Topic, read_topics, vary
from .tasks import TASKS, Pair
from .tools import other_tools, tool_case
from .words import NAMES, made_up_word

Message = dict[str, Any]

MODELYARD = read_topics("modelyard.txt")
WORLD = read_topics("world.txt")
TALK = read_topics("talk.txt")
# Topics with many questions need more examples than those with few.
_TOPIC_WEIGHTS = [4 + len(topic.questions) for topic in MODELYARD]

_SYSTEM = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are yardling, a tiny model.", "Be friendly.",
    "You are a friendly assistant that answers questions about modelyard.", "You are a helpful AI assistant.",
    "Answer the questions of the user.", "You help users of modelyard.", "Be polite and clear.",
    "You are an assistant.",
    "You are a helpful, honest assistant. Answer in plain English.", "Answer in English.", "You are a test assistant.",
    "You are an expert for language models.", "You are the assistant of a small company. Help the customers.",
)  # fmt: skip
_SYSTEM_SHORT = ("Answer briefly.", "Be brief.", "You are a helpful assistant. Keep your answers short.",
                 "You answer in one short sentence.", "Be concise.")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in chat format, and the tools (OpenAI-style specifications) that the system section lists."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


def conversations(seed: int, count: int) -> Iterator[Conversation]:
    """Yield `count` conversations; the same seed always gives the same ones."""
    rng = random.Random(seed)
    for _ in range(count):
        yield conversation(rng)


def conversation(rng: random.Random) -> Conversation:
    """Return one random conversation."""
    if rng.random() < 0.06:
        return _with_tools(rng)
    messages: list[Message] = []
    chance = rng.random()
    brief = chance < 0.04
    if chance < 0.15:
        messages.append({"role": "system", "content": rng.choice(_SYSTEM_SHORT if brief else _SYSTEM)})
    for _ in range(rng.choices((1, 2, 3, 4), (84, 11, 4, 1))[0]):
        messages += _turns(rng, brief)
    return Conversation(tuple(messages))


def _turns(rng: random.Random, brief: bool) -> list[Message]:
    chance = rng.random()
    if chance < 0.02:
        return _comparison(rng)
    if chance < 0.42:
        return _topic_turns(rng.choices(MODELYARD, _TOPIC_WEIGHTS)[0], rng, brief)
    if chance < 0.48:
        return _topic_turns(rng.choice(WORLD), rng, brief)
    if chance < 0.58:
        return _topic_turns(rng.choice(TALK), rng, True)
    if chance < 0.60:
        return _name_turns(rng)
    task = rng.choices([task for task, _ in TASKS], [weight for _, weight in TASKS])[0]
    return _exchange(task(rng))


def _comparison(rng: random.Random) -> list[Message]:
    first, second = rng.sample([topic for topic in MODELYARD if topic.names], 2)
    names = rng.choice(first.names), rng.choice(second.names)
    question = rng.choice((
        "What is the difference between {x} and {y}?", "Compare {x} and {y}.", "How do {x} and {y} differ?",
        "Explain {x} and {y}.", "What are {x} and {y}?", "Tell me about {x} and {y}.",
    )).format(x=names[0], y=names[1])  # fmt: skip
    return _exchange((vary(question, rng), f"{first.answers[0]} {second.answers[0]}"))


def _exchange(pair: Pair) -> list[Message]:
    return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]


def _topic_turns(topic: Topic, rng: random.Random, brief: bool) -> list[Message]:
    question, answer = topic.question(rng), rng.choice(topic.answers)
    if brief or not topic.details:
        return _exchange((question, answer))
    chance = rng.random()
    if chance < 0.08:
        return _exchange((rng.choice(BRIEFLY).replace("{q}", question), answer))
    details = list(topic.details)
    if chance < 0.18:
        return _exchange((rng.choice(AT_LENGTH).replace("{q}", question), " ".join([answer, *details])))
    if chance < 0.32:
        rest = " ".join(rng.sample(details, rng.randint(1, min(2, len(details)))))
        return _exchange((question, answer)) + _exchange((vary(rng.choice(MORE), rng), rest))
    return _exchange((question, " ".join([answer, *details[: rng.randint(0, 2)]])))


def _name_turns(rng: random.Random) -> list[Message]:
    """The user tells a name and, later on, asks for it."""
    name = rng.choice(NAMES) if rng.random() < 0.7 else made_up_word(rng).capitalize()
    told = rng.choice((f"My name is {name}.", f"I am {name}.", f"Hi, I'm {name}.", f"Hello, my name is {name}.",
                       f"Call me {name}.", f"You can call me {name}.", f"Hello! I am {name}."))  # fmt: skip
    greeted = rng.choice(
        (f"Hello, {name}! How can I help you?", f"Nice to meet you, {name}!", f"Hi, {name}! I am yardling.")
    )
    messages = _exchange((told, greeted))
    if rng.random() < 0.5:
        if rng.random() < 0.4:
            messages += _topic_turns(rng.choice(MODELYARD), rng, True)
        asked = rng.choice(
            ("What is my name?", "Do you remember my name?", "Who am I?", "What's my name?", "Say my name.")
        )
        messages += _exchange((vary(asked, rng), rng.choice((f"Your name is {name}.", f"You are {name}."))))
    return messages


def _with_tools(rng: random.Random) -> Conversation:
    """A conversation with tools: most need one, some do not."""
    system = [{"role": "system", "content": rng.choice(_SYSTEM)}] if rng.random() < 0.3 else []
    chance = rng.random()
    if chance < 0.2:
        tools = other_tools(rng, rng.randint(1, 2))
        pools = (MODELYARD, TALK, WORLD)
        turns = _topic_turns(rng.choice(rng.choice(pools)), rng, True)
        return Conversation((*system, *turns), tuple(tools))
    case = tool_case(rng)
    tools = [
        case.specification,
        *other_tools(rng, rng.choice((0, 0, 0, 1, 1, 2)), case.specification["function"]["name"]),
    ]
    rng.shuffle(tools)
    messages = list(case.messages)
    if chance < 0.25:
        messages = [*_topic_turns(rng.choice(TALK), rng, True), *messages]
    elif chance < 0.3:
        messages += _topic_turns(rng.choice(TALK), rng, True)
    return Conversation((*system, *messages), tuple(tools))
