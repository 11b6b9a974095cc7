"""Options of the MLX engine."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

BUNDLED = "bundled"

ANY_OBJECT = '{"type": "object"}'
"""JSON Schema behind "any JSON object"."""

BUNDLED_CAPABILITIES: dict[str, float] = {
    "chat": 0.2,
    "reasoning": 0.1,
    "code_generation": 0.1,
    "code_review": 0.1,
    "summarization": 0.2,
    "translation": 0.1,
    "writing": 0.2,
    "extraction": 0.2,
    "classification": 0.2,
    "data_analysis": 0.1,
    "research": 0.1,
    "planning": 0.1,
    "tool_use": 0.2,
    "embedding": 0.2,
}
"""Three million parameters: last in every choice, yet able to take any demonstration."""

DEFAULT_CAPABILITIES: dict[str, float] = {
    "chat": 0.5,
    "reasoning": 0.4,
    "code_generation": 0.4,
    "code_review": 0.4,
    "summarization": 0.5,
    "translation": 0.4,
    "writing": 0.5,
    "extraction": 0.5,
    "classification": 0.5,
    "data_analysis": 0.4,
    "research": 0.4,
    "planning": 0.4,
    "tool_use": 0.4,
}
"""For a model of which nothing is said: middling at everything that is text."""


class MlxSettings(BaseModel):
    """Settings of `MlxEngine`. Sizes are bytes, lengths are tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = BUNDLED
    """Folder in Hugging Face layout, hub id of a model, or "bundled" for the model that ships with modelyard."""
    allow_download: bool = False
    """Fetch a hub id that is not in the local cache. Off: nothing is ever fetched."""
    lazy: bool = False
    """Load the model with the first request (or LoadModel), not at the start."""
    name: str = ""
    """Public name. Empty: the folder's name, the hub id, or the bundled model's own name."""
    provider: str = "mlx"
    """Who is named as the provider of the model."""
    slots: int = Field(default=8, ge=1, le=256)
    """Sequences generated at the same time."""
    max_waiting: int = Field(default=64, ge=0)
    """Requests held beyond the slots before Busy is raised."""
    context_length: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and answer. None: what the model allows; never more than that."""
    prefill_step_size: int | None = Field(default=None, ge=1)
    """Prompt (or embedding) tokens computed between two decode steps; fewer hold running streams up less.
    None: 512 on a GPU, 128 on a CPU."""
    prompt_cache_entries: int = Field(default=16, ge=0)
    """Finished sequences whose KV cache is kept for prompts with the same beginning. 0: none."""
    prompt_cache_bytes: int = Field(default=1 << 30, ge=0)
    """Bound of the same in bytes. 0: none is kept."""
    memory_limit_bytes: int | None = Field(default=None, ge=1)
    """Passed to mlx.core.set_memory_limit. None: MLX's own default."""
    capabilities: dict[str, float] | None = None
    """Task type in lower case ("chat", "tool_use") -> score in [0, 1]. None: modest defaults."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Numbers to compute in. None: as stored on a GPU; float32 on a CPU, which has no fast 16-bit arithmetic."""
    fast_blas: bool = True
    """On Linux CPUs: lend MLX the fast matrix product of NumPy, through a bridge built with the C compiler at start."""
    stall_seconds: float = Field(default=120.0, gt=0)
    """With work in hand but no finished step for so long, the engine reports itself unhealthy."""
