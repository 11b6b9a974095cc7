"""Throughput and added latency of the control plane in front of one instant model server."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import statistics
import struct
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import grpc

from modelyard.rpc.channels import channel
from modelyard.v1 import generation_pb2, model_server_pb2, orchestrator_pb2
from modelyard.v1.orchestrator_pb2_grpc import OrchestratorStub
from tests.harness.programs import Program, control_plane, simulated_server, until

ORCHESTRATOR = "/modelyard.v1.Orchestrator/Generate"
MODEL_SERVER = "/modelyard.v1.ModelServer/Generate"
SHORT, LONG = 1, 2000  # chunks of an answer
SLOTS = 256
PROMPT = "What is modelyard?"


@dataclass(frozen=True)
class Figures:
    """Rates per second, times in seconds, memory in bytes."""

    direct_chunks: float
    relayed_chunks: float
    direct_calls: float
    relayed_calls: float
    cpu_per_call: float
    cpu_per_chunk: float
    direct_ttft: float
    relayed_ttft: float
    added_ttft: float
    idle_rss: float


def request(tokens: int) -> generation_pb2.GenerationInput:
    return generation_pb2.GenerationInput(
        messages=[
            generation_pb2.Message(role=generation_pb2.ROLE_USER, content=[generation_pb2.ContentPart(text=PROMPT)])
        ],
        sampling=generation_pb2.SamplingParams(max_tokens=tokens, seed=1),
    )


async def h2load(address: str, path: str, body: bytes, calls: int, concurrency: int) -> float:
    """Seconds that `calls` calls took at this concurrency."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "body"
        file.write_bytes(struct.pack(">BI", 0, len(body)) + body)
        connections = min(4, concurrency)
        process = await asyncio.create_subprocess_exec(
            "h2load", "-n", str(calls), "-c", str(connections), "-m", str(max(1, concurrency // connections)),
            "-d", str(file), "-H", "content-type: application/grpc", "-H", "te: trailers",
            f"http://{address}{path}",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output = (await process.communicate())[0].decode()
    found = re.search(r"finished in ([\d.]+)(ms|s)", output)
    succeeded = re.search(r"(\d+) succeeded", output)
    if process.returncode or not found or not succeeded or int(succeeded[1]) != calls:
        raise RuntimeError(f"h2load failed:\n{output}")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def served(plane: Program) -> float:
    """Generate calls that the control plane has counted as ok."""
    with urllib.request.urlopen(str(plane.facts["metrics"])) as answer:
        found = re.search(rb'modelyard_requests_total\{method="Generate",outcome="ok"\} ([\d.e+]+)', answer.read())
    return float(found[1]) if found else 0.0


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


async def first_token(address: str, path: str, body: bytes) -> float:
    """Seconds to the first message; the channel is warm and reused."""
    calls = _calls(address, path)
    started = time.perf_counter()
    call = calls(body)
    await call.read()
    taken = time.perf_counter() - started
    while await call.read() is not grpc.aio.EOF:
        pass
    return taken


_channels: dict[str, grpc.aio.Channel] = {}


def _calls(address: str, path: str) -> grpc.aio.UnaryStreamMultiCallable:
    if address not in _channels:
        _channels[address] = channel(address)
    return _channels[address].unary_stream(path)


async def run(quick: bool = False) -> Figures:
    if shutil.which("h2load") is None:
        raise SystemExit("h2load is needed: apt-get install nghttp2-client")
    scale = 0.1 if quick else 1.0
    async with control_plane("--log-level", "warning") as plane, channel(plane.address) as probe:
        stub = OrchestratorStub(probe)
        await stub.ListModels(orchestrator_pb2.ListModelsRequest())
        idle = rss(plane.pid)
        async with simulated_server(
            "bench", plane.address,
            instant=True, answer_tokens=LONG, slots=SLOTS,
        ) as server:  # fmt: skip

            async def live() -> bool:
                return bool((await stub.ListModels(orchestrator_pb2.ListModelsRequest())).models)

            await until(live)
            model = (await stub.ListModels(orchestrator_pb2.ListModelsRequest())).models[0].name
            return await _measure(plane, server, model, idle, scale)


async def _measure(plane: Program, server: Program, model: str, idle: int, scale: float) -> Figures:
    def direct(tokens: int) -> bytes:
        return model_server_pb2.ModelServerGenerateRequest(model=model, input=request(tokens)).SerializeToString()

    def relayed(tokens: int) -> bytes:
        return orchestrator_pb2.GenerateRequest(input=request(tokens)).SerializeToString()

    async def rounds(tokens: int, calls: int, concurrency: int) -> tuple[float, float, float]:
        """Calls per second direct and relayed, CPU seconds of the control plane per call; medians of turns."""
        calls = max(concurrency, int(calls * scale))
        rates: list[tuple[float, float, float]] = []
        for turn in range(4):
            straight = calls / await h2load(server.address, MODEL_SERVER, direct(tokens), calls, concurrency)
            before, cpu = served(plane), cpu_seconds(plane.pid)
            through = calls / await h2load(plane.address, ORCHESTRATOR, relayed(tokens), calls, concurrency)
            if served(plane) - before != calls:
                raise RuntimeError(f"only {served(plane) - before:.0f} of {calls} calls succeeded")
            if turn:  # the first turn warms up
                rates.append((straight, through, (cpu_seconds(plane.pid) - cpu) / calls))
        return tuple(statistics.median(column) for column in zip(*rates, strict=True))  # type: ignore[return-value]

    short_direct, short_relayed, cpu_call = await rounds(SHORT, 8000, 64)
    long_direct, long_relayed, cpu_long = await rounds(LONG, 64, 8)
    times: list[tuple[float, float]] = []
    for _ in range(int(1000 * scale)):
        times.append((
            await first_token(server.address, MODEL_SERVER, direct(SHORT)),
            await first_token(plane.address, ORCHESTRATOR, relayed(SHORT)),
        ))  # fmt: skip
    for open_channel in _channels.values():
        await open_channel.close()
    return Figures(
        direct_chunks=long_direct * LONG,
        relayed_chunks=long_relayed * LONG,
        direct_calls=short_direct,
        relayed_calls=short_relayed,
        cpu_per_call=cpu_call,
        cpu_per_chunk=cpu_long / LONG,
        direct_ttft=statistics.median(direct for direct, _ in times),
        relayed_ttft=statistics.median(relayed for _, relayed in times),
        added_ttft=statistics.median(relayed - direct for direct, relayed in times),
        idle_rss=idle,
    )
