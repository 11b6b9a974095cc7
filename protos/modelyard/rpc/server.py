"""Server kit: a configured server, handlers that speak the error table, health, reflection, drain.

server = create_server()
server.add_generic_rpc_handlers((service_handler(ORCHESTRATOR, Servicer()),))
health = enable_standard_services(server, [ORCHESTRATOR.full_name])
port = bind(server, "127.0.0.1", 7460)
await server.start()
await health.set_serving(ORCHESTRATOR.full_name, True)
...
await drain(server, health, stop_accepting=..., in_flight=in_flight, grace=30)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

import grpc.aio

from modelyard.rpc.channels import Option
from modelyard.rpc.handlers import Unread, reads_as, service_handler, takes_unread
from modelyard.rpc.health import HealthHandle, enable_standard_services

__all__ = [
    "DEFAULT_MAX_REQUEST_BYTES",
    "HealthHandle",
    "InFlight",
    "Unread",
    "bind",
    "create_server",
    "drain",
    "enable_standard_services",
    "reads_as",
    "service_handler",
    "takes_unread",
]

_log = logging.getLogger(__name__)

DEFAULT_MAX_REQUEST_BYTES = 8 << 20

# Room for the framing of a request that is exactly at its limit, so that the limit is
# refused by us, with a reason, and not by gRPC's own.
_SLACK_BYTES = 1 << 20


def create_server(
    *, max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES, options: Sequence[Option] = ()
) -> grpc.aio.Server:
    """A server with modelyard's standard options; `options` take precedence.

    A stopped client is noticed within 30 s even without an active call. Clients may ping as often
    as they like.
    """
    standard: tuple[Option, ...] = (
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        # Never answer pings with too_many_pings: with an interval of 1 s allowed, a client that pings
        # each second was cut off after four (measured), for its clock's jitter.
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_request_bytes + _SLACK_BYTES),
        ("grpc.max_send_message_length", -1),
    )
    given = {name for name, _ in options}
    return grpc.aio.server(options=(*(option for option in standard if option[0] not in given), *options))


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Listen on host and port (0: a free one) and return the port.

    Raises OSError with a message for people.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    _probe(host, port, where)
    try:
        bound = int(server.add_insecure_port(where))
    except RuntimeError:
        bound = 0
    if bound == 0:  # taken since it was probed
        raise _os_error(errno.EADDRINUSE, _in_use(where))
    return bound


def _probe(host: str, port: int, where: str) -> None:
    """Ask the operating system first: gRPC tells no errno, and writes a line of its own to stderr."""
    problems = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                with contextlib.closing(socket.socket(family, kind, protocol)) as probe:
                    # As gRPC does: connections of the last one here that linger are no hindrance.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(address)
                    probe.listen(1)
                return
            except OSError as error:
                problems.append(error)
    except OSError as error:
        problems.append(error)
    problem = problems[0]
    in_use = problem.errno == errno.EADDRINUSE
    message = _in_use(where) if in_use else f"cannot listen on {where}: {problem.strerror or problem}"
    raise _os_error(problem.errno, message)


def _in_use(where: str) -> str:
    return f"{where} is in use: choose another with --port, or stop what is there"


def _os_error(number: int | None, message: str) -> OSError:
    """With one argument only, so that str() is the message without "[Errno ...]"."""
    error = OSError(message)
    error.errno = number
    return error


# -------------------------------------------------------------------- drain ---


class InFlight:
    """Counts the requests that a drain waits for: `with in_flight: ...` around each."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def count(self) -> int:
        return self._count

    def __enter__(self) -> InFlight:
        self._count += 1
        self._idle.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count -= 1
        if self._count == 0:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        await self._idle.wait()


async def drain(
    server: grpc.aio.Server,
    health: HealthHandle,
    *,
    stop_accepting: Callable[[], Awaitable[None] | None],
    in_flight: InFlight,
    grace: float,
    notice: float = 0.0,
) -> bool:
    """Stop a server in the one order that loses nothing; True if everything in flight ended by itself.

    Health NOT_SERVING -> `notice` seconds for load balancers to see it -> `stop_accepting` (deregister,
    end endless streams, refuse new work with DRAINING) -> wait for `in_flight`, at most `grace`
    seconds -> cancel what is left -> close.
    """
    await health.shut_down()
    if notice > 0:
        await asyncio.sleep(notice)
    stopping = stop_accepting()
    if stopping is not None:
        await stopping
    clean = await _idle_within(in_flight, grace)
    if clean:
        # A moment for the last answers to leave.
        await server.stop(0.2)
    else:
        _log.warning("%d requests were still running after %g s and are cancelled", in_flight.count, grace)
        await server.stop(0)
        # stop() does not wait for the cancelled handlers to clean up behind themselves.
        await _idle_within(in_flight, 1.0)
    return clean


async def _idle_within(in_flight: InFlight, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await in_flight.idle()
    except TimeoutError:
        return False
    return True
