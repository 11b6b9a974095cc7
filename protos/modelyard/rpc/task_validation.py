"""What the comments of modelyard/v1/task_queue.proto demand, checked as in `modelyard.rpc.validation`."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from modelyard.rpc.errors import Violation
from modelyard.rpc.validation import (
    MAX_LABELS,
    MAX_SECONDS,
    MAX_TEXT,
    MAX_VIOLATIONS,
    Violations,
    check_generate_request,
    unknown_number,
)
from modelyard.v1 import orchestrator_pb2, selection_pb2, task_pb2, task_queue_pb2

MAX_ATTEMPTS = 100
MAX_GROUP = 200
"""Characters of a group."""
MAX_KEY = 200
"""Characters of an idempotency key."""
MAX_LABEL_KEY = 64
MAX_LABEL_VALUE = 256
MAX_URL = 2000
MAX_ID = 64
"""Characters of a task's id: no longer one was ever given out."""
MAX_PAGE = 1000
MAX_PAGE_TOKEN = 512
MAX_WANTED = 64
"""Excluded servers and labels of one task. They make its lane, of which each costs."""

_EARLIEST, _LATEST = -62_135_596_800, 253_402_300_799
"""The range of google.protobuf.Timestamp as it is documented: the years 1 to 9999."""
_MOST_EVENT_ID = 2**63 - 1
"""What databases count with."""

_TASK_TYPES = frozenset(task_pb2.TaskType.values())
_STATES = frozenset(task_queue_pb2.TaskState.values())
_KEY = re.compile(r"[\x20-\x7e]{1,200}")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")

SubmitRequest = task_queue_pb2.SubmitTaskRequest | task_queue_pb2.BatchSubmitTasksRequest


# -------------------------------------------------------------------- submit ---


def check_submit(request: SubmitRequest, work: orchestrator_pb2.GenerateRequest | None = None) -> Violations:
    """Violations of a task to be submitted but for those of time, see `check_times`.

    `work` is what is to be generated, with what its preset adds; None: the spec says it all.
    """
    if not request.HasField("spec"):
        return [Violation("spec", "is required")]
    spec = request.spec
    # A TaskSpec has the fields of a GenerateRequest that say what is to be done.
    found = check_generate_request(work or spec, "spec.")  # type: ignore[arg-type]
    if spec.HasField("requirements"):
        _check_sizes(spec.requirements, found)
    if not 0 <= spec.max_attempts <= MAX_ATTEMPTS:
        found.append(Violation("spec.max_attempts", f"must be 1 to {MAX_ATTEMPTS}, not {spec.max_attempts}"))
    if spec.group:
        _check_group(spec.group, "spec.group", found)
    if spec.labels:
        _check_labels(spec, found)
    if spec.HasField("callback") and (problem := url_problem(spec.callback.url)):
        found.append(Violation("spec.callback.url", problem))
    if spec.HasField("not_before"):
        _check_timestamp(spec.not_before, "spec.not_before", found)
    if spec.HasField("deadline"):
        _check_timestamp(spec.deadline, "spec.deadline", found)
    if spec.HasField("attempt_timeout") and not _is_positive(spec.attempt_timeout):
        found.append(Violation("spec.attempt_timeout", f"must be a duration above 0, below {MAX_SECONDS} s"))
    if request.idempotency_key:
        _check_key(request.idempotency_key, "idempotency_key", found)
    return found[:MAX_VIOLATIONS]


def check_times(spec: task_queue_pb2.TaskSpec, now: float) -> Violations:
    """What is wrong with the times of a task that `check_submit` has passed, at `now` (seconds since the epoch)."""
    if not spec.HasField("deadline"):
        return []
    deadline = spec.deadline.seconds + spec.deadline.nanos * 1e-9
    if deadline <= now:
        return [Violation("spec.deadline", "must lie ahead")]
    if spec.HasField("not_before") and deadline <= spec.not_before.seconds + spec.not_before.nanos * 1e-9:
        return [Violation("spec.deadline", "must lie after not_before")]
    return []


def url_problem(url: str) -> str | None:
    """What keeps `url` from being an address for callbacks; None if it is one."""
    if not url:
        return "is required"
    if len(url) > MAX_URL:
        return f"must have at most {MAX_URL} characters"
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return "must be printable ASCII without spaces and backslashes"
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError as error:
        return f"is no address: {error}"
    if parts.scheme not in ("https", "http"):  # whether http may be is for the settings to say
        return "must begin with https://"
    if parts.username is not None or parts.password is not None:
        return "must not carry a user or a password"
    if port == 0 or not _HOST.fullmatch(f"[{host}]" if ":" in host else host):
        return "must name a host"
    if parts.fragment:
        return "must not have a fragment"
    return None


