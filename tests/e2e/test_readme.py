"""What the README tells people to type works, word for word."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
TOOLS = ROOT / ".tools" / "node_modules"
DEFAULT = "127.0.0.1:7460"


def commands(section: str) -> list[str]:
    block = re.search(rf"<!-- {section} -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert block, f"the README has no block {section!r}"
    return block[1].strip().splitlines()


class Fleet:
    """`modelyard up` with the bundled model."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def run(self, command: str, cwd: Path = ROOT, limit: float = 60) -> tuple[int, str]:
        """Exit status and all output of a shell command that means this fleet by the default address."""
        path = f"{BIN}:{TOOLS / '.bin'}:{os.environ['PATH']}"
        process = await asyncio.create_subprocess_shell(
            command.replace(DEFAULT, self.address),
            cwd=cwd,
            env={**os.environ, "MODELYARD_ADDRESS": self.address, "PATH": path},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(), limit)
        return process.returncode or 0, output.decode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    process = await asyncio.create_subprocess_exec(
        BIN / "modelyard", "up", "--json", "--port", "0", "--metrics-port", "0", "--gateway-port", "0",
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout
    address = ""
    async with asyncio.timeout(60):
        async for line in process.stdout:
            facts = json.loads(line)
            if facts.get("program") == "control-plane":
                address = facts["address"]
            if facts.get("program") == "model-server":
                break
    yield Fleet(address)
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 30) == 0


module_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("command", commands("tour"))
@module_loop
async def test_the_tour(fleet: Fleet, command: str) -> None:
    status, output = await fleet.run(command)
    assert status == 0, output
    assert output.strip()


@module_loop
async def test_the_tour_of_durable_tasks(fleet: Fleet, tmp_path: Path) -> None:
    for command in commands("tasks"):
        status, output = await fleet.run(command, cwd=tmp_path)
        assert status == 0, output
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(result["id"], result["state"]) for result in results] == [(1, "succeeded"), (2, "succeeded")]


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=["generate", "agents"])
@module_loop
async def test_the_python_snippets(fleet: Fleet, snippet: str) -> None:
    status, output = await fleet.run(f"{shlex.quote(sys.executable)} -c {shlex.quote(snippet)}")
    assert status == 0 and output.strip(), output


@pytest.mark.parametrize("example", ["stubs.py", "sdk.py", "tasks.py", "request_queue.py"])
@module_loop
async def test_the_python_examples(fleet: Fleet, example: str) -> None:
    arguments = fleet.address if example == "stubs.py" else ""
    status, output = await fleet.run(f"{shlex.quote(sys.executable)} clients/examples/{example} {arguments}")
    assert status == 0 and "mlx-1/yardling" in output, output


@pytest.mark.skipif(shutil.which("node") is None or not TOOLS.exists(), reason="needs Node and `poe lint` once")
@module_loop
async def test_the_node_example(fleet: Fleet, tmp_path: Path) -> None:
    shutil.copy(ROOT / "clients" / "examples" / "node" / "generate.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(TOOLS)
    status, output = await fleet.run(f"node generate.mjs {DEFAULT} {ROOT / 'protos'} 'What is modelyard?'", tmp_path)
    assert status == 0 and "mlx-1/yardling" in output, output


@pytest.mark.skipif(not (TOOLS / ".bin" / "buf").exists(), reason="needs `poe lint` once, which installs buf")
@pytest.mark.parametrize("command", re.findall(r"^buf curl .*$", README, re.MULTILINE))
@module_loop
async def test_buf_curl(fleet: Fleet, command: str) -> None:
    status, output = await fleet.run(command)
    assert status == 0, output
    assert "modelyard.v1.Orchestrator/Generate" in output or '"summary"' in output


def test_links_lead_somewhere() -> None:
    for path in ROOT.rglob("*.md"):
        if any(part.startswith(".") and part != ".github" for part in path.relative_to(ROOT).parts):
            continue
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


def test_every_modelyard_command_in_the_readme_is_run_by_a_test() -> None:
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    told = set(re.findall(r"^modelyard (.*)$", shell, re.MULTILINE))
    run_here = {line.removeprefix("modelyard ") for line in (*commands("tour"), *commands("tasks"))}
    elsewhere = {line for line in told if line.startswith("up")}  # tests/integration/test_cli.py
    assert told <= run_here | elsewhere
