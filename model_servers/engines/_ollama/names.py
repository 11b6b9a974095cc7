"""Names and versions as Ollama writes them."""

from __future__ import annotations

import re

_LATEST = ":latest"


def short_name(name: str) -> str:
    """One spelling per model: the tag that is meant when none is given is left out."""
    return name.strip().removesuffix(_LATEST)


def is_remote(name: str) -> bool:
    """Whether Ollama hands requests for this model on to its cloud, where they may cost money."""
    tag = name.partition(":")[2]
    return tag == "cloud" or tag.endswith("-cloud")


def parse_version(text: str) -> tuple[int, ...]:
    """(0, 12, 6) of "0.12.6-rc1"; () of what is no version. Builds from source call themselves 0.0.0."""
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(part) for part in found.groups()) if found else ()


def at_least(version: str, wanted: tuple[int, int, int]) -> bool:
    """Whether a server of that version has what came with `wanted`; one built from source counts as newest."""
    parsed = parse_version(version)
    return parsed >= wanted or parsed == (0, 0, 0)
