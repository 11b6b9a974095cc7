"""Which servers the suite runs against: every target of targets/*.py, or the one given with --endpoint."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.conformance.subject import LACKS, Subject, running
from tests.conformance.target import Endpoint, Target

_STOP_SECONDS = 30.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "conformance of a ModelServer")
    group.addoption("--endpoint", default="", metavar="HOST:PORT", help="test this running ModelServer, nothing else")
    group.addoption("--model", default="", help="with --endpoint: the model to use; the first reported if absent")
    group.addoption("--embedding-model", default="", help="with --endpoint: the model for Embed; --model if absent")
    group.addoption("--vision-model", default="", help="with --endpoint: the model for images; --model if absent")
    group.addoption(
        "--lacks", action="append", default=[], choices=LACKS, help="what the engine cannot give; see README"
    )


def _option(config: pytest.Config, name: str) -> str:
    # Absent where this file was found too late to add options: when the whole test tree runs.
    return str(config.getoption(name, default=""))


def _targets(config: pytest.Config) -> list[Target]:
    address = _option(config, "endpoint")
    if address:
        endpoint = Endpoint(
            address, _option(config, "model"), _option(config, "embedding_model"), _option(config, "vision_model")
        )

        @asynccontextmanager
        async def there() -> AsyncIterator[Endpoint]:
            yield endpoint

        return [Target(address, there)]
    names = sorted(path.stem for path in (Path(__file__).parent / "targets").glob("[!_]*.py"))
    modules = [importlib.import_module(f"tests.conformance.targets.{name}") for name in names]
    return [target for module in modules for target in module.TARGETS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        targets = _targets(metafunc.config)
        if getattr(metafunc.module, "NEEDS_FAULTS", False):
            targets = [target for target in targets if target.faults is not None]
        metafunc.parametrize("target", targets, ids=lambda t: t.name, indirect=True, scope="module")


@pytest.fixture(scope="module")
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.param
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def subject(target: Target, request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    """The server of the target: started once for each module of tests."""
    lacks = frozenset(request.config.getoption("lacks", default=[]))
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[Subject] = loop.create_future()
    over = asyncio.Event()

    async def live() -> None:
        # One task from beginning to end: timeouts and task groups of a target must not change tasks.
        async with running(target, lacks) as subject:
            ready.set_result(subject)
            await over.wait()

    task = loop.create_task(live())
    await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    yield ready.result()
    over.set()
    async with asyncio.timeout(_STOP_SECONDS):
        await task
