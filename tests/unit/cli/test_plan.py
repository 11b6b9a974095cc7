"""What `up` starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.cli.errors import CliError
from modelyard.cli.plan import Plan, make_plan, name_servers, parse_server


def plan(config: Path | None = None, **options: Any) -> Plan:
    return make_plan(config, **{"port": None, "metrics_port": None, "servers": (), "no_servers": False, **options})


def written(folder: Path, text: str) -> Path:
    path = folder / "modelyard.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("mlx", {"engine": "mlx"}),
        ("mlx:model=/a/b,slots=2", {"engine": "mlx", "engine_settings": {"model": "/a/b", "slots": 2}}),
        (
            "simulated:id=x,port=7000,models=[a, b],seed=3",
            {
                "engine": "simulated",
                "server_id": "x",
                "port": 7000,
                "engine_settings": {"models": ["a", "b"], "seed": 3},
            },
        ),
        ("vllm:url=http://h:1/v1?a=b", {"engine": "vllm", "engine_settings": {"url": "http://h:1/v1?a=b"}}),
        ("x:name='a,b'", {"engine": "x", "engine_settings": {"name": "a,b"}}),
        ("x:labels={room: attic}", {"engine": "x", "labels": {"room": "attic"}}),
    ],
)
def test_server_option(text: str, entry: dict[str, Any]) -> None:
    assert parse_server(text) == entry


@pytest.mark.parametrize("text", ["", ":a=b", "mlx:slots", "mlx:=3", "mlx:watch_parent=no,orchestrators"])
def test_server_option_refused(text: str) -> None:
    with pytest.raises(CliError, match="--server"):
        parse_server(text)


def test_names_are_given_where_none_are() -> None:
    entries = [{"engine": "mlx"}, {"engine": "mlx", "server_id": "mlx-2"}, {"engine": "mlx"}, {"engine": "open_ai"}]
    assert [server.server_id for server in name_servers(entries)] == ["mlx-1", "mlx-2", "mlx-3", "open-ai-1"]
    with pytest.raises(CliError, match="'a'"):
        name_servers([{"engine": "x", "server_id": "a"}, {"engine": "y", "server_id": "a"}])


def test_arguments_of_a_model_server() -> None:
    entry = {
        "engine": "mlx",
        "engine_settings": {"model": "m"},
        "labels": {"a": "b"},
        "drain_grace": 3,
        "quiet": True,
        "limits": {"x": 1},
        "advertise": None,
    }
    (server,) = name_servers([entry])
    program = server.program("127.0.0.1:1", Path("f.yaml"))
    assert (program.name, program.module) == ("mlx-1", "model_servers")
    given = program.arguments
    flags = dict(zip(given[::2], given[1::2], strict=True))
    assert flags == {
        "--config": "f.yaml",
        "--engine": "mlx",
        "--server-id": "mlx-1",
        "--orchestrators": '["127.0.0.1:1"]',
        "--port": "0",
        "--engine-settings": '{"model": "m"}',
        "--labels": '{"a": "b"}',
        "--drain-grace": "3",
        "--quiet": "true",
        "--limits.x": "1",
    }
    assert json.loads(flags["--engine-settings"]) == {"model": "m"}


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "up: {servers: [{engine: simulated}, {engine: mlx}]}")
    assert [server.engine for server in plan(path).servers] == ["simulated", "mlx"]
    assert [server.engine for server in plan(path, servers=("vllm",)).servers] == ["vllm"]
    assert plan(path, no_servers=True).servers == ()
    arguments = plan(path, port=0, metrics_port=-1, gateway_port=0).control_plane
    assert arguments == ("--config", str(path), "--port", "0", "--metrics-port", "-1", "--gateway.port", "0")


def test_one_server_without_settings(tmp_path: Path) -> None:
    for path in (None, written(tmp_path, "control_plane: {port: 1}")):
        (server,) = plan(path).servers
        assert server.engine in ("mlx", "simulated")
        assert bool(plan(path).remarks) is (server.engine == "simulated")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("up: {server: []}", "up.server: unknown setting"),
        ("up: {servers: mlx}", "up.servers: must be a list"),
        ("up: {servers: [mlx]}", r"up.servers\[0\]: needs the name of an engine"),
        ("up: {servers: [{engine: mlx}, {model: x}]}", r"up.servers\[1\]: needs the name of an engine"),
        ("up: {servers: [{engine: mlx, watch_parent: false}]}", "set by `up`"),
        ("up: [", "modelyard.yaml:1: not valid YAML"),
        ("- up", "must be a mapping"),
        ("up: 3", "up: must be a mapping"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CliError, match=words) as caught:
        plan(written(tmp_path, text))
    assert caught.value.status == 2


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert len(plan(written(tmp_path, "")).servers) == 1


def test_the_store_is_the_control_planes_setting() -> None:
    assert plan(None, store="sqlite:///tasks.db").control_plane[-2:] == ("--tasks.store", "sqlite:///tasks.db")
    assert plan(None, store="").control_plane[-2:] == ("--tasks.store", "")
    assert "--tasks.store" not in plan(None).control_plane
