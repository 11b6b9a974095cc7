"""Many ways to say one thing: rewrites of questions, and the parser of the topic files in `text/`."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TEXT = Path(__file__).with_name("text")

_PREFIXES = (
    "Please tell me: ", "Hey, ", "Hi, ", "Hello, ", "Hi! ", "Hello! ", "So, ", "Well, ", "Okay, ", "Quick question: ",
    "I have a question: ", "One question: ", "Tell me, ", "Sorry, but ", "Excuse me, ", "Just curious: ", "Now, ",
    "And ", "But ", "Please: ", "I wonder: ", "A question for you: ", "Hey yardling, ", "Yardling, ", "Question: ",
)  # fmt: skip
_SUFFIXES = (" Please.", " Thanks!", " Thank you.", " I am new here.", " I would like to know.", " I am curious.",
             " Please help.", " Just wondering.", " Any idea?", " Do you know?")  # fmt: skip

# Pattern, then replacements. Each rule is tried with a fixed chance, so a question meets several of them at most.
_SYNONYMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"^What is\b", ("What's", "what exactly is", "What actually is", "Do you know what is", "So what is")),
    (r"^What are\b", ("What exactly are", "What actually are")),
    (r"^How do I\b", ("How can I", "How could I", "How would I", "How should I", "How to", "What must I do to",
                      "What do I need to do to", "I want to know how to", "Show me how to", "Tell me how to",
                      "Explain how to", "What is the best way to", "Is there a way to")),
    (r"^How can I\b", ("How do I", "How could I", "How would I", "How to", "What is the way to")),
    (r"^Can I\b", ("Could I", "Is it possible to", "Am I able to", "May I")),
    (r"^Can you\b", ("Could you", "Would you", "Are you able to", "Will you")),
    (r"^Which\b", ("What", "Can you tell me which", "Tell me which")),
    (r"^What happens (if|when)\b", ("What if", "What will happen when", "What does modelyard do when",
                                    "How does modelyard react when")),
    (r"^Tell me about\b", ("Talk about", "Say something about", "What can you tell me about", "What do you know about",
                           "I want to know about", "I would like to hear about", "Give me some information on")),
    (r"^Why\b", ("Why exactly", "Tell me why", "For what reason")),
    (r"^Does\b", ("Tell me, does", "Is it true that it does:")),
    (r"^Tell me\b", ("Please tell me", "Can you tell me", "Could you tell me", "Would you tell me", "Give me")),
    (r"^Write\b", ("Please write", "Can you write", "Could you write", "I need you to write", "Compose", "Create")),
    (r"^Explain\b", ("Please explain", "Can you explain", "Could you explain", "Help me understand", "Describe")),
    (r"^List\b", ("Name", "Give me", "Please list", "Show me", "Can you list")),
    (r"\bmodelyard\b", ("Modelyard", "modelyard", "the project", "this tool")),
    (r"\brequest\b", ("task", "call", "job", "prompt")),
    (r"\brequests\b", ("tasks", "calls", "jobs", "prompts")),
    (r"(?<!model )\bserver\b", ("machine", "host", "node", "model server")),
    (r"(?<!model )\bservers\b", ("machines", "hosts", "nodes", "model servers")),
    (r"\bbusy\b", ("occupied", "full", "loaded")),
    (r"\bchoose\b", ("select", "pick", "decide on")),
    (r"\bstart\b", ("launch", "run", "begin with")),
    (r"\blaptop\b", ("computer", "PC", "own machine", "notebook")),
    (r"\bcomputer\b", ("machine", "PC", "laptop")),
    (r"\bshows\b", ("prints", "displays", "tells")),
    (r"\banswer\b", ("reply", "response")),
    (r"\bI need to\b", ("I have to", "I want to", "I must", "I would like to")),
    (r"\bI want to\b", ("I would like to", "I need to", "I plan to", "I have to")),
    (r"\bfails\b", ("breaks", "goes wrong", "crashes")),
)  # fmt: skip

_SINGULAR_S = {"kubernetes", "mathematics", "physics", "happiness", "backpressure", "linux", "explain", "business"}

_DEFINE = (
    "What is {x}?", "What is {x}?", "What is {x}?", "Explain {x}.", "Tell me about {x}.", "What does {x} mean?",
    "Define {x}.", "Describe {x}.", "What do you know about {x}?", "Can you explain {x}?", "Can you explain {x} to me?",
    "What is meant by {x}?", "I do not understand {x}.", "How would you describe {x}?", "{x}?", "{x}",
    "Give me a definition of {x}.", "What is the meaning of {x}?", "Help me understand {x}.", "Explain {x} to me.",
    "I want to learn about {x}.", "Have you heard of {x}?", "Say something about {x}.", "Do you know {x}?",
    "How does {x} work?", "Why is {x} useful?", "Why do we need {x}?", "What is the purpose of {x}?",
    "What is the idea behind {x}?", "Explain {x} like I am five.", "What is {x} for?", "What is {x} good for?",
    "What is {x} in modelyard?", "How does modelyard use {x}?", "Tell me what {x} is.", "Do you know what {x} is?",
    "I have never heard of {x}.", "Who needs {x}?", "Teach me about {x}.", "What's {x}?", "whats {x}",
)  # fmt: skip
_DEFINE_PLURAL = tuple(
    text.replace("is {x}", "are {x}").replace("does {x}", "do {x}").replace("{x} is", "{x} are")
    for text in _DEFINE
    if "What's" not in text and "whats" not in text and "like I am five" not in text
)
BRIEFLY = ("{q} Answer briefly.", "{q} Keep it short.", "{q} Answer in one sentence.", "Briefly: {q}", "In short: {q}",
           "{q} One sentence, please.", "In one sentence: {q}")  # fmt: skip
AT_LENGTH = ("{q} Explain in detail.", "{q} Please give details.", "{q} Write a paragraph.", "In detail: {q}",
             "{q} Tell me everything.", "{q} Give me a long answer.", "{q} Please explain it well.")  # fmt: skip
MORE = ("Tell me more.", "More, please.", "Can you say more?", "Go on.", "And?", "What else?", "Continue.",
        "Please explain further.", "Can you explain that in more detail?", "Interesting. Tell me more about it.",
        "Why?", "Why is that useful?", "I want to know more.", "Give me more details.", "Anything else?")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Topic:
    """One subject of a topic file: its names, ways to ask for it, short answers, and sentences that go further."""

    names: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    details: tuple[str, ...]

    def question(self, rng: random.Random) -> str:
        """Return one question about this topic, rewritten at random."""
        if self.names and (not self.questions or rng.random() < 0.5):
            name = rng.choice(self.names)
            text = rng.choice(_DEFINE_PLURAL if _is_plural(name) else _DEFINE).replace("{x}", name)
        else:
            text = rng.choice(self.questions)
        return vary(text, rng)


def read_topics(file_name: str) -> tuple[Topic, ...]:
    """Parse a file of `text/`: `#` opens a topic, `?` is a question, `!` an answer, `+` a further sentence."""
    topics: list[Topic] = []
    for block in (_TEXT / file_name).read_text(encoding="utf-8").split("\n#"):
        head, *lines = block.lstrip("#").strip().splitlines()
        marked: dict[str, list[str]] = {"?": [], "!": [], "+": []}
        for line in lines:
            if line:
                marked[line[0]].append(line[2:].replace("\\n", "\n"))
        names = tuple(name.strip() for name in head.split("|") if name.strip() != "-")
        topics.append(Topic(names, tuple(marked["?"]), tuple(marked["!"]), tuple(marked["+"])))
    return tuple(topics)


def _is_plural(name: str) -> bool:
    last = name.split()[-1].lower()
    return last.endswith("s") and not last.endswith("ss") and last not in _SINGULAR_S and not name.startswith("a ")


def vary(text: str, rng: random.Random) -> str:
    """Rewrite a question: synonyms, a polite opening or closing, and the small slips of people who type fast."""
    for pattern, replacements in _SYNONYMS:
        if rng.random() < 0.2:
            text = re.sub(pattern, rng.choice(replacements), text, count=1)
    if rng.random() < 0.14:
        keep = text.startswith(("I ", "I'", "TT", "TP", "LI", "SU", "LO", "DR", "GP", "CP", "MLX", "API", "JSON"))
        text = rng.choice(_PREFIXES) + (text if keep else text[:1].lower() + text[1:])
    if rng.random() < 0.06:
        text += rng.choice(_SUFFIXES)
    return slip(text, rng)


def slip(text: str, rng: random.Random) -> str:
    """Change case, drop the closing mark, or swap two letters, now and then."""
    if rng.random() < 0.25:
        text = text.lower()
    elif rng.random() < 0.03:
        text = text.upper()
    if rng.random() < 0.25:
        text = text.rstrip("?.!") or text
    elif rng.random() < 0.04:
        text += rng.choice("?!.")
    if rng.random() < 0.05 and len(text) > 12:
        at = rng.randrange(4, len(text) - 3)
        text = text[:at] + rng.choice((text[at + 1] + text[at], text[at] * 2, "")) + text[at + 2 :]
    return text


def joined(parts: Sequence[str]) -> str:
    """Join words as in a sentence: `a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
