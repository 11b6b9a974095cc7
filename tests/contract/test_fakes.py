"""The fakes serve every method of the contract."""

from __future__ import annotations

import inspect

import pytest

from modelyard.testing import FakeModelServer, FakeOrchestrator, FakeTaskQueue


@pytest.mark.parametrize("fake", [FakeOrchestrator, FakeModelServer, FakeTaskQueue])
def test_every_method_is_served(fake) -> None:
    for method in fake.service.methods:
        behaviour = getattr(fake, method.name)
        if method.server_streaming:
            assert inspect.isasyncgenfunction(behaviour) or inspect.iscoroutinefunction(behaviour)
        else:
            assert inspect.iscoroutinefunction(behaviour)
