"""Liveness of generation, not of a port: does the engine produce tokens?

The rule. A model is silent while requests that the engine has accepted produce nothing: no piece of an answer and,
where the engine tells (`EngineStatus.progress`), no step. Accepted are the oldest requests, as many as there are slots;
a model that is not warm, and a request whose reader does not read, are not counted. Silence may last

    max(stall_seconds, 20 x seconds per token)
    + tokens of all prompts being computed / prefill speed
    + 30 s if tools are offered, since some engines hold a call back until it is complete

The prefill speed is a quarter of what was measured; before that, one token in the time of a generated one, which no
prompt token exceeds; before that, ten tokens a second, as a large model on a slow CPU. What lasts longer is a stall:
the requests of the model end with ENGINE_FAILED, the server is unhealthy, the engine is restarted if it can be, and a
canary (one token for a short prompt) tells when it works again. Time in which this process itself did not run does not
count as silence.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from model_servers.engine import (
    CANARY_ID,
    Busy,
    ContentRefused,
    ContextTooLong,
    Engine,
    EngineError,
    EngineModel,
    EngineStatus,
    GenerationRequest,
    Health,
    Message,
    ModelState,
    RateLimited,
    Restarts,
    Role,
    Sampling,
    TaskType,
    UnknownModel,
    Unsupported,
)
from model_servers.models import Keeper
from model_servers.performance import Recorder

_log = logging.getLogger(__name__)

_SLOWEST_PREFILL = 10.0
"""Tokens a second."""
_PREFILL_SHARE = 0.25
"""Of the measured prefill speed: longer prompts are slower by the token, and others compute beside them."""
_TOKENS_MISSED = 20
_HELD_BACK_SECONDS = 30.0
_IMAGE_TOKENS = 2000
_CANARY_TOKENS = 50
"""More than a chat template makes of the canary's prompt."""
_LOOKS = 8
"""At the silence that ends in a stall: what a judgement may be late."""
_LONGEST_TICK = 0.25
_METERED_PAUSE = 30.0
"""Seconds after which a model that may not be probed gets requests again."""
_PROBE_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
_FORGOTTEN = 600.0
"""Seconds without a restart after which the next one is the first again."""


# -------------------------------------------------------------- decisions ---


@dataclass(frozen=True, slots=True)
class Pace:
    """What was measured of a model."""

    prefill_tokens_per_second: float = 0.0
    """0: not known."""
    seconds_per_token: float | None = None
    """None: not known."""


def patience(stall_seconds: float, prompt_tokens: int, pace: Pace, *, holds_back: bool = False) -> float:
    """Seconds of silence that mean nothing; see the rule above."""
    token = pace.seconds_per_token
    if pace.prefill_tokens_per_second > 0:
        speed = _PREFILL_SHARE * pace.prefill_tokens_per_second
    elif token:
        speed = 1 / token
    else:
        speed = _SLOWEST_PREFILL
    longest = max(stall_seconds, _TOKENS_MISSED * (token or 0.0)) + prompt_tokens / speed
    return longest + _HELD_BACK_SECONDS if holds_back else longest


def due_canary(signs: Mapping[str, float], now: float, canary_seconds: float) -> str | None:
    """The model without a sign of life for the longest time, if that is `canary_seconds` (0: never) or more."""
    if not canary_seconds or not signs:
        return None
    oldest = min(signs, key=lambda model: (signs[model], model))
    return oldest if now - signs[oldest] >= canary_seconds else None


def prompt_tokens(request: GenerationRequest) -> int:
    """A generous guess, in tokens: a third of the characters, all of them in scripts that are not ASCII."""
    texts = [request.prompt or "", *(tool.parameters_schema + tool.description for tool in request.tools)]
    images = 0
    for message in request.messages:
        for part in message.content:
            if isinstance(part, str):
                texts.append(part)
            else:
                images += 1
    return text_tokens(texts) + images * _IMAGE_TOKENS


