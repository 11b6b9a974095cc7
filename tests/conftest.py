"""What holds for every test, and fixtures that are dear: started once, and only when a test asks for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.harness.postgres import Postgres, postgres

# On a busy machine an example may take long: that is no failure.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _state_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Path]]:
    """Programs that are started with their defaults keep nothing in the user's home."""
    root = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(root))
        # Not by mktemp, which looks at all that there are each time.
        yield (root / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _a_state_folder_of_the_test(_state_folders: Iterator[Path]) -> Iterator[Path]:
    """Nor do they meet those of another test, which have locked what they keep."""
    folder = next(_state_folders)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A running PostgreSQL; `tables()` makes databases with modelyard's tables quickly."""
    with postgres("fsync=off", "synchronous_commit=off", "full_page_writes=off") as server:
        yield server
