"""What a child is started with again."""

from __future__ import annotations

from modelyard.cli.fleet_process import _pause, _ports


def test_a_control_plane_comes_back_to_the_ports_that_others_know() -> None:
    facts = {"address": "[::1]:7460", "gateway": "http://127.0.0.1:7462", "metrics": "http://127.0.0.1:81/metrics"}
    assert _ports(facts) == ["--port", "7460", "--gateway.port", "7462", "--metrics-port", "81"]
    assert _ports({"address": "127.0.0.1:1"}) == ["--port", "1"]
    assert _ports({}) == []


def test_pauses_double() -> None:
    assert [_pause(n) for n in (1, 2, 3, 6, 20)] == [0.5, 1.0, 2.0, 16.0, 30.0]
