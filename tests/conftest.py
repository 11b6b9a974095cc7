"""What holds for every test, and fixtures that are dear: started once, and only when a test asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.postgres import Postgres, postgres


@pytest.fixture(scope="session", autouse=True)
def _a_state_folder_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that are started with their defaults keep nothing in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _a_state_folder_of_the_test(
    _a_state_folder_of_the_tests: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Nor do they meet those of another test, which have locked what they keep."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A running PostgreSQL; `tables()` makes databases with modelyard's tables quickly."""
    with postgres("fsync=off", "synchronous_commit=off", "full_page_writes=off") as server:
        yield server
