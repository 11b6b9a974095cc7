"""The client for code without asyncio: the asyncio client on a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from modelyard.client._async import AsyncClient
from modelyard.client._direct import Direct
from modelyard.client._errors import Cancelled
from modelyard.client._requests import GenerateOptions, Input, Requirements
from modelyard.client._stream import GenerationStream
from modelyard.client._sync_agents import Agents
from modelyard.client._sync_beliefs import Beliefs, Callbacks
from modelyard.client._sync_tasks import Tasks
from modelyard.client._types import (
    Decision,
    Delta,
    EmbedResult,
    FleetChange,
    GenerationResult,
    Health,
    Model,
    ModelProgress,
    Preset,
    ServerStatus,
)
from modelyard.client._usage_types import UsageReport

T = TypeVar("T")


class _LoopThread:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_handle_exception)
        self._thread = threading.Thread(target=self._loop.run_forever, name="modelyard-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run on the thread; Ctrl-C here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("the client was closed") from None
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[[], None]) -> None:
        """Call on the thread, or not at all if it has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()


def _handle_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # grpc.aio before 1.80 wakes every loop of the process for each event, and the ones that come
    # too late find the socket empty: harmless, but logged as an error (grpc#25364).
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)


def _stop(thread: _LoopThread, client: AsyncClient) -> None:
    try:
        thread.run(client.close())
    finally:
        thread.stop()


