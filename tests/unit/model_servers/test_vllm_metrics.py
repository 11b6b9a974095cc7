"""Reading /metrics of vLLM."""

from __future__ import annotations

import pytest

from model_servers.engines._vllm.metrics import Metrics, parse


def test_several_engines_are_summed_and_the_fullest_cache_counts():
    text = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:cache_config_info{block_size="16",enable_prefix_caching="True",engine="0"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 9.0
"""
    assert parse(text) == Metrics(running=7, waiting=2, cache=0.75, prefix_caching=True)


def test_what_older_versions_call_the_cache():
    text = 'vllm:num_requests_running{model_name="m"} 1.0\nvllm:gpu_cache_usage_perc{model_name="m"} 0.5\n'
    assert parse(text) == Metrics(running=1, cache=0.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>",
        "go_goroutines 7\n",
        "vllm:num_requests_running{ 1\n",
        'vllm:num_requests_running{model_name="m"} many\n',
        'vllm:num_requests_running{model_name="m"} NaN\n',
    ],
)
def test_what_are_no_metrics_of_vllm(text):
    assert parse(text) is None
