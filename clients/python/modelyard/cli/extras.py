"""Which optional parts of modelyard are installed. Nothing is imported to find out."""

from __future__ import annotations

from importlib.util import find_spec

# One telling package for each thing that an extra brings; see pyproject.toml.
_PACKAGES: dict[str, tuple[str, ...]] = {
    "cli": ("click", "rich", "yaml"),
    "server": ("grpc_health", "grpc_reflection", "numpy", "prometheus_client", "pydantic"),
    "mlx": ("llguidance", "mlx", "mlx_lm"),
    "vllm": ("aiohttp",),
    "openai": ("aiohttp",),
    "ollama": ("ollama",),
    "anthropic": ("anthropic",),
    "bedrock": ("boto3",),
}


def missing(extra: str) -> tuple[str, ...]:
    """Packages of the extra that are not installed."""
    return tuple(package for package in _PACKAGES[extra] if find_spec(package) is None)


def cure(what: str, needed: str, *, install: str | None = None) -> str | None:
    """What to do before `what` can run, or None if all of the extra `needed` is there."""
    absent = missing(needed)
    if not absent:
        return None
    verb = "is" if len(absent) == 1 else "are"
    return (
        f"{what} needs {', '.join(absent)}, which {verb} not installed. "
        f"Install with: pip install 'modelyard[{install or needed}]'"
    )
