"""Random bytes and random metadata to every method: refused in order, never a crash or a bug's status."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from modelyard.testing import FakeModelServer
from modelyard.v1 import agents_pb2, belief_pb2, model_server_pb2, orchestrator_pb2, task_queue_pb2, task_queue_pb2_grpc
from tests.harness.front_door import ask, attached, front_door
from tests.harness.model_servers import model_server, request

PER_METHOD = 150
AT_ONCE = 50
BUGS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
LOST_STATUS = "Internal error from Core"
"""What the client's own library says, whatever the server said, where a write meets the end of its stream."""

_INTERESTING_NUMBERS = (0, 1, 2, 3, 7, 99, 2**31 - 1, 2**32 - 1, 2**63 - 1)
_INTERESTING_FLOATS = (0.0, -1.0, 0.5, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), 1e-320)
_INTERESTING_TEXTS = (
    "",
    "a",
    "fake",
    "fake/fake",
    "\0",
    "ä\u202e🦙",
    "../../etc/passwd",
    "{",
    "[1",
    '{"a":1}',
    "x" * 3000,
)


def scramble(message: Message, chance: random.Random, depth: int = 0) -> None:
    """Set fields of a message to values that somebody may send."""
    for field in message.DESCRIPTOR.fields:
        if chance.random() < 0.5:
            continue
        repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == FieldDescriptor.LABEL_REPEATED
        if field.message_type is not None:
            if depth > 5:
                continue
            if field.message_type.GetOptions().map_entry:
                entries, key = getattr(message, field.name), chance.choice(_INTERESTING_TEXTS)
                if field.message_type.fields_by_name["value"].message_type is not None:
                    scramble(entries[key], chance, depth + 1)
                else:
                    entries[key] = chance.choice(_INTERESTING_TEXTS)
            elif repeated:
                for _ in range(chance.randrange(3)):
                    scramble(getattr(message, field.name).add(), chance, depth + 1)
            else:
                inner = getattr(message, field.name)
                inner.SetInParent()
                scramble(inner, chance, depth + 1)
        elif repeated:
            for _ in range(chance.randrange(3)):
                getattr(message, field.name).append(value(field, chance))
        else:
            setattr(message, field.name, value(field, chance))


def value(field: FieldDescriptor, chance: random.Random) -> object:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = chance.choice(_INTERESTING_TEXTS)
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return chance.choice(_INTERESTING_FLOATS)
    bits, signed = {
        FieldDescriptor.CPPTYPE_INT32: (31, True),
        FieldDescriptor.CPPTYPE_ENUM: (31, True),
        FieldDescriptor.CPPTYPE_UINT32: (32, False),
        FieldDescriptor.CPPTYPE_INT64: (63, True),
        FieldDescriptor.CPPTYPE_UINT64: (64, False),
    }[kind]
    number = min(chance.choice(_INTERESTING_NUMBERS), 2**bits - 1)
    return -number if signed and chance.random() < 0.3 else number


