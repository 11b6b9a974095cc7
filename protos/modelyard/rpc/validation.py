"""What the comments of the contract demand of a request, checked.

Each `check_*` returns the violations it found, none if the message is well-formed and at most
`MAX_VIOLATIONS`; `errors.invalid` makes a refusal of them. Cost is linear in the size of the message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from google.protobuf.duration_pb2 import Duration

from modelyard.rpc.errors import Violation
from modelyard.rpc.prompts import MOST_DIGESTS
from modelyard.v1 import (
    fleet_pb2,
    generation_pb2,
    model_server_pb2,
    orchestrator_pb2,
    selection_pb2,
    task_pb2,
    ticket_pb2,
)

MAX_VIOLATIONS = 20
"""No client reads more, and a hostile request must not make more."""

MAX_EMBED_INPUTS = 2048
MAX_SCHEMA_BYTES = 64 << 10
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LABELS = 32
MAX_TOP_LOGPROBS = 20
MAX_EXCLUDED_MODELS = 100
"""Each costs the selector a look at the table."""
MAX_MODELS = 4096
"""Of one report: each costs every control plane work and memory."""
MAX_FINGERPRINT_CHARACTERS = 1024
MAX_TEXT = 256
"""Characters of a free text in a report: names, versions, labels. Everything in it is shown to everybody."""
MAX_DETAIL = 4096
"""Characters of `health_detail`."""
MAX_AMOUNT = 1e9
"""Of prices in US dollars per million tokens and of tokens per second."""
MAX_SECONDS = 315_576_000_000
"""The range of google.protobuf.Duration as it is documented, about 10,000 years; its field holds more."""
MAX_CONTEXT_LENGTH = 2**32 - 1
MAX_OUTCOMES = 1000
"""Of tickets, in one report."""
MAX_AHEAD = 16
"""Requests for which one Assign call may be ahead."""


_ROLES = frozenset(generation_pb2.Role.values()) - {0}
_TOOL_CHOICE_MODES = frozenset(generation_pb2.ToolChoiceMode.values())
_TASK_TYPES = frozenset(task_pb2.TaskType.values())
_PRIORITIES = frozenset(task_pb2.TaskPriority.values())
_FEATURES = frozenset(fleet_pb2.ModelFeature.values())
_HEALTHS = frozenset(fleet_pb2.ServerHealth.values())
_STATES = frozenset(fleet_pb2.DesiredState.values())
_MODEL_STATES = frozenset(fleet_pb2.ModelState.values())
_SYSTEM, _ASSISTANT, _TOOL = generation_pb2.ROLE_SYSTEM, generation_pb2.ROLE_ASSISTANT, generation_pb2.ROLE_TOOL
_ASKING = frozenset({_SYSTEM, generation_pb2.ROLE_USER})

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SERVER_ID = re.compile(r"[a-z0-9._-]{1,63}")
_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,64}")
_MEDIA_TYPE = re.compile(r"image/[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ENDPOINT = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]{1,253}):([0-9]{1,5})")

Violations = list[Violation]


# ---------------------------------------------------------------- requests ---


def check_generate_request(request: orchestrator_pb2.GenerateRequest, path: str = "") -> Violations:
    """Violations of a GenerateRequest; `path` ends with "." if not empty.

    Its size is checked where its bytes are: see `max_request_bytes` of `server.service_handler`.
    """
    found = _check_required_input(request, f"{path}input")
    if request.task_type not in _TASK_TYPES:
        found.append(Violation(f"{path}task_type", unknown_number(request.task_type)))
    _check_routing(request, path, found)
    return found[:MAX_VIOLATIONS]


def check_assign_request(request: orchestrator_pb2.AssignRequest) -> Violations:
    """Violations of an AssignRequest."""
    if not request.HasField("request"):
        return [Violation("request", "is required")]
    found: Violations = []
    inner = request.request
    for field, _ in inner.input.ListFields():
        if field.name != "sampling":
            found.append(Violation(f"request.input.{field.name}", "must be left out: it is the model server's to see"))
    if inner.input.HasField("sampling"):
        _check_sampling(inner.input.sampling, "request.input.sampling", found)
    if inner.task_type not in _TASK_TYPES:
        found.append(Violation("request.task_type", unknown_number(inner.task_type)))
    if request.prompt_tokens > MAX_CONTEXT_LENGTH // 2:
        found.append(Violation("prompt_tokens", "is more than any model takes"))
    if len(request.prompt_hashes) > MOST_DIGESTS:
        found.append(Violation("prompt_hashes", f"are more than {MOST_DIGESTS}"))
    if request.ahead_requests > MAX_AHEAD:
        found.append(Violation("ahead_requests", f"at most {MAX_AHEAD} are accepted, not {request.ahead_requests}"))
    _check_routing(inner, "request.", found)
    return found[:MAX_VIOLATIONS]


def check_embed_request(request: orchestrator_pb2.EmbedRequest) -> Violations:
    """Violations of an EmbedRequest."""
    found: Violations = []
    _check_inputs(len(request.inputs), found)
    _check_routing(request, "", found)
    return found[:MAX_VIOLATIONS]


def check_model_server_generate_request(
    request: model_server_pb2.ModelServerGenerateRequest
    | model_server_pb2.ModelServerCompleteRequest
    | model_server_pb2.CountTokensRequest,
) -> Violations:
    """Violations of a ModelServerGenerateRequest, ModelServerCompleteRequest or CountTokensRequest."""
    found = _check_required_input(request, "input")
    if not request.model:
        found.append(Violation("model", "is required"))
    return found[:MAX_VIOLATIONS]


def check_model_server_embed_request(request: model_server_pb2.ModelServerEmbedRequest) -> Violations:
    """Violations of a ModelServerEmbedRequest."""
    found: Violations = []
    if not request.model:
        found.append(Violation("model", "is required"))
    _check_inputs(len(request.inputs), found)
    return found


def check_feedback(request: orchestrator_pb2.ReportFeedbackRequest) -> Violations:
    """Which answer, and what somebody says of it."""
    found: Violations = []
    if not _REQUEST_ID.fullmatch(request.request_id):
        found.append(Violation("request_id", "is required, at most 64 printable ASCII characters"))
    if not request.HasField("score"):
        found.append(Violation("score", "is required"))
    elif not 0 <= request.score <= 1:
        found.append(Violation("score", f"must be between 0 and 1, is {request.score:g}"))
    return found


def check_tenant(name: str) -> Violations:
    """Violations of the metadata `modelyard-tenant`."""
    if _TENANT.fullmatch(name):
        return []
    return [Violation("modelyard-tenant", 'must be 1 to 64 letters, digits, ".", "_" or "-"')]


def _check_required_input(
    request: orchestrator_pb2.GenerateRequest
    | model_server_pb2.ModelServerGenerateRequest
    | model_server_pb2.ModelServerCompleteRequest
    | model_server_pb2.CountTokensRequest,
    path: str,
) -> Violations:
    return (
        check_generation_input(request.input, path) if request.HasField("input") else [Violation(path, "is required")]
    )


def _check_inputs(count: int, found: Violations) -> None:
    if not 1 <= count <= MAX_EMBED_INPUTS:
        found.append(Violation("inputs", f"must be 1 to {MAX_EMBED_INPUTS} texts, not {count}"))


def _check_routing(
    request: orchestrator_pb2.GenerateRequest | orchestrator_pb2.EmbedRequest, path: str, found: Violations
) -> None:
    if request.priority not in _PRIORITIES:
        found.append(Violation(f"{path}priority", unknown_number(request.priority)))
    # A TaskSpec, which is checked as well, has no request id.
    if (request_id := getattr(request, "request_id", "")) and not _REQUEST_ID.fullmatch(request_id):
        found.append(Violation(f"{path}request_id", "must be at most 64 printable ASCII characters"))
    if request.HasField("requirements"):
        _check_requirements(request.requirements, f"{path}requirements", found)


def _check_requirements(requirements: selection_pb2.Requirements, path: str, found: Violations) -> None:
    if requirements.min_context_length < 0:
        found.append(Violation(f"{path}.min_context_length", "must be 0 or more"))
    if requirements.max_cost_nano_usd < 0:
        found.append(Violation(f"{path}.max_cost_nano_usd", "must be 0 or more"))
    if len(requirements.excluded_models) > MAX_EXCLUDED_MODELS:
        found.append(Violation(f"{path}.excluded_models", f"at most {MAX_EXCLUDED_MODELS} are accepted"))
        return
    for i, model in enumerate(requirements.excluded_models):
        if not model.strip("/") or len(model) > MAX_TEXT:
            problem = f'must be a name or "provider/name" of at most {MAX_TEXT} characters'
            found.append(Violation(f"{path}.excluded_models[{i}]", problem))
            if len(found) >= MAX_VIOLATIONS:
                return
    for i, feature in enumerate(requirements.features):
        if feature not in _FEATURES:
            found.append(Violation(f"{path}.features[{i}]", unknown_number(feature)))
            if len(found) >= MAX_VIOLATIONS:
                return


# ------------------------------------------------------------------- input ---


def check_generation_input(input: generation_pb2.GenerationInput, path: str = "input") -> Violations:
    """Violations of a GenerationInput found at `path`."""
    found: Violations = []
    messages = input.messages
    if messages:
        if input.prompt:
            found.append(Violation(path, "give either messages or prompt, not both"))
        _check_messages(messages, path, found)
    elif not input.prompt:
        found.append(Violation(path, "messages or prompt is required"))
    if input.HasField("sampling"):
        _check_sampling(input.sampling, f"{path}.sampling", found)
    if input.HasField("response_format"):
        _check_response_format(input.response_format, f"{path}.response_format", found)
    names = _check_tools(input.tools, path, found) if input.tools else frozenset()
    if input.HasField("tool_choice"):
        _check_tool_choice(input.tool_choice, names, f"{path}.tool_choice", found)
    return found[:MAX_VIOLATIONS]


def _check_messages(messages: Sequence[generation_pb2.Message], path: str, found: Violations) -> None:
    call_ids: set[str] = set()
    role = 0
    for i, message in enumerate(messages):
        role = message.role
        content = message.content
        calls = message.tool_calls
        if role not in _ROLES:
            found.append(Violation(f"{path}.messages[{i}].role", unknown_number(role) if role else "is required"))
        if not content and not (calls and role == _ASSISTANT):
            found.append(Violation(f"{path}.messages[{i}].content", "at least one part is required"))
        for j, part in enumerate(content):
            kind = part.WhichOneof("part")
            if kind == "image":
                _check_image(part.image, f"{path}.messages[{i}].content[{j}].image", found)
            elif kind is None:
                found.append(Violation(f"{path}.messages[{i}].content[{j}]", "text or image is required"))
            elif not part.text and role in _ASKING:
                found.append(Violation(f"{path}.messages[{i}].content[{j}].text", "must not be empty"))
        if calls:
            if role != _ASSISTANT:
                found.append(Violation(f"{path}.messages[{i}].tool_calls", "only an assistant message may carry calls"))
            _check_tool_calls(calls, call_ids, f"{path}.messages[{i}].tool_calls", found)
        if (role == _TOOL) != bool(message.tool_call_id):
            text = "is required in a tool message" if role == _TOOL else "only a tool message may answer a call"
            found.append(Violation(f"{path}.messages[{i}].tool_call_id", text))
        if len(found) >= MAX_VIOLATIONS:
            return
    if role == _SYSTEM:
        found.append(
            Violation(f"{path}.messages[{len(messages) - 1}].role", "the last message must not be a system one")
        )


def _check_image(image: generation_pb2.Image, path: str, found: Violations) -> None:
    if not image.data:
        found.append(Violation(f"{path}.data", "is required"))
    if not _MEDIA_TYPE.fullmatch(image.media_type):
        found.append(Violation(f"{path}.media_type", 'must be an image type such as "image/png"'))


def _check_tool_calls(
    calls: Sequence[generation_pb2.ToolCall], call_ids: set[str], path: str, found: Violations
) -> None:
    for i, call in enumerate(calls):
        if not call.id:
            found.append(Violation(f"{path}[{i}].id", "is required"))
        elif call.id in call_ids:
            found.append(Violation(f"{path}[{i}].id", "must be unique in the conversation"))
        call_ids.add(call.id)
        if not call.name:
            found.append(Violation(f"{path}[{i}].name", "is required"))
        if problem := json_object_problem(call.arguments_json):
            found.append(Violation(f"{path}[{i}].arguments_json", problem))
        if len(found) >= MAX_VIOLATIONS:
            return


def _between(low: float, high: float) -> Callable[[Any], str | None]:
    return lambda value: None if low <= value <= high else f"must be {low:g} to {high:g}"


def _above_zero(high: float) -> Callable[[Any], str | None]:
    return lambda value: None if 0 < value <= high else f"must be above 0, at most {high:g}"


def _at_least(low: int) -> Callable[[Any], str | None]:
    return lambda value: None if value >= low else f"must be {low} or more"


# Comparisons are written so that NaN fails them.
_SAMPLING: dict[str, Callable[[Any], str | None]] = {
    "max_tokens": _at_least(1),
    "temperature": _between(0, 2),
    "top_p": _above_zero(1),
    "top_k": _at_least(0),
    "min_p": _between(0, 1),
    "frequency_penalty": _between(-2, 2),
    "presence_penalty": _between(-2, 2),
    "repetition_penalty": _above_zero(10),
    "top_logprobs": _between(0, MAX_TOP_LOGPROBS),
    "n": lambda value: None if value in (0, 1) else "only 1 is accepted",
}


def _check_sampling(sampling: generation_pb2.SamplingParams, path: str, found: Violations) -> None:
    for field, value in sampling.ListFields():
        name = field.name
        check = _SAMPLING.get(name)
        if check is not None:
            if problem := check(value):
                found.append(Violation(f"{path}.{name}", problem))
        elif name == "stop":
            _check_stop(value, f"{path}.stop", found)
    if sampling.top_logprobs and not sampling.logprobs:
        found.append(Violation(f"{path}.top_logprobs", "needs logprobs"))


def _check_stop(stop: Sequence[str], path: str, found: Violations) -> None:
    if len(stop) > MAX_STOPS:
        found.append(Violation(path, f"at most {MAX_STOPS} are accepted, not {len(stop)}"))
        return
    for i, text in enumerate(stop):
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            found.append(Violation(f"{path}[{i}]", f"must have 1 to {MAX_STOP_CHARACTERS} characters"))


def _check_response_format(response_format: generation_pb2.ResponseFormat, path: str, found: Violations) -> None:
    if response_format.WhichOneof("format") != "json_schema":
        return
    schema = response_format.json_schema.schema
    if len(schema) > MAX_SCHEMA_BYTES or len(schema.encode()) > MAX_SCHEMA_BYTES:
        found.append(Violation(f"{path}.json_schema.schema", f"must have at most {MAX_SCHEMA_BYTES} bytes"))
    elif problem := json_object_problem(schema):
        found.append(Violation(f"{path}.json_schema.schema", problem))


def _check_tools(tools: Sequence[generation_pb2.Tool], path: str, found: Violations) -> frozenset[str]:
    names: set[str] = set()
    for i, tool in enumerate(tools):
        name = tool.name
        if not _TOOL_NAME.fullmatch(name):
            text = "must be 1 to 64 letters, digits, '_' or '-'" if name else "is required"
            found.append(Violation(f"{path}.tools[{i}].name", text))
        elif name in names:
            found.append(Violation(f"{path}.tools[{i}].name", "must be unique"))
        names.add(name)
        if tool.parameters_schema and (problem := json_object_problem(tool.parameters_schema)):
            found.append(Violation(f"{path}.tools[{i}].parameters_schema", problem))
        if len(found) >= MAX_VIOLATIONS:
            break
    return frozenset(names)


def _check_tool_choice(choice: generation_pb2.ToolChoice, names: frozenset[str], path: str, found: Violations) -> None:
    required = choice.mode == generation_pb2.TOOL_CHOICE_MODE_REQUIRED
    if choice.mode not in _TOOL_CHOICE_MODES:
        found.append(Violation(f"{path}.mode", unknown_number(choice.mode)))
    elif required and not names:
        found.append(Violation(f"{path}.mode", "a tool is required but none is offered"))
    if choice.name:
        if not required:
            found.append(Violation(f"{path}.name", "needs TOOL_CHOICE_MODE_REQUIRED"))
        elif choice.name not in names:
            found.append(Violation(f"{path}.name", "must be among the tools"))


def json_object_problem(text: str) -> str | None:
    """What keeps `text` from being a JSON object; None if it is one."""
    if not text:
        return "is required"
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        return "is nested too deeply"
    except ValueError as error:
        return f"is not valid JSON: {error}"
    return None if isinstance(value, dict) else "must be a JSON object"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def unknown_number(value: int) -> str:
    """What is wrong with the number of an enum value that nobody knows."""
    return f"unknown value {value}"


# ------------------------------------------------------------------ report ---


def check_report(report: fleet_pb2.ServerReport) -> Violations:
    """Violations of a model server's report."""
    found: Violations = []
    _check_identity(report.identity, found)
    if not report.engine.name:
        found.append(Violation("engine.name", "is required"))
    if len(report.models) > MAX_MODELS:
        found.append(Violation("models", f"at most {MAX_MODELS} are accepted, not {len(report.models)}"))
        return found[:MAX_VIOLATIONS]
    _check_texts(report.engine, "engine", found)
    _check_texts(report.hardware, "hardware", found)
    _check_text(report.health_detail, "health_detail", found, MAX_DETAIL)
    offered: set[tuple[str, str]] = set()
    for i, model in enumerate(report.models):
        _check_model(model, offered, f"models[{i}]", found)
        if len(found) >= MAX_VIOLATIONS:
            return found[:MAX_VIOLATIONS]
    load = report.load
    if load.slots < 1:
        found.append(Violation("load.slots", "must be 1 or more"))
    if not 0 <= load.kv_cache_utilization <= 1:
        found.append(Violation("load.kv_cache_utilization", "must be 0 to 1"))
    if report.health not in _HEALTHS:
        found.append(Violation("health", unknown_number(report.health)))
    if report.state not in _STATES:
        found.append(Violation("state", unknown_number(report.state)))
    found += check_ticket_report(report.tickets)
    return found[:MAX_VIOLATIONS]


