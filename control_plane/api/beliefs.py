"""The Beliefs service: parse -> call -> render."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import json_format, struct_pb2

from control_plane.api.metrics import Metrics
from control_plane.api.orchestrator import served
from control_plane.api.tenant import tenant_of
from control_plane.domain.errors import draining
from control_plane.tasks.facts import TASKS_PREFIX, BeliefRecord
from modelyard.rpc.errors import Refusal, Violation, invalid
from modelyard.rpc.reasons import Reason
from modelyard.v1 import belief_pb2

if TYPE_CHECKING:
    from control_plane.tasks.beliefs import Beliefs

MAX_KEY_CHARACTERS = 500
MAX_SOURCE_CHARACTERS = 200
MAX_VALUE_BYTES = 64 << 10
_PAGE, _MOST_PAGE = 100, 1000
_BATCH = 100
_MOST_VERSION = 2**63 - 1
"""What databases count with."""
_PAUSE = 0.05
"""Seconds between two looks into the database of one watch, however often something changes."""


class BeliefsServicer:
    """All methods of the service. Once `stop_accepting` was called, new work is refused with DRAINING and watches
    end."""

    def __init__(self, beliefs: Beliefs | None, metrics: Metrics) -> None:
        self.metrics = metrics
        self._kept = beliefs
        self._stopping = asyncio.Event()

    def stop_accepting(self) -> None:
        """Refuse new work from now on, end watches."""
        self._stopping.set()

    def _admit(self) -> None:
        if self._stopping.is_set():
            raise draining()

    def _beliefs(self) -> Beliefs:
        if self._kept is None:
            raise Refusal(Reason.UNSUPPORTED, "this control plane keeps no beliefs (setting tasks.store)")
        return self._kept

    @served
    async def PutBelief(
        self, request: belief_pb2.PutBeliefRequest, context: grpc.aio.ServicerContext
    ) -> belief_pb2.PutBeliefResponse:
        self._admit()
        belief = request.belief
        violations = [*_check_key(belief.key, "belief.key"), *_check_facts(belief)]
        if belief.key.startswith(TASKS_PREFIX):
            violations.append(
                Violation("belief.key", f'keys that begin with "{TASKS_PREFIX}" are the control plane\'s own')
            )
        value = _json(belief.value, violations) if belief.HasField("value") else ""
        if not value and not violations:
            violations.append(Violation("belief.value", "is required"))
        if violations:
            raise invalid(violations)
        confidence = belief.confidence if belief.HasField("confidence") else 1.0
        record = await self._beliefs().put(tenant_of(context), belief.key, value, confidence, belief.source)
        return belief_pb2.PutBeliefResponse(belief=rendered(record))

    @served
    async def GetBelief(
        self, request: belief_pb2.GetBeliefRequest, context: grpc.aio.ServicerContext
    ) -> belief_pb2.GetBeliefResponse:
        self._admit()
        if violations := _check_key(request.key, "key"):
            raise invalid(violations)
        return belief_pb2.GetBeliefResponse(belief=rendered(await self._beliefs().get(tenant_of(context), request.key)))

    @served
    async def ListBeliefs(
        self, request: belief_pb2.ListBeliefsRequest, context: grpc.aio.ServicerContext
    ) -> belief_pb2.ListBeliefsResponse:
        self._admit()
        violations = _check_prefix(request.prefix)
        if not 0 <= request.page_size <= _MOST_PAGE:
            violations.append(Violation("page_size", f"must be 0 to {_MOST_PAGE}"))
        after = _after(request.page_token, request.prefix, violations)
        if violations:
            raise invalid(violations)
        size = request.page_size or _PAGE
        found = await self._beliefs().page(tenant_of(context), request.prefix, size + 1, after)
        token = _token(request.prefix, found[size - 1].key) if len(found) > size else ""
        return belief_pb2.ListBeliefsResponse(beliefs=map(rendered, found[:size]), next_page_token=token)

    @served
    async def DeleteBelief(
        self, request: belief_pb2.DeleteBeliefRequest, context: grpc.aio.ServicerContext
    ) -> belief_pb2.DeleteBeliefResponse:
        self._admit()
        if violations := _check_key(request.key, "key"):
            raise invalid(violations)
        await self._beliefs().delete(tenant_of(context), request.key)
        return belief_pb2.DeleteBeliefResponse()

    @served
    async def WatchBeliefs(self, request: belief_pb2.WatchBeliefsRequest, context: grpc.aio.ServicerContext) -> None:
        self._admit()
        violations = _check_prefix(request.prefix)
        if request.after_version > _MOST_VERSION:
            violations.append(Violation("after_version", "is none that was given out"))
        if violations:
            raise invalid(violations)
        tenant, news = tenant_of(context), asyncio.Event()
        beliefs = self._beliefs()
        forget = beliefs.listen(news.set)
        try:
            resumed = request.HasField("after_version")
            position = request.after_version if resumed else await beliefs.last_version()
            silent = True
            while not self._stopping.is_set():
                news.clear()
                # The table has one row per key: whoever reads slowly finds the latest value there, and memory is
                # taken for one batch only.
                found, position = await beliefs.since(tenant, request.prefix, position, _BATCH)
                for record in found:
                    await context.write(_change(record))
                if silent and not found:
                    await context.write(belief_pb2.WatchBeliefsResponse(version=position))
                silent = False
                if len(found) < _BATCH:
                    await self._wait(news)
        finally:
            forget()
        raise draining()

    async def _wait(self, news: asyncio.Event) -> None:
        """Until there may be news, or the process stops."""
        waiting = [asyncio.ensure_future(event.wait()) for event in (news, self._stopping)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not self._stopping.is_set():
                await asyncio.sleep(_PAUSE)
        finally:
            for task in waiting:
                task.cancel()


# ------------------------------------------------------------------- parse ---


def _check_key(key: str, field: str) -> list[Violation]:
    if not key:
        return [Violation(field, "is required")]
    return _check_text(key, field, MAX_KEY_CHARACTERS)


def _check_prefix(prefix: str) -> list[Violation]:
    return _check_text(prefix, "prefix", MAX_KEY_CHARACTERS)


def _check_text(text: str, field: str, most: int) -> list[Violation]:
    if len(text) > most:
        return [Violation(field, f"must have at most {most} characters")]
    if any(character < " " or "\x7f" <= character <= "\x9f" for character in text):
        return [Violation(field, "must hold no control characters")]
    return []


def _check_facts(belief: belief_pb2.Belief) -> list[Violation]:
    found = _check_text(belief.source, "belief.source", MAX_SOURCE_CHARACTERS)
    if belief.HasField("confidence") and not 0 <= belief.confidence <= 1:  # written so that NaN fails it
        found.append(Violation("belief.confidence", "must be 0 to 1"))
    return found


def _json(value: struct_pb2.Value, violations: list[Violation]) -> str:
    if value.WhichOneof("kind") is None:
        violations.append(Violation("belief.value", "is required"))
        return ""
    try:
        text = json.dumps(json_format.MessageToDict(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, json_format.Error):
        violations.append(Violation("belief.value", "must be JSON, which has no NaN and no infinity"))
        return ""
    if len(text) > MAX_VALUE_BYTES or len(text.encode()) > MAX_VALUE_BYTES:
        violations.append(Violation("belief.value", f"must have at most {MAX_VALUE_BYTES} bytes as JSON"))
        return ""
    return text


def _token(prefix: str, key: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([prefix, key]).encode()).decode()


def _after(token: str, prefix: str, violations: list[Violation]) -> str:
    if not token:
        return ""
    try:
        of, key = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
        if of == prefix and isinstance(key, str) and not _check_key(key, "page_token"):
            return key
    except (binascii.Error, ValueError, TypeError, RecursionError):
        pass
    violations.append(Violation("page_token", "does not belong to this prefix"))
    return ""


# ------------------------------------------------------------------ render ---


def rendered(record: BeliefRecord) -> belief_pb2.Belief:
    """A fact as the contract has it; without its value if it was deleted."""
    belief = belief_pb2.Belief(
        key=record.key, confidence=record.confidence, source=record.source, version=record.version
    )
    belief.updated_at.FromNanoseconds(round(record.updated_at * 1e9))
    if not record.deleted:
        value: Any = json.loads(record.value)
        json_format.ParseDict(value, belief.value)
    return belief


def _change(record: BeliefRecord) -> belief_pb2.WatchBeliefsResponse:
    return belief_pb2.WatchBeliefsResponse(belief=rendered(record), version=record.version, deleted=record.deleted)
