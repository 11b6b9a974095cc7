"""Layered settings: defaults, then modelyard.yaml, then environment variables, then flags.

A program describes its settings as a frozen pydantic model (`Settings` below as base). Each
value can be given four ways, later ones win:

    default      in the model
    file         modelyard.yaml, section named after the program
    environment  MODELYARD_<SECTION>_<KEY>, nested keys joined with two underscores
    flag         --key value, nested keys joined with a dot, '-' for '_'

A value that does not fit stops the program with the key's name and where the value came from.
"""

from __future__ import annotations

import argparse
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from modelyard.program import yaml_text

DEFAULT_FILE = "modelyard.yaml"

SECTIONS = ("control_plane", "model_server", "up", "client")
"""Of the file; keys that begin with `x-` are for whoever writes it."""


class Settings(BaseModel):
    """Base of every settings model: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


T = TypeVar("T", bound=Settings)


class SettingsError(Exception):
    """A setting that cannot be used; the message names key, source and cure."""


@dataclass(frozen=True, slots=True)
class Key:
    """One leaf of a settings model."""

    path: tuple[str, ...]
    description: str
    default: Any
    annotation: Any

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    @property
    def flag(self) -> str:
        return "--" + self.dotted.replace("_", "-")

    def variable(self, section: str) -> str:
        return f"MODELYARD_{section}_{'__'.join(self.path)}".upper()


def _nested(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _is_structured(annotation: Any) -> bool:
    """Lists and mappings are given as YAML text on the command line and in the environment."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return any(_is_structured(argument) for argument in get_args(annotation))
    return origin in (list, tuple, dict, set, frozenset, Mapping) or annotation in (list, tuple, dict)


def keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[Key]:
    """Every leaf of the model, in order of definition."""
    hints = typing.get_type_hints(model, include_extras=False)
    for name, info in model.model_fields.items():
        nested = _nested(hints[name])
        if nested:
            yield from keys(nested, (*prefix, name))
        else:
            default = None if info.is_required() else info.get_default(call_default_factory=True)
            yield Key((*prefix, name), info.description or "", default, hints[name])


def table(model: type[Settings], section: str) -> str:
    """The documentation of all settings as a Markdown table."""
    rows = ["| key | default | environment | meaning |", "|---|---|---|---|"]
    for key in keys(model):
        default = "" if key.default in (None, "") else f"`{_plain(key.default)}`"
        rows.append(f"| `{key.dotted}` | {default} | `{key.variable(section)}` | {key.description} |")
    return "\n".join(rows)


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


class YamlFile:
    """A YAML document that remembers the line of every key.

    Raises SettingsError with the file, and the line where it is known, whatever the file holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path}: cannot be read: {error}") from None
        try:
            self._node, self.data = yaml_text.parse(text)
        except yaml_text.YamlProblem as problem:
            where = f":{problem.line}" if problem.line else ""
            raise SettingsError(f"{path}{where}: not valid YAML: {problem}") from None

    def line(self, path: Sequence[str | int]) -> int:
        """Line (from 1) of the deepest part of `path` that the document has."""
        node = self._node
        line = 1
        for part in path:
            found = None
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == str(part):
                        found, line = value, key.start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = node.value[part]
                line = found.start_mark.line + 1
            if found is None:
                break
            node = found
        return line

    def where(self, path: Sequence[str | int]) -> str:
        """'file:line: key', as every complaint about the file begins."""
        return f"{self.path}:{self.line(path)}: {'.'.join(map(str, path))}"


def parser(model: type[Settings], program: str, section: str, description: str) -> argparse.ArgumentParser:
    """A parser with one flag per setting, and --config."""
    result = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    result.add_argument("--config", metavar="FILE", help=f"configuration file (default: ./{DEFAULT_FILE} if it exists)")
    for key in keys(model):
        default = "" if key.default in (None, "") else f" (default: {_plain(key.default)})"
        text = (key.description + default).replace("%", "%%")
        boolean = key.annotation is bool
        result.add_argument(
            key.flag,
            dest=key.dotted,
            metavar=key.path[-1].upper(),
            default=None,
            help=text,
            **({"nargs": "?", "const": "true"} if boolean else {}),  # type: ignore[arg-type]
        )
    return result


def load(
    model: type[T],
    *,
    program: str,
    section: str,
    description: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
) -> T:
    """Read all layers and return the validated settings.

    Raises SettingsError; exits with the usage text for --help and unknown flags.
    """
    namespace = parser(model, program, section, description).parse_args(argv)
    chosen = namespace.config or env.get("MODELYARD_CONFIG")
    path = Path(chosen) if chosen else cwd / DEFAULT_FILE
    tree: dict[str, Any] = {}
    sources: dict[tuple[str, ...], str] = {}
    document: YamlFile | None = None
    if chosen or path.exists():
        document = YamlFile(path)
        data = document.data or {}
        if not isinstance(data, dict):
            raise SettingsError(f"{path}:1: must be a mapping with sections such as '{section}:'")
        for name in data:
            if name not in (*SECTIONS, section) and not str(name).startswith("x-"):
                near = _near(str(name), (*SECTIONS, section))
                raise SettingsError(f"{document.where([name])}: unknown section{near}; there are {', '.join(SECTIONS)}")
        part = data.get(section) or {}
        if not isinstance(part, dict):
            raise SettingsError(f"{document.where([section])}: must be a mapping")
        tree = part
    layers: list[dict[str, Any]] = [{}, {}]
    for key in keys(model):
        for layer, (value, source) in zip(
            layers,
            (
                (env.get(key.variable(section)), key.variable(section)),
                (getattr(namespace, key.dotted), key.flag),
            ),
            strict=True,
        ):
            if value is None:
                continue
            parsed: Any = value
            if _is_structured(key.annotation):
                try:
                    _, parsed = yaml_text.parse(value)
                except yaml_text.YamlProblem:
                    raise SettingsError(f"{source}: not valid YAML: {value!r}") from None
            _put(layer, key.path, parsed)
            sources[key.path] = source
    for layer in layers:
        tree = _merge(tree, layer)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_explain(error, sources, document, section, model)) from None


def _near(name: str, known: Iterable[str]) -> str:
    """Words about what was perhaps meant."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f", perhaps {found[0]!r}" if found else ""


def _explain(
    error: ValidationError,
    sources: Mapping[tuple[str, ...], str],
    document: YamlFile | None,
    section: str,
    model: type[Settings],
) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        location = problem["loc"]
        names = tuple(str(part) for part in location)
        source = next((sources[names[:n]] for n in range(len(names), 0, -1) if names[:n] in sources), None)
        if source is None and document is not None:
            source = document.where([section, *location])
        given = "" if problem["type"] in ("missing", "extra_forbidden") else f" (got {problem['input']!r})"
        message = problem["msg"]
        if problem["type"] == "extra_forbidden":
            message = "unknown setting" + _near(names[-1], (key.path[-1] for key in keys(model)))
        lines.append(f"{source or '.'.join(names)}: {message}{given}")
    return "\n".join(lines)
