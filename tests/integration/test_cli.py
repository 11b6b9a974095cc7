"""The command line as a user runs it: real processes, simulated engines, free ports."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modelyard.rpc.errors import Refusal, Violation
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeOrchestrator
from tests.harness.ports import free_port
from tests.harness.programs import control_plane, simulated_server, until

CLI = [sys.executable, "-m", "modelyard.cli"]
FAST = "simulated:id=fast,models=[swift],decode_tokens_per_second=400,answer_tokens=20"
SLOW = "simulated:id=slow,models=[snail],decode_tokens_per_second=10,answer_tokens=2000"


def environment(**more: str) -> dict[str, str]:
    return {**{key: value for key, value in os.environ.items() if not key.startswith("MODELYARD_")}, **more}


def modelyard(
    *arguments: str, stdin: str = "", cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *arguments], input=stdin, capture_output=True, text=True, env=environment(**env), cwd=cwd, timeout=60
    )


class Up:
    """A running `modelyard up --json`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []

    def until(self, kind: str, name: str | None = None) -> dict[str, Any]:
        """Read events until one of this kind (of this child) comes."""
        assert self.process.stdout
        while line := self.process.stdout.readline():
            event = json.loads(line)
            self.events.append(event)
            if kind in event or (event.get("event") == kind and name in (None, event.get("name"))):
                return event
        raise AssertionError(f"no {kind} of {name}; status {self.process.wait()}; events {self.events}")

    @property
    def address(self) -> str:
        return str(next(event["address"] for event in self.events if event["event"] == "up"))

    @property
    def children(self) -> set[int]:
        return {event["pid"] for event in self.events if event.get("event") == "starting"}

    def __call__(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return modelyard("--address", self.address, *arguments, stdin=stdin)

    def spawn(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*CLI, "--address", self.address, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )


@contextmanager
def up(*arguments: str, port: str = "0", ready: bool = True, cwd: Path | None = None) -> Iterator[Up]:
    process = subprocess.Popen(
        [*CLI, "up", "--json", "--port", port, "--metrics-port", "-1", "--gateway-port", "-1", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
        cwd=cwd,
    )
    running = Up(process)
    try:
        if ready:
            running.until("up")
        yield running
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def alive(pid: int) -> bool:
    """Whether the process runs; a dead one that nobody has reaped does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def assert_gone(pids: set[int]) -> None:
    async def gone() -> bool:
        return not any(alive(pid) for pid in pids)

    assert pids
    asyncio.run(until(gone, timeout=20, every=0.05))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("fleet")
    # What is refused for good shall be refused at once.
    (folder / "modelyard.yaml").write_text("control_plane: {fleet: {warm_up: 0}}\n")
    with up("--server", FAST, "--server", SLOW, cwd=folder) as running:
        yield running


# ------------------------------------------------------------------ generating ---


def test_generate_streams_the_answer_to_standard_output(fleet: Up) -> None:
    done = fleet("generate", "Hello", "--model", "swift")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("This is a simulated answer")
    assert done.stdout.endswith("\n")
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_generate_reads_a_pipe(fleet: Up, arguments: tuple[str, ...]) -> None:
    done = fleet("generate", *arguments, "--model", "swift", stdin="What is said here")
    assert done.returncode == 0, done.stderr
    assert "simulated" in done.stdout


def test_generate_json_is_one_object_with_the_whole_story(fleet: Up) -> None:
    done = fleet("generate", "Hello", "--model", "swift", "--max-tokens", "5", "--explain", "--logprobs", "--json")
    result = json.loads(done.stdout)
    assert (result["server_id"], result["model"], result["finish_reason"]) == ("fast", "swift", "length")
    assert result["usage"]["completion_tokens"] == 5
    assert len(result["logprobs"]) == 5
    assert result["timings"]["ttft"] > 0
    assert result["decisions"][0]["verdict"] == "chosen"
    assert {candidate["server_id"] for candidate in result["decisions"][0]["candidates"]} == {"fast", "slow"}


def test_a_seed_of_zero_is_sent(fleet: Up) -> None:
    texts = [
        json.loads(fleet("generate", "Hello", "--model", "swift", "--json", *seed).stdout)["text"]
        for seed in ((), ("--seed", "0"), ("--seed", "0"))
    ]
    assert texts[1] == texts[2] != texts[0]


def test_generate_holds_the_answer_to_a_schema(fleet: Up, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for given in (json.dumps(schema), str(tmp_path / "schema.json")):
        done = fleet("generate", "Where?", "--schema", given, "--model", "swift")
        assert isinstance(json.loads(done.stdout)["city"], str), done.stderr


def test_an_image_needs_a_model_that_sees(fleet: Up, tmp_path: Path) -> None:
    image = tmp_path / "dot.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n")
    done = fleet("generate", "What is this?", "--image", str(image))
    assert done.returncode == 4
    assert "vision" in done.stderr


def test_generate_explain_shows_the_decision_beside_the_answer(fleet: Up) -> None:
    done = fleet("generate", "Hello", "--model", "swift", "--explain")
    assert "simulated answer" in done.stdout
    assert "chosen" in done.stderr
    assert "slow/snail: " in done.stderr


def test_ctrl_c_stops_the_engine(fleet: Up) -> None:
    generating = fleet.spawn("generate", "Tell me a long story", "--model", "snail")
    assert generating.stdout and generating.stderr
    assert generating.stdout.read(1)
    generating.send_signal(signal.SIGINT)
    assert generating.wait(20) == 130
    assert "Traceback" not in generating.stderr.read()
    generating.stdout.close()
    generating.stderr.close()
    with subprocess.Popen(
        [*CLI, "--address", fleet.address, "servers", "--watch", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as watching:
        assert watching.stdout
        while True:  # the next reports tell that nothing runs any more
            change = json.loads(watching.stdout.readline())
            if any(s["server_id"] == "slow" and s["in_flight"] == s["running"] == 0 for s in change["servers"]):
                break
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 130


def test_a_reader_that_leaves_is_no_error(fleet: Up) -> None:
    generating = fleet.spawn("generate", "Tell me a long story", "--model", "snail")
    assert generating.stdout and generating.stderr
    generating.stdout.read(1)
    generating.stdout.close()
    assert generating.stderr.read() == ""
    assert generating.wait(20) == 141
    generating.stderr.close()


@pytest.mark.parametrize(
    ("shell", "status", "words"),
    [
        ('"$@" generate --json hi --model swift >&-', 0, ""),
        ('"$@" generate hi --model swift >&-', 0, ""),
        ('"$@" models >&-', 0, ""),
        ('"$@" models 2>&- 1>/dev/null', 0, ""),
        ('"$@" generate - <&-', 2, "the prompt on standard input is empty"),
        ('"$@" models --json >/dev/full', 1, "No space left on device"),
        ('"$@" models >/dev/full', 1, "No space left on device"),
    ],
)
def test_closed_and_full_streams(fleet: Up, shell: str, status: int, words: str) -> None:
    line = ["sh", "-c", shell, "sh", *CLI, "--address", fleet.address]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == bool(words)


@pytest.mark.parametrize(
    "arguments", [("generate", "-"), ("generate", b"ab\xff"), ("embed",), ("embed", b"ab\xff"), ("models", b"ab\xff")]
)
def test_what_is_not_utf8_is_told_in_our_words(fleet: Up, arguments: tuple[str | bytes, ...]) -> None:
    line = [*CLI, "--address", fleet.address, *arguments]
    for mode in ("0", "1"):  # how Python reads: strictly, or byte by byte
        env = environment(PYTHONUTF8=mode, LC_ALL="C.UTF-8")
        done = subprocess.run(line, input=b"ab\xff\xfe", capture_output=True, env=env, timeout=60)
        assert done.returncode == 2
        assert re.fullmatch(rb"modelyard: .* is not UTF-8 text; convert it first.*iconv.*\n", done.stderr), done.stderr


def test_a_model_server_is_no_control_plane(fleet: Up) -> None:
    endpoint = json.loads(fleet("servers", "--json").stdout)["servers"][0]["endpoint"]
    for command in (("models",), ("generate", "hi")):
        done = modelyard("--address", endpoint, *command)
        assert done.returncode == 1
        assert done.stderr == (
            f"modelyard: what answers at {endpoint} is a model server, not a control plane; "
            "name a control plane with --address\n"
        )


def test_embed_prints_a_line_per_text(fleet: Up) -> None:
    done = fleet("embed", "one", "two", "--model", "swift")
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(len([float(number) for number in line.split()]) == 64 for line in lines)
    told = json.loads(fleet("embed", "one", "--model", "swift", "--json").stdout)
    assert len(told["vectors"][0]) == 64


def test_chat_keeps_the_conversation_and_obeys(fleet: Up) -> None:
    script = "/model swift\nHello\nAnd again\n/explain\nOnce more\n/nonsense\n/model nope\nHello?\n/quit\nnot asked\n"
    done = fleet("chat", "--max-tokens", "5", stdin=script)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert "chosen" in done.stderr
    assert "/nonsense is not known" in done.stderr
    assert "modelyard: no model 'nope'" in done.stderr


# ------------------------------------------------------------------- inspecting ---


def test_servers_and_models_as_aligned_text_and_json(fleet: Up) -> None:
    lines = fleet("servers").stdout.splitlines()
    assert lines[0].startswith("server  state")
    assert lines[0].split()[-4:] == ["TTFT", "TPOT", "success", "epoch"]
    assert [line.split()[:2] for line in lines[1:]] == [["fast", "live"], ["slow", "live"]]
    told = json.loads(fleet("servers", "--json").stdout)["servers"]
    assert {server["server_id"]: server["engine"] for server in told} == {"fast": "simulated", "slow": "simulated"}

    lines = fleet("models").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "snail", "swift"]
    told = json.loads(fleet("models", "--json").stdout)["models"]
    assert [model["name"] for model in told] == ["snail", "swift"]
    one = fleet("models", "swift")
    assert "fast" in one.stdout and "slow" not in one.stdout
    assert json.loads(fleet("models", "swift", "--json").stdout)["placements"][0]["server_id"] == "fast"


def test_explain_tells_the_choice_and_the_rejections(fleet: Up) -> None:
    done = fleet("explain", "Hello", "--model", "swift")
    assert done.returncode == 0
    assert done.stdout.startswith("chosen: fast")
    assert "slow/snail: model snail is not swift" in done.stdout
    decision = json.loads(fleet("explain", "Hello", "--json").stdout)
    assert decision["verdict"] == "chosen"
    assert decision["estimated_prompt_tokens"] > 0
    assert decision["formulas"]["tpot"] == "tpot_base + tpot_per_stream * streams" and decision["propensity"] == 1
    sums = fleet("explain", "Hello", "--arithmetic").stdout
    best = decision["candidates"][0]
    assert f"\n  score         {best['score']:>9.4g} = (weight_capability * capability + " in sums
    impossible = fleet("explain", "Hello", "--max-tokens", "1000000")
    assert impossible.returncode == 4
    assert "context 32768 <" in impossible.stdout


def test_drain_and_undo(fleet: Up) -> None:
    assert "takes nothing new" in fleet("drain", "slow").stdout
    try:
        assert json.loads(fleet("drain", "slow", "--json").stdout)["lease_state"] == "draining"
        waiting = fleet("explain", "Hello", "--model", "snail")
        assert waiting.returncode == 5
        assert "slow is draining" in waiting.stdout
    finally:
        assert "serves again" in fleet("drain", "slow", "--undo").stdout


# ----------------------------------------------------------------------- errors ---


@pytest.mark.parametrize(
    ("arguments", "status", "reason", "words"),
    [
        (("generate", "Hello", "--model", "nope"), 4, "UNKNOWN_MODEL", "no model 'nope'"),
        (("models", "nope"), 4, "UNKNOWN_MODEL", "see `modelyard models`"),
        (("drain", "nope"), 4, "UNKNOWN_SERVER", "see `modelyard servers`"),
        (("generate", "Hello", "--max-tokens", "1000000"), 4, "NO_CAPABLE_SERVER", "context 32768 <"),
        (("generate", "Hello", "--model", "snail", "--timeout", "0.3"), 5, "DEADLINE_EXCEEDED", "--timeout"),
        (("generate", "Hello", "--temperature", "3"), 2, "USAGE", "--temperature"),
        (("generate", "Hello", "--schema", "nowhere.json"), 2, "USAGE", "no such file"),
        (("generate", "--schema", "{}", "--json-object", "Hello"), 2, "USAGE", "exclude each other"),
        (("generate", "Hello", "--raw", "--system", "Be brief"), 2, "INVALID_REQUEST", "raw prompt"),
    ],
)
def test_failures_are_one_line_and_an_exit_status(
    fleet: Up, arguments: tuple[str, ...], status: int, reason: str, words: str
) -> None:
    done = fleet(*arguments, "--json")
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert words in done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["reason"] == reason
    assert error["message"]
    if reason != "USAGE":
        assert done.stderr.startswith("modelyard: ")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("refusal", "status", "words"),
    [
        (Refusal(Reason.QUEUE_FULL, "2048 requests are waiting", retry_after=1.5), 5, "(retry after 1.5 s)"),
        (Refusal(Reason.FLEET_WARMING_UP, "servers are still attaching"), 5, "try again in a moment"),
        (Refusal(Reason.QUEUE_TIMEOUT, "waited 60 s"), 5, "--priority"),
        (Refusal(Reason.INVALID_REQUEST, "input: is required", [Violation("input", "is required")]), 2, "input: is"),
        (Refusal(Reason.INTERNAL, "incident 4711"), 1, "incident 4711"),
    ],
)
async def test_refusals_of_a_control_plane(refusal: Refusal, status: int, words: str) -> None:
    async with FakeOrchestrator() as control_plane:
        control_plane.inject_error("Generate", refusal)
        done = await asyncio.to_thread(modelyard, "generate", "x", "--json", MODELYARD_ADDRESS=control_plane.address)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == status
    assert words in done.stderr
    assert error["reason"] == refusal.reason.value
    assert error.get("retry_after") == refusal.retry_after
    assert error.get("violations", []) == [
        {"field": violation.field, "description": violation.description} for violation in refusal.violations
    ]


async def test_text_before_a_failure_stays_and_the_failure_is_told() -> None:
    async with FakeOrchestrator() as control_plane:
        control_plane.answer("Hello", Refusal(Reason.STREAM_BROKEN, "fake-1 went away"))
        done = await asyncio.to_thread(modelyard, "generate", "x", MODELYARD_ADDRESS=control_plane.address)
        told = await asyncio.to_thread(modelyard, "generate", "x", "--json", MODELYARD_ADDRESS=control_plane.address)
    assert done.stdout == "Hello\n"
    assert done.returncode == 5
    assert "fake-1 went away" in done.stderr
    assert json.loads(told.stdout)["error"]["partial_text"] == "Hello"


async def test_a_connection_that_is_cut_is_told_in_our_words_alone() -> None:
    """gRPC's library has a line of its own for it, which would end up on the terminal."""
    slow = {"decode_tokens_per_second": 5, "answer_tokens": 1000}
    async with control_plane("--drain-grace", "0.2") as plane:
        async with simulated_server("one", plane.address, **slow) as server:
            await until(lambda: _attached(plane.address))
            asking = await asyncio.create_subprocess_exec(
                *CLI, "--address", plane.address, "generate", "--no-direct", "x",
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment(),
            )  # fmt: skip
            assert asking.stdout
            await asyncio.wait_for(asking.stdout.read(1), 30)
            await plane.stop()
            _, said = await asyncio.wait_for(asking.communicate(), 30)
            await server.stop()
    assert asking.returncode == 5
    assert said.count(b"\n") == 1 and said.startswith(b"modelyard: "), said
    assert b".cc:" not in server.log, server.log.decode()


async def _attached(address: str) -> bool:
    done = await asyncio.to_thread(modelyard, "--address", address, "servers", "--json")
    return bool(json.loads(done.stdout)["servers"])


def test_no_control_plane_is_told_with_its_cure(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    (tmp_path / "modelyard.yaml").write_text(f"client: {{address: '{address}'}}")
    for command in (("servers",), ("models",), ("generate", "x"), ("explain", "x"), ("chat",)):
        done = modelyard(*command, cwd=tmp_path, stdin="Hello\n")
        told = f"modelyard: no control plane answers at {address}; start one with `modelyard up`"
        assert done.stderr.startswith(told), command
        assert done.returncode == (0 if command == ("chat",) else 3), command


# --------------------------------------------------------------------------- up ---


def test_programs_get_their_arguments() -> None:
    for program, flag in (("control-plane", "--metrics-port"), ("model-server", "--engine-settings")):
        done = modelyard(program, "--help")
        assert done.returncode == 0
        assert flag in done.stdout
        assert modelyard(program, "--no-such-flag").returncode == 2


def test_sigint_drains_and_leaves_nothing(tmp_path: Path) -> None:
    with up("--server", FAST, cwd=tmp_path) as running:
        running.process.send_signal(signal.SIGINT)
        running.until("stopped")
        assert running.process.wait(30) == 0
        assert len(running.children) == 2
        assert_gone(running.children)
        order = [event["name"] for event in running.events if event["event"] == "stopping"]
        assert order == ["control-plane", "fast"]


def test_a_running_answer_is_finished_before_the_end(tmp_path: Path) -> None:
    server = "simulated:id=one,decode_tokens_per_second=40,answer_tokens=60"
    with up("--server", server, cwd=tmp_path) as running:
        generating = running.spawn("generate", "Hello", "--json")
        watching = running.spawn("servers", "--watch", "--json")
        assert watching.stdout and watching.stderr and generating.stdout and generating.stderr
        while not any(server["in_flight"] for server in json.loads(watching.stdout.readline())["servers"]):
            pass
        running.process.send_signal(signal.SIGTERM)
        out, err = generating.communicate(timeout=30)
        assert generating.returncode == 0, err
        assert json.loads(out)["finish_reason"] == "stop"
        running.until("stopped")
        assert running.process.wait(30) == 0
        watching.communicate(timeout=30)
        assert watching.returncode in (3, 5)  # the control plane said that it drains, or was gone


def test_a_control_plane_that_dies_is_started_again_where_it_was(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/kept.db"
    with up("--server", FAST, "--store", store, cwd=tmp_path) as running:
        first = running.address
        later = running("tasks", "submit", "--not-before", "2", "Hello").stdout.strip()
        os.kill(pid_of(running, "control-plane"), signal.SIGKILL)
        ended = running.until("exited", "control-plane")
        assert ended["restart_in"] == 0.5 and "control-plane was ended by SIGKILL" in ended["message"]
        assert "serving on" in ended["message"]  # its last words
        again = running.until("ready", "control-plane")
        assert again["address"] == first
        done = running("tasks", "get", later, "--wait", "--json")  # accepted before, run after
        assert json.loads(done.stdout)["state"] == "succeeded", done.stderr
        assert running("generate", "Hello").returncode == 0
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
        assert_gone(running.children)


def test_a_control_plane_that_cannot_come_back_ends_the_fleet(tmp_path: Path) -> None:
    with up("--server", FAST, "--store", "", cwd=tmp_path) as running, socket.socket() as thief:
        host, port = running.address.split(":")
        os.kill(pid_of(running, "control-plane"), signal.SIGKILL)
        running.until("exited", "control-plane")
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind((host, int(port)))
        thief.listen(1)
        assert "is in use" in running.until("error")["error"]["message"]
        assert running.process.wait(30) == 1
        assert_gone(running.children)


def pid_of(running: Up, name: str) -> int:
    return next(int(e["pid"]) for e in reversed(running.events) if e["event"] == "starting" and e["name"] == name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_fleet_outlives_its_reader_and_drains_all_the_same(number: signal.Signals, tmp_path: Path) -> None:
    with up("--server", FAST, cwd=tmp_path) as running:
        assert running.process.stdout
        running.process.stdout.close()
        assert running("generate", "Hello").returncode == 0
        running.process.send_signal(number)
        assert running.process.wait(30) == 0
        assert_gone(running.children)


def test_a_second_signal_kills(tmp_path: Path) -> None:
    with up("--server", SLOW, cwd=tmp_path) as running:
        generating = running.spawn("generate", "Hello")
        assert generating.stdout
        assert generating.stdout.read(1)
        running.process.send_signal(signal.SIGINT)
        running.until("stopping")
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(10) == 130
        assert_gone(running.children)
        generating.communicate(timeout=30)
        assert generating.returncode in (3, 5)


@pytest.mark.parametrize("moment", ["starting", "up"])
def test_no_orphans_when_up_is_killed(moment: str, tmp_path: Path) -> None:
    with up("--server", FAST, ready=False, cwd=tmp_path) as running:
        running.until(moment, "fast" if moment == "starting" else None)
        running.process.kill()
        assert len(running.children) == 2
        assert_gone(running.children)


def test_a_model_server_that_dies_is_started_again(tmp_path: Path) -> None:
    with up("--server", FAST, cwd=tmp_path) as running:
        first = next(event["pid"] for event in running.events if event["event"] == "ready" and event["name"] == "fast")
        os.kill(first, signal.SIGKILL)
        died = running.until("exited", "fast")
        assert died["restart_in"] > 0
        assert "SIGKILL" in died["message"]
        assert running.until("ready", "fast")["pid"] != first
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = modelyard("up", "--port", str(port), "--no-servers", "--metrics-port", "-1", "--gateway-port", "-1")
    assert done.returncode == 2
    assert f"127.0.0.1:{port} is in use" in done.stderr.splitlines()[-1]
    assert done.stderr.count("is in use") == 1
    assert "Traceback" not in done.stderr


def test_a_task_store_in_use_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "tasks.db.lock").touch()
    with (tmp_path / "tasks.db.lock").open("rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ports = ("--port", "0", "--metrics-port", "-1", "--gateway-port", "-1")
        done = modelyard("up", *ports, "--no-servers", "--store", "sqlite:///tasks.db", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("is in use by another control plane") == 1
    last = done.stderr.splitlines()[-1]
    assert "a file of their own (--tasks.store sqlite:///OTHER, for `modelyard up` --store sqlite:///OTHER)" in last


def test_wrong_settings_of_a_server_are_told(tmp_path: Path) -> None:
    done = modelyard(
        "up",
        "--port",
        "0",
        "--metrics-port",
        "-1",
        "--gateway-port",
        "-1",
        "--server",
        "simulated:slots=many",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "engine_settings.slots" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_does_not_start_is_told(tmp_path: Path) -> None:
    server = "simulated:faults=[{kind: refuse_start}]"
    done = modelyard(
        "up", "--port", "0", "--metrics-port", "-1", "--gateway-port", "-1", "--server", server, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("remove the fault 'refuse_start'")
    assert "modelyard: simulated-1 ended with status 1" in done.stderr


def test_the_fleet_of_the_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "modelyard.yaml").write_text(
        """
        control_plane: {fleet: {warm_up: 0}}
        up:
          servers:
            - {engine: simulated, labels: {room: attic}}
            - {engine: simulated, server_id: spare, engine_settings: {models: [other]}}
        """
    )
    with up(cwd=tmp_path) as running:
        servers = {server["server_id"]: server for server in running.events[-1]["servers"]}
    assert set(servers) == {"simulated-1", "spare"}
    assert servers["simulated-1"]["labels"] == {"room": "attic"}
    assert servers["spare"]["models"][0]["name"] == "other"


def test_up_for_people_prints_where_it_is() -> None:
    process = subprocess.Popen(
        [*CLI, "up", "--port", "0", "--metrics-port", "0", "--gateway-port", "0", "--server", FAST],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout and process.stderr
        lines = []
        while not lines or not lines[-1].startswith("try: "):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        text = "".join(lines)
        assert "modelyard is up at 127.0.0.1:" in text
        assert "metrics at http://127.0.0.1:" in text
        assert re.search(r"OpenAI's API at http://127\.0\.0\.1:\d+/v1$", text, re.MULTILINE)
        assert "swift" in text
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        log = process.stderr.read()
        assert "[control-plane] " in log
        assert "[fast] " in log
        assert "\x1b" not in text + log
    finally:
        process.kill()
        process.communicate()
