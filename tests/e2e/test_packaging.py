"""The wheel holds what it must, and the base install is as light as promised."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_one_wheel_holds_everything(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "control_plane/__main__.py",
        "control_plane/tasks/migrations/env.py",
        "control_plane/tasks/migrations/versions/0001_first_tables.py",
        "model_servers/__main__.py",
        "model_servers/bundled/yardling/model.safetensors",
        "modelyard/v1/orchestrator_pb2.py",
        "modelyard/v1/orchestrator.proto",
        "modelyard/client/py.typed",
        "modelyard/cli/__init__.py",
    } <= names
    assert any(name.endswith("licenses/.github/LICENSE") for name in names)
    roots = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == {"control_plane", "model_servers", "modelyard"}
    assert "modelyard/__init__.py" not in names, "the namespace has parts in two folders"
    assert wheel.stat().st_size < 8 * 2**20


def test_no_file_of_the_repository_is_too_large() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    sizes = {name: (ROOT / name).stat().st_size for name in tracked.split("\0") if name and (ROOT / name).is_file()}
    assert {name for name, size in sizes.items() if size > 2**20} <= {
        "model_servers/bundled/yardling/model.safetensors"
    }
    assert max(sizes.values()) < 8 * 2**20


def test_the_client_imports_nothing_but_the_base_dependencies() -> None:
    script = (
        "import sys, modelyard.client\n"
        "heavy = {'numpy', 'pydantic', 'yaml', 'click', 'rich', 'mlx', 'prometheus_client', 'uvloop',"
        " 'control_plane', 'model_servers'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"
