"""Fakes for tests of programs that speak the contract: real gRPC servers on a free port, scripted.

async with FakeOrchestrator() as fake:
    fake.answer("Hello", ", world")
    fake.inject_error("Generate", Refusal(Reason.QUEUE_FULL, "full", retry_after=0.01))
    async with AsyncClient(fake.address, retries=1) as client:
        assert (await client.generate("hi")).text == "Hello, world"
    assert [call.method for call in fake.calls] == ["Generate", "Generate"]
"""

from modelyard.testing.model_server import FakeModelServer, model_info, model_progress
from modelyard.testing.orchestrator import FakeOrchestrator
from modelyard.testing.server import Call, FakeServer, Gate
from modelyard.testing.task_queue import FakeTaskQueue

__all__ = [
    "Call",
    "FakeModelServer",
    "FakeOrchestrator",
    "FakeServer",
    "FakeTaskQueue",
    "Gate",
    "model_info",
    "model_progress",
]
