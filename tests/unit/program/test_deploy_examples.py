"""The example configuration is one that the programs accept."""

from __future__ import annotations

from pathlib import Path

import yaml

from control_plane import definitions
from control_plane.config import SECTION, ControlPlaneSettings
from control_plane.domain.model import ModelName, Provider
from model_servers import config as model_server
from modelyard.program.settings import load

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
ARGV = ["--config", str(DEPLOY / "modelyard.yaml")]


def test_both_programs_accept_the_example() -> None:
    plane = load(
        ControlPlaneSettings, program="p", section=SECTION, description="", argv=ARGV, env={}, cwd=DEPLOY.parent
    )
    assert plane.models_dir is not None
    assert (DEPLOY.parent / plane.models_dir).is_dir()
    server = load(
        model_server.ModelServerSettings,
        program="p",
        section=model_server.SECTION,
        description="",
        argv=ARGV,
        env={},
        cwd=DEPLOY.parent,
    )
    assert server.engine == "mlx"


def test_every_section_of_the_example_is_read_by_somebody() -> None:
    sections = yaml.safe_load((DEPLOY / "modelyard.yaml").read_text())
    assert set(sections) == {SECTION, model_server.SECTION, "client"}


def test_the_example_definitions_are_sound() -> None:
    found = definitions.read(DEPLOY / "models").definitions.get(Provider("openai"), ModelName("large-hosted-model"))
    assert found and found.price and found.price.completion == 10.0
