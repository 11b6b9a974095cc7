"""Predictors and the forecast on real stores and servers: learned from tasks, put in force, swapped live; models warmed
ahead."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from control_plane import predictor
from control_plane.api.task_convert import completion_tokens
from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import TaskType
from control_plane.predictors import live as live_module
from control_plane.predictors.artefact import Artefact, train
from control_plane.predictors.attempt import from_lines, to_lines
from control_plane.predictors.forecast import Forecast
from control_plane.predictors.live import Role
from control_plane.predictors.shelf import Shelf
from control_plane.tasks import forecasts, history, versions
from control_plane.tasks.lanes import lane_of
from control_plane.tasks.location import SqliteFile, located
from control_plane.tasks.model import NewTask, Placement, TaskState, Tenant
from control_plane.tasks.sqlite import engine, open_sqlite
from control_plane.tasks.store import SqlTaskStore
from modelyard.client import AsyncClient
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.testing import FakeModelServer, model_info
from modelyard.v1 import fleet_pb2, generation_pb2, orchestrator_pb2
from modelyard.v1.task_queue_pb2 import TaskResult
from tests.harness import attempts as made_up
from tests.harness.front_door import FrontDoor, ask, attached, front_door
from tests.harness.kept_tasks import open_tasks, succeeded
from tests.harness.model_servers import eventually, model_server
from tests.harness.postgres import Postgres
from tests.harness.tasks import Desk, desk

TENANT = Tenant("acme")
WARM, COLD = fleet_pb2.MODEL_STATE_WARM, fleet_pb2.MODEL_STATE_COLD


class SteppedClock:
    """Goes on when it is told to."""

    def __init__(self, wall: float) -> None:
        self._began = self.at = wall

    def wall(self) -> float:
        return self._began

    def monotonic(self) -> float:
        return self.at


def result(tokens: int) -> bytes:
    summary = orchestrator_pb2.GenerationSummary(usage=generation_pb2.Usage(completion_tokens=tokens))
    return TaskResult(text="never looked at", summary=summary).SerializeToString()


async def worked_through(url: str, rounds: int, together: int = 40) -> None:
    """Tasks in a store, run over the last days: long prompts and the server `slow` take longer, some attempts fail."""
    place = located(url, {})
    assert isinstance(place, SqliteFile)
    clock, rng = SteppedClock(time.time() - 20 * 86400), random.Random(1)
    store = await SqlTaskStore.open(await open_sqlite(place, "one", clock))
    try:
        for number in range(rounds):
            server, tokens = ("fast", "slow")[number % 2], (400, 4000)[number // 2 % 2]
            route = RouteRequest("", TaskType.SUMMARIZATION, prompt_tokens=tokens, max_tokens=200)
            task = NewTask(TENANT, b"secret", lane_of(TENANT, route), TaskType.SUMMARIZATION, 1)
            await asyncio.gather(*(store.submit(task) for _ in range(together)))
            (waiting,) = await store.waiting_lanes()
            placement = Placement(ServerId(server), "i", ModelName("llama"), Provider("vllm"))
            claims = await store.claim(waiting.id, [placement] * together)
            took = tokens / 500 * (2 if server == "slow" else 1)
            for part in range(4):
                clock.at += took / 4 * rng.uniform(0.8, 1.2) if part else took * 0.7
                ended = claims[part::4]
                good = ended if server == "fast" or part else []
                await asyncio.gather(
                    *(store.succeeded(claim.id, claim.epoch, result(tokens // 20), 5) for claim in good),
                    *(
                        store.attempt_failed(claim.id, claim.epoch, "ENGINE_FAILED", "broke", None)
                        for claim in ended
                        if claim not in good
                    ),
                )
            clock.at += 600.0
    finally:
        await store.close()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/tasks.db"


def run(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> dict[str, Any]:
    """What a verb says with --json."""
    capsys.readouterr()
    assert predictor.main([*argv, "--json"]) == status
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------- the store ---


async def test_attempts_are_read_in_pages_and_say_what_happened(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await worked_through(url, 4)
    monkeypatch.setattr(history, "PAGE", 50)
    found, before, pages = [], "", 0
    with history.reader(located(url, {})) as read:
        while True:
            some, before = read(
                lambda connection, before=before: history.page(connection, before, 0.0, completion_tokens)  # type: ignore[misc]
            )
            found += some
            pages += 1
            if not before:
                break
        since = sorted(attempt.at for attempt in found)[100]
        later, _ = read(lambda connection: history.page(connection, "", since, completion_tokens))
    assert pages == 4 and len(found) == 160 and all(attempt.at >= since - 1 for attempt in later)
    failed = [attempt for attempt in found if not attempt.ok]
    assert len(failed) == 20 and {attempt.question.server_id for attempt in failed} == {"slow"}
    assert {attempt.completion_tokens for attempt in failed} == {None}
    one = next(attempt for attempt in found if attempt.ok and attempt.question.prompt_tokens > 2000)
    assert one.question.task_type is TaskType.SUMMARIZATION and one.question.max_tokens == 200
    assert one.completion_tokens == 200 and 5 < one.seconds < 40
    assert one.question.hour == int(one.at // 3600) % 24
    lines = b"".join(to_lines(found))
    assert b"secret" not in lines and b"acme" not in lines and b"never" not in lines
    assert list(from_lines(lines.splitlines())) == found


async def test_a_shared_store_is_read_and_written_too(postgres_server: Postgres) -> None:
    url = await postgres_server.tables()
    forecast, now = Forecast(600.0), time.time()
    forecast.add((TaskType.CHAT, "llama"), now, 7)
    kept = forecast.changed()
    async with open_tasks(url) as store:
        for _ in range(3):
            await succeeded(store)
        await forecasts.keep(store.database, kept)
        await forecasts.keep(store.database, kept)
        assert await store.database.read(forecasts.kept) == kept

    def look() -> Any:
        with history.reader(located(url, {})) as read:
            return read(lambda connection: history.page(connection, "", now - 60, completion_tokens))

    found, more = await asyncio.to_thread(look)
    assert [(one.ok, one.completion_tokens, one.question.server_id) for one in found] == [(True, 0, "gpu-1")] * 3
    assert more == ""


async def test_a_store_from_before_is_upgraded_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tasks.db"
    with engine(path, write=True).connect() as connection:
        versions.migrate(connection, "0002")
    answer = run(capsys, "train", "--store", f"sqlite:///{path}", status=2)
    assert "modelyard db upgrade" in answer["error"]["message"]


# ----------------------------------------------------------------- the verbs ---


async def test_train_evaluate_promote_rollback(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    await worked_through(url, 16)
    at = ("--store", url)
    assert run(capsys, "list", *at)["versions"] == []
    few = run(capsys, "train", *at, "--limit", "150", status=1)
    assert "150 attempts to learn from, 200 are needed" in few["error"]["message"]

    one = await asyncio.to_thread(run, capsys, "train", *at)
    assert one["version"] == "v1" and one["data"]["attempts"] == 512 and one["library"].startswith("lightgbm ")
    assert one["dir"] == str(tmp_path / "tasks.predictors")
    assert one["evaluation"]["against"] == "rules" and one["evaluation"]["worse"] == []
    scores = {who: one["holdout"][who]["losses"]["seconds"] for who in ("trained", "rules")}
    assert scores["trained"] < scores["rules"] / 2, "the rules do not look at the prompt"
    assert run(capsys, "promote", "v1", *at) == {"promoted": "v1", "before": "rules", "overridden": []}
    nothing = run(capsys, "evaluate", *at, status=5)
    assert nothing["error"]["reason"] == "NOTHING_YET" and "in force itself" in nothing["error"]["message"]

    # A candidate that was taught nonsense.
    exported = tmp_path / "attempts.jsonl"
    assert run(capsys, "export", str(exported), *at)["attempts"] == 640
    with exported.open("rb") as file:
        wrong = [replace(one, seconds=40.0 / one.seconds) for one in from_lines(file)]
    nonsense = tmp_path / "nonsense.jsonl"
    nonsense.write_bytes(b"".join(to_lines(wrong)))
    two = await asyncio.to_thread(run, capsys, "train", *at, "--from", str(nonsense))
    assert two["version"] == "v2"
    told = await asyncio.to_thread(run, capsys, "evaluate", *at, status=1)
    assert told["version"] == "v2" and told["evaluation"]["against"] == "v1"
    assert "seconds" in told["evaluation"]["worse"] and told["evaluation"]["enough"]
    refused = run(capsys, "promote", "v2", *at, status=1)
    assert refused["error"]["reason"] == "OBJECTED" and "its loss in seconds is" in refused["error"]["message"]
    assert "--force" in refused["error"]["message"]
    listed = run(capsys, "list", *at)
    assert (listed["promoted"], listed["candidate"]) == ("v1", "v2")
    assert [each["place"] for each in listed["versions"]] == ["in force", "candidate"]

    forced = run(capsys, "promote", "v2", *at, "--force")
    assert forced["promoted"] == "v2" and any("its loss in seconds is" in each for each in forced["overridden"])
    assert run(capsys, "show", "v2", *at)["history"][-1]["overridden"] == forced["overridden"]
    assert run(capsys, "rollback", *at) == {"promoted": "v1", "before": "v2"}
    assert run(capsys, "list", *at)["promoted"] == "v1"

    # For people, too.
    for verb in (["list"], ["show", "v1"]):
        capsys.readouterr()
        assert predictor.main([*verb, *at]) == 0
        assert "v1" in capsys.readouterr().out


def test_what_cannot_be_done_is_said_in_one_line(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shelf = str(tmp_path / "shelf")
    (tmp_path / "broken.jsonl").write_text("{\n")
    for argv, words, status in (
        (["show", "--dir", shelf], "no predictor was trained yet", 5),
        (["evaluate", "--dir", shelf], "no predictor was trained yet", 5),
        (["promote", "v1", "--dir", shelf], "no version 'v1'", 1),
        (["rollback", "--dir", shelf], "nothing to roll back", 1),
        (["train", "--dir", shelf, "--from", str(tmp_path / "broken.jsonl")], "line 1: ", 2),
        (["train", "--dir", shelf, "--from", str(tmp_path / "absent.jsonl")], "No such file", 2),
        (["train", "--store", "postgresql://nobody@127.0.0.1:1/none"], "name the folder", 2),
        (["forecast", "--store", url, "--minutes", "-3"], "--minutes", 2),
        (["forecast", "--store", url], "no tables yet", 2),
    ):
        assert words in run(capsys, *argv, status=status)["error"]["message"]


async def test_ctrl_c_leaves_what_was_there(tmp_path: Path) -> None:
    """A training in a process of its own, told to stop while it reads."""
    pipe = tmp_path / "slow.jsonl"
    os.mkfifo(pipe)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "modelyard.cli", "predictor", "train", "--dir", str(tmp_path / "shelf"),
        "--from", str(pipe), "--json", stdout=-1, stderr=-1, cwd=tmp_path,
    )  # fmt: skip
    end = await asyncio.to_thread(pipe.open, "wb", 0)  # returns when the other one has opened it
    with end:
        end.write(b"".join(to_lines(made_up.history(10))))
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 130, err
    assert json.loads(out)["error"]["reason"] == "INTERRUPTED" and b"Traceback" not in err
    assert not (tmp_path / "shelf" / "registry.json").exists()


# --------------------------------------------------------------------- live ---


@cache
def trained() -> Artefact:
    return train(made_up.history(1000), 0.0)


def metric(door: FrontDoor, name: str, **labels: str) -> float | None:
    return door.plane.metrics.registry.get_sample_value(name, labels)


async def done(desk: Desk, count: int = 1, state: TaskState = TaskState.SUCCEEDED, **asked: Any) -> list[Any]:
    tasks = await desk.all([await desk.submit(**asked) for _ in range(count)])
    assert {task.state for task in tasks} == {state}
    return tasks


async def test_what_is_put_in_force_holds_at_once_and_what_is_broken_does_not(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    price = fleet_pb2.Price(prompt_usd_per_million_tokens=1, completion_usd_per_million_tokens=10)
    fake = FakeModelServer("gpu-1", [model_info("llama", price=price)])
    async with desk(tmp_path, predictors={"dir": shelf.folder}) as tasks, attached(tasks.door, fake):
        door, live = tasks.door, tasks.door.plane.foresight.live
        (task,) = await done(tasks)
        (attempt,) = task.attempts
        told = attempt.predicted
        assert told.version == "rules" and 0 < told.success <= 1 and told.completion_tokens > 0
        assert 0 < told.p50.ToNanoseconds() <= told.p90.ToNanoseconds()
        assert told.cost_nano_usd >= told.completion_tokens * 10_000
        assert metric(door, "modelyard_predictor_in_force", version="rules") == 1
        assert metric(door, "modelyard_predictor_error_count", predictor="rules", target="seconds") == 1

        shelf.add(trained())
        await eventually(lambda: live.version_of(Role.SHADOW) == "v1")
        (task,) = await done(tasks)
        assert task.attempts[0].predicted.version == "rules", "a shadow has no say"
        assert metric(door, "modelyard_predictor_error_count", predictor="shadow", target="success") == 1

        shelf.promote("v1", time.time(), force=True)
        await eventually(lambda: live.version == "v1")
        (task,) = await done(tasks)
        assert task.attempts[0].predicted.version == "v1" and Role.SHADOW not in live.trained
        assert metric(door, "modelyard_predictor_in_force", version="v1") == 1
        assert metric(door, "modelyard_predictor_loss", predictor="promoted", target="seconds") is not None
        async with AsyncClient(door.address) as client:
            shown = (await client.tasks.get(task.id)).attempts[0].predicted
        assert shown is not None and shown.version == "v1" and shown.p50 <= shown.p90

        registry = shelf.registry()
        (shelf.folder / "v1.json").write_bytes(b"{}")
        # Nobody reads it again until the registry changes.
        (shelf.folder / "registry.json").write_bytes((shelf.folder / "registry.json").read_bytes() + b"\n")
        changed = json.loads((shelf.folder / "registry.json").read_text())
        changed["entries"][0]["sha256"] = "0" * 64
        (shelf.folder / "registry.json").write_text(json.dumps(changed))
        await eventually(lambda: live.version == "rules")
        assert metric(door, "modelyard_predictor_fallbacks_total", why="unreadable") == 1
        assert (await done(tasks))[0].attempts[0].predicted.version == "rules"
        assert registry.promoted == "v1"

        (shelf.folder / "registry.json").write_text("{")
        await eventually(lambda: metric(door, "modelyard_predictor_fallbacks_total", why="unreadable") == 2)
        assert (await done(tasks))[0].attempts[0].predicted.version == "rules", "and tasks go on"


async def test_rules_hold_where_the_trained_one_turns_out_worse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taught that short prompts take long, and is asked of short ones."""
    monkeypatch.setattr(live_module, "ENOUGH", 5)
    shelf = Shelf(tmp_path / "shelf")
    shelf.add(train(made_up.history(1000, seconds=lambda asked: 1000 / asked.prompt_tokens), 0.0))
    shelf.promote("v1", time.time(), force=True)
    fake = FakeModelServer("fast", [model_info("llama", provider="vllm")], slots=8)
    async with desk(tmp_path, predictors={"dir": shelf.folder}) as tasks, attached(tasks.door, fake):
        live = tasks.door.plane.foresight.live
        assert live.version == "v1", "in force from the beginning"
        for _ in range(60):
            if live.version == "rules":
                break
            await done(tasks)
        assert live.version == "rules" and "seconds" in live.worse
        assert metric(tasks.door, "modelyard_predictor_fallbacks_total", why="worse") == 1
        assert "predictor v1 is worse than the rules in " in caplog.text
        (task,) = await done(tasks)
        assert task.attempts[0].predicted.version == "rules"


