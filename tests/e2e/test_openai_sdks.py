"""OpenAI's own SDKs take their tour through `modelyard up` with the bundled model."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "clients" / "examples"
TOOLS = ROOT / ".tools" / "node_modules"

README = (ROOT / "control_plane" / "gateway" / "README.md").read_text(encoding="utf-8")
DEFAULT = "http://127.0.0.1:7462/v1"

needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (TOOLS / "openai").exists(), reason="needs Node and `poe lint` once"
)
module_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def base_url() -> AsyncIterator[str]:
    """Of a fleet whose only model is the bundled one."""
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).parent / "modelyard", "up", "--json",
        "--port", "0", "--metrics-port", "-1", "--gateway-port", "0", "--server", "mlx",
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout
    gateway = ""
    async with asyncio.timeout(60):
        async for line in process.stdout:
            facts = json.loads(line)
            if facts["event"] == "up":
                gateway = facts["gateway"]
                break
    yield f"{gateway}/v1"
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 30) == 0


def snippet(language: str, base_url: str) -> str:
    """The one block of the README in a language, for another address."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert DEFAULT in found
    return found.replace(DEFAULT, base_url)


async def output(*command: str | Path, cwd: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    text = (await asyncio.wait_for(process.communicate(), 60))[0].decode()
    assert process.returncode == 0, text
    return text


def check(told: str, *errors: str) -> None:
    """What either tour prints; the bundled model is there to make it real, not clever."""
    lines = dict(line.split(": ", 1) for line in told.splitlines() if ": " in line)
    assert "yardling" in lines["models"]
    assert "modelyard" in lines["chat"]
    assert "mlx-1" in lines["chosen"] and "scores" in lines["chosen"]
    stream = re.fullmatch(r"(\d+) pieces, (\d+) tokens", lines["stream"])
    assert stream and int(stream[1]) > 5 and int(stream[2]) >= int(stream[1])
    assert lines["tool"].startswith("get_weather") and "city" in lines["tool"]
    assert lines["after the tool"].strip()
    assert "name" in lines["schema"]
    assert lines["response"].strip() and lines["completion"].strip()
    assert int(lines["response stream"].split()[0]) > 5
    assert re.fullmatch(r"2 of length \d+", lines["embeddings"])
    assert [line for line in told.splitlines() if line.startswith("error: ")] == [f"error: {error}" for error in errors]
    assert told.splitlines()[-1] == "done"


@module_loop
async def test_python(base_url: str) -> None:
    told = await output(sys.executable, EXAMPLES / "openai_tour.py", base_url, cwd=ROOT)
    check(told, "404 model_not_found True", "400 temperature")


@needs_node
@module_loop
async def test_javascript(base_url: str, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "node" / "openai.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(TOOLS)
    told = await output("node", "openai.mjs", base_url, cwd=tmp_path)
    check(told, "404 model_not_found model", "400 invalid_request temperature")


@module_loop
async def test_the_readme_in_python_and_with_curl(base_url: str) -> None:
    assert (await output(sys.executable, "-c", snippet("python", base_url), cwd=ROOT)).strip()
    streamed = await output("sh", "-c", snippet("sh", base_url), cwd=ROOT)
    assert "chat.completion.chunk" in streamed and streamed.rstrip().endswith("data: [DONE]")


@needs_node
@module_loop
async def test_the_readme_in_javascript(base_url: str, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(TOOLS)
    (tmp_path / "readme.mjs").write_text(snippet("js", base_url))
    assert (await output("node", "readme.mjs", cwd=tmp_path)).strip()
