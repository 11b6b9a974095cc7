"""Tokens and texts of the simulated engine: deterministic, readable, meaningless."""

from __future__ import annotations

import random
import re
from array import array
from functools import lru_cache
from hashlib import blake2b, shake_256
from math import sqrt

from model_servers.engine import GenerationRequest, Image

CHARACTERS_PER_TOKEN = 4
IMAGE_TOKENS = 256
NOTICE = "This is a simulated answer: no model has read the prompt. "

_ADJECTIVES = (
    "quiet",
    "careful",
    "patient",
    "bright",
    "narrow",
    "early",
    "simple",
    "steady",
    "open",
    "distant",
    "gentle",
)
_NOUNS = ("harbour", "river", "engine", "garden", "signal", "ledger", "winter", "market", "bridge", "window", "letter")
_VERBS = ("keeps", "follows", "measures", "carries", "answers", "crosses", "remembers", "repairs", "draws", "finds")
_PLACES = ("by the mill", "before noon", "without a sound", "along the wall", "for a season", "under the roof")


def count_tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


_TOLD = re.compile(r"\[(\d{1,6}) tokens\](?:<\|assistant\|>)?\Z")


def told_tokens(prompt: str) -> int:
    """Tokens of the answer that a rendered prompt asks for in its last words; 0 where it does not."""
    found = _TOLD.search(prompt, max(0, len(prompt) - 40))
    return int(found[1]) if found else 0


def render_prompt(request: GenerationRequest) -> str:
    """The prompt as one text: what is counted and what the prefix cache goes by."""
    if request.prompt is not None:
        return request.prompt
    parts: list[str] = []
    for tool in request.tools:
        parts.append(f"<|tool|>{tool.name} {tool.description} {tool.parameters_schema}")
    for message in request.messages:
        parts.append(f"<|{message.role.name.lower()}|>")
        for part in message.content:
            parts.append(_render_image(part) if isinstance(part, Image) else part)
        for call in message.tool_calls:
            parts.append(f"<|call|>{call.name}{call.arguments_json}")
    parts.append("<|assistant|>")
    return "".join(parts)


def _render_image(image: Image) -> str:
    digest = blake2b(image.data, digest_size=32).hexdigest()
    size = IMAGE_TOKENS * CHARACTERS_PER_TOKEN
    return (digest * (size // len(digest) + 1))[:size]


def fingerprint(prompt: str, engine_seed: int, request_seed: int | None) -> int:
    """A number that prompt and seeds determine, the same in every process."""
    digest = blake2b(f"{engine_seed}/{request_seed}/".encode(), digest_size=8)
    digest.update(prompt.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "big")


@lru_cache(maxsize=8)
def _book(seed: int) -> tuple[str, tuple[int, ...]]:
    """Filler for one engine seed, and where its sentences begin. Answers are cut out of it."""
    draw = random.Random(seed)
    sentences = []
    starts = []
    length = 0
    for _ in range(512):
        sentence = (
            f"The {draw.choice(_ADJECTIVES)} {draw.choice(_NOUNS)} {draw.choice(_VERBS)} "
            f"the {draw.choice(_ADJECTIVES)} {draw.choice(_NOUNS)} {draw.choice(_PLACES)}. "
        )
        starts.append(length)
        sentences.append(sentence)
        length += len(sentence)
    return "".join(sentences), tuple(starts)


def filler(number: int, tokens: int, engine_seed: int, *, whole_sentences: bool) -> str:
    """A text of that many tokens, or with `whole_sentences` the most sentences that fit in."""
    book, starts = _book(engine_seed)
    size = tokens * CHARACTERS_PER_TOKEN
    start = starts[number % len(starts)]
    missing = size - len(NOTICE)
    body = book[start:] if missing <= len(book) - start else book[start:] + book * (missing // len(book) + 1)
    text = (NOTICE + body)[:size]
    if whole_sentences:
        end = text.rfind(". ")
        if end > 0:
            return text[: end + 1]
    return text


def embed(text: str, dimension: int, scope: str) -> list[float]:
    """A unit vector that the text determines; likeness of texts is not reflected."""
    digest = shake_256(scope.encode() + b"\0" + text.encode("utf-8", "surrogatepass")).digest(2 * dimension)
    values = array("h", digest)
    norm = sqrt(sum(value * value for value in values)) or 1.0
    return [value / norm for value in values]
