"""From what a server says went wrong to what an engine may raise. Pure.

A server's own words never reach a message: some repeat the prompt in them, some a part of the key. Only status, code,
type and parameter are passed on, where they look like identifiers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import msgspec

from model_servers.engine import (
    Busy,
    ContentRefused,
    ContextTooLong,
    CredentialsRejected,
    EngineError,
    EngineFailed,
    OutOfMemory,
    RateLimited,
    UnknownModel,
    Unsupported,
)
from modelyard.openai import wire

_LONGEST_WAIT = 3600.0
_QUOTA_WAIT = 60.0
_IDENTIFIER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}")

_TOO_LONG = re.compile(
    r"context_length_exceeded|string_above_max_length|context (?:length|window|size)|maximum model length"
    r"|max_model_len|max_total_tokens|too many (?:input )?tokens|(?:prompt|input|messages?) (?:is|are) too long"
    r"|reduce the length|maximum (?:input|prompt) length",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"content_filter|content_policy|content policy|moderation|flagged|responsible ?ai|safety system|usage policies",
    re.IGNORECASE,
)
_BAD_KEY = re.compile(r"invalid_api_key|incorrect api key|invalid api key|authentication_error", re.IGNORECASE)
_NO_MODEL = re.compile(
    r"model_not_found|model_decommissioned|not a valid model|model .{0,200}(?:does not exist|not found|not available)",
    re.IGNORECASE | re.DOTALL,
)
_NO_QUOTA = re.compile(r"insufficient_quota|exceeded your current quota|billing|insufficient credits", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory|outofmemory", re.IGNORECASE)
_CURES = (
    (re.compile(r"tool[- _]call[- _]parser|auto[- _]tool[- _]choice", re.IGNORECASE),
     "start vLLM with --enable-auto-tool-choice and --tool-call-parser"),
    (re.compile(r"chat template", re.IGNORECASE), "the model has no usable chat template: send a raw prompt"),
    (re.compile(r"multimodal|multi-modal|image", re.IGNORECASE), "the model takes no such image"),
    (re.compile(r"grammar|json.?schema|structured.?output|guided", re.IGNORECASE),
     "the server does not take this JSON schema"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """Who answers, for people."""

    name: str
    """For example api.openai.com."""
    key: str = ""
    """Where the key comes from, for example "the environment variable OPENAI_API_KEY". Empty: no key is sent."""

    def rejected(self, said: str = "") -> CredentialsRejected:
        if not self.key:
            return CredentialsRejected(f"{self.name} asks for a key{said}: name one with api_key_env or api_key_file")
        return CredentialsRejected(f"{self.name} refuses the key{said}: check {self.key}")

    def lost(self, why: str) -> EngineFailed:
        return EngineFailed(f"{self.name} {why}")


class Answer(msgspec.Struct):
    error: wire.ErrorBody | str | None = None
    message: str | None = None
    """FastAPI's and others', which have no `error`."""


def parse(body: bytes) -> wire.ErrorBody:
    """The error of an answer, empty if it has none that can be read."""
    try:
        answer = msgspec.json.decode(body, type=Answer)
    except msgspec.MsgspecError:
        return wire.ErrorBody()
    if isinstance(answer.error, wire.ErrorBody):
        return answer.error
    return wire.ErrorBody(message=answer.error or answer.message or "")


def from_response(
    source: Source, status: int, headers: Mapping[str, str], body: bytes, now: datetime | None = None
) -> EngineError:
    """What an answer with an HTTP status other than 200 means. `now`: to read a Retry-After that is a date."""
    return from_error(source, status, parse(body), retry_after(headers, now or datetime.now(UTC)))


def from_error(source: Source, status: int, error: wire.ErrorBody, wait: float | None = None) -> EngineError:
    """What an error object means. `wait`: seconds that the server asked for."""
    about = " ".join(str(part) for part in (error.code, error.type, error.message) if part)
    said = f" ({_said(status, error)})"
    if status == 402 or _NO_QUOTA.search(about):
        return RateLimited(f"the quota at {source.name} is used up{said}: raise it there", wait or _QUOTA_WAIT)
    if status in (400, 403, 422) and _REFUSED.search(about):
        return ContentRefused(f"{source.name} will not answer this input{said}")
    if status in (401, 403) or (status < 500 and _BAD_KEY.search(about)):
        return source.rejected(said)
    if status == 429:
        return RateLimited(f"{source.name} limits the rate{said}", 1.0 if wait is None else wait)
    if status == 413 or (status in (400, 422) and _TOO_LONG.search(about)):
        return ContextTooLong(f"prompt and answer do not fit into the context of the model at {source.name}{said}")
    if status in (400, 404) and (_NO_MODEL.search(about) or (status == 404 and error.param == "model")):
        return UnknownModel(f"{source.name} has no such model{said}")
    if status in (404, 405):
        return EngineFailed(f"{source.name} does not have this address{said}: check base_url")
    if 400 <= status < 500 and status not in (408, 409, 425, 498, 499):
        cure = next((cure for pattern, cure in _CURES if pattern.search(about)), "")
        return Unsupported(f"{source.name} does not take this request{said}{cure and ': '}{cure}")
    if status in (498, 503, 529):
        return Busy(f"{source.name} is overloaded{said}", 1.0 if wait is None else wait)
    if _NO_MEMORY.search(about):
        return OutOfMemory(f"{source.name} is out of memory{said}")
    return EngineFailed(f"{source.name} failed{said}")


def of_stream(source: Source, error: wire.ErrorBody) -> EngineError:
    """What an error object in the middle of a stream means: its code takes the place of the status."""
    code = error.code
    status = int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdecimal()) else 0
    if not 400 <= status < 600:
        kinds = {"rate_limit_exceeded": 429, "rate_limit_error": 429, "overloaded_error": 529, "server_error": 500}
        named = (str(name) for name in (code, error.type) if name)
        status = next((kinds[name] for name in named if name in kinds), 500)
        about = f"{code} {error.type} {error.message}"
        if status == 500 and (_REFUSED.search(about) or _TOO_LONG.search(about)):
            status = 400
    return from_error(source, status, error)


def retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds to wait: Retry-After as seconds or date (RFC 9110), or OpenAI's retry-after-ms."""
    seconds = _number(headers.get("retry-after-ms"))
    if seconds is not None:
        seconds /= 1000
    else:
        text = headers.get("Retry-After")
        seconds = _number(text)
        if seconds is None and text:
            try:
                until = parsedate_to_datetime(text)
            except ValueError:
                return None
            seconds = (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds()
    return None if seconds is None else min(max(seconds, 0.0), _LONGEST_WAIT)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if value == value else None


def _said(status: int, error: wire.ErrorBody) -> str:
    parts = [str(status)] if status else []
    for name, value in (("", error.type), ("", error.code), ("parameter ", error.param)):
        text = "" if value is None else str(value)
        if text != str(status) and _IDENTIFIER.fullmatch(text):
            parts.append(name + text)
    return ", ".join(parts) or "no details"
