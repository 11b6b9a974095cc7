"""Where Generation writes: in place of a gRPC context, an HTTP answer that renders what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from control_plane.domain.ports import Clock
from control_plane.fleet.server import Flight
from control_plane.gateway.answers import Answer, Asked, Head
from control_plane.gateway.exchange import Exchange
from modelyard.v1.generation_pb2 import GenerationDelta
from modelyard.v1.orchestrator_pb2 import GenerateResponse, GenerationSummary


class Sink:
    """What is not about the answer itself. Timeout: seconds that everything may take."""

    def __init__(self, http: Exchange, clock: Clock, timeout: float | None) -> None:
        self.http = http
        self._clock = clock
        self._deadline = None if timeout is None else clock.monotonic() + timeout

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock.monotonic())

    def invocation_metadata(self) -> list[tuple[str, str]]:
        """Who asks, as a header says it."""
        return self.http.tenant

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """The request's id is sent back in a header."""

    def chosen(self, flight: Flight, attempts: int) -> None:
        """A server is being tried."""
        self.http.flight, self.http.attempts = flight, attempts

    def head(self) -> Head:
        """What the answer says of itself; known once a server was chosen."""
        http = self.http
        return Head(http.request_id, int(self._clock.wall()), http.flight.model if http.flight else "")


class WholeSink(Sink):
    """Wants the answer when it is complete."""

    def __init__(self, http: Exchange, clock: Clock, timeout: float | None) -> None:
        super().__init__(http, clock, timeout)
        self.answer = Answer()

    async def write(self, message: bytes) -> None:
        self.http.decision = GenerateResponse.FromString(message).decision.summary

    def whole(self, deltas: Sequence[GenerationDelta], summary: GenerationSummary) -> None:
        """The answer."""
        for delta in deltas:
            self.answer.take(delta)
        self.answer.summary = summary


class StreamSink(Sink):
    """Sends everything on as it comes. The head waits for the first piece, so that what fails
    before it is told by an HTTP status."""

    def __init__(self, http: Exchange, clock: Clock, timeout: float | None, asked: Asked) -> None:
        super().__init__(http, clock, timeout)
        self._asked = asked

    async def write(self, message: bytes) -> None:
        response = GenerateResponse.FromString(message)
        http = self.http
        if response.HasField("decision"):
            http.decision = response.decision.summary
            return
        stream = http.stream
        if stream is None:
            stream = self._asked.open(self.head())
            await http.begin(stream)
        events = stream.piece(response.delta) if response.HasField("delta") else b""
        if response.HasField("summary"):
            await http.send(events + stream.end(response.summary), last=True)
        elif events:
            await http.send(events)
