"""From a request to prompt tokens and to how the answer is read. Runs on the text thread, off the event loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from model_servers.engine import (
    ContextTooLong,
    GenerationRequest,
    Image,
    Message,
    Role,
    Sampling,
    Tool,
    ToolChoiceMode,
    Unsupported,
)
from model_servers.engines._mlx.answer import Answer, Detokenizer
from model_servers.engines._mlx.loading import Model
from model_servers.engines._mlx.markup import MarkupReader
from model_servers.engines._mlx.settings import ANY_OBJECT
from modelyard.program import privacy

_ROLES = {Role.SYSTEM: "system", Role.USER: "user", Role.ASSISTANT: "assistant", Role.TOOL: "tool"}


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: list[int]
    in_reasoning: bool = False
    """The prompt ends inside the model's reasoning."""
    in_call: bool = False
    """The prompt ends inside a tool call, which the grammar completes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A request made ready for the engine thread."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    constraint: Any
    """grammar.Constraint, or None for free text."""
    answer: Answer


def make_plan(model: Model, request: GenerationRequest) -> Plan:
    """Raises ContextTooLong, InvalidRequest and Unsupported."""
    prompt = make_prompt(model, request)
    used = len(prompt.tokens)
    room = model.context_length - used
    if room < 1:
        raise ContextTooLong(
            f"the prompt has {used} tokens and leaves no room for an answer in the context of "
            f"{model.context_length} tokens"
        )
    sampling = _with_defaults(request.sampling, model.defaults)
    markup = None
    if _offers_tools(request) or model.marks.think_start:
        marks = model.marks if _offers_tools(request) else dataclasses.replace(model.marks, call_start="")
        offered = frozenset(tool.name for tool in request.tools)
        markup = MarkupReader(marks, offered=offered, in_reasoning=prompt.in_reasoning, in_call=prompt.in_call)
    return Plan(
        prompt=prompt.tokens,
        max_tokens=min(room, sampling.max_tokens or room),
        sampling=sampling,
        constraint=_constraint(model, request, prompt),
        answer=Answer(Detokenizer(model.tokenizer, model.skipped), sampling.stop, markup),
    )


def make_prompt(model: Model, request: GenerationRequest) -> Prompt:
    """Tokens as generation counts them."""
    tokenizer = model.tokenizer
    if request.prompt is not None:
        if _offers_tools(request):
            raise Unsupported("tools need messages: a raw prompt has no place for them")
        return Prompt(_encode(model, request.prompt, add_special_tokens=True))
    if not tokenizer.has_chat_template:
        raise Unsupported(f"model {model.name} has no chat template: send a raw prompt")
    tools = None
    if _offers_tools(request):
        if not model.marks.call_start:
            raise Unsupported(f"model {model.name} has no tool calling")
        tools = [_tool(tool.name, tool.description, tool.parameters_schema) for tool in request.tools]
    options: dict[str, Any] = {}
    constrained = _json_schema(request) is not None or _forces_call(request)
    if model.marks.think_start and constrained:
        # The grammar holds from the first token on, so there is no room for reasoning before it.
        options["enable_thinking"] = False
    messages = _messages(request.messages)
    try:
        text = str(
            tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False, **options)
        )
    except Exception as error:  # templates are programs of their own and raise what they like
        raise Unsupported(f"the chat template of {model.name} refuses these messages ({privacy.kind(error)})") from None
    in_call = _forces_call(request)
    if in_call:
        text += model.marks.call_start + model.marks.call_glue
    start = model.marks.think_start
    in_reasoning = bool(start) and not constrained and text.rstrip().endswith(start)
    return Prompt(_encode(model, text, add_special_tokens=False), in_reasoning, in_call)


def weight(request: GenerationRequest) -> int:
    """About how many characters there are to work through; compiling a schema takes longer than tokenizing it."""
    schemas = len(request.json_schema or "") + sum(len(tool.parameters_schema) for tool in request.tools)
    messages = sum(len(part) for message in request.messages for part in message.content if isinstance(part, str))
    calls = sum(len(call.arguments_json) for message in request.messages for call in message.tool_calls)
    described = sum(len(tool.description) for tool in request.tools)
    return len(request.prompt or "") + messages + calls + described + 8 * schemas


def pieces(texts: Sequence[str], characters: int) -> Iterator[Sequence[str]]:
    """The texts in groups that have together at most that many characters, or one text that has more."""
    begin = size = 0
    for end, text in enumerate(texts):
        if end > begin and size + len(text) > characters:
            yield texts[begin:end]
            begin, size = end, 0
        size += len(text)
    if begin < len(texts):
        yield texts[begin:]


def embedding_tokens(model: Model, text: str) -> list[int]:
    """Tokens of one text to embed; at least one. Raises ContextTooLong."""
    tokens = _encode(model, text, add_special_tokens=True)
    if len(tokens) > model.context_length:
        raise ContextTooLong(f"an input has {len(tokens)} tokens, the model's context is {model.context_length} tokens")
    return tokens


def _encode(model: Model, text: str, *, add_special_tokens: bool) -> list[int]:
    """Raises ContextTooLong for what cannot fit however it is tokenized, which is not tried then."""
    if model.most_bytes_per_token is not None:
        size, most = len(text.encode("utf-8", "surrogatepass")), model.context_length * model.most_bytes_per_token
        if size > most:
            raise ContextTooLong(
                f"the text has {size} bytes, a context of {model.context_length} tokens holds at most {most}"
            )
    tokens = [int(t) for t in model.tokenizer.encode(text, add_special_tokens=add_special_tokens)]
    # Nothing at all cannot be computed on; the end-of-text token is what models know as "no text".
    return tokens or [min(model.eos, default=0)]


def _offers_tools(request: GenerationRequest) -> bool:
    return bool(request.tools) and request.tool_choice is not ToolChoiceMode.NONE


def _forces_call(request: GenerationRequest) -> bool:
    return _offers_tools(request) and request.tool_choice is ToolChoiceMode.REQUIRED


def _json_schema(request: GenerationRequest) -> str | None:
    return request.json_schema or (ANY_OBJECT if request.json_object else None)


def _constraint(model: Model, request: GenerationRequest, prompt: Prompt) -> Any:
    schema = _json_schema(request)
    if schema is None and not prompt.in_call:
        return None
    if model.grammar_tokenizer is None:
        raise Unsupported(f"model {model.name} cannot hold its output to a grammar here: is llguidance installed?")
    from model_servers.engines._mlx import grammar

    field = "response_format.json_schema.schema"
    if not _offers_tools(request):
        return grammar.Constraint(model.grammar_tokenizer, grammar.schema_grammar(str(schema), field), field)
    if model.marks.parse_call is not None:
        raise Unsupported(f"the tool call format of {model.name} cannot be forced, nor mixed with JSON output")
    tools = [tool for tool in request.tools if not prompt.in_call or request.tool_name in ("", tool.name)]
    if not tools:
        raise Unsupported(f"the tool {request.tool_name!r} that must be called is not among the tools")
    for tool in tools:
        if tool.parameters_schema:
            grammar.check_schema(tool.parameters_schema, _field_of(request, tool))
    if prompt.in_call:  # the call is the answer: a response format has nothing left to shape
        field = _field_of(request, *tools)
        text = grammar.schema_grammar(grammar.call_schema(tools), field)
    else:
        marks = model.marks
        text = grammar.answer_or_calls_grammar(
            model.grammar_tokenizer, str(schema), tools, marks.call_start, marks.call_end, field
        )
    return grammar.Constraint(model.grammar_tokenizer, text, field)


def _field_of(request: GenerationRequest, *tools: Tool) -> str:
    return "tools" if len(tools) > 1 else f"tools[{request.tools.index(tools[0])}].parameters_schema"


def _with_defaults(asked: Sampling, defaults: Sampling) -> Sampling:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    missing = {name: getattr(defaults, name) for name in names if getattr(asked, name) is None}
    return dataclasses.replace(asked, **missing)


def _tool(name: str, description: str, schema: str) -> dict[str, Any]:
    try:
        parameters = json.loads(schema) if schema else {"type": "object", "properties": {}}
    except (ValueError, RecursionError):
        raise Unsupported(f"parameters_schema of tool {name!r} is not JSON") from None
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _messages(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """As Hugging Face chat templates expect them."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    return [_message(message, names) for message in messages]


def _message(message: Message, names: dict[str, str]) -> dict[str, Any]:
    if any(isinstance(part, Image) for part in message.content):
        raise Unsupported("the MLX engine takes text only, no images")
    rendered: dict[str, Any] = {"role": _ROLES[message.role], "content": message.text}
    if message.name:
        rendered["name"] = message.name
    if message.role is Role.TOOL:
        rendered["tool_call_id"] = message.tool_call_id
        rendered.setdefault("name", names.get(message.tool_call_id, ""))
    if message.tool_calls:
        rendered["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments_json)},
            }
            for call in message.tool_calls
        ]
    return rendered


def _arguments(text: str) -> Any:
    """Templates want the parsed object; what is not JSON is shown as it is."""
    try:
        return json.loads(text) if text else {}
    except ValueError:
        return text