async def test_failed_attempts_count_and_a_new_process_begins_with_what_the_store_knows(tmp_path: Path) -> None:
    fake = FakeModelServer("gpu-1")
    async with desk(tmp_path) as tasks, attached(tasks.door, fake):
        fake.inject_error("Complete", Refusal(Reason.ENGINE_FAILED, "no"), times=2)
        fake.inject_error("Generate", Refusal(Reason.ENGINE_FAILED, "no"), times=2)
        tasks_done = await done(tasks, 5)
        failures = sum(len(task.attempts) - 1 for task in tasks_done)
        assert failures >= 1
        live = tasks.door.plane.foresight.live
        before = live.predict(_asked(tasks, tasks_done[0])).prediction
        assert live.rolling[Role.RULES].attempts == 5 + failures
    async with desk(tmp_path) as tasks:
        after = tasks.door.plane.foresight.live.predict(_asked(tasks, tasks_done[0])).prediction
        assert after.success == pytest.approx(before.success, abs=0.02)
        assert after.seconds_p50 < 1.5, "it does not begin with nothing: answers take milliseconds"


def _asked(tasks: Desk, task: Any) -> Any:
    attempt = task.attempts[-1]
    return made_up.question(model=attempt.model, provider=attempt.provider, server_id=attempt.server_id)


