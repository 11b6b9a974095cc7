"""A stand-in for `ollama serve`: its HTTP API, without models.

    async with OllamaStandIn(parallel=2) as standin:
        ...  # standin.url

    python -m tests.standins.ollama --port 11434 --library tiny

It behaves as the real one does where that matters to a client: slots per loaded model with a queue in order of arrival,
loading on demand and anew when `num_ctx` or `shift` change, `keep_alive`, prompts cut down silently unless
`truncate` is false (from 0.12.6 on), errors as a line after a 200, work that ends when the connection does. Answers
follow from the request alone. A token is up to six letters or digits, or one other character, with the space before it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from aiohttp import web

from model_servers.engine import Unsupported
from model_servers.engines.simulated.schema import minimal_json

_TOKEN = re.compile(r"\s?\w{1,6}|\s?[^\w\s]|\s")
_WORDS = (
    "river", "harbour", "lantern", "garden", "signal", "window", "quiet", "early", "narrow", "bright", "follows",
    "keeps", "carries", "finds", "between", "under", "before", "along", "stone", "winter", "market", "letter",
)  # fmt: skip
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_WORK = ("/api/chat", "/api/generate", "/api/embed", "/api/pull")
_IMAGE_TOKENS = 64


@dataclass(frozen=True)
class Fault:
    """What goes wrong with all work from now on."""

    kind: Literal["hang", "stall", "reset", "status", "garbage", "error_line", "no_end"]
    """hang: accepted, then not a byte; stall: no more after some pieces; reset: the connection is cut after some
    pieces; status: an error status; garbage: bytes that are no answer; error_line: an error as a line after that;
    no_end: the answer ends properly, but without its last line."""
    status: int = 500
    retry_after: float | None = None
    pieces: int = 2
    message: str = ""
    """Replaces the usual error text."""
    everywhere: bool = False
    """Strikes the questions about models and version too."""


_MESSAGES = {
    401: "unauthorized",
    403: "forbidden",
    404: "model 'it' not found",
    429: "too many requests",
    500: "llama runner process has terminated: exit status 2",
    503: "server busy, please try again.  maximum pending requests exceeded",
}


@dataclass(frozen=True)
class StandInModel:
    name: str
    abilities: tuple[str, ...] = ("completion", "tools")
    context_length: int = 4096
    size: int = 40_000_000
    dimension: int = 32
    stops: tuple[str, ...] = ("<|end|>",)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    @property
    def layers(self) -> list[tuple[str, int]]:
        """Digest and bytes of each file."""
        return [
            (f"sha256:{self.digest[:12]}{i}", size) for i, size in enumerate((self.size * 9 // 10, self.size // 10))
        ]

    @property
    def details(self) -> dict[str, Any]:
        return {
            "parent_model": "", "format": "gguf", "family": "tiny", "families": ["tiny"],
            "parameter_size": "40M", "quantization_level": "Q4_K_M",
        }  # fmt: skip


TINY = StandInModel("tiny", ("completion", "tools", "insert"))
THINKER = StandInModel("thinker", ("completion", "tools", "thinking"))
SEER = StandInModel("seer", ("completion", "vision"))
EMBEDDER = StandInModel("embedder", ("embedding",), context_length=512)
ALL = (TINY, THINKER, SEER, EMBEDDER)


@dataclass
class _Runner:
    """A model in memory."""

    model: StandInModel
    num_ctx: int
    shift: bool
    slots: asyncio.Semaphore
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    users: int = 0
    keep_alive: float = 300.0
    expires: float = math.inf
    timer: asyncio.TimerHandle | None = None


@dataclass(frozen=True)
class Recorded:
    path: str
    body: dict[str, Any]


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def tokens_of(text: str) -> list[str]:
    return _TOKEN.findall(text)


class OllamaStandIn:
    """Times are seconds. `models` are there, `library` can be pulled."""

    def __init__(
        self,
        *,
        models: tuple[StandInModel, ...] = ALL,
        library: tuple[StandInModel, ...] = (),
        version: str = "0.13.5",
        parallel: int = 2,
        max_queue: int = 512,
        token_seconds: float = 0.0005,
        prefill_token_seconds: float = 0.000005,
        load_seconds: float = 0.01,
        pull_seconds: float = 0.05,
        memory: float = math.inf,
        answer_tokens: int = 0,
    ) -> None:
        """`memory`: bytes for models. `answer_tokens`: of a free answer; 0: some."""
        self.present = {model.name: model for model in models}
        self.library = {model.name: model for model in (*models, *library)}
        self.version = version
        self.parallel = parallel
        self.max_queue = max_queue
        self.token_seconds = token_seconds
        self.prefill_token_seconds = prefill_token_seconds
        self.load_seconds = load_seconds
        self.pull_seconds = pull_seconds
        self.memory = memory
        self.answer_tokens = answer_tokens
        self.port = 0
        self.fault: Fault | None = None
        self.requests: list[Recorded] = []
        self.generated = 0
        """Tokens computed, of all answers."""
        self.cancelled = 0
        """Answers that nobody wanted to the end."""
        self.loads: Counter[str] = Counter()
        self.most_at_once = 0
        self._at_once = 0
        self._queued = 0
        self._runners: dict[str, _Runner] = {}
        self._fetched: Counter[str] = Counter()
        self._runner: web.AppRunner | None = None

    # ------------------------------------------------------------- process ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> OllamaStandIn:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """On a free port; after a stop on the same one again."""
        app = web.Application(client_max_size=64 << 20)
        app.add_routes(
            [
                web.get("/", self._hello),
                web.get("/api/version", self._version),
                web.get("/api/tags", self._tags),
                web.get("/api/ps", self._ps),
                web.post("/api/show", self._show),
                web.post("/api/pull", self._pull),
                web.post("/api/chat", self._chat),
                web.post("/api/generate", self._generate),
                web.post("/api/embed", self._embed),
                web.delete("/api/delete", self._delete),
            ]
        )
        app.middlewares.append(self._around)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.02, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """As if killed: connections break, nothing is in memory any more. What was pulled stays."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        for runner in self._runners.values():
            if runner.timer:
                runner.timer.cancel()
        self._runners.clear()

    @property
    def loaded(self) -> dict[str, int]:
        """Models in memory with their num_ctx."""
        return {name: runner.num_ctx for name, runner in self._runners.items() if runner.ready.is_set()}

    def asked(self, path: str) -> list[dict[str, Any]]:
        """Bodies of the requests for that path."""
        return [request.body for request in self.requests if request.path == path]

    def _at_least(self, *wanted: int) -> bool:
        return tuple(map(int, self.version.split("."))) >= wanted

    @web.middleware
    async def _around(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path in _WORK:
            self.requests.append(Recorded(request.path, await request.json()))
        fault = self.fault
        if fault and (fault.everywhere or request.path in _WORK):
            if fault.kind == "hang":
                await asyncio.Event().wait()
            if fault.kind == "status":
                headers = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
                error = fault.message or _MESSAGES.get(fault.status, "something is wrong")
                return web.json_response({"error": error}, status=fault.status, headers=headers)
            if fault.kind == "garbage":
                return web.Response(body=b"\x00\xff<html>this is not Ollama\n", content_type="application/x-ndjson")
        try:
            response: web.StreamResponse = await handler(request)
        except _Refused as refused:
            return web.json_response({"error": str(refused)}, status=refused.status)
        return response

    # -------------------------------------------------------------- models ---

    async def _hello(self, request: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    async def _tags(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "models": [
                    {
                        "name": _full(model.name),
                        "model": _full(model.name),
                        "size": model.size,
                        "modified_at": "2025-05-10T08:06:48.639712648-07:00",
                        "digest": model.digest,
                        "details": model.details,
                    }
                    for model in self.present.values()
                ]
            }
        )

    async def _ps(self, request: web.Request) -> web.Response:
        now = time.monotonic()
        found = []
        for name, runner in self._runners.items():
            if not runner.ready.is_set():
                continue
            left = min(runner.expires - now, 1e9)
            expires = datetime.now(UTC) + timedelta(seconds=left)
            found.append(
                {
                    "name": _full(name),
                    "model": _full(name),
                    "size": self._memory_of(runner),
                    "size_vram": 0,
                    "digest": runner.model.digest,
                    "details": runner.model.details,
                    "expires_at": expires.isoformat(),
                    "context_length": runner.num_ctx,
                }
            )
        return web.json_response({"models": found})

    def _memory_of(self, runner: _Runner) -> int:
        return runner.model.size + 1000 * runner.num_ctx * self.parallel

    async def _show(self, request: web.Request) -> web.Response:
        model = self._model(await request.json())
        answer = {
            "modelfile": f"FROM {model.name}", "template": "{{ .Prompt }}", "details": model.details,
            "parameters": "num_keep                       24\n"
            + "\n".join(f"stop                           {json.dumps(stop)}" for stop in model.stops),
            "model_info": {
                "general.architecture": "tiny", "tiny.context_length": model.context_length,
                "tiny.embedding_length": model.dimension,
                **({"tiny.pooling_type": 1} if model.abilities == ("embedding",) else {}),
            },
            "modified_at": "2025-05-10T08:06:48.639712648-07:00",
        }  # fmt: skip
        if self._at_least(0, 6, 4):
            answer["capabilities"] = list(model.abilities)
        return web.json_response(answer)

    def _model(self, body: dict[str, Any]) -> StandInModel:
        name = str(body.get("model", "")).removesuffix(":latest")
        if name not in self.present:
            raise _Refused(404, f"model '{body.get('model', '')}' not found")
        return self.present[name]

    async def _delete(self, request: web.Request) -> web.Response:
        model = self._model(await request.json())
        del self.present[model.name]
        self._drop(model.name)
        return web.Response()

    async def _pull(self, request: web.Request) -> web.StreamResponse:
        name = str((await request.json())["model"]).removesuffix(":latest")

        async def steps() -> AsyncGenerator[dict[str, Any], None]:
            yield {"status": "pulling manifest"}
            model = self.library.get(name)
            if model is None:
                yield {"error": "pull model manifest: file does not exist"}
                return
            for digest, total in model.layers:
                line = {"status": f"pulling {digest[7:19]}", "digest": digest, "total": total}
                yield line | ({"completed": self._fetched[digest]} if self._fetched[digest] else {})
                while self._fetched[digest] < total:
                    await asyncio.sleep(self.pull_seconds / 10)
                    self._fetched[digest] = min(total, self._fetched[digest] + -(-total // 5))
                    yield line | {"completed": self._fetched[digest]}
            yield {"status": "verifying sha256 digest"}
            yield {"status": "writing manifest"}
            self.present[name] = model
            yield {"status": "success"}

        return await self._send(request, steps())

    # ------------------------------------------------------------- loading ---

    @contextlib.asynccontextmanager
    async def _loaded(self, model: StandInModel, body: dict[str, Any]) -> AsyncGenerator[_Runner, None]:
        """The model in memory, as the request wants it, for as long as it is used."""
        given = body.get("options") or {}
        num_ctx = min(int(given.get("num_ctx", 4096)), model.context_length)
        shift = bool(body.get("shift", True)) or not self._at_least(0, 12, 6)
        runner = self._runners.get(model.name)
        while runner is not None and (runner.num_ctx, runner.shift) != (num_ctx, shift):
            while runner.users:
                await asyncio.sleep(0.001)
            if self._runners.get(model.name) is runner:
                self._drop(model.name)
            runner = self._runners.get(model.name)
        if runner is None:
            parallel = 1 if "completion" not in model.abilities else self.parallel
            runner = _Runner(model, num_ctx, shift, asyncio.Semaphore(parallel))
            if self._memory_of(runner) > self.memory:
                gib = self._memory_of(runner) / 2**30
                have = self.memory / 2**30
                raise _Refused(
                    500, f"model requires more system memory ({gib:.1f} GiB) than is available ({have:.1f} GiB)"
                )
            self._runners[model.name] = runner
            self.loads[model.name] += 1
            # Goes on when the one who asked for it leaves.
            asyncio.get_running_loop().call_later(self.load_seconds, runner.ready.set)
        runner.users += 1
        try:
            await runner.ready.wait()
            if "keep_alive" in body:
                runner.keep_alive = _seconds(body["keep_alive"])
            yield runner
        finally:
            runner.users -= 1
            if not runner.users and self._runners.get(model.name) is runner:
                self._expire(model.name, runner)

    def _expire(self, name: str, runner: _Runner) -> None:
        if runner.timer:
            runner.timer.cancel()
        runner.expires = time.monotonic() + runner.keep_alive
        if runner.keep_alive == 0:
            self._drop(name)
        elif runner.keep_alive != math.inf:
            loop = asyncio.get_running_loop()
            runner.timer = loop.call_later(runner.keep_alive, lambda: runner.users or self._drop(name))

    def _let_go(self, name: str) -> None:
        """Unloads as soon as no request uses it."""
        runner = self._runners.get(name)
        if runner and runner.users:
            runner.keep_alive = 0
        else:
            self._drop(name)

    def _drop(self, name: str) -> None:
        runner = self._runners.pop(name, None)
        if runner and runner.timer:
            runner.timer.cancel()

    # ---------------------------------------------------------------- work ---

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, chat=True)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, chat=False)

    async def _complete(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        body = await request.json()
        began = time.monotonic()
        model = self._model(body)
        empty = not body.get("messages") if chat else not body.get("prompt")
        if empty and body.get("keep_alive") == 0:
            self._let_go(model.name)
            return web.json_response(self._end(model, chat, "unload"))
        if "completion" not in model.abilities:
            raise _Refused(400, f'"{model.name}" does not support {"chat" if chat else "generate"}')
        if body.get("tools") and "tools" not in model.abilities:
            raise _Refused(400, f"registry.ollama.ai/library/{model.name} does not support tools")
        if body.get("think") and "thinking" not in model.abilities:
            raise _Refused(400, f'"{model.name}" does not support thinking')
        if self._queued >= self.max_queue:
            raise _Refused(503, _MESSAGES[503])
        self._queued += 1
        try:
            async with self._loaded(model, body) as runner:
                loaded = time.monotonic()
                if empty:
                    return web.json_response(self._end(model, chat, "load"))
                prompt = self._fit(body, runner, chat)
                pieces, reason = self._compose(model, body, prompt, runner)
                steps = self._steps(model, runner, chat, prompt, pieces, reason, body, began, loaded)
                if body.get("stream", True):
                    return await self._send(request, steps)
                async with contextlib.aclosing(steps):
                    return web.json_response(_merged([step async for step in steps]))
        finally:
            self._queued -= 1

    def _fit(self, body: dict[str, Any], runner: _Runner, chat: bool) -> list[str]:
        """The prompt's tokens: cut down to the context, unless that is not wanted."""
        messages = list(body["messages"]) if chat else []
        prompt = tokens_of(_render(messages, body.get("tools")) if chat else body["prompt"])
        prompt += ["<image>"] * _IMAGE_TOKENS * sum(len(message.get("images", ())) for message in messages)
        if len(prompt) <= runner.num_ctx:
            return prompt
        if self._at_least(0, 12, 6) and body.get("truncate") is False:
            raise _Refused(
                400,
                f"request ({len(prompt)} tokens) exceeds the available context size ({runner.num_ctx} tokens), "
                "try increasing it",
            )
        while len(prompt) > runner.num_ctx and len(messages) > 1:
            del messages[next(i for i, m in enumerate(messages) if m["role"] != "system" or i == len(messages) - 1)]
            prompt = tokens_of(_render(messages, body.get("tools")))
        return prompt[-runner.num_ctx :]

    def _compose(
        self, model: StandInModel, body: dict[str, Any], prompt: list[str], runner: _Runner
    ) -> tuple[list[dict[str, Any]], str]:
        """The pieces of the answer, one token each but for tool calls, and why it ends."""
        given = body.get("options") or {}
        seed = "greedy" if given.get("temperature") == 0 else given.get("seed", random.random())
        images = [image for message in body.get("messages", ()) for image in message.get("images", ())]
        digest = hashlib.sha256(json.dumps([model.name, seed, prompt, images]).encode()).hexdigest()
        draw = random.Random(digest)
        pieces: list[dict[str, Any]] = []
        if "thinking" in model.abilities and body.get("think", True):
            pieces += [{"thinking": token} for token in tokens_of("Let me see what is asked.")]
        tool = _tool_asked_for(body)
        if tool is not None:
            arguments = json.loads(minimal_json(json.dumps(tool["parameters"])))
            call = {"id": f"call_{digest[:8]}", "function": {"index": 0, "name": tool["name"], "arguments": arguments}}
            return [*pieces, {"tool_calls": [call]}], "stop"
        text = self._text(body, draw, bool(images))
        ends = [at for at in (text.find(stop) for stop in given.get("stop", ())) if at >= 0]
        if ends:
            text = text[: min(ends)]
        pieces += [{"text": token} for token in tokens_of(text)]
        room = given.get("num_predict", -1)
        room = len(pieces) if room < 0 else room
        if not runner.shift:
            room = min(room, runner.num_ctx - len(prompt))
        if len(pieces) > room:
            return pieces[:room], "length"
        return pieces, "stop"

    def _text(self, body: dict[str, Any], draw: random.Random, sees: bool) -> str:
        wanted = body.get("format")
        if wanted == "json":
            return json.dumps({"answer": " ".join(draw.choices(_WORDS, k=4))})
        if wanted:
            try:
                return minimal_json(json.dumps(wanted))
            except Unsupported:
                raise _Refused(400, "invalid JSON schema in format") from None
        tokens = self.answer_tokens or draw.randrange(30, 90)
        words = ["I", "see", "this:"] if sees else []
        text = ""
        while len(tokens_of(text)) < tokens:
            words += [f"{word}." if i == 7 else word for i, word in enumerate(draw.choices(_WORDS, k=8))]
            text = " ".join(words)
        return "".join(tokens_of(text)[:tokens])

    async def _steps(
        self, model: StandInModel, runner: _Runner, chat: bool, prompt: list[str], pieces: list[dict[str, Any]],
        reason: str, body: dict[str, Any], began: float, loaded: float,
    ) -> AsyncGenerator[dict[str, Any], None]:  # fmt: skip
        done = False
        try:
            async with runner.slots:
                self._at_once += 1
                self.most_at_once = max(self.most_at_once, self._at_once)
                try:
                    started = time.monotonic()
                    await asyncio.sleep(len(prompt) * self.prefill_token_seconds)
                    filled = time.monotonic()
                    computed = 0
                    for piece in pieces:
                        computed += 1
                        await asyncio.sleep(max(0.0, filled + computed * self.token_seconds - time.monotonic()))
                        self.generated += 1
                        line = self._line(model, chat, piece)
                        if body.get("logprobs") and "text" in piece and self._at_least(0, 12, 11):
                            line["logprobs"] = [_logprob(piece["text"], int(body.get("top_logprobs") or 0))]
                        yield line
                    ended = time.monotonic()
                finally:
                    self._at_once -= 1
            done = True
            yield self._end(model, chat, reason) | {
                "total_duration": _nanoseconds(time.monotonic() - began),
                "load_duration": _nanoseconds(loaded - began),
                "prompt_eval_count": len(prompt),
                "prompt_eval_duration": _nanoseconds(filled - started),
                "eval_count": computed,
                "eval_duration": _nanoseconds(ended - filled),
            }
        finally:
            self.cancelled += not done

    def _line(self, model: StandInModel, chat: bool, piece: dict[str, Any]) -> dict[str, Any]:
        line: dict[str, Any] = {"model": model.name, "created_at": datetime.now(UTC).isoformat()}
        if chat:
            message: dict[str, Any] = {"role": "assistant", "content": piece.get("text", "")}
            message |= {key: piece[key] for key in ("thinking", "tool_calls") if key in piece}
            line["message"] = message
        else:
            line["response"] = piece.get("text", "")
            line |= {key: piece[key] for key in ("thinking",) if key in piece}
        return line | {"done": False}

    def _end(self, model: StandInModel, chat: bool, reason: str) -> dict[str, Any]:
        return self._line(model, chat, {}) | {"done": True, "done_reason": reason}

    async def _embed(self, request: web.Request) -> web.Response:
        body = await request.json()
        began = time.monotonic()
        model = self._model(body)
        inputs = [body["input"]] if isinstance(body["input"], str) else body["input"]
        async with self._loaded(model, body) as runner:
            if not inputs:
                return web.json_response({"model": model.name, "embeddings": []})
            if "embedding" not in model.abilities:
                raise _Refused(501, "this model does not support embeddings")
            async with runner.slots:
                counted = 0
                vectors = []
                for text in inputs:
                    tokens = tokens_of(text)
                    if len(tokens) > runner.num_ctx:
                        if body.get("truncate") is False:
                            raise _Refused(400, "the input length exceeds the context length")
                        tokens = tokens[: runner.num_ctx]
                    await asyncio.sleep(len(tokens) * self.prefill_token_seconds)
                    counted += len(tokens)
                    vectors.append(_vector(model, tokens))
        return web.json_response(
            {
                "model": model.name,
                "embeddings": vectors,
                "prompt_eval_count": counted,
                "total_duration": _nanoseconds(time.monotonic() - began),
                "load_duration": 0,
            }
        )

    async def _send(self, request: web.Request, steps: AsyncGenerator[dict[str, Any], None]) -> web.StreamResponse:
        """Line by line, until a fault strikes."""
        fault = self.fault
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        sent = 0
        async with contextlib.aclosing(steps):
            async for step in steps:
                if fault and fault.kind == "no_end" and (step.get("done") or step.get("status") == "success"):
                    break
                if fault and sent >= fault.pieces and fault.kind in ("stall", "reset", "error_line"):
                    if fault.kind == "stall":
                        await asyncio.Event().wait()
                    if fault.kind == "reset":
                        assert request.transport is not None
                        request.transport.abort()
                        return response
                    step = {"error": fault.message or _MESSAGES[500]}
                if not response.prepared:
                    if "error" in step:
                        raise _Refused(500, step["error"])
                    await response.prepare(request)
                await response.write(json.dumps(step).encode() + b"\n")
                sent += 1
                if "error" in step:
                    break
        if not response.prepared:
            await response.prepare(request)
        await response.write_eof()
        return response


def _full(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


def _seconds(keep_alive: str | float) -> float:
    if isinstance(keep_alive, str) and (parts := _DURATION.findall(keep_alive)):
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    return math.inf if float(keep_alive) < 0 else float(keep_alive)


def _nanoseconds(seconds: float) -> int:
    return max(1, round(seconds * 1e9))


def _render(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
    text = json.dumps(tools) if tools else ""
    for message in messages:
        text += f"<{message['role']}>{message.get('content', '')}"
        if calls := message.get("tool_calls"):
            text += json.dumps(calls)
        if name := message.get("tool_name"):
            text += name
    return text + "<assistant>"


def _tool_asked_for(body: dict[str, Any]) -> dict[str, Any] | None:
    """A tool whose name stands in the last message, if that is the user's."""
    messages = body.get("messages") or [{}]
    if body.get("format") or messages[-1].get("role") != "user":
        return None
    functions: Iterator[dict[str, Any]] = (tool["function"] for tool in body.get("tools") or ())
    return next((function for function in functions if function["name"] in messages[-1]["content"]), None)


def _logprob(token: str, top: int) -> dict[str, Any]:
    likely = -0.01 * (1 + len(token))
    others = [{"token": f"~{i}", "logprob": likely - i} for i in range(1, top)]
    chosen = {"token": token, "logprob": likely, "bytes": list(token.encode())}
    return {**chosen, **({"top_logprobs": [chosen, *others]} if top else {})}


def _vector(model: StandInModel, tokens: list[str]) -> list[float]:
    """Sum of a direction for each token: texts with the same words are alike."""
    total = [0.0] * model.dimension
    for token in tokens or [""]:
        draw = random.Random(f"{model.name}/{token.strip().lower()}")
        for i in range(model.dimension):
            total[i] += draw.gauss(0, 1)
    norm = math.sqrt(sum(value * value for value in total))
    return [value / norm for value in total]


def _merged(steps: list[dict[str, Any]]) -> dict[str, Any]:
    last = steps[-1]
    if "message" in last:
        last["message"]["content"] = "".join(step["message"]["content"] for step in steps)
        if calls := [call for step in steps for call in step["message"].get("tool_calls", ())]:
            last["message"]["tool_calls"] = calls
    else:
        last["response"] = "".join(step["response"] for step in steps)
    return last


async def _main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.standins.ollama", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--models", default="", help="names that are there, with commas between")
    parser.add_argument("--library", default="tiny", help="names that can be pulled")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--token-seconds", type=float, default=0.002)
    parser.add_argument("--load-seconds", type=float, default=0.1)
    parser.add_argument("--pull-seconds", type=float, default=0.5)
    given = parser.parse_args(argv)
    known = {model.name: model for model in ALL}

    def named(names: str) -> tuple[StandInModel, ...]:
        return tuple(known.get(name) or StandInModel(name) for name in names.split(",") if name)

    standin = OllamaStandIn(
        models=named(given.models),
        library=named(given.library),
        parallel=given.parallel,
        token_seconds=given.token_seconds,
        load_seconds=given.load_seconds,
        pull_seconds=given.pull_seconds,
    )
    standin.port = given.port
    await standin.start()
    facts = {"event": "ready", "program": "ollama-standin", "address": f"127.0.0.1:{standin.port}", "url": standin.url}
    print(json.dumps(facts), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main())
