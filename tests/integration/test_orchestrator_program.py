"""The control plane as the program that people run: start, settings, metrics, definitions, logs and the end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
import time
import urllib.request
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modelyard.v1 import orchestrator_pb2
from tests.harness.front_door import ask, client
from tests.harness.programs import Program, control_plane, simulated_server, until

SLOW = {"decode_tokens_per_second": 40, "aggregate_tokens_per_second": 0, "answer_tokens": 60}
CANARY = "zanzibar-4711-xylophone"


async def run_to_end(*argv: str, cwd: Path | None = None, **variables: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a control plane that is expected to end by itself."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MODELYARD_")}
    quiet = {"MODELYARD_CONTROL_PLANE_GATEWAY__PORT": "-1", "MODELYARD_CONTROL_PLANE_TASKS__STORE": ""}
    env = {**env, **quiet, **variables}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "control_plane", *argv,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env, cwd=cwd,
    )  # fmt: skip
    try:
        output, errors = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def scrape(running: Program) -> dict[str, float]:
    """Samples of /metrics, labels included in the name."""

    def get() -> str:
        with urllib.request.urlopen(running.facts["metrics"], timeout=20) as response:
            return response.read().decode()

    lines = (await asyncio.to_thread(get)).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


# ------------------------------------------------------------------ settings ---


async def test_bad_settings_end_the_program_with_the_key():
    cases = await asyncio.gather(
        run_to_end("--port", "seven"),
        run_to_end("--fleet.lease-duration", "1", "--fleet.report-interval", "1"),
        run_to_end("--port", "0", MODELYARD_CONTROL_PLANE_DRAIN_GRACE="-3"),
    )
    for (status, output, errors), key in zip(
        cases, ("--port", "lease_duration", "MODELYARD_CONTROL_PLANE_DRAIN_GRACE"), strict=True
    ):
        assert (status, output) == (2, "")
        assert key in errors and "Traceback" not in errors
        assert len(errors.strip().splitlines()) == 1, errors


async def test_a_bad_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "modelyard.yaml"
    path.write_text("control_plane:\n  port: 0\n  quue:\n    bound: {}\n")
    status, _, errors = await run_to_end("--config", str(path))
    assert status == 2 and f"{path}:3: control_plane.quue: unknown setting" in errors


async def test_a_port_in_use_says_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        grpc_port, metrics_port, gateway_port = await asyncio.gather(
            run_to_end("--port", str(port), "--metrics-port", "-1"),
            run_to_end("--port", "0", "--metrics-port", str(port)),
            run_to_end("--port", "0", "--metrics-port", "-1", "--gateway.port", str(port)),
        )
    for (status, output, errors), flag in (
        (grpc_port, "--port"),
        (metrics_port, "--metrics-port"),
        (gateway_port, "--gateway.port"),
    ):
        assert (status, output) == (2, ""), errors
        assert str(port) in errors and "in use" in errors and flag in errors, errors
        assert "Traceback" not in errors
        # Ours is the only line: gRPC says nothing of its own.
        assert errors.splitlines()[-1].startswith("modelyard control-plane: ") and "add_port" not in errors, errors


async def test_bad_definitions_end_the_start(tmp_path):
    (tmp_path / "ollama.yaml").write_text("models:\n  llama:\n    context_length: 8192\n    colour: red\n")
    status, output, errors = await run_to_end("--port", "0", "--metrics-port", "-1", "--models-dir", str(tmp_path))
    assert (status, output) == (2, "")
    assert f"{tmp_path / 'ollama.yaml'}:4: models.llama.colour: unknown key" in errors
    assert "Traceback" not in errors


# --------------------------------------------------------------- definitions ---


async def test_definitions_are_applied_and_a_bad_edit_changes_nothing(tmp_path):
    path = tmp_path / "simulated.yaml"
    path.write_text("models:\n  simulated:\n    context_length: 1000\n  absent:\n    capabilities: {chat: 0.7}\n")
    async with (
        control_plane("--models-dir", str(tmp_path), "--fleet.warm-up", "0") as plane,
        client(plane.address) as door,
        simulated_server("one", plane.address, instant=True),
    ):
        await door.until_ready("one")

        async def model(name: str):
            return (await door.stub.GetModel(orchestrator_pb2.GetModelRequest(name=name))).model

        assert (await model("simulated")).context_length == 1000
        absent = await model("simulated/absent")
        assert not absent.placements and [c.score for c in absent.capabilities] == [0.7]
        assert (await door.generate(ask(max_tokens=1500))).reason == "NO_CAPABLE_SERVER"
        assert (await door.generate(ask(model="absent"))).reason == "NO_CAPABLE_SERVER"

        path.write_text("models:\n  simulated:\n    context_length: -1\n")

        async def complained() -> bool:
            return f"{path}:3: models.simulated.context_length" in plane.log.decode()

        await until(complained)
        assert (await model("simulated")).context_length == 1000

        path.write_text("models:\n  simulated:\n    context_length: 2000\n")

        async def applied() -> bool:
            return (await model("simulated")).context_length == 2000

        await until(applied)
        assert (await door.generate(ask(max_tokens=1500))).done


# ------------------------------------------------------------------- metrics ---


async def test_metrics_tell_of_what_happened():
    faults = [{"kind": "error", "at_request": 2}]
    engine = {"answer_tokens": 5, "decode_tokens_per_second": 500}
    async with (
        control_plane("--fleet.warm-up", "0", "--retry.max-attempts", "1") as plane,
        client(plane.address) as door,
    ):
        async with (
            simulated_server("a-first", plane.address, faults=faults, **engine),
            simulated_server("b-second", plane.address, **engine),
        ):
            await door.until_ready("a-first", "b-second")
            first = ask(server_id="a-first")
            assert (await door.generate(first)).done
            # The second request of a-first fails.
            assert (await door.generate(first)).reason == "ATTEMPTS_EXHAUSTED"
            assert (await door.generate(ask(n=2))).reason == "INVALID_REQUEST"
            for _ in range(3):
                assert (await door.generate(ask(server_id="b-second"))).done
            samples = await scrape(plane)

            def value(name: str, **labels: str) -> float:
                return samples[name + "{" + ",".join(f'{k}="{v}"' for k, v in sorted(labels.items())) + "}"]

            requests = "modelyard_requests_total"
            assert value(requests, method="Generate", outcome="ok") == 4
            assert value(requests, method="Generate", outcome="ATTEMPTS_EXHAUSTED") == 1
            assert value(requests, method="Generate", outcome="INVALID_REQUEST") == 1
            assert value("modelyard_ttft_seconds_count", model="simulated") == 4
            assert 0 < value("modelyard_ttft_seconds_sum", model="simulated") < 60
            assert value("modelyard_tpot_seconds_count", model="simulated") == 4
            assert value("modelyard_tokens_total", kind="completion", model="simulated") == 20
            assert samples["modelyard_selection_seconds_count"] >= 5
            assert samples["modelyard_selection_seconds_sum"] < 5
            for priority in ("low", "normal", "high", "critical"):
                assert value("modelyard_queue_depth", priority=priority) == 0
            states = {
                state: value("modelyard_servers", state=state) for state in ("live", "suspect", "lost", "draining")
            }
            assert states == {"live": 2, "suspect": 0, "lost": 0, "draining": 0}
            pair = {"model": "simulated", "provider": "simulated"}
            for server in ("a-first", "b-second"):
                assert value("modelyard_in_flight", server=server) == 0
                assert value("modelyard_slots", server=server) == 4
                closed = value("modelyard_breaker_state", **pair, server=server, state="closed")
                assert closed == 1
            assert value("modelyard_success_rate", **pair, server="a-first") < 1
        await door.until_server("a-first", lambda status: status.lease_state != 1)
        samples = await scrape(plane)
        assert samples['modelyard_servers{state="live"}'] == 0


# ----------------------------------------------------------------------- end ---


async def test_sigterm_lets_streams_end_and_refuses_new_work():
    # The streams outlive the lease by far: draining must not make the control plane lose its fleet.
    arguments = ("--fleet.report-interval", "0.1", "--fleet.lease-duration", "0.4")
    async with (
        control_plane(*arguments) as plane,
        client(plane.address) as door,
        simulated_server("one", plane.address, **SLOW),
    ):
        await door.until_ready("one")
        health = health_pb2_grpc.HealthStub(door.channel)
        request = health_pb2.HealthCheckRequest(service="modelyard.v1.Orchestrator")
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(request)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        streams = [await door.stream(ask(f"{n}")).first_delta() for n in range(3)]
        stopping = asyncio.create_task(plane.stop())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING

        async def refuses() -> bool:
            return (await door.generate()).reason == "DRAINING"

        await until(refuses)
        for stream in streams:
            reply = await stream.rest()
            assert reply.done.usage.completion_tokens == 60
        assert await stopping == 0
        refused = await door.generate()
        assert refused.refused.code is grpc.StatusCode.UNAVAILABLE


async def test_sigterm_serves_the_queue_too():
    async with (
        control_plane() as plane,
        client(plane.address) as door,
        simulated_server("one", plane.address, **{**SLOW, "answer_tokens": 10, "slots": 1}),
    ):
        await door.until_ready("one")
        streams = [door.stream(ask(f"{n}")) for n in range(4)]
        await streams[0].first_delta()

        async def all_there() -> bool:
            return (await scrape(plane))['modelyard_queue_depth{priority="normal"}'] == 3

        await until(all_there)
        stopping = asyncio.create_task(plane.stop())
        for stream in streams:
            assert (await stream.rest()).done.usage.completion_tokens == 10
        assert await stopping == 0


async def test_an_idle_control_plane_stops_at_once():
    async with (
        control_plane() as plane,
        client(plane.address) as door,
        simulated_server("one", plane.address, instant=True),
    ):
        await door.until_ready("one")
        watch = door.stub.WatchFleet(orchestrator_pb2.WatchFleetRequest())
        await watch.read()
        began = time.monotonic()
        assert await plane.stop() == 0
        assert time.monotonic() - began < 5


async def test_what_does_not_end_within_the_grace_is_cut_off():
    async with (
        control_plane("--drain-grace", "0.3") as plane,
        client(plane.address) as door,
        simulated_server("one", plane.address, **{**SLOW, "answer_tokens": 20_000}),
    ):
        await door.until_ready("one")
        stream = await door.stream(ask()).first_delta()
        stopping = asyncio.create_task(plane.stop())
        assert (await stream.rest()).refused.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert await stopping == 0


# ---------------------------------------------------------------------- logs ---


async def test_prompts_never_reach_the_logs():
    secrets = {
        "prompt": f"{CANARY}-prompt",
        "tool": f"{CANARY}-tool",
        "failing": f"{CANARY}-failing",
        "malformed": f"{CANARY}-malformed",
        "embedded": f"{CANARY}-embedded",
    }
    debug = ("--log-level", "debug")
    faults = [{"kind": "error", "at_request": 2}, {"kind": "error_after_tokens", "at_request": 3, "tokens": 1}]
    once = ("--retry.max-attempts", "1")
    async with control_plane(*debug, *once, "--fleet.warm-up", "0") as plane, client(plane.address) as door:
        async with simulated_server("one", plane.address, *debug, instant=True, faults=faults) as server:
            await door.until_ready("one")
            first = ask(secrets["prompt"], explain=True, request_id="seen-in-logs")
            first.input.tools.add(name="f", description=secrets["tool"], parameters_schema="{}")
            assert (await door.generate(first)).done
            assert (await door.generate(ask(secrets["failing"]))).reason == "ATTEMPTS_EXHAUSTED"
            assert (await door.generate(ask(secrets["failing"]))).reason == "STREAM_BROKEN"
            bad = ask(secrets["malformed"], stop=[secrets["malformed"] * 30])
            bad.input.messages.add(role=3).tool_calls.add(id="1", name="f", arguments_json="{" + secrets["malformed"])
            assert (await door.generate(bad)).reason == "INVALID_REQUEST"
            assert (await door.generate(ask(secrets["failing"] * 20_000))).reason == "NO_CAPABLE_SERVER"
            await door.stub.Embed(orchestrator_pb2.EmbedRequest(inputs=[secrets["embedded"]]))
            stuck = door.stream(ask(secrets["failing"], max_tokens=1), timeout=0.001)
            await stuck.rest()
            assert await server.stop() == 0
        assert await plane.stop() == 0
    logs = plane.log.decode() + server.log.decode()
    assert "one attached" in logs and "attempt on one failed" in logs  # the logs are those of this test
    assert CANARY not in logs
    for line in plane.log.decode().splitlines():
        assert not re.search(r"Traceback|Error:", line), line


async def test_logs_can_be_read_by_machines():
    async with control_plane("--log-format", "json") as plane:
        assert await plane.stop() == 0
    entries = [json.loads(line) for line in plane.log.decode().splitlines()]
    assert any("serving on" in entry["message"] for entry in entries)
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in entries)
