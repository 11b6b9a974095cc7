"""Output held to a grammar by llguidance: JSON objects, JSON schemas, forced tool calls.

Importing this module needs llguidance; without it the engine does not offer these features.

A schema that is refused, before the answer or in the middle of it, is the fault of the request: InvalidRequest that
names its field, or Unsupported where the schema is sound but asks for what llguidance lacks. What llguidance says
quotes schema and answer, so none of it is passed on but keywords of JSON Schema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from model_servers.engine import EngineError, InvalidRequest, Tool, Unsupported

_LIMITS = LLParserLimits(max_lexer_states=50_000)
"""A state takes up to 2 kB: at most 100 MB for a request. llguidance's own limits bound the time of each step."""
_DEPTH = 100
_MOST_STATES = 5_000
"""Of the automata for multipleOf, which llguidance does not bound: 100,000 states take a second and 50 MB."""
_COMBINERS = frozenset(("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef"))

# Those that are words of any sentence count in quotes only.
_KEYWORD = re.compile(
    r"""(?<=["'])(?:contains|else|if|items|not|then)(?=["'])|\b(?:additionalItems|additionalProperties|allOf|anyOf|const|"""
    r"dependencies|dependentRequired|dependentSchemas|enum|exclusiveMaximum|exclusiveMinimum|format|maxContains|maxItems|"
    r"maxLength|maxProperties|maximum|minContains|minItems|minLength|minProperties|minimum|multipleOf|oneOf|pattern|"
    r"patternProperties|prefixItems|properties|propertyNames|required|type|unevaluatedItems|unevaluatedProperties|"
    r"uniqueItems)\b"
)

_STYLE = {"whitespace_flexible": True, "whitespace_pattern": " ?"}
"""At most one blank between JSON tokens. Free whitespace lets weak models write blanks until they are cut off."""


def make_tokenizer(tokenizer: Any, vocabulary: int, eos: Sequence[int]) -> LLTokenizer:
    """`vocabulary`: width of the model's logits, which may exceed the tokenizer's. Takes up to a second."""
    backend = tokenizer.backend_tokenizer
    # The copy goes through text: padding and truncation of the original must not leak into it.
    described = json.loads(backend.to_str())
    described["padding"] = described["truncation"] = None
    known = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return LLTokenizer(json.dumps(described), n_vocab=max(vocabulary, known), eos_token=list(eos))


def refused(problem: str, field: str) -> EngineError:
    """What llguidance says of a schema, in our words."""
    said = problem.strip().partition("\n")[0]  # what follows is a dump of its state
    named = dict.fromkeys(_KEYWORD.findall(said))
    at = f" (see {', '.join(map(repr, named))})" if named else ""
    if re.search("[Uu]nimplemented|not supported", said):
        return Unsupported(f"the JSON schema asks for what the MLX engine cannot enforce{at}")
    if re.search("[Uu]nsatisfiable|NoExtension", said):
        return InvalidRequest(f"no value satisfies the JSON schema{at}", field)
    if re.search("max is|too large|too complex|TooComplex|too many|limit", said):
        return InvalidRequest("the JSON schema is too large or too complex to hold an answer to it", field)
    return InvalidRequest(f"no grammar can be made of the JSON schema{at}", field)


def check_schema(schema: str, field: str) -> Any:
    """The schema as a value. Raises InvalidRequest and Unsupported for what the compiler must not be given."""
    try:
        document = json.loads(schema)
    except (ValueError, RecursionError):
        raise InvalidRequest("the JSON schema is not valid JSON", field) from None
    steps: list[Decimal] = []
    combined = False
    level, depth = [document], 0
    while level:
        depth += 1
        if depth > _DEPTH:
            raise InvalidRequest(f"the JSON schema nests more than {_DEPTH} levels deep", field)
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                step: Any = node.get("multipleOf")
                if type(step) in (int, float) and (exact := Decimal(str(step))).is_finite() and exact > 0:
                    steps.append(exact)
                combined = combined or not _COMBINERS.isdisjoint(node)
                below += node.values()
            elif isinstance(node, list):
                below += node
        level = below
    if steps and _automaton_states(steps, combined=combined) > _MOST_STATES:
        raise Unsupported("the JSON schema has a 'multipleOf' with more digits than the MLX engine can enforce")
    return document


def _automaton_states(steps: Sequence[Decimal], *, combined: bool) -> int:
    """About how many states the automata for these values of multipleOf have. Trailing zeros cost nothing."""
    if combined:  # schemas that are merged need a common multiple
        least = min(int(step.as_tuple().exponent) for step in steps)
        return len(steps) * _without_zeros(math.lcm(*(int(step.scaleb(-least)) for step in steps)))
    return sum(_without_zeros(int("".join(map(str, step.as_tuple().digits)))) for step in steps)


