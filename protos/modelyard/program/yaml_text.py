"""YAML text to plain values, strictly: whatever is wrong with the text is one kind of error, which knows its line."""

from __future__ import annotations

from typing import Any

import yaml


class YamlProblem(Exception):
    """Text that is no YAML document, or one whose meaning would be a guess."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.line = line
        """From 1; None: not known."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                # YAML itself forbids what PyYAML lets pass: the last one would win silently.
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()  # an escape may stand for half a character, which no message can carry
            return value
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:
            # A date 2024-13-45, a number of 5,000 digits, `!!bool perhaps`: PyYAML lets whatever the conversion
            # raises pass through.
            problem = f"not a {node.tag.rpartition(':')[2]}: {error}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def parse(text: str) -> tuple[yaml.Node | None, Any]:
    """The document as nodes, which know their lines, and as a value; both None if it is empty.

    Raises YamlProblem.
    """
    try:
        loader = _Loader(text)  # looks for characters that YAML does not allow
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except RecursionError:
        raise YamlProblem("nested too deeply", None) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlProblem(f"character {chr(error.character)!r} is not allowed", line) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise YamlProblem(str(getattr(error, "problem", error)), mark.line + 1 if mark else None) from None
