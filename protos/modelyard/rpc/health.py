"""The standard services of every server: grpc.health.v1 and reflection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc.aio import ServicerContext

from modelyard.rpc.handlers import service_handler


class HealthHandle:
    """The standard health of a server: "" is alive until shutdown, services as they are set."""

    def __init__(self, service_names: Sequence[str]) -> None:
        self._serving: dict[str, bool] = {"": True, **dict.fromkeys(service_names, False)}
        self._changed = asyncio.Event()
        self._closed = False

    async def set_serving(self, service: str, serving: bool) -> None:
        """Tell whether a service takes requests. Ignored after `shut_down`."""
        if not self._closed and self._serving.get(service) is not serving:
            self._serving[service] = serving
            self._tell()

    async def shut_down(self) -> None:
        """Everything NOT_SERVING, for good."""
        self._closed = True
        self._serving = dict.fromkeys(self._serving, False)
        self._tell()

    def serving(self, service: str) -> bool | None:
        """The state now; None for a service that is not known."""
        return self._serving.get(service)

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def watch(self, service: str) -> AsyncGenerator[bool | None, None]:
        """The state now, then every change; a slow reader misses intermediate ones."""
        while True:
            yield (state := self._serving.get(service))
            while self._serving.get(service) is state:
                await self._changed.wait()


def enable_standard_services(
    server: grpc.aio.Server, service_names: Sequence[str], *, reflection: bool = True
) -> HealthHandle:
    """Add grpc.health.v1 and (unless told not to) gRPC reflection v1 and v1alpha to a server."""
    from grpc_health.v1 import health_pb2

    handle = HealthHandle(service_names)
    health = health_pb2.DESCRIPTOR.services_by_name["Health"]
    server.add_generic_rpc_handlers((service_handler(health, _HealthServicer(handle, health_pb2)),))
    if reflection:
        _enable_reflection(server, (*service_names, health.full_name))
    return handle


class _HealthServicer:
    """grpc.health.v1. Not grpc_health's own asyncio servicer: there one watcher that leaves cuts
    off all others, and one that does not read blocks every change (1.81)."""

    def __init__(self, handle: HealthHandle, health_pb2: Any) -> None:
        self._handle = handle
        self._answer = health_pb2.HealthCheckResponse

    async def Check(self, request: Any, context: ServicerContext) -> Any:
        serving = self._handle.serving(request.service)
        if serving is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:100]!r}")
        return self._answer(status=self._status(serving))

    async def Watch(self, request: Any, context: ServicerContext) -> AsyncIterator[Any]:
        async with contextlib.aclosing(self._handle.watch(request.service)) as states:
            async for serving in states:
                yield self._answer(status=self._status(serving))

    def _status(self, serving: bool | None) -> Any:
        if serving is None:
            return self._answer.SERVICE_UNKNOWN
        return self._answer.SERVING if serving else self._answer.NOT_SERVING


def _enable_reflection(server: grpc.aio.Server, service_names: Sequence[str]) -> None:
    from grpc_reflection.v1alpha import reflection, reflection_pb2

    names = (*service_names, reflection.SERVICE_NAME)
    servicer = reflection.aio.ReflectionServicer(names)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    # The messages of v1 and v1alpha are the same on the wire; newer clients ask for v1 first.
    server.add_generic_rpc_handlers(
        tuple(
            grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method})
            for name in ("grpc.reflection.v1.ServerReflection", reflection.SERVICE_NAME)
        )
    )
