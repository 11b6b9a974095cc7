"""The conformance suite against a server that somebody else runs: it finds what is wrong, and nothing else."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from model_servers.engine import (
    Delta,
    Embeddings,
    EngineLoad,
    EngineModel,
    EngineStatus,
    Feature,
    Finished,
    FinishReason,
    GenerationRequest,
    Health,
    Unsupported,
    Usage,
)
from tests.harness.model_servers import model_server

ROOT = Path(__file__).parents[2]
WORDS = [f"word{number} " for number in range(40)]


class Careless:
    """Answers like an engine, but ignores stop strings, max_tokens, seeds and the context's length."""

    running = 0

    async def start(self) -> None: ...

    def status(self) -> EngineStatus:
        model = EngineModel("careless", "example", 1000, features=Feature.STREAMING | Feature.LOGPROBS)
        load = EngineLoad(slots=4, running=self.running)
        return EngineStatus("careless", "1", "CPU", 0, (model,), load, Health.READY)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        for word in WORDS:
            yield Delta(word, 1)
        yield Finished(FinishReason.STOP, Usage(10, 0, len(WORDS)))

    async def embed(self, model: str, inputs: object) -> Embeddings:
        raise Unsupported("no embedding")

    async def count_tokens(self, request: GenerationRequest) -> int:
        return 10

    async def close(self) -> None: ...


async def conformance(*arguments: str) -> tuple[int, str]:
    """Exit status and output of a run of the suite."""
    command = (sys.executable, "-m", "pytest", "tests/conformance", "-p", "no:cacheprovider", "-q", *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_what_is_wrong_with_a_foreign_server_is_found():
    names = "max_tokens_ends or stop_strings_cut or logprobs_come or does_not_fit or is_answered or report_is_valid"
    async with model_server(Careless()) as server:
        status, out = await conformance("--endpoint", server.address, "-k", names, "--tb=no")
    failed = {line.split("::")[1].split("[")[0] for line in out.splitlines() if line.startswith("FAILED")}
    assert status == 1, out
    assert failed == {
        "test_max_tokens_ends_the_answer_with_length",
        "test_stop_strings_cut_the_text_wherever_pieces_end",
        "test_logprobs_come_with_every_token_or_are_unsupported",
        "test_a_prompt_that_does_not_fit_is_refused",
    }
    assert f"[{server.address}]" in out, "nothing but the endpoint is tested"
    assert "2 passed" in out


async def test_a_model_is_chosen_by_name():
    settings = {"models": [{"name": "first", "features": []}, {"name": "second", "features": ["embedding"]}]}
    chosen = "-k", "each_text_has_its_vector or an_unknown_model"
    async with model_server(engine_settings=settings) as server:
        status, out = await conformance("--endpoint", server.address, "--model", "second", *chosen)
        assert status == 0, out
