"""What the watchdog thinks of silence, without waiting for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_servers.engine import (
    EngineLoad,
    EngineModel,
    EngineStatus,
    GenerationRequest,
    Health,
    Image,
    Message,
    ModelState,
    Role,
    Tool,
)
from model_servers.models import Keeper
from model_servers.performance import Recorder, Timing
from model_servers.watchdog import Backoff, Pace, Run, Watchdog, due_canary, patience, prompt_tokens


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Still:
    """An engine that only has a status."""

    def __init__(self) -> None:
        self.state = ModelState.WARM
        self.progress = 0
        self.slots = 2

    def status(self) -> EngineStatus:
        models = tuple(EngineModel(name, "p", 1000, state=self.state) for name in ("a", "b"))
        return EngineStatus("x", "1", "", 0, models, EngineLoad(self.slots), Health.READY, progress=self.progress)


class Scene:
    """A watchdog whose looks and time the test moves; a request never ends by itself."""

    def __init__(self, stall_seconds: float = 10.0) -> None:
        self.clock = Clock()
        self.engine = Still()
        self.recorder = Recorder(self.clock)
        self.watchdog = Watchdog(
            self.engine,  # type: ignore[arg-type]
            Keeper(self.engine, clock=self.clock),  # type: ignore[arg-type]
            self.recorder,
            stall_seconds=stall_seconds,
            canary_seconds=0,
            metered=False,
            draining=lambda: False,
            clock=self.clock,
        )
        self.ended: list[str] = []

    def begin(self, model: str = "a", tokens: int = 0, **options) -> Run:
        return self.watchdog.begin(model, tokens, end=lambda: self.ended.append(model), **options)

    def passes(self, seconds: float, *speaking: Run) -> None:
        for _ in range(round(seconds * 4)):
            self.clock.now += 0.25
            for run in speaking:
                run.at = self.clock.now
            self.watchdog.look(self.clock.now)


@given(st.floats(0.1, 100), st.integers(0, 200_000), st.floats(0.1, 1e5), st.floats(1e-4, 10))
def test_patience_is_at_least_the_setting_and_grows_with_what_must_be_computed(stall, tokens, prefill, token):
    for pace in (Pace(), Pace(prefill), Pace(0.0, token), Pace(prefill, token)):
        base = patience(stall, 0, pace)
        assert base >= stall
        assert patience(stall, tokens, pace) >= base
        assert patience(stall, tokens, pace, holds_back=True) > patience(stall, tokens, pace)
    # What was measured to be possible never counts as a stall.
    assert patience(stall, tokens, Pace(prefill, token)) >= tokens / prefill + token


def test_patience_by_what_is_known():
    assert patience(10, 100, Pace()) == 20  # ten tokens a second
    assert patience(10, 1000, Pace(0.0, 0.01)) == 20  # a prompt token in the time of a generated one
    assert patience(10, 1000, Pace(400.0, 0.01)) == 20  # a quarter of what was measured
    assert patience(10, 0, Pace(0.0, 2.0)) == 40  # twenty tokens of a slow one


def test_the_size_of_a_prompt_is_guessed_generously():
    message = Message(Role.USER, ("x" * 300, "\u4e16" * 50, Image(b"", "image/png")))
    request = GenerationRequest("m", messages=(message,), tools=(Tool("f", "d" * 30, "s" * 30),))
    assert 2171 <= prompt_tokens(request) <= 2180


def test_canaries_go_to_the_model_that_was_silent_longest():
    assert due_canary({"a": 90.0, "b": 70.0}, 100.0, 20.0) == "b"
    assert due_canary({"a": 90.0}, 100.0, 20.0) is None
    assert due_canary({"a": 0.0}, 100.0, 0.0) is None and due_canary({}, 100.0, 1.0) is None


def test_restarts_come_at_growing_distances():
    backoff = Backoff()
    now = 0.0
    distances = []
    for _ in range(9):
        assert backoff.ready(now)
        backoff.take(now)
        began = now
        while not backoff.ready(now):
            now += 0.5
        distances.append(now - began)
    assert distances == [1, 2, 4, 8, 16, 32, 60, 60, 60] and backoff.count == 9
    backoff.take(now + 700)
    assert backoff.count == 1


def test_silence_of_all_requests_is_a_stall():
    scene = Scene()
    first, second = scene.begin(), scene.begin()
    scene.passes(30, second)
    assert scene.ended == []
    scene.passes(9.5)
    assert scene.ended == [] and not scene.watchdog.ailing
    scene.passes(1)
    assert scene.ended == ["a", "a"] and "on model a" in first.stalled == second.stalled
    assert scene.watchdog.ailments() == {"a": first.stalled}
    assert first.stalled.startswith("no token for 10.")


def test_a_long_prompt_may_take_its_time():
    scene = Scene()
    scene.begin(tokens=1000)
    scene.passes(109)
    assert scene.ended == []
    scene.passes(2)
    assert scene.ended == ["a"]


def test_a_measured_model_is_judged_by_its_pace():
    scene = Scene()
    scene.recorder.begin("a")
    scene.recorder.end("a", Timing(0.0, ttft=1.0, tpot=0.01, total=2.0), computed=400, generated=100)
    scene.begin(tokens=1000)
    scene.passes(19.5)
    assert scene.ended == []
    scene.passes(1)
    assert scene.ended == ["a"]


def test_requests_that_come_and_give_up_do_not_hide_a_hang():
    scene = Scene()
    scene.engine.slots = 8
    older = scene.begin()
    for _ in range(4):
        scene.passes(2)
        newer = scene.begin()
        scene.passes(1)
        scene.watchdog.end(older)
        older = newer
    assert scene.watchdog.ailing is True


def test_a_request_that_answered_between_two_looks_counts():
    scene = Scene()
    scene.begin()
    scene.passes(9)
    short = scene.begin()
    short.at = scene.clock.now + 0.1
    scene.watchdog.end(short)
    scene.passes(9)
    assert scene.ended == []


def test_what_waits_behind_the_slots_is_not_judged():
    scene = Scene()
    running = [scene.begin("b"), scene.begin("b")]
    scene.begin("a")
    scene.passes(60, *running)
    assert scene.ended == []
    for run in running:
        scene.watchdog.end(run)
    scene.passes(11)
    assert scene.ended == ["a"]


@pytest.mark.parametrize("state", [ModelState.LOADING, ModelState.PULLING, ModelState.COLD])
def test_a_model_that_is_not_warm_is_not_judged(state: ModelState):
    scene = Scene()
    scene.engine.state = state
    scene.begin()
    scene.passes(60)
    assert scene.ended == []


def test_a_slow_reader_is_not_the_engines_fault():
    scene = Scene()
    blocked = True
    scene.begin(blocked=lambda: blocked)
    scene.passes(60)
    blocked = False
    scene.passes(9)
    assert scene.ended == []
    scene.passes(2)
    assert scene.ended == ["a"]


def test_steps_that_the_engine_tells_are_signs_of_life():
    scene = Scene()
    scene.begin()
    for _ in range(30):
        scene.engine.progress += 1
        scene.passes(2)
    assert scene.ended == []
    scene.passes(11)
    assert scene.ended == ["a"]


def test_a_call_that_may_be_held_back_has_more_time():
    scene = Scene()
    scene.begin(holds_back=True)
    scene.passes(39)
    assert scene.ended == []
    scene.passes(2)
    assert scene.ended == ["a"]


def test_time_in_which_this_process_stood_still_does_not_count():
    scene = Scene()
    scene.begin()
    scene.passes(5)
    scene.clock.now += 3600  # suspended
    scene.watchdog.look(scene.clock.now)
    scene.passes(4)
    assert scene.ended == []
    scene.passes(2)
    assert scene.ended == ["a"]
