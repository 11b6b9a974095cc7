"""Task type, priority and the like, from headers and metadata."""

from __future__ import annotations

import pytest

from control_plane.gateway.hints import apply, apply_routing, hints
from modelyard.rpc.errors import Refusal
from modelyard.v1 import task_pb2
from modelyard.v1.orchestrator_pb2 import EmbedRequest, GenerateRequest


def test_headers_win_over_metadata() -> None:
    metadata = {"modelyard_priority": "low", "modelyard_preset": "critic", "modelyard_timeout": "2.5", "mine": "x"}
    found = hints({b"x-modelyard-priority": b"HIGH", b"x-modelyard-task-type": b"code-review"}, metadata)
    request = GenerateRequest()
    apply(found, request)
    assert request.task_type == task_pb2.TASK_TYPE_CODE_REVIEW
    assert request.priority == task_pb2.TASK_PRIORITY_HIGH
    assert (request.preset, found.timeout, request.explain) == ("critic", 2.5, False)


def test_pins_and_explain() -> None:
    given = {b"x-modelyard-server": b"gpu-1", b"x-modelyard-provider": b"mlx", b"x-modelyard-explain": b"true"}
    request, embed = GenerateRequest(), EmbedRequest()
    apply(hints(given, None), request)
    apply_routing(hints(given, None), embed)
    for requirements in (request.requirements, embed.requirements):
        assert (requirements.server_id, requirements.provider) == ("gpu-1", "mlx")
    assert request.explain


def test_nothing_said_changes_nothing() -> None:
    request = GenerateRequest()
    apply(hints({b"x-other": b"1"}, {"topic": "x"}), request)
    assert request == GenerateRequest()


@pytest.mark.parametrize(
    ("headers", "metadata", "where"),
    [
        ({b"x-modelyard-task-type": b"poetry"}, None, "X-Modelyard-Task-Type"),
        ({b"x-modelyard-priority": b"9"}, None, "X-Modelyard-Priority"),
        ({b"x-modelyard-timeout": b"soon"}, None, "X-Modelyard-Timeout"),
        ({b"x-modelyard-timeout": b"-1"}, None, "X-Modelyard-Timeout"),
        ({b"x-modelyard-timeout": b"nan"}, None, "X-Modelyard-Timeout"),
        ({b"x-modelyard-timeout": b"\xff"}, None, "X-Modelyard-Timeout"),
        ({b"x-modelyard-explain": b"perhaps"}, None, "X-Modelyard-Explain"),
        ({}, {"modelyard_priority": "urgent"}, "metadata.modelyard_priority"),
    ],
)
def test_what_makes_no_sense_is_named(headers: dict[bytes, bytes], metadata: dict[str, str] | None, where: str) -> None:
    with pytest.raises(Refusal) as caught:
        hints(headers, metadata)
    assert caught.value.violations[0].field == where
