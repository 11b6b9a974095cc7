from __future__ import annotations

from pathlib import Path

import pytest

from control_plane.definitions import read
from control_plane.presets import Presets, compile_presets
from modelyard.program.settings import SettingsError
from modelyard.rpc.errors import Refusal
from modelyard.v1.generation_pb2 import ROLE_SYSTEM, ROLE_USER, ContentPart, Message
from modelyard.v1.orchestrator_pb2 import GenerateRequest
from modelyard.v1.task_pb2 import TASK_PRIORITY_HIGH, TASK_TYPE_CHAT, TASK_TYPE_RESEARCH

RESEARCHER = """
presets:
  researcher:
    description: Gathers facts.
    task_type: research
    priority: high
    system: Name your sources.
    sampling: {temperature: 0.3, max_tokens: 2048, stop: ["END"]}
    timeout: 120
    requirements: {min_context_length: 8192, features: [json]}
    weights: {capability: 5}
    providers:
      openai: {model: gpt-large, sampling: {temperature: 0.1}}
      bedrock: {model: claude-large, region: eu-west-1}
"""


def compiled(folder: Path, text: str = RESEARCHER, **options: str) -> Presets:
    (folder / "presets.yaml").write_text(text)
    return compile_presets(read(folder).presets, **options)


def asked(*messages: tuple[int, str], **fields: object) -> GenerateRequest:
    request = GenerateRequest(preset="researcher", **fields)  # type: ignore[arg-type]
    for role, text in messages or ((ROLE_USER, "Why?"),):
        request.input.messages.append(Message(role=role, content=[ContentPart(text=text)]))  # type: ignore[arg-type]
    return request


def test_a_preset_fills_what_is_left_open(tmp_path: Path) -> None:
    filled, preset = compiled(tmp_path).fill(asked())
    assert preset is not None and preset.timeout == 120 and preset.weights == {"capability": 5}
    assert (filled.task_type, filled.priority) == (TASK_TYPE_RESEARCH, TASK_PRIORITY_HIGH)
    assert [(m.role, m.content[0].text) for m in filled.input.messages] == [
        (ROLE_SYSTEM, "Name your sources."),
        (ROLE_USER, "Why?"),
    ]
    sampling = filled.input.sampling
    assert (sampling.temperature, sampling.max_tokens, list(sampling.stop)) == (0.3, 2048, ["END"])
    assert filled.requirements.min_context_length == 8192
    assert (filled.requirements.model, filled.requirements.provider) == ("", "")


def test_what_the_request_says_holds(tmp_path: Path) -> None:
    request = asked((ROLE_SYSTEM, "Mine."), (ROLE_USER, "Why?"), task_type=TASK_TYPE_CHAT)
    request.input.sampling.temperature = 0.0
    request.input.sampling.stop.append("STOP")
    request.requirements.min_context_length = 5
    filled, _ = compiled(tmp_path).fill(request)
    assert [m.content[0].text for m in filled.input.messages] == ["Mine.", "Why?"]
    assert filled.input.sampling.temperature == 0.0 and list(filled.input.sampling.stop) == ["STOP"]
    assert filled.input.sampling.max_tokens == 2048
    assert filled.task_type == TASK_TYPE_CHAT and filled.requirements.min_context_length == 5


def test_a_raw_prompt_gets_no_system_message(tmp_path: Path) -> None:
    request = GenerateRequest(preset="researcher")
    request.input.prompt = "Once"
    filled, _ = compiled(tmp_path).fill(request)
    assert not filled.input.messages and filled.input.prompt == "Once"


def test_the_default_provider_chooses_the_entry(tmp_path: Path) -> None:
    presets = compiled(tmp_path, default_provider="openai")
    wanted = presets.fill(asked())[0]
    assert (wanted.requirements.provider, wanted.requirements.model) == ("openai", "gpt-large")
    assert wanted.input.sampling.temperature == 0.1
    request = asked()
    request.requirements.provider = "bedrock"
    wanted = presets.fill(request)[0]
    assert (wanted.requirements.provider, wanted.requirements.model) == ("bedrock", "claude-large")
    assert dict(wanted.requirements.labels) == {"region": "eu-west-1"}
    request = asked()
    request.requirements.model = "my-own"
    wanted = presets.fill(request)[0]
    assert (wanted.requirements.provider, wanted.requirements.model) == ("", "my-own")
    assert wanted.input.sampling.temperature == 0.3


def test_a_default_preset_is_for_requests_that_name_none(tmp_path: Path) -> None:
    request = asked()
    request.preset = ""
    assert compiled(tmp_path).fill(request) == (request, None)
    filled, _ = compiled(tmp_path, default="researcher").fill(request)
    assert filled.preset == "researcher" and filled.input.sampling.max_tokens == 2048


def test_an_unknown_preset_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    request = asked()
    request.preset = "reseacher"
    with pytest.raises(Refusal, match=r"researcher") as refused:
        compiled(tmp_path).fill(request)
    assert [violation.field for violation in refused.value.violations] == ["preset"]
    with pytest.raises(ValueError, match="no preset is called 'x'"):
        compile_presets({}, default="x")


def test_the_built_in_ones_cover_roles_use_cases_and_cost_tiers() -> None:
    names = {preset.name for preset in compile_presets({})}
    assert names >= {"researcher", "analyst", "synthesizer", "critic", "supervisor"}
    assert names >= {"fast_completion", "high_quality", "general_purpose", "economy", "balanced", "premium"}


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("{sampling: {temperature: 2.5}}", r":3: presets\.p\.sampling\.temperature: .*less than or equal to 2"),
        ("{timeout: 0}", r"presets\.p\.timeout: .*greater than 0"),
        ("{timeout: -1}", r"presets\.p\.timeout"),
        ("{sampling: {max_tokens: 0}}", r"presets\.p\.sampling\.max_tokens"),
        ("{task_type: cooking}", r"presets\.p\.task_type: .*unknown kind of work 'cooking'"),
        ("{weights: {speed: 1}}", r"presets\.p\.weights: .*unknown scorer 'speed'; known: capability"),
        ("{providers: {openai: {}}}", r"presets\.p\.providers\.openai\.model: .*required"),
        ("{providers: {bedrock: {model: m}}}", r"presets\.p: .*providers\.bedrock\.region is required"),
        ("{requirements: {features: [flying]}}", r"unknown feature 'flying'"),
        ("{temprature: 1}", r"presets\.p\.temprature: unknown key"),
    ],
)
def test_a_mistake_names_file_line_and_key(tmp_path: Path, entry: str, complaint: str) -> None:
    (tmp_path / "presets.yaml").write_text(f"presets:\n\n  p: {entry}\n")
    with pytest.raises(SettingsError, match=complaint):
        read(tmp_path)


def test_two_files_may_not_define_the_same_preset(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("presets: {p: {}}\n")
    with pytest.raises(SettingsError, match=r"b\.yaml: preset 'p' is in .*a\.yaml already"):
        read(tmp_path)
