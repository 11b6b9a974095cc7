"""Where the control plane is: file, environment, flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.cli.errors import CliError
from modelyard.cli.session import ClientSettings, Session, client_settings, configuration_file


def test_later_ones_win(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("client: {address: 'file:1', timeout: 5}")
    session = Session(config=path)
    assert client_settings(session, {}) == ClientSettings("file:1", 5.0)
    env = {"MODELYARD_ADDRESS": "env:1", "MODELYARD_TIMEOUT": "7"}
    assert client_settings(session, env) == ClientSettings("env:1", 7.0)
    assert client_settings(Session(address="flag:1", config=path), env).address == "flag:1"
    path.write_text("client: {direct: always}")
    assert client_settings(session, {}).direct == "always"
    assert client_settings(session, {"MODELYARD_DIRECT": "never"}).direct == "never"
    assert client_settings(Session(config=path, direct=True), {"MODELYARD_DIRECT": "never"}).direct == "always"
    assert client_settings(Session(config=path, direct=False), {}).direct == "never"


def test_the_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert configuration_file(None, {}) is None
    assert client_settings(Session(), {}) == ClientSettings("127.0.0.1:7460", None)
    (tmp_path / "modelyard.yaml").write_text("client: {address: 'here:1'}")
    assert client_settings(Session(), {}).address == "here:1"
    assert configuration_file(None, {"MODELYARD_CONFIG": "other.yaml"}) == Path("other.yaml")
    assert configuration_file(Path("flag.yaml"), {"MODELYARD_CONFIG": "other.yaml"}) == Path("flag.yaml")


@pytest.mark.parametrize(
    ("text", "env", "words"),
    [
        ("client: {adress: x}", {}, "client.adress: unknown setting"),
        ("client: {timeout: soon}", {}, "client.timeout: must be a number"),
        ("client: {timeout: 2024-13-45}", {}, "not valid YAML: month must be"),
        ("client: {timeout: 0}", {}, "client.timeout: must be a number"),
        ("client: {direct: maybe}", {}, "client.direct: must be auto, always or never"),
        ("", {"MODELYARD_DIRECT": "maybe"}, "MODELYARD_DIRECT: must be auto, always or never"),
        ("", {"MODELYARD_TIMEOUT": "-1"}, "MODELYARD_TIMEOUT: must be a number"),
    ],
)
def test_wrong_settings_are_named(text: str, env: dict[str, str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(CliError, match=words):
        client_settings(Session(config=path), env)


def test_a_file_that_is_asked_for_must_exist(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="cannot be read"):
        client_settings(Session(config=tmp_path / "nowhere.yaml"), {})