# ----------------------------------------------------------------- forecast ---


async def test_the_forecast_is_kept_exported_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with desk(tmp_path) as tasks, attached(tasks.door, FakeModelServer("gpu-1", [model_info("llama")])):
        await done(tasks, 3)
        for _ in range(4):
            assert (await tasks.door.generate(ask(task_type=TaskType.SUMMARIZATION.value))).done
        warmer = tasks.door.plane.foresight.warmer
        async with asyncio.TaskGroup() as group:
            warmer.look_ahead(group)
        labels: Mapping[str, str] = {"task_type": "summarization", "model": "llama"}
        rate = metric(tasks.door, "modelyard_forecast_requests_per_minute", **labels)
        high = metric(tasks.door, "modelyard_forecast_requests_p90", **labels)
        assert rate is not None and high is not None and 0 < rate * 10 <= high
    told = await asyncio.to_thread(run, capsys, "forecast", "--store", f"sqlite:///{tmp_path}/tasks.db")
    rows = {row["task_type"]: row for row in told["forecast"]}
    assert set(rows) == {"chat", "summarization"} and rows["summarization"]["model"] == "llama"
    assert rows["summarization"]["mean"] > rows["chat"]["mean"] > 0
    async with desk(tmp_path) as tasks:
        forecast = tasks.door.plane.foresight.forecast
        assert len(forecast.known()) == 2 and forecast.model("llama", time.time(), 600.0) > 0


