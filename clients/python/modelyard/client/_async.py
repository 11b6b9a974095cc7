"""The asyncio client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio

from modelyard.client import _answers as answers
from modelyard.client import _values as values
from modelyard.client._agents import AsyncAgents
from modelyard.client._ahead import TicketsAhead
from modelyard.client._beliefs import AsyncBeliefs, AsyncCallbacks
from modelyard.client._direct import MODES, Direct, DirectCall, Hosts
from modelyard.client._errors import Cancelled, from_call, parsed
from modelyard.client._requests import GenerateOptions, Input, Requirements, embed_request, generate_request
from modelyard.client._stream import GenerationStream
from modelyard.client._tasks import AsyncTasks
from modelyard.client._timing import Patience
from modelyard.client._types import (
    Decision,
    EmbedResult,
    FleetChange,
    GenerationResult,
    Health,
    Model,
    ModelProgress,
    Preset,
    ServerStatus,
)
from modelyard.client._usage import AsyncAccounting
from modelyard.client._usage_types import UsageReport
from modelyard.client._whole import WholeAnswers
from modelyard.rpc.calls import SharedChannel
from modelyard.rpc.channels import channel
from modelyard.v1 import orchestrator_pb2, orchestrator_pb2_grpc

ADDRESS_VARIABLE = "MODELYARD_ADDRESS"
DEFAULT_ADDRESS = "127.0.0.1:7460"
TENANT_VARIABLE = "MODELYARD_TENANT"
DIRECT_VARIABLE = "MODELYARD_DIRECT"
_SERVICE = "modelyard.v1.Orchestrator"
_HEALTH_TIMEOUT = 5.0

T = TypeVar("T")


def direct_mode(given: str) -> Direct:
    """Raises ValueError for what is none."""
    for mode in MODES:
        if given == mode:
            return mode
    raise ValueError(f"unknown direct mode {given!r}; allowed: {', '.join(MODES)}")


class AsyncClient:
    """A client of one control plane, for asyncio.

        async with AsyncClient() as client:
            result = await client.generate("Why is the sky blue?", max_tokens=200)
            async for delta in client.stream("Tell me a story").deltas():
                print(delta.text, end="")

    address   "host:port"; default: environment variable MODELYARD_ADDRESS, else 127.0.0.1:7460
    timeout   seconds that each call may take, its retries included; None: the control plane's limit
    direct    "auto": answers come from the model server itself where it can be reached, else through the control
              plane; "never": always through the control plane; "always": never. Default: environment variable
              MODELYARD_DIRECT, else "auto"
    tickets_ahead  whether direct calls that follow each other within a second, and differ to routing in the length of
              their prompts only, get their tickets in the background, each while the one before is at work or done
    retries   how often a call that failed with TryAgain is made again, after the pause that the
              control plane asks for; never after a part of the answer has come
    tenant    whose durable tasks, beliefs, agents, budgets and usage are meant; default: environment variable
              MODELYARD_TENANT, else "default"

    May be made anywhere; belongs to the event loop that uses it first. One connection is used for
    all calls. Failures raise ModelyardError (see there for the tree), wrong arguments ValueError
    or TypeError.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout: float | None = None,
        retries: int = 0,
        tenant: str | None = None,
        direct: Direct | None = None,
        tickets_ahead: bool = True,
    ) -> None:
        self.address = address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        self._timeout = values.timeout(timeout)
        self._retries = retries
        self._direct = direct_mode(direct or os.environ.get(DIRECT_VARIABLE) or "auto")
        self._hosts = Hosts(self.address)
        self._ahead = TicketsAhead() if tickets_ahead else None
        self._channel: SharedChannel | None = None
        self._stub: Any = None
        self._whole: WholeAnswers | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._metadata = _tenant_metadata(tenant or os.environ.get(TENANT_VARIABLE))
        self.tasks = AsyncTasks(self)
        """Durable tasks."""
        self.beliefs = AsyncBeliefs(self)
        """What is held to be true."""
        self.callbacks = AsyncCallbacks(self)
        """What became of the callbacks of durable tasks."""
        self.agents = AsyncAgents(self)
        """Agents, and the routing of tasks among them."""
        self._accounting = AsyncAccounting(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what runs and close the connection. Idempotent."""
        self._closed = True
        if self._ahead is not None:
            self._ahead.close()
        await self._hosts.close()
        if self._channel is not None:
            await self._channel.close(None)

    # ------------------------------------------------------------- generating ---

    def stream(
        self,
        input: Input,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        direct: Direct | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationStream:
        """Generate an answer and read it as it is made; see GenerateOptions for what may be said.

        The call starts with the first read. Leaving the loop or the `async with` block early
        stops the model.
        """
        request = generate_request(input, **options)
        return GenerationStream(
            self, request, lambda: self._patience(timeout, retries), None if direct is None else direct_mode(direct)
        )

    async def generate(
        self,
        input: Input,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        direct: Direct | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationResult:
        """Generate a whole answer. Arguments as `stream`.

        A model server that fails in the middle of the answer costs time only: the control plane asks another one. So
        there is no part of an answer that failed; `stream(...).collect()` keeps it, and asks nobody else.
        """
        stream = self.stream(input, timeout=timeout, retries=retries, direct=direct, **options)
        stream.whole = True
        return await stream.collect()

    async def embed(
        self,
        inputs: str | Sequence[str],
        *,
        timeout: float | None = None,
        retries: int | None = None,
        **requirements: Unpack[Requirements],
    ) -> EmbedResult:
        """Turn one text or up to 2,048 into vectors, one each, in order."""
        request = embed_request(inputs, **requirements)
        response = await self._call("Embed", request, timeout, retries, request.request_id)
        return answers.embed_result(response)

    async def explain(
        self, input: Input, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Decision:
        """Dry run: which server would be chosen for this now, and why not the others."""
        request = orchestrator_pb2.ExplainSelectionRequest(request=generate_request(input, **options))
        response = await self._call("ExplainSelection", request, timeout)
        return answers.decision(response.decision, response.estimated_prompt_tokens)

    async def usage(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        by: str | Sequence[str] = (),
        timeout: float | None = None,
    ) -> UsageReport:
        """What this client's tenant has used between two times, rounded to hours, and how its budgets stand.

        `by` tells rows apart: "model", "provider", "server", "task_type", "hour" or "day"; without it there is only
        the total.
        """
        return await self._accounting.usage(since, until, by, timeout)

    # ------------------------------------------------------------------ fleet ---

    async def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """Every model that a server offers or a definition names, by name."""
        response = await self._call("ListModels", orchestrator_pb2.ListModelsRequest(), timeout)
        return tuple(answers.model(model) for model in response.models)

    async def presets(self, *, timeout: float | None = None) -> tuple[Preset, ...]:
        """Every preset that a request may name, by name."""
        response = await self._call("ListPresets", orchestrator_pb2.ListPresetsRequest(), timeout)
        return tuple(answers.preset(preset) for preset in response.presets)

    async def model(self, name: str, *, timeout: float | None = None) -> Model:
        """One model by "name" or "provider/name"; raises UnknownModel."""
        response = await self._call("GetModel", orchestrator_pb2.GetModelRequest(name=name), timeout)
        return answers.model(response.model)

    async def servers(self, *, timeout: float | None = None) -> tuple[ServerStatus, ...]:
        """Every model server known, lost ones included, by id."""
        response = await self._call("ListModelServers", orchestrator_pb2.ListModelServersRequest(), timeout)
        return tuple(answers.server(server) for server in response.servers)

    async def watch_fleet(self) -> AsyncGenerator[FleetChange, None]:
        """The whole fleet first, then every change, without end."""
        call = self._connected().WatchFleet(orchestrator_pb2.WatchFleetRequest())
        async with contextlib.aclosing(self._messages(call)) as messages:
            async for message in messages:
                yield answers.fleet_change(message)

    async def report_feedback(self, request_id: str, score: float, *, timeout: float | None = None) -> bool:
        """Say how good an answer was, from 0 (of no use) to 1 (good): models that answer a kind of work badly get less
        of it. False: it had been judged before. Raises UnknownRequest: no such answer, or long ago."""
        request = orchestrator_pb2.ReportFeedbackRequest(request_id=request_id, score=score)
        counted: bool = (await self._call("ReportFeedback", request, timeout)).counted
        return counted

    async def drain(self, server_id: str, *, undo: bool = False, timeout: float | None = None) -> ServerStatus:
        """Tell a model server to finish what it has and take nothing new, or to serve again."""
        request = orchestrator_pb2.DrainModelServerRequest(server_id=server_id, undo=undo)
        response = await self._call("DrainModelServer", request, timeout)
        return answers.server(response.server)

    def pull_model(
        self, model: str, *, server_id: str | None = None, timeout: float | None = None
    ) -> AsyncGenerator[ModelProgress, None]:
        """Fetch a model's files on a model server; every step, the last one "cold" or "warm".

        `server_id` may be left out where only one server can be meant. Such work may take long, so the client's own
        timeout does not hold for it, only the one given here. Leaving the loop early stops the work, unless others
        wait for it too; in a coroutine that goes on, close the generator (`contextlib.aclosing`).
        """
        request = orchestrator_pb2.PullModelRequest(model=model, server_id=server_id or "")
        return self._progress("PullModel", request, timeout)

    def load_model(
        self, model: str, *, server_id: str | None = None, timeout: float | None = None
    ) -> AsyncGenerator[ModelProgress, None]:
        """Bring a model into a model server's memory; every step, the last one "warm". See `pull_model`."""
        request = orchestrator_pb2.LoadModelRequest(model=model, server_id=server_id or "")
        return self._progress("LoadModel", request, timeout)

    def unload_model(
        self, model: str, *, server_id: str | None = None, timeout: float | None = None
    ) -> AsyncGenerator[ModelProgress, None]:
        """Take a model out of a model server's memory when its requests have ended; every step. See `pull_model`."""
        request = orchestrator_pb2.UnloadModelRequest(model=model, server_id=server_id or "")
        return self._progress("UnloadModel", request, timeout)

    async def _progress(self, method: str, request: Any, timeout: float | None) -> AsyncGenerator[ModelProgress, None]:
        call = getattr(self._connected(), method)(request, timeout=values.timeout(timeout))
        async with contextlib.aclosing(self._messages(call)) as messages:
            async for message in messages:
                yield answers.model_progress(message)

    async def health(self, *, timeout: float | None = None) -> Health:
        """Standard health of the control plane. Raises ConnectionFailed if nothing answers."""
        timeout = values.timeout(timeout) or self._timeout or _HEALTH_TIMEOUT
        alive, serving = await asyncio.gather(self._check("", timeout), self._check(_SERVICE, timeout))
        return Health(alive, serving)

    async def _check(self, service: str, timeout: float) -> bool:
        # grpc.health.v1 by hand: two one-field messages are not worth another dependency.
        self._connected()
        assert self._channel is not None
        check = self._channel.plain.unary_unary("/grpc.health.v1.Health/Check")
        name = service.encode()
        request = b"\x0a" + bytes([len(name)]) + name if name else b""
        try:
            response: bytes = await self._guarded(check(request, timeout=timeout))
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED):
                return False
            raise from_call(error, address=self.address) from error
        return response == b"\x08\x01"

    # ---------------------------------------------------------------- calling ---

    def _connected(self) -> Any:
        """The stub, on a channel of the running loop."""
        if self._closed:
            raise RuntimeError("the client is closed")
        loop = asyncio.get_running_loop()
        if self._channel is None:
            # Not earlier: a grpc.aio channel binds to the loop that runs when it is made.
            self._channel = SharedChannel(channel(self.address))
            stub = orchestrator_pb2_grpc.OrchestratorStub(self._channel)  # type: ignore[no-untyped-call]
            self._stub = _AsTenant(stub, self._metadata) if self._metadata else stub
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("an AsyncClient belongs to the event loop that used it first: make one per loop")
        return self._stub

    def _generating(
        self, request: orchestrator_pb2.GenerateRequest, timeout: float | None, direct: Direct | None, whole: bool
    ) -> Any:
        """A Generate call, direct where that is wanted; `whole`: pieces of the answer are of no use."""
        stub, mode = self._connected(), direct or self._direct
        if whole:
            if self._whole is None:
                self._whole = WholeAnswers(stub)
            stub = self._whole
        if mode == "always" or (mode == "auto" and self._hosts.assigned):
            return DirectCall(
                stub, self._hosts, request, timeout, must=mode == "always", whole=whole, ahead=self._ahead
            )
        return stub.Generate(request, timeout=timeout)

    def _patience(self, timeout: float | None, retries: int | None) -> Patience:
        return Patience(self._timeout if timeout is None else timeout, self._retries if retries is None else retries)

    async def _call(
        self, method: str, request: Any, timeout: float | None, retries: int | None = None, request_id: str = ""
    ) -> Any:
        patience = self._patience(timeout, retries)
        while True:
            try:
                return parsed(await self._guarded(getattr(self._connected(), method)(request, timeout=patience.left())))
            except grpc.aio.AioRpcError as error:
                failure = from_call(error, address=self.address, request_id=request_id)
                await patience.wait_or_raise(failure, error)

    async def _messages(self, call: Any) -> AsyncGenerator[Any, None]:
        """The messages of a stream, which is cancelled when nobody reads on. Raises ModelyardError."""
        started = False
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                started = True
                yield parsed(message)
        except grpc.aio.AioRpcError as error:
            raise from_call(error, address=self.address, started=started) from error
        except asyncio.CancelledError:
            self._raise_if_closed()
            raise
        finally:
            call.cancel()

    async def _guarded(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except asyncio.CancelledError:
            self._raise_if_closed()
            raise

    def _raise_if_closed(self) -> None:
        """Tell the closing of the client from a cancellation of the task, which must go on."""
        task = asyncio.current_task()
        if self._closed and not (task and task.cancelling()):
            raise Cancelled("the client was closed") from None


class _AsTenant:
    """A stub whose calls all say whose they are."""

    def __init__(self, stub: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._stub = stub
        self._metadata = metadata

    def __getattr__(self, method: str) -> Any:
        return functools.partial(getattr(self._stub, method), metadata=self._metadata)


def _tenant_metadata(tenant: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with every call. Raises ValueError for what is no name of a tenant."""
    if not tenant:
        return ()
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", tenant):
        raise ValueError(f'a tenant is 1 to 64 letters, digits, ".", "_" or "-", not {tenant!r}')
    return (("modelyard-tenant", tenant),)
