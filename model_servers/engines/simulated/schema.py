"""The smallest JSON value that a JSON Schema accepts, for the keywords in common use."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from model_servers.engine import Unsupported

_DEPTH = 32

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


def minimal_json(schema_text: str) -> str:
    """JSON text that satisfies the schema; "" stands for any object. Raises Unsupported."""
    if not schema_text.strip():
        return "{}"
    try:
        schema = json.loads(schema_text)
    except ValueError:
        raise Unsupported("the JSON schema is not valid JSON") from None
    return json.dumps(_minimal(schema, schema, 0))


def _minimal(schema: Any, root: Any, depth: int) -> Any:
    if depth > _DEPTH:
        raise Unsupported("the JSON schema nests too deeply, or has no finite instance")
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise Unsupported("the JSON schema accepts nothing")
    schema = _resolve(schema, root, depth)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    if kind is None:
        kind = _guess_type(schema)
    if kind == "object":
        properties = schema.get("properties") or {}
        return {
            name: _minimal(properties.get(name, True), root, depth + 1)
            for name in dict.fromkeys([*schema.get("required", ())])
        }
    if kind == "array":
        prefix = schema.get("prefixItems") or []
        count = max(int(schema.get("minItems", 0)), 0)
        items = schema.get("items", True)
        return [_minimal(prefix[n] if n < len(prefix) else items, root, depth + 1) for n in range(count)]
    if kind == "string":
        return _string(schema)
    if kind in ("integer", "number"):
        return _number(schema, integer=kind == "integer")
    if kind == "boolean":
        return False
    if kind == "null":
        return None
    raise Unsupported(f"the JSON schema names the type {kind!r}")


def _resolve(schema: Mapping[str, Any], root: Any, depth: int) -> dict[str, Any]:
    """The schema with its references followed and its combinations merged in."""
    if depth > _DEPTH:
        raise Unsupported("the JSON schema nests too deeply, or has no finite instance")
    merged = dict(schema)
    reference = merged.pop("$ref", None)
    parts: list[Any] = [] if reference is None else [_target(reference, root)]
    parts += merged.pop("allOf", None) or []
    for choice in ("anyOf", "oneOf"):
        options = merged.pop(choice, None)
        if options:
            parts.append(options[0])
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        for key, value in _resolve(part, root, depth + 1).items():
            if key == "properties":
                merged[key] = {**value, **merged.get(key, {})}
            elif key == "required":
                merged[key] = [*merged.get(key, ()), *value]
            else:
                merged.setdefault(key, value)
    return merged


def _target(reference: Any, root: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise Unsupported("the JSON schema refers to another document")
    node = root
    for part in reference[1:].strip("/").split("/"):
        if not part:
            continue
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, Mapping) or name not in node:
            raise Unsupported(f"the JSON schema has no {reference!r}")
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


def _string(schema: Mapping[str, Any]) -> str:
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    if "pattern" in schema:
        raise Unsupported("the simulated engine cannot satisfy 'pattern' of a JSON schema")
    text = "simulated"
    shortest = int(schema.get("minLength", 0))
    text = text.ljust(shortest, ".")
    longest = schema.get("maxLength")
    return text if longest is None else text[: int(longest)]


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