def text_tokens(texts: Iterable[str]) -> int:
    return sum(len(text) // 3 + 1 if text.isascii() else len(text) for text in texts)


class Backoff:
    """When the next restart may come: after 1, 2, 4 ... 60 s."""

    def __init__(self) -> None:
        self.count = 0
        self._next = float("-inf")

    def ready(self, now: float) -> bool:
        return now >= self._next

    def take(self, now: float) -> None:
        if now - self._next > _FORGOTTEN:
            self.count = 0
        self._next = now + min(2.0 ** min(self.count, 10), _LONGEST_PAUSE)
        self.count += 1


# --------------------------------------------------------------- watchdog ---


@dataclass(eq=False, slots=True)
class Run:
    """One request that the engine works on."""

    model: str
    prompt_tokens: int
    holds_back: bool
    end: Callable[[], None]
    """Ends the request; it finds the reason in `stalled`."""
    blocked: Callable[[], bool]
    """Whether the engine waits for the reader."""
    waited: float = 0.0
    """Seconds that it waited for the model to be loaded."""
    at: float = 0.0
    """When the latest piece of the answer came; 0: none so far."""
    stalled: str = ""


@dataclass(slots=True)
class _Ailment:
    detail: str
    since: float
    probe_at: float
    """When the next canary may go."""
    restart_due: bool
    """Once for each stall: whether it helped is for a canary to say."""


class Watchdog:
    """Judges every model, ends what stalls, and mends what can be mended."""

    def __init__(
        self,
        engine: Engine,
        keeper: Keeper,
        recorder: Recorder,
        *,
        stall_seconds: float,
        canary_seconds: float,
        metered: bool,
        draining: Callable[[], bool],
        stuck: Callable[[str], None] = lambda why: None,
        clock: Callable[[], float],
    ) -> None:
        """`metered`: each token costs money, so no canaries. `stuck` hears of a restart that failed."""
        self._engine = engine
        self._restarts: Restarts | None = engine if isinstance(engine, Restarts) else None
        self._keeper = keeper
        self._recorder = recorder
        self._stall_seconds = stall_seconds
        self._canary_seconds = canary_seconds
        self._metered = metered
        self._draining = draining
        self._stuck = stuck
        self._clock = clock
        self._tick = min(stall_seconds / _LOOKS, _LONGEST_TICK)
        self._runs: dict[Run, None] = {}
        """In order of arrival."""
        self._looked_at = clock()
        self._progress = 0
        self._silence: dict[str, float] = {}
        self._signs: dict[str, float] = {}
        """Per warm model: when it last showed that it works, or when that was first asked."""
        self._token_seconds: dict[str, float] = {}
        """Measured by canaries: a short prefill and one token."""
        self._ailments: dict[str, _Ailment] = {}
        self._unhealthy_since: float | None = None
        self._backoff = Backoff()
        self.canaries = 0
        """Requests in the engine that are no load."""
        self.restarting = False

    # ----------------------------------------------------------- requests ---

    def begin(
        self,
        model: str,
        tokens: int,
        *,
        end: Callable[[], None],
        blocked: Callable[[], bool] = lambda: False,
        holds_back: bool = False,
        waited: float = 0.0,
    ) -> Run:
        """A request of that many prompt tokens goes to the engine."""
        run = Run(model, tokens, holds_back, end, blocked, waited)
        self._runs[run] = None
        return run

    def end(self, run: Run) -> None:
        """It has ended, however; what it produced is a sign of life."""
        del self._runs[run]
        if run.at:
            self._signs[run.model] = max(run.at, self._signs.get(run.model, 0.0))

    # --------------------------------------------------------------- view ---

    @property
    def ailing(self) -> bool:
        return bool(self._ailments)

    def ailments(self) -> dict[str, str]:
        """What is wrong, by model."""
        suffix = f"; restarting the engine ({self._backoff.count})" if self.restarting else ""
        return {model: ailment.detail + suffix for model, ailment in self._ailments.items()}

    # -------------------------------------------------------------- judge ---

    async def watch(self) -> None:
        """Look again and again; until cancelled."""
        while True:
            await asyncio.sleep(self._tick)
            self.look(self._clock())

    def look(self, now: float) -> None:
        """Judge every model with requests; never waits."""
        passed = min(now - self._looked_at, 2 * self._tick)
        status = self._engine.status()
        if status.health is not Health.UNHEALTHY:
            self._unhealthy_since = None
        elif self._unhealthy_since is None:
            self._unhealthy_since = now
        moved = status.progress != self._progress
        self._progress = status.progress
        warm = {model.name for model in status.models if model.state is ModelState.WARM}
        accepted = list(self._runs)[: max(status.load.slots, 1)]
        computing = sum(run.prompt_tokens for run in accepted if not run.at)
        for model in {run.model for run in accepted} | set(self._silence):
            mine = [run for run in accepted if run.model == model]
            if not mine:
                self._silence.pop(model, None)
            elif model not in warm or moved or self._gave_signs(model, mine):
                self._silence[model] = 0.0
            elif model not in self._ailments:
                silence = self._silence[model] = self._silence.get(model, 0.0) + passed
                holds_back = any(run.holds_back for run in mine)
                if silence > patience(self._stall_seconds, computing, self._pace(model), holds_back=holds_back):
                    self._stalls(model, silence, now)
        self._looked_at = now

    def _gave_signs(self, model: str, runs: Sequence[Run]) -> bool:
        last = self._looked_at
        return self._signs.get(model, 0.0) >= last or any(run.at >= last or run.blocked() for run in runs)

    def _pace(self, model: str) -> Pace:
        means = self._recorder.means(model)
        token = means.tpot if means and means.tpot else self._token_seconds.get(model)
        return Pace(means.prefill_tokens_per_second if means else 0.0, token)

    def _stalls(self, model: str, silence: float, now: float) -> None:
        detail = f"no token for {silence:.1f} s on model {model}"
        self._falls_ill(model, detail, now)
        for run in self._runs:
            if run.model == model:
                run.stalled = detail
                run.end()

    def _falls_ill(self, model: str, detail: str, now: float) -> None:
        _log.error("the engine is unhealthy: %s", detail)
        self._ailments[model] = _Ailment(detail, now, now, restart_due=True)

    # --------------------------------------------------------------- mend ---

    async def tend(self) -> None:
        """Send canaries, restart what can be restarted; until cancelled."""
        while True:
            await asyncio.sleep(self._tick)
            if self._draining():
                continue
            now = self._clock()
            status = self._engine.status()
            if self._must_restart(status, now):
                await self._restart(now)
            elif self._ailments:
                await self._probe(status, now)
            elif (model := self._due(status, now)) is not None and (failure := await self._canary(model)):
                self._falls_ill(model.name, failure, self._clock())

    def _must_restart(self, status: EngineStatus, now: float) -> bool:
        if self._restarts is None or not self._backoff.ready(now):
            return False
        gone = self._unhealthy_since is not None and now - self._unhealthy_since >= self._stall_seconds
        return gone or any(ailment.restart_due for ailment in self._ailments.values())

    async def _restart(self, now: float) -> None:
        engine = self._restarts
        if engine is None:
            return
        self._backoff.take(now)
        _log.warning("restarting the engine (%d)", self._backoff.count)
        self.restarting = True
        try:
            await engine.restart()
        except Unsupported as error:
            _log.warning("the engine cannot be restarted: %s", error)
            self._restarts = None
        except EngineError as error:
            _log.error("restarting the engine failed: %s", error)
            self._stuck(str(error))
        except Exception as error:  # a bug of a plug-in must not end the server
            _log.exception("restarting the engine failed")
            self._stuck(f"{type(error).__name__} in its restart")
        else:
            self._unhealthy_since = None
            self._silence.clear()
            for ailment in self._ailments.values():
                ailment.restart_due = False
            self._keeper.restarted()
        finally:
            self.restarting = False

    async def _probe(self, status: EngineStatus, now: float) -> None:
        """Find out whether an ailing model works again."""
        models = {model.name: model for model in status.models}
        for name, ailment in list(self._ailments.items()):
            model = models.get(name)
            if self._metered:
                if now - ailment.since >= _METERED_PAUSE:
                    self._recovers(name)  # the next request will tell
            elif model is None or model.state in (ModelState.ABSENT, ModelState.COLD, ModelState.FAILED):
                self._recovers(name)  # loading it will tell
            elif (
                model.state is ModelState.WARM
                and status.health is Health.READY
                and now >= ailment.probe_at
                and not self._keeper.busy_with(name)
            ):
                failure = await self._canary(model)
                now = self._clock()
                if failure == "":
                    self._recovers(name)
                elif failure is None:
                    ailment.probe_at = now + _PROBE_PAUSE
                elif self._restarts is not None:
                    self._falls_ill(name, failure, now)
                else:
                    ailment.detail, ailment.probe_at = failure, now + _PROBE_PAUSE

    def _recovers(self, model: str) -> None:
        _log.info("model %r: healthy again", model)
        self._ailments.pop(model, None)
        self._signs[model] = self._clock()

    def _due(self, status: EngineStatus, now: float) -> EngineModel | None:
        idle = not (self._runs or status.load.running or status.load.waiting)
        if self._metered or not self._canary_seconds or status.health is not Health.READY or not idle:
            return None
        warm = {
            model.name: model
            for model in status.models
            if model.state is ModelState.WARM and not self._keeper.busy_with(model.name)
        }
        self._signs = {name: self._signs.get(name, now) for name in warm}
        due = due_canary(self._signs, now, self._canary_seconds)
        return None if due is None else warm[due]

    async def _canary(self, model: EngineModel) -> str | None:
        """Let a model produce one token: "" it did, None cannot tell, else what was wrong."""
        limit = patience(self._stall_seconds, _CANARY_TOKENS, self._pace(model.name))
        began = self._clock()
        self.canaries += 1
        try:
            with self._keeper.borrow(model.name):
                async with asyncio.timeout(limit):
                    await self._produce(model)
        except TimeoutError:
            return f"no token for {self._clock() - began:.1f} s on model {model.name}"
        except (Busy, RateLimited):
            return None
        except (Unsupported, ContextTooLong, ContentRefused, UnknownModel):
            self._signs[model.name] = self._clock()  # an answer, if not the one that was asked for
            return ""
        except EngineError as error:
            return f"model {model.name} does not answer: {error}"
        except Exception as error:
            _log.exception("a canary of model %r failed", model.name)
            return f"model {model.name} does not answer: {type(error).__name__}"
        finally:
            self.canaries -= 1
        now = self._clock()
        self._signs[model.name] = now
        self._token_seconds[model.name] = now - began
        return ""

    async def _produce(self, model: EngineModel) -> None:
        if set(model.capabilities) == {TaskType.EMBEDDING}:
            await self._engine.embed(model.name, ("Hello",))
            return
        request = GenerationRequest(
            model=model.name,
            messages=(Message(Role.USER, ("Hello",)),),
            sampling=Sampling(max_tokens=1),
            request_id=CANARY_ID,
        )
        async with aclosing(self._engine.generate(request)) as items:
            async for _ in items:
                pass