class Client:
    """A client of one control plane. Arguments and methods as AsyncClient, without await.

        with Client() as client:
            print(client.generate("Why is the sky blue?").text)
            for event in client.stream("Tell me a story"):
                ...

    May be used by several threads. Ctrl-C cancels the call that runs. Closed by `close`, by leaving
    the `with` block, or with the process.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout: float | None = None,
        retries: int = 0,
        direct: Direct | None = None,
        tenant: str | None = None,
        tickets_ahead: bool = True,
    ) -> None:
        self._client = AsyncClient(
            address, timeout=timeout, retries=retries, direct=direct, tenant=tenant, tickets_ahead=tickets_ahead
        )
        self._lock = threading.Lock()
        self._thread: _LoopThread | None = None
        self._closed = False
        self._finalizer: Any = None

    @property
    def tasks(self) -> Tasks:
        """Durable tasks."""
        # Made anew each time: kept, the two would hold each other, and nobody would close the client at its end.
        return Tasks(self, self._client.tasks)

    @property
    def beliefs(self) -> Beliefs:
        """What is held to be true."""
        return Beliefs(self, self._client.beliefs)

    @property
    def callbacks(self) -> Callbacks:
        """What became of the callbacks of durable tasks."""
        return Callbacks(self, self._client.callbacks)

    @property
    def agents(self) -> Agents:
        """Agents, and the routing of tasks among them."""
        return Agents(self, self._client.agents)

    @property
    def address(self) -> str:
        """ "host:port" of the control plane."""
        return self._client.address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs, close the connection and end the thread. Idempotent."""
        with self._lock:
            self._closed = True
            if self._finalizer is not None:
                self._finalizer()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            thread = self._started()
        except RuntimeError:
            coroutine.close()
            raise
        return thread.run(coroutine)

    def _started(self) -> _LoopThread:
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if self._thread is None:
                self._thread = _LoopThread()
                # Also at exit of the process; must not hold a reference to self.
                self._finalizer = weakref.finalize(self, _stop, self._thread, self._client)
            return self._thread

    def stream(
        self,
        input: Input,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        direct: Direct | None = None,
        **options: Unpack[GenerateOptions],
    ) -> SyncGenerationStream:
        """Generate an answer and read it as it is made; see GenerateOptions for what may be said."""
        stream = self._client.stream(input, timeout=timeout, retries=retries, direct=direct, **options)
        return SyncGenerationStream(self, stream)

    def generate(
        self,
        input: Input,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        direct: Direct | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationResult:
        """Generate a whole answer. Arguments as `stream`."""
        return self._run(self._client.generate(input, timeout=timeout, retries=retries, direct=direct, **options))

    def embed(
        self,
        inputs: str | Sequence[str],
        *,
        timeout: float | None = None,
        retries: int | None = None,
        **requirements: Unpack[Requirements],
    ) -> EmbedResult:
        """Turn one text or up to 2,048 into vectors, one each, in order."""
        return self._run(self._client.embed(inputs, timeout=timeout, retries=retries, **requirements))

    def usage(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        by: str | Sequence[str] = (),
        timeout: float | None = None,
    ) -> UsageReport:
        """What this client's tenant has used between two times, rounded to hours, and how its budgets stand. See
        AsyncClient.usage."""
        return self._run(self._client.usage(since=since, until=until, by=by, timeout=timeout))

    def explain(self, input: Input, *, timeout: float | None = None, **options: Unpack[GenerateOptions]) -> Decision:
        """Dry run: which server would be chosen for this now, and why not the others."""
        return self._run(self._client.explain(input, timeout=timeout, **options))

    def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """Every model that a server offers or a definition names, by name."""
        return self._run(self._client.models(timeout=timeout))

    def presets(self, *, timeout: float | None = None) -> tuple[Preset, ...]:
        """Every preset that a request may name, by name."""
        return self._run(self._client.presets(timeout=timeout))

    def model(self, name: str, *, timeout: float | None = None) -> Model:
        """One model by "name" or "provider/name"; raises UnknownModel."""
        return self._run(self._client.model(name, timeout=timeout))

    def servers(self, *, timeout: float | None = None) -> tuple[ServerStatus, ...]:
        """Every model server known, lost ones included, by id."""
        return self._run(self._client.servers(timeout=timeout))

    def watch_fleet(self) -> Iterator[FleetChange]:
        """The whole fleet first, then every change, without end."""
        return self._each(self._client.watch_fleet())

    def report_feedback(self, request_id: str, score: float, *, timeout: float | None = None) -> bool:
        """Say how good an answer was: see `AsyncClient.report_feedback`."""
        return self._run(self._client.report_feedback(request_id, score, timeout=timeout))

    def drain(self, server_id: str, *, undo: bool = False, timeout: float | None = None) -> ServerStatus:
        """Tell a model server to finish what it has and take nothing new, or to serve again."""
        return self._run(self._client.drain(server_id, undo=undo, timeout=timeout))

    def pull_model(
        self, model: str, *, server_id: str | None = None, timeout: float | None = None
    ) -> Iterator[ModelProgress]:
        """Fetch a model's files on a model server; every step, the last one "cold" or "warm".

        `server_id` may be left out where only one server can be meant. The client's own timeout does not hold for
        such work, only the one given here. Leaving the loop early stops the work, unless others wait for it too.
        """
        return self._each(self._client.pull_model(model, server_id=server_id, timeout=timeout))

    def load_model(
        self, model: str, *, server_id: str | None = None, timeout: float | None = None
    ) -> Iterator[ModelProgress]:
        """Bring a model into a model server's memory; every step, the last one "warm". See `pull_model`."""
        return self._each(self._client.load_model(model, server_id=server_id, timeout=timeout))

    def unload_model(
        self, model: str, *, server_id: str | None = None, timeout: float | None = None
    ) -> Iterator[ModelProgress]:
        """Take a model out of a model server's memory when its requests have ended; every step. See `pull_model`."""
        return self._each(self._client.unload_model(model, server_id=server_id, timeout=timeout))

    def _each(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        try:
            while (item := self._run(_next(source))) is not None:
                yield item
        finally:
            if not self._closed:
                self._run(source.aclose())

    def health(self, *, timeout: float | None = None) -> Health:
        """Standard health of the control plane. Raises ConnectionFailed if nothing answers."""
        return self._run(self._client.health(timeout=timeout))


class SyncGenerationStream:
    """The events of one answer: an iterator, and a context manager. See GenerationStream."""

    def __init__(self, client: Client, stream: GenerationStream) -> None:
        self._client = client
        self._stream = stream

    @property
    def result(self) -> GenerationResult:
        """The whole answer, once it has been read to its end."""
        return self._stream.result

    @property
    def partial(self) -> GenerationResult | None:
        """What has come so far; None if nothing has."""
        return self._stream.partial

    def collect(self) -> GenerationResult:
        """Read to the end and return the whole answer."""
        return self._client._run(self._stream.collect())

    def deltas(self) -> Iterator[Delta]:
        """The pieces of the answer alone, without decisions."""
        with self:
            for event in self:
                if isinstance(event, Delta):
                    yield event

    def cancel(self) -> None:
        """Stop the model, from any thread. Whoever is reading gets Cancelled."""
        self._client._started().call(self._stream.cancel)

    def close(self) -> None:
        """End the stream, stopping the model if it still works. Idempotent."""
        if not self._client._closed:
            self._client._run(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Breaking out of a loop must stop the model, and on the loop's own thread.
        thread = self._client._thread
        if thread is not None:
            thread.call(self._stream.abandon)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta | Decision:
        event: Delta | Decision | None = self._client._run(_next(self._stream))
        if event is None:
            raise StopIteration
        return event


async def _next(source: Any) -> Any:
    """The next item, None at the end: StopAsyncIteration cannot cross a future."""
    return await anext(source, None)
