"""Tables in documents that are made from the code: written by a command, checked by a test."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def renewed(document: str, parts: Mapping[str, str]) -> str:
    """The document with the text between `<!-- name -->` and `<!-- end of name -->` replaced.

    Raises ValueError unless each name is marked in exactly one place.
    """
    for name, text in parts.items():
        pattern = re.compile(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
        document, count = pattern.subn(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", document)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{count} places are marked {name!r}, there must be one")
    return document


def renew(documents: Mapping[Path, Mapping[str, str]]) -> None:
    """Write every document anew."""
    for path, parts in documents.items():
        path.write_text(renewed(path.read_text(encoding="utf-8"), parts), encoding="utf-8")
