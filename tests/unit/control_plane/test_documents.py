from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from control_plane import config, reference
from modelyard.program.documents import renewed
from modelyard.program.settings import keys


@pytest.mark.parametrize("path", reference.documents(), ids=lambda path: path.parent.name)
def test_tables_are_up_to_date(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert renewed(text, reference.documents()[path]) == text, "run: python -m control_plane.reference"


def test_every_setting_has_a_description() -> None:
    assert [key.dotted for key in keys(config.ControlPlaneSettings) if not key.description] == []


def test_no_settings_model_is_left_out() -> None:
    named = {part for key in keys(config.ControlPlaneSettings) for part in key.path}
    models = [value for value in vars(config).values() if isinstance(value, type) and issubclass(value, BaseModel)]
    assert {name for model in models for name in model.model_fields} <= named | {"host"}


def test_a_marker_must_be_there_once() -> None:
    with pytest.raises(ValueError, match="0 places are marked 'x'"):
        renewed("nothing", {"x": "y"})
