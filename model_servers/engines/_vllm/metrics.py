"""What /metrics of vLLM tells of its load. Importing this module needs prometheus_client."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_CACHE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
"""The second is what versions before 0.10 call it."""
_CONFIG = "vllm:cache_config_info"
_WANTED = tuple(f"{name}{end}" for name in (_RUNNING, _WAITING, *_CACHE, _CONFIG) for end in ("{", " "))


@dataclass(frozen=True, slots=True)
class Metrics:
    running: int = 0
    """Requests in the batch, of everyone who uses the server."""
    waiting: int = 0
    cache: float = 0.0
    """Share of the KV cache that is taken, in [0, 1]: the fullest one of several engines."""
    prefix_caching: bool = False


def parse(text: str) -> Metrics | None:
    """None if these are not vLLM's metrics."""
    # Histograms make up nearly all of it; reading them every second would cost more than all the rest.
    lines = [line for line in text.splitlines() if line.startswith(_WANTED)]
    totals: dict[str, float] = {}
    cache, prefix_caching = 0.0, False
    try:
        for family in text_string_to_metric_families("\n".join([*lines, ""])):
            for sample in family.samples:
                if sample.name in _CACHE:
                    cache = max(cache, sample.value)
                elif sample.name == _CONFIG:
                    prefix_caching = prefix_caching or sample.labels.get("enable_prefix_caching") == "True"
                else:
                    totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        if _RUNNING not in totals:
            return None
        return Metrics(int(totals[_RUNNING]), int(totals.get(_WAITING, 0)), min(max(cache, 0.0), 1.0), prefix_caching)
    except (ValueError, OverflowError):  # numbers that are none
        return None
