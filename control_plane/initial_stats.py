"""What is assumed of a model until it is measured, as definitions and settings say it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modelyard.program.settings import Settings
from modelyard.rpc.validation import MAX_SECONDS


class InitialStats(Settings):
    success: Annotated[float, Field(ge=0, le=1)] | None = None
    ttft: Annotated[float, Field(gt=0, le=MAX_SECONDS)] | None = None
    """Seconds."""
    tpot: Annotated[float, Field(gt=0, le=MAX_SECONDS)] | None = None
