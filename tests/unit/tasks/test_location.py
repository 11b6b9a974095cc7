from __future__ import annotations

from pathlib import Path

import pytest

from control_plane.tasks.location import PostgresDatabase, SqliteFile, StoreError, located


def test_files() -> None:
    assert located("sqlite:////var/lib/tasks.db", {}) == SqliteFile(Path("/var/lib/tasks.db"))
    assert located("sqlite:///tasks%20a.db", {}) == SqliteFile(Path.cwd() / "tasks a.db")
    assert located("sqlite:///~/tasks.db", {}) == SqliteFile(Path("~/tasks.db").expanduser())


def test_auto_is_in_the_users_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert located("auto", {"XDG_STATE_HOME": "/x"}) == SqliteFile(Path("/x/modelyard/tasks.db"))
    assert located("auto", {"HOME": "/h"}) == SqliteFile(Path("/h/.local/state/modelyard/tasks.db"))
    relative = {"HOME": "/h", "XDG_STATE_HOME": "not/absolute"}
    assert located("auto", relative) == SqliteFile(Path("/h/.local/state/modelyard/tasks.db"))
    monkeypatch.setattr("sys.platform", "darwin")
    mac = Path("/h/Library/Application Support/modelyard/tasks.db")
    assert located("auto", {"HOME": "/h", "XDG_STATE_HOME": "/x"}) == SqliteFile(mac)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:hush@h:5433/db?sslmode=require", "postgresql://u@h:5433/db"),
        ("postgres://h/db", "postgresql://h/db"),
        ("postgresql://u:hush@a:1,b:2/db", "postgresql://u@a:1,b:2/db"),
        ("postgresql://u:hush@[::1]:5432/db", "postgresql://u@[::1]:5432/db"),
        ("postgresql:///db?host=/run/postgresql", "postgresql:///db"),
    ],
)
def test_postgresql_is_shown_without_its_password(url: str, shown: str) -> None:
    place = located(url, {})
    assert isinstance(place, PostgresDatabase)
    assert (place.dsn, place.shown) == (url, shown)
    assert "hush" not in repr(place)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "unknown kind"),
        ("tasks.db", "unknown kind 'without a scheme'"),
        ("mysql://u:hush@h/db", "unknown kind 'mysql'"),
        ("sqlite://tasks.db", "sqlite:///relative/path"),
        ("sqlite:///", "needs the path"),
        ("sqlite:///:memory:", "would not be durable"),
        ("sqlite:///a.db?mode=ro", "sqlite:///relative/path"),
        ("sqlite:///a%00b", "zero byte"),
        ("postgresql://u:hush@h", "name the database"),
        ("postgresql://u:hush#x@h/db", "no valid URL|%23"),
        ("postgresql://u:hush@h:port/db", "no valid URL"),
        ("postgresql://u:hush@[::1/db", "no valid URL"),
    ],
)
def test_what_cannot_be_used_is_said_without_the_password(url: str, told: str) -> None:
    with pytest.raises(StoreError, match=told) as caught:
        located(url, {})
    assert "hush" not in str(caught.value)