@pytest.mark.parametrize("expected", [True, False])
async def test_a_cold_model_is_warm_before_its_hour_begins(expected: bool) -> None:
    """A real simulated engine that takes a while to load; the hours of weeks before say that many requests come."""
    models = [
        {"name": "daily", "state": "cold", "load_seconds": 0.3},
        {"name": "other", "state": "warm"},
    ]
    policy = {"warm_ahead": 5.0, "margin": 60.0}
    async with front_door(forecast=policy) as door:
        foresight, now = door.plane.foresight, time.time()
        key = (TaskType.CHAT, "daily")
        if expected:
            for minute in range(120, 0, -1):
                foresight.forecast.add(key, now - minute * 60.0, 10)
        else:
            foresight.forecast.add(key, now - 86400.0, 1)
        settings = {"models": models, "instant": False}
        async with model_server(engine_settings=settings, server_id="mac-1", orchestrators=(door.address,)):
            await door.until_ready("mac-1")

            def state(status: fleet_pb2.ModelServerStatus) -> int:
                return {model.name: model.state for model in status.report.models}["daily"]

            if expected:
                await door.until_server("mac-1", lambda status: state(status) == WARM)
                warmed = {"model": "daily", "outcome": "ok"}
                await eventually(lambda: metric(door, "modelyard_warmed_ahead_total", **warmed) == 1)
                assert (await door.generate(ask(model="daily", max_tokens=1))).done.server_id == "mac-1"
            else:
                async with asyncio.TaskGroup() as group:
                    foresight.warmer.look_ahead(group)
                assert state(await door.server("mac-1")) == COLD
                assert metric(door, "modelyard_warmed_ahead_total", model="daily", outcome="ok") is None
