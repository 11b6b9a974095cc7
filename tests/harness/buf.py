"""`buf curl`, a client that nobody here wrote: it knows the services by reflection only."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_PINNED = Path(__file__).parents[2] / ".tools/node_modules/.bin/buf"


def buf() -> str:
    """The program. Skips the test where it is not installed, but never in CI."""
    found = str(_PINNED) if _PINNED.exists() else shutil.which("buf")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("buf is not installed: run `poe lint` once, which puts it into .tools")
        pytest.skip("buf is not installed: run `poe lint` once, which puts it into .tools")
    return found


@dataclass
class Answer:
    """What a call printed."""

    status: int
    messages: list[Any]
    output: str
    errors: str

    @property
    def error(self) -> dict[str, Any]:
        """The error of a call that failed, as JSON."""
        assert self.status != 0, self.output
        return json.loads(self.errors)


async def curl(address: str, method: str = "", body: Any = None, *flags: str) -> Answer:
    """Call "package.Service/Method"; without a method only `flags` say what to do."""
    arguments = ["curl", "--protocol", "grpc", "--http2-prior-knowledge", *flags]
    if body is not None:
        arguments += ["-d", json.dumps(body)]
    process = await asyncio.create_subprocess_exec(
        buf(), *arguments, f"http://{address}/{method}".rstrip("/"),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        output, errors = await process.communicate()
    text = output.decode()
    messages, position, decoder = [], 0, json.JSONDecoder()
    if "--list-methods" not in flags and "--list-services" not in flags:
        while (position := len(text) - len(text[position:].lstrip())) < len(text):
            message, position = decoder.raw_decode(text, position)
            messages.append(message)
    assert process.returncode is not None
    return Answer(process.returncode, messages, text, errors.decode())
