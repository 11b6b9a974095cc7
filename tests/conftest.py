"""Fixtures that are dear: started once, and only when a test asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.postgres import Postgres, postgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A running PostgreSQL; `tables()` makes databases with modelyard's tables quickly."""
    with postgres("fsync=off", "synchronous_commit=off", "full_page_writes=off") as server:
        yield server