def payloads(make: Callable[[], Message], chance: random.Random) -> bytes:
    """Bytes of one request: noise, a message with odd values, or one with flipped bits."""
    way = chance.random()
    if way < 0.25:
        return chance.randbytes(chance.randrange(200))
    message = make()
    scramble(message, chance)
    raw = bytearray(message.SerializeToString())
    if way < 0.6 and raw:
        for _ in range(chance.randrange(1, 4)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        if chance.random() < 0.3:
            del raw[chance.randrange(len(raw)) :]
    return bytes(raw)


def metadata(chance: random.Random) -> tuple[tuple[str, str | bytes], ...]:
    pairs: list[tuple[str, str | bytes]] = []
    for _ in range(chance.randrange(5)):
        key = "".join(chance.choice("abcdefghijklmnopqrstuvwxyz0123456789-_.") for _ in range(chance.randrange(1, 20)))
        if chance.random() < 0.5:
            pairs.append((f"x{key}-bin", chance.randbytes(chance.randrange(60))))
        else:
            pairs.append((f"x{key}", "".join(chr(chance.randrange(0x20, 0x7F)) for _ in range(chance.randrange(60)))))
    if chance.random() < 0.3:
        pairs.append(("modelyard-request-id", "x" * chance.randrange(200)))
    if chance.random() < 0.2:
        pairs.append(("authorization", "Bearer x"))
    if chance.random() < 0.2:
        pairs.append(("modelyard-tenant", chance.choice(("", "a", "a b", "default", "x" * 100))))
    return tuple(pairs)


async def call(link: grpc.aio.Channel, method, raw: bytes, chance: random.Random) -> grpc.StatusCode:
    """The status of one call, whatever the kind of its method."""
    name = f"/{method.containing_service.full_name}/{method.name}"
    options = {"timeout": 0.4, "metadata": metadata(chance)}
    try:
        if method.client_streaming:
            stream = link.stream_stream(name)(**options)
            for _ in range(chance.randrange(1, 4)):
                await stream.write(raw)
            await stream.done_writing()
        elif method.server_streaming:
            stream = link.unary_stream(name)(raw, **options)
        else:
            await link.unary_unary(name)(raw, **options)
            return grpc.StatusCode.OK
        for _ in range(chance.randrange(50)):
            if await stream.read() is grpc.aio.EOF:
                return await stream.code()
        stream.cancel()
        return grpc.StatusCode.CANCELLED
    except grpc.aio.AioRpcError as error:
        if error.details() == LOST_STATUS:
            return grpc.StatusCode.CANCELLED
        assert error.code() not in BUGS, f"{method.name}: {error!r}"
        return error.code()
    except asyncio.InvalidStateError:
        # The stream ended under a write; its status says why.
        code = await stream.code()
        return grpc.StatusCode.CANCELLED if await stream.details() == LOST_STATUS else code


async def bombard(link: grpc.aio.Channel, service, seed: int) -> dict[str, Counter[grpc.StatusCode]]:
    chance = random.Random(seed)
    counts: dict[str, Counter[grpc.StatusCode]] = {}
    for method in service.methods:
        make = GetMessageClass(method.input_type)
        seen = counts[method.name] = Counter()
        for _ in range(PER_METHOD // AT_ONCE):
            raws = [payloads(make, chance) for _ in range(AT_ONCE)]
            streams = [call(link, method, raw, random.Random(chance.random())) for raw in raws]
            seen.update(await asyncio.gather(*streams))
    return counts


def judge(counts: dict[str, Counter[grpc.StatusCode]]) -> None:
    for method, seen in counts.items():
        assert not BUGS & set(seen), f"{method}: {seen}"
        assert sum(seen.values()) >= PER_METHOD - AT_ONCE
    assert sum(1 for seen in counts.values() if seen[grpc.StatusCode.INVALID_ARGUMENT]) >= len(counts) - 3, counts


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_control_plane_refuses_in_order(seed, caplog):
    service = orchestrator_pb2.DESCRIPTOR.services_by_name["Orchestrator"]
    async with (
        front_door(queue={"timeout": dict.fromkeys(("low", "normal", "high", "critical"), 0.2)}) as door,
        attached(door, FakeModelServer("one")) as (fake,),
    ):
        judge(await bombard(door.channel, service, seed))
        # Random orders may have drained it, random reports may have taken its name.
        await fake.detach()
        fake.instance_id = "after"
        await fake.attach(door.address)
        assert (await door.generate(ask(server_id="one"))).done
        await door.until_idle()
    assert "incident" not in caplog.text


@pytest.mark.parametrize("service", [task_queue_pb2, belief_pb2, agents_pb2], ids=["TaskQueue", "Beliefs", "Agents"])
async def test_durable_tasks_refuse_in_order(service, caplog, tmp_path):
    (described,) = service.DESCRIPTOR.services_by_name.values()
    store = f"sqlite:///{tmp_path / 'tasks.db'}"
    async with (
        front_door(tasks={"store": store}) as door,
        attached(door, FakeModelServer("one")),
    ):
        judge(await bombard(door.channel, described, seed=4))
        # What was accepted by chance does no harm: tasks still run.
        stub = task_queue_pb2_grpc.TaskQueueStub(door.channel)
        spec = task_queue_pb2.TaskSpec(input=ask().input)
        metadata = (("modelyard-tenant", "after"),)
        submitted = await stub.SubmitTask(task_queue_pb2.SubmitTaskRequest(spec=spec), metadata=metadata)
        watch = stub.WatchTask(task_queue_pb2.WatchTaskRequest(id=submitted.task.id), metadata=metadata, timeout=20)
        *_, last = [message async for message in watch]
        assert last.task.result.text == "Hello, world"
    assert "incident" not in caplog.text


async def test_a_model_server_refuses_in_order(caplog):
    service = model_server_pb2.DESCRIPTOR.services_by_name["ModelServer"]
    async with model_server() as server:
        judge(await bombard(server.channel, service, seed=3))
        await server.until_load(running=0)
        assert (await server.generate(request("Hello", max_tokens=3))).result is not None
    assert "incident" not in caplog.text