def check_ticket_report(report: ticket_pb2.TicketReport) -> Violations:
    """Violations of what a report says of tickets."""
    found: Violations = []
    _check_text(report.orchestrator_id, "tickets.orchestrator_id", found)
    if len(report.outcomes) > MAX_OUTCOMES:
        found.append(Violation("tickets.outcomes", f"at most {MAX_OUTCOMES} are accepted, not {len(report.outcomes)}"))
        return found
    if report.HasField("as_of"):
        _check_duration(report.as_of, "tickets.as_of", found)
    for i, outcome in enumerate(report.outcomes):
        _check_text(outcome.failure_reason, f"tickets.outcomes[{i}].failure_reason", found)
        for field, value in outcome.result.timings.ListFields():
            _check_duration(value, f"tickets.outcomes[{i}].result.timings.{field.name}", found)
        if len(found) >= MAX_VIOLATIONS:
            break
    return found[:MAX_VIOLATIONS]


def _check_identity(identity: fleet_pb2.ServerIdentity, found: Violations) -> None:
    if not _SERVER_ID.fullmatch(identity.server_id):
        text = "must be 1 to 63 lower-case letters, digits, '.', '_' or '-'" if identity.server_id else "is required"
        found.append(Violation("identity.server_id", text))
    if not identity.instance_id:
        found.append(Violation("identity.instance_id", "is required"))
    _check_text(identity.instance_id, "identity.instance_id", found)
    _check_text(identity.version, "identity.version", found)
    endpoint = _ENDPOINT.fullmatch(identity.endpoint)
    if endpoint is None or not 1 <= int(endpoint[1]) <= 65535:
        found.append(Violation("identity.endpoint", "must be host:port" if identity.endpoint else "is required"))
    if len(identity.labels) > MAX_LABELS:
        found.append(Violation("identity.labels", f"at most {MAX_LABELS} are accepted"))
    elif any(len(text) > MAX_TEXT for label in identity.labels.items() for text in label):
        found.append(Violation("identity.labels", f"keys and values must have at most {MAX_TEXT} characters"))


