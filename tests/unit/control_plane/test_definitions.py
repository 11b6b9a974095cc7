from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from control_plane.app import ControlPlane, SystemClock
from control_plane.config import ControlPlaneSettings
from control_plane.definitions import Watcher, read
from control_plane.domain.definition import ModelDefinition
from control_plane.domain.model import ModelCard, ModelName, Price, Provider
from control_plane.domain.task import Feature, TaskType
from modelyard.program.settings import SettingsError

GOOD = """
models:
  llama3.1:8b:
    capabilities: {chat: 0.7, code_generation: 0.5}
    context_length: 8192
    features: [streaming, json]
    price: {prompt: 0.1, completion: 0.2}
    initial: {success: 0.9, ttft: 0.4, tpot: 0.05}
  bare: {}
"""


def test_a_definition_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "ollama.yaml").write_text(GOOD)
    definitions = read(tmp_path).definitions
    assert definitions.get(Provider("ollama"), ModelName("llama3.1:8b")) == ModelDefinition(
        provider=Provider("ollama"),
        name=ModelName("llama3.1:8b"),
        capabilities={TaskType.CHAT: 0.7, TaskType.CODE_GENERATION: 0.5},
        context_length=8192,
        features=Feature.STREAMING | Feature.JSON,
        price=Price(prompt=0.1, completion=0.2),
        initial_success=0.9,
        initial_ttft=0.4,
        initial_tpot=0.05,
    )
    assert definitions.get(Provider("ollama"), ModelName("bare")) == ModelDefinition(
        Provider("ollama"), ModelName("bare")
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("models:\n  a:\n    capabilities: {chatting: 1}\n", r"x\.yaml:3: models\.a\.capabilities: .*'chatting'"),
        ("models:\n  a:\n    capabilities:\n      chat: 2\n", r"x\.yaml:4: models\.a\.capabilities\.chat: .*less than"),
        ("models:\n  a:\n    contextlength: 5\n", r"x\.yaml:3: models\.a\.contextlength: unknown key"),
        ("models:\n  a:\n    features: [fly]\n", r"x\.yaml:3: models\.a\.features: .*unknown feature 'fly'"),
        ("model: {}\n", r"x\.yaml:1: .*"),
        ("models: [\n", r"x\.yaml:2: not valid YAML"),
        ("models:\n  y: {context_length: 2024-13-45}\n", r"x\.yaml:2: not valid YAML: not a timestamp"),
        ("models:\n  a: {}\n  a: {}\n", r"x\.yaml:3: not valid YAML: duplicate key 'a'"),
        ("models:\n  a:\n    context_length: 5000000000\n", r"x\.yaml:3: models\.a\.context_length: .*less than"),
        ("models:\n  a:\n    price: {prompt: 1.0e+10}\n", r"x\.yaml:3: models\.a\.price\.prompt: .*less than"),
        ("models:\n  a:\n    initial: {ttft: 1.0e+15}\n", r"x\.yaml:3: models\.a\.initial\.ttft: .*less than"),
        ("models:\n  " + "a" * 257 + ": {}\n", r"x\.yaml:2: .*at most 256 characters"),
        ('models:\n  "\\ud800": {}\n', r"x\.yaml:2: not valid YAML: not a str"),
        ("models: &a\n  m: *a\n", r"x\.yaml:2: models\.m\.m: "),
        ("models:\n  a:\n    price: {prompt: .nan}\n", r"x\.yaml:3: models\.a\.price\.prompt"),
    ],
)
def test_a_mistake_names_file_line_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SettingsError, match=complaint):
        read(tmp_path)


def test_a_provider_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.yaml")).write_text("models: {a: {}}")
    with pytest.raises(SettingsError, match="must be printable"):
        read(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is not a folder"):
        read(tmp_path / "nowhere")


def test_a_bad_edit_keeps_the_previous_definitions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ollama.yaml"
    path.write_text(GOOD)
    watcher = Watcher(tmp_path)
    assert watcher.poll() is None
    path.write_text(GOOD + "  broken: 3\n")
    with caplog.at_level(logging.ERROR):
        assert watcher.poll() is None
        assert watcher.poll() is None
    assert [record.getMessage() for record in caplog.records if "ollama.yaml:10" in record.getMessage()] != []
    assert len(caplog.records) == 1
    path.write_text(GOOD + "  added: {}\n")
    changed = watcher.poll()
    assert changed is not None
    assert changed.definitions.get(Provider("ollama"), ModelName("added"))


@pytest.mark.parametrize("bad", ["models:\n  y: {context_length: 2024-13-45}\n", "models: " + "[" * 3000, "\0"])
def test_a_bad_edit_never_takes_a_running_control_plane_down(tmp_path: Path, bad: str) -> None:
    (tmp_path / "ollama.yaml").write_text(GOOD)
    plane = ControlPlane(ControlPlaneSettings(models_dir=tmp_path), SystemClock())
    assert plane.watcher is not None
    before = plane.fleet.definitions
    (tmp_path / "new.yaml").write_text(bad)
    plane.reread_definitions(plane.watcher)
    assert plane.fleet.definitions is before
    (tmp_path / "new.yaml").write_text("models: {added: {}}")
    plane.reread_definitions(plane.watcher)
    assert plane.fleet.definitions.get(Provider("new"), ModelName("added"))


def test_whatever_the_watcher_raises_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Watcher):
        def poll(self) -> None:
            raise RuntimeError("overlooked")

    plane = ControlPlane(ControlPlaneSettings(models_dir=tmp_path), SystemClock())
    plane.reread_definitions(Broken(tmp_path))
    assert "overlooked" in caplog.text and "stay in force" in caplog.text


def test_the_shorter_context_length_holds() -> None:
    card = ModelCard(ModelName("a"), Provider("p"), context_length=4096, features=Feature.STREAMING)
    longer = ModelDefinition(Provider("p"), ModelName("a"), context_length=8192, features=Feature.JSON)
    assert longer.apply(card).context_length == 4096
    assert longer.apply(card).features == Feature.JSON
    shorter = ModelDefinition(Provider("p"), ModelName("a"), context_length=1024)
    assert shorter.apply(card).context_length == 1024
    assert shorter.apply(card).features == Feature.STREAMING
