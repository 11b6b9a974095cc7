"""What a request may tell modelyard beyond OpenAI's words: in headers, or in its `metadata`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from control_plane.gateway.errors import refuse
from modelyard.v1 import selection_pb2, task_pb2
from modelyard.v1.orchestrator_pb2 import EmbedRequest, GenerateRequest

_FIELDS = ("task_type", "priority", "timeout", "preset", "server", "provider")
_HEADERS = tuple((f"X-Modelyard-{'-'.join(part.title() for part in name.split('_'))}", name) for name in _FIELDS)
_NAMES = tuple((title, title.lower().encode(), name, f"modelyard_{name}") for title, name in _HEADERS)
EXPLAIN = b"x-modelyard-explain"

_TASK_TYPES = {name.removeprefix("TASK_TYPE_").lower(): number for name, number in task_pb2.TaskType.items() if number}
_PRIORITIES = {
    name.removeprefix("TASK_PRIORITY_").lower(): number for name, number in task_pb2.TaskPriority.items() if number
}
_ANY_MODEL = frozenset({"auto", "modelyard"})


@dataclass(frozen=True, slots=True)
class Hints:
    """Checked; zero and empty mean not said."""

    task_type: int = 0
    priority: int = 0
    timeout: float | None = None
    """Seconds that everything may take."""
    preset: str = ""
    server: str = ""
    provider: str = ""
    explain: bool = False


_NONE = Hints()


def hints(headers: Mapping[bytes, bytes], metadata: Mapping[str, str] | None) -> Hints:
    """Headers win over metadata. Raises INVALID_REQUEST naming the header or key."""
    said: dict[str, tuple[str, str]] = {}
    for title, header, name, key in _NAMES:
        value = headers.get(header)
        if value is not None:
            said[name] = title, value.decode("latin-1").strip()
        elif metadata and key in metadata:
            said[name] = f"metadata.{key}", metadata[key].strip()
    explain = headers.get(EXPLAIN)
    if not said and explain is None:
        return _NONE
    return Hints(
        task_type=_number(said, "task_type", _TASK_TYPES),
        priority=_number(said, "priority", _PRIORITIES),
        timeout=_seconds(said),
        preset=said.get("preset", ("", ""))[1],
        server=said.get("server", ("", ""))[1],
        provider=said.get("provider", ("", ""))[1],
        explain=explain is not None and _truth(explain.decode("latin-1")),
    )


def _number(said: Mapping[str, tuple[str, str]], name: str, numbers: Mapping[str, int]) -> int:
    where, value = said.get(name, ("", ""))
    if not value:
        return 0
    number = numbers.get(value.lower().replace("-", "_"))
    if number is None:
        raise refuse(where, f"must be one of {', '.join(numbers)}")
    return number


def _seconds(said: Mapping[str, tuple[str, str]]) -> float | None:
    where, value = said.get("timeout", ("", ""))
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise refuse(where, "must be a number of seconds above 0")
    return seconds


def _truth(value: str) -> bool:
    value = value.strip().lower()
    if value in ("true", "1", "yes"):
        return True
    if value in ("false", "0", "no", ""):
        return False
    raise refuse("X-Modelyard-Explain", "must be true or false")


def apply(given: Hints, request: GenerateRequest) -> None:
    """Put what was said into a request to generate."""
    if given is _NONE:
        return
    if given.task_type:
        request.task_type = given.task_type  # type: ignore[assignment]
    if given.preset:
        request.preset = given.preset
    request.explain = given.explain
    apply_routing(given, request)


def apply_routing(given: Hints, request: GenerateRequest | EmbedRequest) -> None:
    """Put what holds for embeddings too into a request."""
    if given.priority:
        request.priority = given.priority  # type: ignore[assignment]
    if given.server:
        request.requirements.server_id = given.server
    if given.provider:
        request.requirements.provider = given.provider


def pin(requirements: selection_pb2.Requirements, model: str) -> None:
    """Demand the model that a request names; "auto" and "modelyard" leave the choice to the selector."""
    if not model:
        raise refuse("model", 'is required; "auto" leaves the choice to modelyard')
    if model not in _ANY_MODEL:
        requirements.model = model
