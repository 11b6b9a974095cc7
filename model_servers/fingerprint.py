"""What decides how a model performs on this server, as one short text."""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import blake2b

from model_servers.engine import EngineModel, EngineStatus, Health


def fingerprint(status: EngineStatus, model: EngineModel) -> str:
    """For ModelInfo.fingerprint: other speed or quality is to be expected when it changes.

    Empty while the engine starts, when it may not yet know what it runs on.
    """
    if status.health is Health.STARTING:
        return ""
    return _digest(
        status.engine,
        status.version,
        model.quantization,
        model.context_length,
        status.load.slots,
        status.device,
        status.memory_bytes,
    )


@lru_cache(maxsize=256)
def _digest(*facts: str | int) -> str:
    return blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