def _check_model(model: fleet_pb2.ModelInfo, offered: set[tuple[str, str]], path: str, found: Violations) -> None:
    name, provider = model.name, model.provider
    if not name:
        found.append(Violation(f"{path}.name", "is required"))
    if not provider:
        found.append(Violation(f"{path}.provider", "is required"))
    _check_text(name, f"{path}.name", found)
    _check_text(provider, f"{path}.provider", found)
    _check_text(model.quantization, f"{path}.quantization", found)
    if (provider, name) in offered:
        found.append(Violation(path, f"{provider[:MAX_TEXT]}/{name[:MAX_TEXT]} is offered twice"))
    offered.add((provider, name))
    if model.context_length < 1:
        found.append(Violation(f"{path}.context_length", "must be 1 or more"))
    for i, capability in enumerate(model.capabilities):
        if capability.task_type not in _TASK_TYPES or not capability.task_type:
            text = unknown_number(capability.task_type) if capability.task_type else "is required"
            found.append(Violation(f"{path}.capabilities[{i}].task_type", text))
        if not 0 <= capability.score <= 1:
            found.append(Violation(f"{path}.capabilities[{i}].score", "must be 0 to 1"))
        if len(found) >= MAX_VIOLATIONS:
            return
    for i, feature in enumerate(model.features):
        if feature not in _FEATURES:
            found.append(Violation(f"{path}.features[{i}]", unknown_number(feature)))
            if len(found) >= MAX_VIOLATIONS:
                return
    if model.HasField("price"):
        for field, value in model.price.ListFields():
            _check_amount(value, f"{path}.price.{field.name}", found)
    if model.HasField("performance"):
        _check_performance(model.performance, f"{path}.performance", found)
    if model.state not in _MODEL_STATES:
        found.append(Violation(f"{path}.state", unknown_number(model.state)))
    if model.HasField("load_time"):
        _check_duration(model.load_time, f"{path}.load_time", found)
    if len(model.fingerprint) > MAX_FINGERPRINT_CHARACTERS:
        found.append(Violation(f"{path}.fingerprint", f"must have at most {MAX_FINGERPRINT_CHARACTERS} characters"))


def _check_performance(performance: fleet_pb2.Performance, path: str, found: Violations) -> None:
    for field, value in performance.ListFields():
        if field.message_type is None:
            _check_amount(value, f"{path}.{field.name}", found)
        else:
            _check_duration(value, f"{path}.{field.name}", found)


def _check_duration(value: Duration, path: str, found: Violations) -> None:
    if not (0 <= value.seconds < MAX_SECONDS and 0 <= value.nanos <= 999_999_999):
        found.append(Violation(path, f"must be a duration of 0 or more, below {MAX_SECONDS} s"))


def _check_amount(value: float, path: str, found: Violations) -> None:
    if not 0 <= value <= MAX_AMOUNT:  # NaN fails this too
        found.append(Violation(path, f"must be 0 to {MAX_AMOUNT:g}"))


def _check_text(text: str, path: str, found: Violations, most: int = MAX_TEXT) -> None:
    if len(text) > most:
        found.append(Violation(path, f"must have at most {most} characters, not {len(text)}"))


def _check_texts(message: fleet_pb2.EngineInfo | fleet_pb2.HardwareInfo, path: str, found: Violations) -> None:
    for field, value in message.ListFields():
        if isinstance(value, str):
            _check_text(value, f"{path}.{field.name}", found)
