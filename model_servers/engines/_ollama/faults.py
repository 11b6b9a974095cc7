"""What Ollama and the way to it say when something is wrong, as the errors that engines raise."""

from __future__ import annotations

import re

from model_servers.engine import (
    Busy,
    ContextTooLong,
    CredentialsRejected,
    EngineError,
    EngineFailed,
    OutOfMemory,
    RateLimited,
    UnknownModel,
    Unsupported,
)

_MEMORY = re.compile(
    r"more system memory|out of memory|not enough memory|insufficient memory|unable to allocate|cudamalloc|alloc.*fail",
    re.IGNORECASE,
)
_CONTEXT = re.compile(
    r"available context|context length|context size|context window|maximum context|too large to process", re.IGNORECASE
)
_QUOTED = re.compile(r"[\"'`{\[<\n]|raw=|content=")
"""Where Ollama begins to quote what it was given or has generated."""
_LONGEST = 160
_LONGEST_RETRY = 3600.0


class NoConnection(EngineFailed):
    """Nobody listens where Ollama should."""


def harmless(text: str) -> str:
    """The beginning of Ollama's message, up to the first thing that could be a prompt or an answer."""
    return _QUOTED.split(text, maxsplit=1)[0].strip(" :,(")[:_LONGEST].strip()


def from_response(text: str, status: int, model: str, *, started: bool = False) -> EngineError:
    """The error for Ollama's `{"error": text}`; `status` is not positive when it came as a line after a 200.

    `started`: a part of the answer is out already, so that only EngineFailed is left.
    """
    kind = _refusal(text, status, model)
    if started and not isinstance(kind, EngineFailed):
        return EngineFailed(f"Ollama broke the answer off: {kind}")
    return kind


def _refusal(text: str, status: int, model: str) -> EngineError:
    said = harmless(text) or f"HTTP status {status}"
    low = text.lower()
    if _MEMORY.search(text):
        return OutOfMemory(f"model {model!r} does not fit into memory: unload another one, or lower num_ctx ({said})")
    if _CONTEXT.search(text):
        return ContextTooLong(
            f"Ollama says that it does not fit the context of {model!r}: shorten it, or raise num_ctx"
        )
    if status == 503 or "maximum pending requests" in low:
        return Busy("Ollama's queue is full")
    if status == 429:
        return rate_limited("")
    if status in (401, 403):
        return CredentialsRejected(
            "Ollama, or a proxy before it, wants credentials: set OLLAMA_API_KEY, or run `ollama signin` on its host"
        )
    if "file does not exist" in low:
        return UnknownModel(f"neither this Ollama nor its library has a model called {model!r}")
    if status == 404 or ("model" in low and "not found" in low):
        return UnknownModel(f"Ollama does not have {model!r}: fetch it with `ollama pull {model}`, or set auto_pull")
    if "does not support" in low:
        return Unsupported(f"model {model!r}: Ollama says that it lacks a feature that the request needs")
    if status == 400:
        return Unsupported(f"Ollama refuses the request: {said}")
    return EngineFailed(f"Ollama failed: {said}")


def rate_limited(retry_after: str) -> RateLimited:
    """`retry_after`: the header, seconds as a number or anything else."""
    said = "Ollama, or a proxy before it, limits the rate"
    try:
        return RateLimited(said, min(max(float(retry_after), 0.0), _LONGEST_RETRY))
    except ValueError:
        return RateLimited(said)


def no_connection(url: str) -> NoConnection:
    return NoConnection(f"nothing answers at {url}: start Ollama with `ollama serve`, or set `url`")


def broken(url: str) -> EngineFailed:
    return EngineFailed(f"the connection to Ollama at {url} broke: see the log of `ollama serve`")


def garbage(url: str) -> EngineFailed:
    return EngineFailed(f"what answers at {url} does not speak Ollama's protocol: check `url`, or update Ollama")


def silent(seconds: float, setting: str) -> EngineFailed:
    return EngineFailed(
        f"Ollama has sent nothing for {seconds:g} s: see the log of `ollama serve`, restart it, or raise {setting}"
    )