def _without_zeros(number: int) -> int:
    return int(str(number).rstrip("0") or "0") if number < 10**100 else number


def schema_grammar(schema: str, field: str) -> str:
    """The grammar of a JSON Schema document. Raises InvalidRequest and Unsupported."""
    check_schema(schema, field)
    try:
        return str(LLMatcher.grammar_from_json_schema(schema, defaults=_STYLE))
    except ValueError as error:
        raise refused(str(error), field) from None


def answer_or_calls_grammar(
    tokenizer: LLTokenizer, schema: str, tools: Sequence[Tool], start: str, end: str, field: str = ""
) -> str:
    """Either JSON that satisfies `schema`, or one or more tool calls between the tags `start` and `end`.

    Raises InvalidRequest and Unsupported for schemas that must not be compiled; whether the grammar is accepted is for
    Constraint to find out.
    """
    begin, finish = _terminal(tokenizer, start), _terminal(tokenizer, end)
    return f"""
start: answer | call+
answer: %json {_styled(check_schema(schema, field))}
call: {begin} GAP arguments GAP {finish} GAP
arguments: %json {_styled(check_schema(call_schema(tools), field))}
GAP: /\\n?/
"""


def _terminal(tokenizer: LLTokenizer, tag: str) -> str:
    """How a grammar names a tag: special tokens (llguidance has its own idea of which are) without quotes."""
    tokens = tokenizer.tokenize_str(tag, parse_special=True)
    if len(tokens) == 1 and tokenizer.is_special_token(tokens[0]):
        return f"<[{tokens[0]}]>"
    return json.dumps(tag)


def _styled(schema: Any) -> str:
    return json.dumps({"x-guidance": _STYLE, **schema} if isinstance(schema, dict) else schema)


def call_schema(tools: Sequence[Tool]) -> str:
    """Schema of a Hermes tool call, {"name": ..., "arguments": {...}}, to one of `tools`."""
    defs = {f"tool{i}": _rebased(arguments_schema(tool), f"#/$defs/tool{i}") for i, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/tool{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    return json.dumps({"$defs": defs, "anyOf": calls})


def _rebased(schema: Any, root: str) -> Any:
    """The schema with its local references moved: "#/..." means the root of the document it is put into."""
    if isinstance(schema, dict):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _rebased(value, root)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_rebased(item, root) for item in schema]
    return schema


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The tool's schema as an object schema. Raises Unsupported if it is not a JSON object."""
    if not tool.parameters_schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    try:
        schema = json.loads(tool.parameters_schema)
    except ValueError:
        raise Unsupported(f"parameters_schema of tool {tool.name!r} is not JSON") from None
    if not isinstance(schema, dict):
        raise Unsupported(f"parameters_schema of tool {tool.name!r} is not a JSON object")
    return {"type": "object", **schema}


class Constraint:
    """Logits processor that lets only tokens pass which the grammar allows next."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str, field: str) -> None:
        """`field`: what of the request the grammar was made from. May take 100 ms and more.

        Raises InvalidRequest and Unsupported if the grammar is not accepted, or allows no first token.
        """
        self._field = field
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
        self._begun = False
        self._next = b"" if self._matcher.is_error() else self._matcher.compute_bitmask()
        self._check()

    @property
    def finished(self) -> bool:
        """The text is complete and nothing may follow."""
        return self._begun and bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise refused(self._matcher.get_error(), self._field)

    def __call__(self, context: Any, logits: Any) -> Any:
        """Raises InvalidRequest when the grammar turns out to be too complex, or to lead nowhere."""
        import mlx.core as mx

        if self._begun and not self._matcher.is_stopped():
            # The next mask depends on the last token: reading it waits for the step before.
            self._matcher.consume_token(int(context[-1].item()))
            self._check()
            self._next = b"" if self._matcher.is_stopped() else self._matcher.compute_bitmask()
            self._check()
        self._begun = True
        if self._matcher.is_stopped():
            return logits  # the answer ends here; this draw is thrown away
        packed = np.frombuffer(self._next, dtype=np.uint8)
        allowed = np.unpackbits(packed, bitorder="little")[: logits.shape[-1]].astype(bool)
        if allowed.size < logits.shape[-1]:
            allowed = np.pad(allowed, (0, logits.shape[-1] - allowed.size))
        return mx.where(mx.array(allowed), logits, -mx.inf)