def _check_sizes(wanted: selection_pb2.Requirements, found: Violations) -> None:
    path = "spec.requirements"
    for name, texts in (
        ("excluded_server_ids", wanted.excluded_server_ids),
        ("labels", [*wanted.labels, *wanted.labels.values()]),
    ):
        if len(texts) > (2 * MAX_WANTED if name == "labels" else MAX_WANTED):
            found.append(Violation(f"{path}.{name}", f"at most {MAX_WANTED} are accepted"))
        elif any(len(text) > MAX_TEXT for text in texts):
            found.append(Violation(f"{path}.{name}", f"each must have at most {MAX_TEXT} characters"))
    for name in ("model", "provider", "server_id"):
        if len(getattr(wanted, name)) > MAX_TEXT:
            found.append(Violation(f"{path}.{name}", f"must have at most {MAX_TEXT} characters"))


def _check_labels(spec: task_queue_pb2.TaskSpec, found: Violations) -> None:
    if len(spec.labels) > MAX_LABELS:
        found.append(Violation("spec.labels", f"at most {MAX_LABELS} are accepted, not {len(spec.labels)}"))
        return
    for key, value in spec.labels.items():
        if not 1 <= len(key) <= MAX_LABEL_KEY or len(value) > MAX_LABEL_VALUE:
            told = f"keys must have 1 to {MAX_LABEL_KEY} characters, values at most {MAX_LABEL_VALUE}"
            found.append(Violation("spec.labels", told))
            return
        if "\0" in key or "\0" in value:
            found.append(Violation("spec.labels", "must not contain NUL"))
            return


def _check_group(group: str, path: str, found: Violations) -> None:
    if len(group) > MAX_GROUP:
        found.append(Violation(path, f"must have at most {MAX_GROUP} characters, not {len(group)}"))
    elif not group.isprintable():  # PostgreSQL takes no NUL, and people read it
        found.append(Violation(path, "must be printable"))


def _check_key(key: str, path: str, found: Violations) -> None:
    if not _KEY.fullmatch(key):
        found.append(Violation(path, f"must be at most {MAX_KEY} printable ASCII characters"))


def _check_timestamp(time: Timestamp, path: str, found: Violations) -> None:
    if not (_EARLIEST <= time.seconds <= _LATEST and 0 <= time.nanos <= 999_999_999):
        found.append(Violation(path, "must be a time in the years 1 to 9999"))


def _is_positive(value: Duration) -> bool:
    return 0 <= value.seconds < MAX_SECONDS and 0 <= value.nanos <= 999_999_999 and bool(value.seconds or value.nanos)


# ------------------------------------------------------------------- reading ---


def check_task_id(id: str) -> Violations:
    """Violations of the field `id` of a request about one task. An id that nobody ever got is none: UNKNOWN_TASK."""
    return [] if id else [Violation("id", "is required")]


def check_list(request: task_queue_pb2.ListTasksRequest) -> Violations:
    """Violations of a ListTasksRequest, but for its page token, which only its maker can judge."""
    found = _check_filter(request.filter)
    found += check_page_size(request.page_size)
    if len(request.page_token) > MAX_PAGE_TOKEN:
        found.append(Violation("page_token", "is unknown"))
    return found[:MAX_VIOLATIONS]


def check_page_size(size: int) -> Violations:
    """Violations of the field `page_size` of a request that lists something."""
    return [] if 0 <= size <= MAX_PAGE else [Violation("page_size", f"must be 0 to {MAX_PAGE}, not {size}")]


def check_watch_task(request: task_queue_pb2.WatchTaskRequest) -> Violations:
    """Violations of a WatchTaskRequest."""
    return check_task_id(request.id) + _check_position(request.after_event_id)


def check_watch_tasks(request: task_queue_pb2.WatchTasksRequest) -> Violations:
    """Violations of a WatchTasksRequest."""
    filter = request.filter
    found = _check_filter(filter) + _check_position(request.after_event_id)
    if filter.idempotency_key:
        found.append(Violation("filter.idempotency_key", "is not supported here"))
    for name in ("created_after", "created_before"):
        if filter.HasField(name):
            found.append(Violation(f"filter.{name}", "is not supported here"))
    return found[:MAX_VIOLATIONS]


def _check_position(event_id: int) -> Violations:
    if event_id <= _MOST_EVENT_ID:
        return []
    return [Violation("after_event_id", "is no id of an event")]


def _check_filter(filter: task_queue_pb2.TaskFilter) -> Violations:
    found: Violations = []
    for name, numbers, known in (
        ("states", filter.states, _STATES),
        ("task_types", filter.task_types, _TASK_TYPES),
    ):
        if len(numbers) > MAX_WANTED:
            found.append(Violation(f"filter.{name}", f"at most {MAX_WANTED} are accepted, not {len(numbers)}"))
            continue
        for i, number in enumerate(numbers):
            if number not in known:
                found.append(Violation(f"filter.{name}[{i}]", unknown_number(number)))
    _check_group(filter.group, "filter.group", found)
    if filter.idempotency_key:
        _check_key(filter.idempotency_key, "filter.idempotency_key", found)
    if filter.HasField("created_after"):
        _check_timestamp(filter.created_after, "filter.created_after", found)
    if filter.HasField("created_before"):
        _check_timestamp(filter.created_before, "filter.created_before", found)
    return found[:MAX_VIOLATIONS]
