"""The entry point: what it imports, what it says when parts are missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from modelyard.cli import main
from modelyard.cli._root import COMMANDS, root
from modelyard.cli.errors import FAILED, INTERRUPTED, REASONS, USAGE
from modelyard.cli.session import Session

PACKAGE = Path(str(importlib.util.find_spec("modelyard.cli").origin)).parents[2]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_has_help(name: str) -> None:
    if name in ("control-plane", "model-server", "db", "predictor", "simulate"):
        assert root.get_command(None, name)  # type: ignore[arg-type]  # their --help is the program's own
        return
    result = CliRunner().invoke(root, [name, "--help"], obj=Session())
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_help_lists_every_command_and_imports_little() -> None:
    code = (
        "import sys; from modelyard.cli import main; main(['--help']); "
        "print([name for name in ('grpc', 'google', 'rich', 'yaml', 'asyncio', 'modelyard.client') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    for name in COMMANDS:
        assert any(line.strip().startswith(f"{name} ") for line in lines), name


def test_the_readme_has_every_command_and_exit_status() -> None:
    text = (PACKAGE / "modelyard" / "cli" / "README.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"`modelyard {name}" in text, name
    statuses = {USAGE, FAILED, INTERRUPTED, *(status for status, _ in REASONS.values())}
    for status in statuses:
        assert f"| {status} |" in text, status


def test_version_and_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("modelyard ")
    assert main(["nonsense"]) == 2
    assert main(["models", "--nonsense", "--json"]) == 2
    assert "No such option" in capsys.readouterr().err


def _run_with(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter that has only these packages and ours."""
    paths = [str(PACKAGE), str(packages)]
    code = f"import sys; sys.path += {paths!r}; from modelyard.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-S", "-c", code, *arguments], capture_output=True, text=True)


def test_without_the_cli_extra(tmp_path: Path) -> None:
    done = _run_with(tmp_path, "--help")
    assert done.returncode == 1
    assert "pip install 'modelyard[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "extra"),
    [("control-plane", "server"), ("model-server", "server"), ("up", "local"), ("demo", "local")],
)
def test_without_the_server_extra(command: str, extra: str, tmp_path: Path) -> None:
    for name in ("click", "rich", "yaml"):
        spec = importlib.util.find_spec(name)
        assert spec and spec.submodule_search_locations
        (tmp_path / name).symlink_to(spec.submodule_search_locations[0])
    done = _run_with(tmp_path, command)
    assert done.returncode == 1
    assert f"modelyard: modelyard {command} needs grpc_health" in done.stderr
    assert f"pip install 'modelyard[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
