"""The smallest JSON value that a JSON Schema accepts, for the keywords in common use."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from model_servers.engine import EngineError, InvalidRequest, Unsupported

_DEPTH = 100
_MOST_WORK = 200_000
"""Keywords looked at for one value: a few lines of schema can ask for more than any machine could write."""

# What the keywords that are used below must be.
_LISTS = ("allOf", "anyOf", "enum", "oneOf", "prefixItems", "required")
_OBJECTS = ("properties",)
_NUMBERS = (
    "exclusiveMaximum",
    "exclusiveMinimum",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "multipleOf",
)
_MUST_BE: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(_LISTS, (list, "a list")),
    **dict.fromkeys(_OBJECTS, (dict, "an object")),
    **dict.fromkeys(_NUMBERS, ((int, float), "a number")),
}

_FORMATS = {
    "date-time": "2000-01-01T00:00:00Z",
    "date": "2000-01-01",
    "time": "00:00:00Z",
    "email": "simulated@example.org",
    "uri": "https://example.org/simulated",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "hostname": "example.org",
}


def minimal_json(schema_text: str, field: str = "", most: int = 1 << 20) -> str:
    """JSON text that satisfies the schema; "" stands for any object. `most`: characters after which it may break off.

    Raises Unsupported, and InvalidRequest for what is no schema; `field` is where the request has it.
    """
    if not schema_text.strip():
        return "{}"
    try:
        schema = json.loads(schema_text)
        writer = _Writer(schema, field, most)
        with contextlib.suppress(_Full):
            writer.write(schema, 0)
        return "".join(writer.pieces)
    except EngineError:
        raise
    except Exception:  # nothing else can go wrong here than that the schema is not what it has to be
        raise InvalidRequest("the JSON schema is malformed", field) from None


class _Full(Exception):
    """The text is as long as is wanted."""


class _Writer:
    """Writes the smallest value piece by piece, and stops where it gets too long or too much work."""

    def __init__(self, root: Any, field: str, most: int) -> None:
        self.pieces: list[str] = []
        self._root = root
        self._field = field
        self._room = most
        self._work = 0

    def _put(self, text: str) -> None:
        self.pieces.append(text)
        self._room -= len(text)
        if self._room <= 0:
            raise _Full

    def _malformed(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"the JSON schema is malformed: {what}", self._field)

    def _look(self, schema: Any, depth: int) -> Mapping[str, Any]:
        """Check a schema before it is used."""
        if depth > _DEPTH:
            raise InvalidRequest("the JSON schema nests too deeply, or has no finite instance", self._field)
        if not isinstance(schema, Mapping):
            if schema is False:
                raise InvalidRequest("the JSON schema accepts nothing", self._field)
            raise self._malformed("a schema must be an object or a boolean")
        self._work += 1 + len(schema)
        if self._work > _MOST_WORK:
            raise Unsupported("the JSON schema takes too much work for the simulated engine")
        for keyword, value in schema.items():
            expected, name = _MUST_BE.get(keyword, (object, ""))
            if not isinstance(value, expected):
                raise self._malformed(f"{keyword!r} must be {name}")
        return schema

    def write(self, schema: Any, depth: int) -> None:
        if schema is True:
            self._put("{}")
            return
        merged = self._resolve(schema, depth)
        if "const" in merged:
            self._put(json.dumps(merged["const"]))
        elif merged.get("enum"):
            self._put(json.dumps(merged["enum"][0]))
        else:
            self._write_type(merged, depth)

    def _write_type(self, schema: Mapping[str, Any], depth: int) -> None:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = kind[0] if kind else None
        if kind is None:
            kind = _guess_type(schema)
        if kind == "object":
            self._write_object(schema, depth)
        elif kind == "array":
            self._write_array(schema, depth)
        elif kind == "string":
            self._put(json.dumps(_string(schema, self._room)))
        elif kind in ("integer", "number"):
            if schema.get("multipleOf", 1) <= 0:
                raise self._malformed("'multipleOf' must be above 0")
            self._put(json.dumps(_number(schema, integer=kind == "integer")))
        elif kind in ("boolean", "null"):
            self._put("false" if kind == "boolean" else "null")
        else:
            raise self._malformed("'type' must be one of those that JSON has")

    def _write_object(self, schema: Mapping[str, Any], depth: int) -> None:
        properties = schema.get("properties") or {}
        self._put("{")
        for n, name in enumerate(dict.fromkeys(schema.get("required", ()))):
            self._put(f"{', ' if n else ''}{json.dumps(name)}: ")
            self.write(properties.get(name, True), depth + 1)
        self._put("}")

    def _write_array(self, schema: Mapping[str, Any], depth: int) -> None:
        prefix: Sequence[Any] = schema.get("prefixItems") or ()
        items = schema.get("items", True)
        self._put("[")
        for n in range(int(schema.get("minItems", 0))):
            if n:
                self._put(", ")
            self.write(prefix[n] if n < len(prefix) else items, depth + 1)
        self._put("]")

    def _resolve(self, schema: Any, depth: int) -> dict[str, Any]:
        """The schema with its references followed and its combinations merged in."""
        merged = dict(self._look(schema, depth))
        reference = merged.pop("$ref", None)
        parts: list[Any] = [] if reference is None else [self._target(reference)]
        parts += merged.pop("allOf", None) or []
        for choice in ("anyOf", "oneOf"):
            options = merged.pop(choice, None)
            if options:
                parts.append(options[0])
        for part in parts:
            if part is True:
                continue
            for key, value in self._resolve(part, depth + 1).items():
                if key == "properties":
                    merged[key] = {**value, **merged.get(key, {})}
                elif key == "required":
                    merged[key] = [*merged.get(key, ()), *value]
                else:
                    merged.setdefault(key, value)
        return merged

    def _target(self, reference: Any) -> Any:
        if not isinstance(reference, str):
            raise self._malformed("'$ref' must be a string")
        if not reference.startswith("#"):
            raise Unsupported("the JSON schema refers to another document")
        node = self._root
        for part in reference[1:].strip("/").split("/"):
            if not part:
                continue
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(node, Mapping) or name not in node:
                raise self._malformed("a '$ref' leads nowhere")
            node = node[name]
        return node


def _guess_type(schema: Mapping[str, Any]) -> str:
    if "items" in schema or "prefixItems" in schema or "minItems" in schema:
        return "array"
    if "minLength" in schema or "pattern" in schema or "format" in schema:
        return "string"
    if "minimum" in schema or "maximum" in schema or "multipleOf" in schema:
        return "number"
    return "object"


def _string(schema: Mapping[str, Any], room: int) -> str:
    """At most about `room` characters, which is all that is sent."""
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    if "pattern" in schema:
        raise Unsupported("the simulated engine cannot satisfy 'pattern' of a JSON schema")
    text = "simulated".ljust(int(min(schema.get("minLength", 0), room)), ".")
    longest = schema.get("maxLength")
    return text if longest is None else text[: int(min(longest, len(text)))]


def _number(schema: Mapping[str, Any], *, integer: bool) -> float | int:
    low = schema.get("minimum", -math.inf)
    above = schema.get("exclusiveMinimum", -math.inf)
    high = min(schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf))
    step = schema.get("multipleOf", 1)
    value: float = 0
    if low > 0 or above >= 0:
        value = max(math.ceil(low / step) * step if low > 0 else -math.inf, (above // step + 1) * step)
        if value > high or (value == high and "maximum" not in schema):
            value = (max(low, above) + high) / 2
    elif high < 0 or (high == 0 and "exclusiveMaximum" in schema):
        value = math.floor(high / step) * step
        if value == schema.get("exclusiveMaximum"):
            value -= step
    return int(value) if integer or value == int(value) else value
