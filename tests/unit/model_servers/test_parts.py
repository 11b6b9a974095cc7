"""The small parts of the model server, each by itself."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from enum import IntEnum

import pytest
from pydantic import BaseModel

from model_servers import convert, engine, registry
from model_servers.__main__ import main
from model_servers.admission import Admission
from model_servers.config import ModelServerSettings, default_server_id, endpoint
from model_servers.engine import Delta, EngineFailed, EnginePlugin, Feature, Finished, FinishReason, Usage
from model_servers.lifecycle import Changes, Lifecycle
from model_servers.performance import Recorder, Timing
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.v1 import fleet_pb2, generation_pb2, model_server_pb2, task_pb2


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ----------------------------------------------------------------- convert ---


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (engine.Role, generation_pb2.Role, "ROLE_"),
        (engine.FinishReason, generation_pb2.FinishReason, "FINISH_REASON_"),
        (engine.ToolChoiceMode, generation_pb2.ToolChoiceMode, "TOOL_CHOICE_MODE_"),
        (engine.Health, fleet_pb2.ServerHealth, "SERVER_HEALTH_"),
        (engine.ModelState, fleet_pb2.ModelState, "MODEL_STATE_"),
        (engine.TaskType, task_pb2.TaskType, "TASK_TYPE_"),
    ],
)
def test_numbers_equal_those_of_the_contract(ours: type[IntEnum], theirs, prefix: str):
    contract = {name.removeprefix(prefix): number for name, number in theirs.items() if number}
    assert {member.name: member.value for member in ours} == contract


def test_feature_bits_equal_the_numbers_of_the_contract():
    contract = {name.removeprefix("MODEL_FEATURE_"): 1 << number for name, number in fleet_pb2.ModelFeature.items()}
    assert {str(feature.name): feature.value for feature in Feature} == {
        name: bit for name, bit in contract.items() if name != "UNSPECIFIED"
    }


def test_input_becomes_an_engine_request():
    content = generation_pb2.GenerationInput()
    content.messages.add(role=generation_pb2.ROLE_SYSTEM).content.add(text="Be kind.")
    user = content.messages.add(role=generation_pb2.ROLE_USER, name="ann")
    user.content.add(text="Look: ")
    user.content.add(image=generation_pb2.Image(data=b"\x89", media_type="image/png"))
    content.messages.add(role=generation_pb2.ROLE_ASSISTANT).tool_calls.add(id="1", name="f", arguments_json="{}")
    content.messages.add(role=generation_pb2.ROLE_TOOL, tool_call_id="1").content.add(text="ok")
    content.sampling.max_tokens = 5
    content.sampling.temperature = 0.0
    content.sampling.stop.append("x")
    content.tools.add(name="f", parameters_schema="{}")
    content.tool_choice.mode = generation_pb2.TOOL_CHOICE_MODE_REQUIRED
    content.tool_choice.name = "f"
    content.response_format.json_schema.schema = "{}"
    request = convert.generation_request("m", content, "id")
    assert request.messages[1].content == ("Look: ", engine.Image(b"\x89", "image/png"))
    assert request.messages[1].name == "ann" and request.messages[3].tool_call_id == "1"
    assert request.messages[2].tool_calls == (engine.ToolCall("1", "f", "{}"),)
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.stop) == (5, 0.0, None, ("x",))
    assert (request.json_schema, request.json_object, request.tool_name) == ("{}", False, "f")
    assert request.prompt is None and request.request_id == "id"
    assert convert.needed_features(request) == Feature.FUNCTION_CALLING | Feature.JSON_SCHEMA | Feature.VISION


def test_raw_prompt_and_defaults():
    request = convert.generation_request("m", generation_pb2.GenerationInput(prompt="abc"))
    assert request == engine.GenerationRequest("m", prompt="abc")
    assert convert.needed_features(request) == Feature.NONE


def test_every_sampling_field_is_converted():
    known = {field.name for field in generation_pb2.SamplingParams.DESCRIPTOR.fields} - {"n"}
    assert known == set(engine.Sampling.__dataclass_fields__)


def test_deltas_and_results():
    parse = model_server_pb2.ModelServerGenerateResponse.FromString
    delta = Delta(
        "é", 2, (engine.TokenLogprob("é", -0.5, (("e", -1.0),)),), (engine.ToolCallDelta(1, "i", "n", "{"),), "r"
    )
    message = parse(convert.delta_bytes(delta)).delta
    assert (message.text, message.tokens, message.reasoning_text) == ("é", 2, "r")
    assert message.logprobs[0].top[0].token == "e" and message.tool_calls[0].index == 1
    finished = Finished(FinishReason.LENGTH, Usage(5, 2, 3, 1))
    result = parse(convert.result_bytes(finished, Timing(0.25, None, None, 1.5), None)).result
    assert (result.usage.cached_prompt_tokens, result.usage.reasoning_tokens) == (2, 1)
    assert result.timings.queued.ToMilliseconds() == 250 and not result.timings.HasField("ttft")


def test_every_engine_error_has_its_reason():
    reasons = {
        engine.UnknownModel: Reason.UNKNOWN_MODEL,
        engine.ContextTooLong: Reason.CONTEXT_TOO_LONG,
        engine.InvalidRequest: Reason.INVALID_REQUEST,
        engine.Unsupported: Reason.UNSUPPORTED,
        engine.Busy: Reason.SERVER_BUSY,
        engine.RateLimited: Reason.RATE_LIMITED,
        engine.OutOfMemory: Reason.OUT_OF_MEMORY,
        engine.CredentialsRejected: Reason.CREDENTIALS_REJECTED,
        engine.ContentRefused: Reason.CONTENT_REFUSED,
        engine.EngineFailed: Reason.ENGINE_FAILED,
    }
    assert set(reasons) == set(engine.EngineError.__subclasses__())
    for error, reason in reasons.items():
        assert convert.refusal(error("why"), "input").reason is reason
    assert convert.refusal(engine.Busy("full", 3.0), "input").retry_after == 3.0
    (violation,) = convert.refusal(engine.InvalidRequest("why", "tools[1]"), "input").violations
    assert (violation.field, violation.description) == ("input.tools[1]", "why")


# --------------------------------------------------------------- admission ---


def admission(clock: Clock, *, max_waiting: int | None = None, draining: bool = False) -> Admission:
    return Admission(slots=lambda: 2, max_waiting=max_waiting, draining=lambda: draining, clock=clock)


def test_waiting_room_is_twice_the_slots_by_default():
    door = admission(Clock())
    places = [door.place("a" if n % 2 else "b") for n in range(6)]
    for place in places:
        place.__enter__()
    assert (door.count(), door.count_of("a"), door.count_of("")) == (6, 3, 0)
    with pytest.raises(Refusal) as caught, door.place("a"):
        pass
    assert caught.value.reason is Reason.SERVER_BUSY
    for place in places:
        place.__exit__(None, None, None)
    assert (door.count(), door.count_of("a")) == (0, 0)


def test_retry_delay_follows_how_long_requests_take():
    clock = Clock()
    door = admission(clock, max_waiting=0)

    def retry_after() -> float:
        with door.place(""), door.place(""), pytest.raises(Refusal) as caught, door.place(""):
            pass
        return caught.value.retry_after

    before = retry_after()
    for _ in range(20):
        with door.place(""):
            clock.now += 20
    assert retry_after() > 4 * before


def test_nobody_enters_while_draining():
    with pytest.raises(Refusal) as caught, admission(Clock(), draining=True).place(""):
        pass
    assert caught.value.reason is Reason.DRAINING


# --------------------------------------------------- lifecycle, performance ---


async def test_changes_are_never_missed():
    changes = Changes()
    waiting = asyncio.create_task(changes.beyond(0))
    changes.tell()
    changes.tell()
    assert await waiting == 2 and await changes.beyond(1) == 2


async def test_a_drain_order_stands_until_its_giver_takes_it_back():
    lifecycle = Lifecycle()
    lifecycle.order("a", drain=True)
    lifecycle.order("b", drain=False)
    assert lifecycle.draining and lifecycle.changes.version == 1
    lifecycle.order("a", drain=False)
    assert not lifecycle.draining
    lifecycle.stop()
    lifecycle.order("a", drain=False)
    assert lifecycle.draining


def test_throughput_counts_all_running_requests_over_busy_time():
    clock = Clock()
    recorder = Recorder(clock)
    assert recorder.means("m") is None
    timing = Timing(queued=0.5, ttft=1.0, tpot=0.01, total=2.0)
    recorder.begin("m")
    recorder.begin("m")
    clock.now += 2
    recorder.end("m", timing, computed=100, generated=100)
    recorder.end("m", timing, computed=100, generated=100)
    clock.now += 1000  # idle time does not count
    means = recorder.means("m")
    assert means is not None and (means.ttft, means.tpot) == (1.0, 0.01)
    assert means.prefill_tokens_per_second == pytest.approx(200)
    assert means.decode_tokens_per_second == pytest.approx(100)
    recorder.begin("m")
    recorder.end("m", None)
    assert recorder.means("m") == means


# --------------------------------------------------------- settings, plug-ins ---


def test_made_up_server_ids_are_valid():
    assert default_server_id("My_Mac.local", "mlx") == "my_mac-mlx"
    assert ModelServerSettings(server_id=default_server_id("Ünïcode Höst" * 9, "x")).server_id
    assert ModelServerSettings().identity_name()


def test_endpoint_is_where_others_dial():
    assert endpoint(ModelServerSettings(), 5) == "127.0.0.1:5"
    assert endpoint(ModelServerSettings(host="::1"), 5) == "[::1]:5"
    assert endpoint(ModelServerSettings(advertise="gpu:9"), 5) == "gpu:9"
    assert endpoint(ModelServerSettings(host="0.0.0.0"), 5) not in ("0.0.0.0:5", "127.0.0.1:5")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--server-id", "No Good"], "--server-id"),
        (["--orchestrators", "[nowhere]"], "'nowhere' is not host:port"),
        (["--engine", "nothing"], "installed are: "),
        (["--engine-settings", "{slots: 0}"], "engine_settings.slots"),
        (["--engine-settings", "{slotz: 1}"], "it knows: models, slots"),
        (["--engine-settings", "{models: [{name: a, features: [flying]}]}"], "engine_settings.models.0.features"),
    ],
)
def test_settings_that_cannot_be_used_are_named(flags, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("modelyard model-server: ") and expected in said


class _NoSettings(BaseModel): ...


def test_missing_library_names_the_cure():
    def create(_: _NoSettings):
        raise ModuleNotFoundError("No module named 'vendor'", name="vendor")

    plugin = EnginePlugin("fancy", _NoSettings, create, extra="fancy")
    with pytest.raises(registry.EngineUnavailable, match=r"needs vendor.*pip install 'modelyard\[fancy\]'"):
        registry.create(plugin, _NoSettings())


def test_engine_that_cannot_be_made_says_why():
    def create(_: _NoSettings):
        raise EngineFailed("no such folder")

    with pytest.raises(registry.EngineUnavailable, match="no such folder"):
        registry.create(EnginePlugin("fancy", _NoSettings, create), _NoSettings())


def test_built_in_engines_are_declared_as_entry_points():
    import tomllib
    from pathlib import Path

    declared = tomllib.loads((Path(registry.__file__).parents[1] / "pyproject.toml").read_text())
    assert declared["project"]["entry-points"][registry.GROUP] == registry.BUILT_IN


def test_program_announces_itself_and_stops_with_its_parent():
    command = [sys.executable, "-m", "model_servers", "--orchestrators", "[]", "--watch-parent"]
    environment = {
        **os.environ,
        "MODELYARD_MODEL_SERVER__SERVER_ID": "ignored",
        "MODELYARD_MODEL_SERVER_SERVER_ID": "kid",
    }
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        line = process.stdout.readline()
        assert '"event": "ready"' in line and '"server_id": "kid"' in line
        process.stdin.close()
        assert process.wait(timeout=20) == 0
