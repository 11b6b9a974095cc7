"""What is demanded of messages about tasks."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.rpc import task_validation as validation
from modelyard.rpc.validation import MAX_VIOLATIONS, check_tenant
from modelyard.v1 import generation_pb2, orchestrator_pb2, task_queue_pb2
from tests.unit.rpc.test_validation import fields_of, of

INPUT = {"messages": [{"role": generation_pb2.ROLE_USER, "content": [{"text": "hi"}]}]}
LONG = "x" * 257


def submit(key: str = "", **fields: Any) -> task_queue_pb2.SubmitTaskRequest:
    return task_queue_pb2.SubmitTaskRequest(spec={"input": INPUT, **fields}, idempotency_key=key)


GOOD: list[dict[str, Any]] = [
    {},
    {"key": "k" * 200},
    {"key": " ~"},
    {"task_type": 15, "priority": 4, "max_attempts": 100, "group": "g" * 200, "labels": {"k" * 64: "v" * 256}},
    {"labels": {f"{n}": "" for n in range(32)}},
    {"callback": {"url": "https://example.org:8443/a/b?c=d"}},
    {"callback": {"url": "https://[::1]/"}},
    {"not_before": {"seconds": -62135596800}, "deadline": {"seconds": 253402300799, "nanos": 999999999}},
    {"attempt_timeout": {"nanos": 1}},
    {"requirements": {"excluded_server_ids": ["x" * 256] * 64, "labels": {f"{n}": "" for n in range(64)}}},
]

BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": {}}, "spec.input"),
    ({"input": {"messages": []}}, "spec.input"),
    ({"task_type": 99}, "spec.task_type"),
    ({"task_type": -1}, "spec.task_type"),
    ({"priority": 99}, "spec.priority"),
    ({"max_attempts": -1}, "spec.max_attempts"),
    ({"max_attempts": 101}, "spec.max_attempts"),
    ({"group": "x" * 201}, "spec.group"),
    ({"group": "a\nb"}, "spec.group"),
    ({"group": "\0"}, "spec.group"),
    ({"labels": {f"{n}": "" for n in range(33)}}, "spec.labels"),
    ({"labels": {"": ""}}, "spec.labels"),
    ({"labels": {"k" * 65: ""}}, "spec.labels"),
    ({"labels": {"k": LONG}}, "spec.labels"),
    ({"labels": {"k": "\0"}}, "spec.labels"),
    ({"key": "k" * 201}, "idempotency_key"),
    ({"key": "ä"}, "idempotency_key"),
    ({"key": "a\nb"}, "idempotency_key"),
    ({"not_before": {"seconds": 253402300800}}, "spec.not_before"),
    ({"not_before": {"nanos": -1}}, "spec.not_before"),
    ({"deadline": {"seconds": -(2**63)}}, "spec.deadline"),
    ({"deadline": {"nanos": 10**9}}, "spec.deadline"),
    ({"attempt_timeout": {}}, "spec.attempt_timeout"),
    ({"attempt_timeout": {"seconds": -1}}, "spec.attempt_timeout"),
    ({"attempt_timeout": {"seconds": 315_576_000_000}}, "spec.attempt_timeout"),
    ({"requirements": {"min_context_length": -1}}, "spec.requirements.min_context_length"),
    ({"requirements": {"max_cost_nano_usd": -1}}, "spec.requirements.max_cost_nano_usd"),
    ({"requirements": {"features": [99]}}, "spec.requirements.features[0]"),
    ({"requirements": {"excluded_server_ids": ["a"] * 65}}, "spec.requirements.excluded_server_ids"),
    ({"requirements": {"excluded_server_ids": [LONG]}}, "spec.requirements.excluded_server_ids"),
    ({"requirements": {"labels": {f"{n}": "" for n in range(65)}}}, "spec.requirements.labels"),
    ({"requirements": {"labels": {"a": LONG}}}, "spec.requirements.labels"),
    *(({"requirements": {name: LONG}}, f"spec.requirements.{name}") for name in ("model", "provider", "server_id")),
    *(
        ({"callback": {"url": url}}, "spec.callback.url")
        for url in (
            "",
            "example.org",
            "ftp://example.org",
            "https://",
            "https:///x",
            "https://a b/",
            "https://user@example.org/",
            "https://user:secret@example.org/",
            "https://example.org/#x",
            "https://example.org:0/",
            "https://example.org:x/",
            "https://example.org:99999/",
            "https://-x/",
            "https://[::1/",
            "https://ex\\ample.org/",
            "https://ä.org/",
            "https://example.org/\n",
            "https://example.org/" + "x" * 2000,
        )
    ),
]


@pytest.mark.parametrize("fields", GOOD)
def test_well_formed(fields: dict[str, Any]) -> None:
    assert validation.check_submit(submit(**fields)) == []


@pytest.mark.parametrize(("fields", "path"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_malformed(fields: dict[str, Any], path: str) -> None:
    assert fields_of(validation.check_submit(submit(**fields))) == [path]


def test_the_spec_is_required() -> None:
    assert fields_of(validation.check_submit(task_queue_pb2.SubmitTaskRequest())) == ["spec"]


def test_what_a_preset_adds_is_checked() -> None:
    work = orchestrator_pb2.GenerateRequest(input={"prompt": "a", "sampling": {"temperature": 9}})
    assert fields_of(validation.check_submit(submit(), work)) == ["spec.input.sampling.temperature"]


@pytest.mark.parametrize(
    ("not_before", "deadline", "path"),
    [
        (None, None, None),
        (50.0, None, None),
        (None, 100.0, ["spec.deadline"]),
        (None, 99.0, ["spec.deadline"]),
        (None, 100.5, None),
        (200.0, 200.0, ["spec.deadline"]),
        (200.0, 150.0, ["spec.deadline"]),
        (200.0, 200.5, None),
    ],
)
def test_times(not_before: float | None, deadline: float | None, path: list[str] | None) -> None:
    def stamp(seconds: float | None) -> Timestamp | None:
        return None if seconds is None else Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))

    request = submit(not_before=stamp(not_before), deadline=stamp(deadline))
    assert validation.check_submit(request) == []
    assert fields_of(validation.check_times(request.spec, now=100.0)) == (path or [])


@pytest.mark.parametrize(
    ("filter", "path"),
    [
        ({"states": [1, 99]}, "filter.states[1]"),
        ({"states": [1] * 65}, "filter.states"),
        ({"task_types": [-1]}, "filter.task_types[0]"),
        ({"group": "x" * 201}, "filter.group"),
        ({"idempotency_key": "ä"}, "filter.idempotency_key"),
        ({"created_after": {"nanos": -1}}, "filter.created_after"),
        ({"created_before": {"seconds": 2**60}}, "filter.created_before"),
    ],
)
def test_filters(filter: dict[str, Any], path: str) -> None:
    assert fields_of(validation.check_list(task_queue_pb2.ListTasksRequest(filter=filter))) == [path]
    assert path in fields_of(validation.check_watch_tasks(task_queue_pb2.WatchTasksRequest(filter=filter)))


def test_the_rest_of_reading() -> None:
    assert validation.check_list(task_queue_pb2.ListTasksRequest(page_size=1000, page_token="x" * 512)) == []
    for size in (-1, 1001):
        assert fields_of(validation.check_list(task_queue_pb2.ListTasksRequest(page_size=size))) == ["page_size"]
    token = task_queue_pb2.ListTasksRequest(page_token="x" * 513)
    assert fields_of(validation.check_list(token)) == ["page_token"]
    assert fields_of(validation.check_task_id("")) == ["id"] and validation.check_task_id("x" * 9999) == []
    watch = task_queue_pb2.WatchTaskRequest(after_event_id=2**64 - 1)
    assert fields_of(validation.check_watch_task(watch)) == ["id", "after_event_id"]
    for unsupported in ({"idempotency_key": "k"}, {"created_after": {}}, {"created_before": {}}):
        found = validation.check_watch_tasks(task_queue_pb2.WatchTasksRequest(filter=unsupported))
        assert fields_of(found) == [f"filter.{next(iter(unsupported))}"]


@settings(max_examples=50, deadline=None)
@given(st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True))
def test_tenants(name: str) -> None:
    assert check_tenant(name) == []
    for wrong in ("", f"{name} ", f"{name}/", f"{name}\n", "x" * 65, "ä"):
        assert fields_of(check_tenant(wrong)) == ["modelyard-tenant"]


# ------------------------------------------------------------------- fuzzing ---


@settings(max_examples=150, deadline=None)
@given(of(task_queue_pb2.SubmitTaskRequest, depth=6), st.floats(-1e12, 1e12))
def test_any_task_is_judged(request_: task_queue_pb2.SubmitTaskRequest, now: float) -> None:
    found = validation.check_submit(request_)
    assert len(found) <= MAX_VIOLATIONS
    again = task_queue_pb2.SubmitTaskRequest.FromString(request_.SerializeToString())
    assert validation.check_submit(again) == found
    if not found:
        validation.check_times(request_.spec, now)


@settings(max_examples=100, deadline=None)
@given(of(task_queue_pb2.ListTasksRequest), of(task_queue_pb2.WatchTasksRequest))
def test_any_filter_is_judged(listing: Any, watching: Any) -> None:
    assert len(validation.check_list(listing)) <= MAX_VIOLATIONS
    assert len(validation.check_watch_tasks(watching)) <= MAX_VIOLATIONS


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text(max_size=40).map(lambda rest: f"https://{rest}"))
def test_any_url_is_judged(url: str) -> None:
    problem = validation.url_problem(url)
    assert problem is None or problem
