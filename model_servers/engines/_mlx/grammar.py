"""Output held to a grammar by llguidance: JSON objects, JSON schemas, forced tool calls.

Importing this module needs llguidance; without it the engine does not offer these features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from model_servers.engine import Tool, Unsupported

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


def schema_grammar(schema: str) -> str:
    """The grammar of a JSON Schema document. Raises Unsupported if it is none."""
    try:
        return str(LLMatcher.grammar_from_json_schema(schema, defaults=_STYLE))
    except ValueError as error:
        raise Unsupported(f"the JSON schema cannot be used: {error}") from error


def answer_or_calls_grammar(tokenizer: LLTokenizer, schema: str, tools: Sequence[Tool], start: str, end: str) -> str:
    """Either JSON that satisfies `schema`, or one or more tool calls between the tags `start` and `end`."""
    begin, finish = _terminal(tokenizer, start), _terminal(tokenizer, end)
    return f"""
start: answer | call+
answer: %json {_styled(schema)}
call: {begin} GAP arguments GAP {finish} GAP
arguments: %json {_styled(call_schema(tools))}
GAP: /\\n?/
"""


def _terminal(tokenizer: LLTokenizer, tag: str) -> str:
    """How a grammar names a tag: special tokens (llguidance has its own idea of which are) without quotes."""
    tokens = tokenizer.tokenize_str(tag, parse_special=True)
    if len(tokens) == 1 and tokenizer.is_special_token(tokens[0]):
        return f"<[{tokens[0]}]>"
    return json.dumps(tag)


def _styled(schema: str) -> str:
    try:
        parsed = json.loads(schema)
    except ValueError as error:
        raise Unsupported(f"the JSON schema cannot be used: {error}") from error
    return json.dumps({"x-guidance": _STYLE, **parsed} if isinstance(parsed, dict) else parsed)


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
    except ValueError as error:
        raise Unsupported(f"parameters_schema of tool {tool.name!r} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise Unsupported(f"parameters_schema of tool {tool.name!r} is not a JSON object")
    return {"type": "object", **schema}


class Constraint:
    """Logits processor that lets only tokens pass which the grammar allows next."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        """Raises Unsupported if the grammar is not accepted. Compiling may take 100 ms and more."""
        error = LLMatcher.validate_grammar(grammar, tokenizer)
        if error:
            raise Unsupported(f"the JSON schema cannot be used: {error.strip().splitlines()[0]}")
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._begun = False

    @property
    def finished(self) -> bool:
        """The text is complete and nothing may follow."""
        return self._begun and bool(self._matcher.is_stopped())

    def __call__(self, context: Any, logits: Any) -> Any:
        import mlx.core as mx

        # The next mask depends on the last token: reading it waits for the step before.
        known = not self._begun or self._matcher.is_stopped()
        if not known and not self._matcher.consume_token(int(context[-1].item())):
            raise RuntimeError(f"grammar refused a token that it had allowed: {self._matcher.get_error()}")
        self._begun = True
        if self._matcher.is_stopped():
            if self._matcher.is_error():
                raise RuntimeError(f"grammar failed: {self._matcher.get_error()}")
            return logits  # the answer ends here; this draw is thrown away
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(packed, bitorder="little")[: logits.shape[-1]].astype(bool)
        if allowed.size < logits.shape[-1]:
            allowed = np.pad(allowed, (0, logits.shape[-1] - allowed.size))
        return mx.where(mx.array(allowed), logits, -mx.inf)
