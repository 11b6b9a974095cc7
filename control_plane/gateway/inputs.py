"""What the request formats share: decoding, and OpenAI's words for input turned into the contract's."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any, TypeVar

import msgspec

from control_plane.gateway.errors import refuse
from modelyard.openai import wire
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.v1 import generation_pb2
from modelyard.v1.generation_pb2 import GenerationInput, Message, SamplingParams

T = TypeVar("T")

_DATA_URL = re.compile(r"data:([^;,]*)((?:;[^;,]*)*),", re.ASCII)
_INT32 = 2**31 - 1
_encode = msgspec.json.encode

ROLES = {
    "system": generation_pb2.ROLE_SYSTEM,
    "developer": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
    "tool": generation_pb2.ROLE_TOOL,
}
_CHOICES = {
    "auto": generation_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": generation_pb2.TOOL_CHOICE_MODE_NONE,
    "required": generation_pb2.TOOL_CHOICE_MODE_REQUIRED,
}


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The request in a body. Raises INVALID_REQUEST naming the field that does not fit."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        field = path.removesuffix("`").removeprefix("$").removeprefix(".")
        raise refuse(field or "body", message[:1].lower() + message[1:]) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise Refusal(Reason.INVALID_REQUEST, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise Refusal(Reason.INVALID_REQUEST, "the body is nested too deeply") from None


# ----------------------------------------------------------------- messages ---


def add_text(message: Message, text: str) -> None:
    """Append a text."""
    message.content.add().text = text


def add_image(message: Message, url: str, param: str) -> None:
    """Append the image of a data URL."""
    image = message.content.add().image
    found = _DATA_URL.match(url)
    if found is None or not found[2].lower().endswith(";base64"):
        raise refuse(param, 'must be a data URL ("data:image/png;base64,..."): nothing is fetched from the network')
    try:
        image.data = base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise refuse(param, "is not valid base64") from None
    image.media_type = found[1].lower()


def role(name: str | None, param: str) -> generation_pb2.Role:
    """The contract's role. Developers speak as the system."""
    number = ROLES.get(name or "")
    if number is None:
        raise refuse(param, "must be system, developer, user, assistant or tool")
    return number


# ----------------------------------------------------------- what to answer ---


def set_sampling(sampling: SamplingParams, asked: wire.ChatRequest | wire.CompletionRequest) -> None:
    """Copy what is given."""
    if asked.temperature is not None:
        sampling.temperature = asked.temperature
    if asked.top_p is not None:
        sampling.top_p = asked.top_p
    if asked.top_k is not None:
        sampling.top_k = max(0, _int32(asked.top_k, "top_k"))  # -1 is another way to say "all"
    if asked.min_p is not None:
        sampling.min_p = asked.min_p
    if asked.repetition_penalty is not None:
        sampling.repetition_penalty = asked.repetition_penalty
    if asked.frequency_penalty is not None:
        sampling.frequency_penalty = asked.frequency_penalty
    if asked.presence_penalty is not None:
        sampling.presence_penalty = asked.presence_penalty
    if asked.seed is not None:
        sampling.seed = asked.seed % 2**64  # OpenAI's are signed
    if asked.stop:
        sampling.stop.extend([asked.stop] if isinstance(asked.stop, str) else asked.stop)
    if asked.n is not None and asked.n != 1:
        raise refuse("n", "only 1 is supported: send several requests")


def set_logprobs(sampling: SamplingParams, top: int | None, param: str) -> None:
    """Ask for log-probabilities and that many alternatives."""
    sampling.logprobs = True
    if top:
        sampling.top_logprobs = _int32(top, param)


def _int32(value: int, param: str) -> int:
    if not -_INT32 <= value <= _INT32:
        raise refuse(param, f"must be at most {_INT32}")
    return value


def set_max_tokens(sampling: SamplingParams, value: int, param: str) -> None:
    """Bound the answer."""
    sampling.max_tokens = _int32(value, param)


def set_format(input: GenerationInput, form: wire.ResponseFormat) -> None:
    """Demand the shape of an answer, in the words of chat completions."""
    match form.type:
        case "text":
            pass
        case "json_object":
            input.response_format.json.SetInParent()
        case "json_schema" if form.json_schema is not None:
            schema = form.json_schema
            set_schema(input, schema.schema, schema.name, "response_format.json_schema.schema")
        case "json_schema":
            raise refuse("response_format.json_schema", "is required")
        case _:
            raise refuse("response_format.type", "must be text, json_object or json_schema")


def set_schema(input: GenerationInput, schema: dict[str, Any] | None, name: str | None, param: str) -> None:
    """Demand an answer that satisfies a JSON Schema."""
    if schema is None:
        raise refuse(param, "is required")
    form = input.response_format.json_schema
    form.schema = _encode(schema).decode()
    form.name = name or ""


def add_tool(input: GenerationInput, name: str, description: str | None, parameters: dict[str, Any] | None) -> None:
    """Offer a function."""
    tool = input.tools.add(name=name, description=description or "")
    if parameters:
        tool.parameters_schema = _encode(parameters).decode()


def choose_tool(input: GenerationInput, choice: str, param: str) -> None:
    """auto, none or required."""
    mode = _CHOICES.get(choice)
    if mode is None:
        raise refuse(param, "must be none, auto, required or a function")
    input.tool_choice.mode = mode


def choose_named_tool(input: GenerationInput, kind: str, name: str | None, param: str) -> None:
    """The one function that must be called."""
    if kind != "function" or not name:
        raise refuse(param, "must be none, auto, required or a function")
    input.tool_choice.mode = generation_pb2.TOOL_CHOICE_MODE_REQUIRED
    input.tool_choice.name = name
