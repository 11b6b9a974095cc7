"""yardling: the tiny model that comes with modelyard, for demos and tests."""

from __future__ import annotations

from pathlib import Path

MODEL_NAME = "yardling"


def path() -> Path:
    """Return the folder that holds the model: weights, tokenizer and configuration in Hugging Face layout."""
    return Path(__file__).with_name(MODEL_NAME)


__all__ = ["MODEL_NAME", "path"]
