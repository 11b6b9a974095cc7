from __future__ import annotations

import plistlib
import shlex
import sys

import pytest
from click.testing import CliRunner

from modelyard.cli import service_unit
from modelyard.cli.errors import CliError
from modelyard.cli.programs import model_server

ARGUMENTS = ["--engine", "ollama", "--engine-settings", "{base_url: 'http://127.0.0.1:11434'}", "--labels", "{a: 5%$}"]


def test_systemd_runs_the_same_command() -> None:
    text = service_unit.unit("systemd", "model-server", "model_servers", ARGUMENTS)
    (line,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    words = shlex.split(line.removeprefix("ExecStart=").replace("%%", "%").replace("$$", "$"))
    assert words == [sys.executable, "-P", "-m", "model_servers", *ARGUMENTS]
    assert "Restart=always" in text


def test_launchd_runs_the_same_command() -> None:
    text = service_unit.unit("launchd", "model-server", "model_servers", ARGUMENTS)
    unit = plistlib.loads(text.encode())
    assert unit["ProgramArguments"] == [sys.executable, "-P", "-m", "model_servers", *ARGUMENTS]
    assert unit["KeepAlive"] is True and unit["Label"] == "dev.modelyard.model-server"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(CliError, match="choose one of launchd, systemd"):
        service_unit.unit("cron", "model-server", "model_servers", [])


@pytest.mark.parametrize("given", [["--print-service", "systemd"], ["--print-service=systemd"]])
def test_the_command_prints_it_instead_of_running(given: list[str]) -> None:
    result = CliRunner().invoke(model_server, ["--engine", "simulated", *given])
    assert (
        result.exit_code == 0
        and "ExecStart=" in result.output
        and "--print-service" not in result.output.split("[Unit]")[1]
    )
