"""From a command to the control plane and back: one client, one event loop, expected failures told in one line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from modelyard.cli.errors import USAGE, Failed, Failure, from_sdk, words
from modelyard.cli.session import ClientSettings, Session, client_settings

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, ModelyardError

T = TypeVar("T")

_PROBE_SECONDS = 2.0


def call(session: Session, work: Callable[[AsyncClient], Awaitable[T]]) -> T:
    """Run `work` with a client. Ctrl-C cancels it, and KeyboardInterrupt is raised when it has ended."""
    return asyncio.run(_with_client(client_settings(session), session.tenant, work))


async def _with_client(settings: ClientSettings, tenant: str | None, work: Callable[[AsyncClient], Awaitable[T]]) -> T:
    from modelyard.client import AsyncClient, ModelyardError

    try:
        async with AsyncClient(
            settings.address, timeout=settings.timeout, tenant=tenant, direct=settings.direct
        ) as client:
            return await work(client)
    except ModelyardError as error:
        raise Failed(await told(error, settings.address)) from error
    except (ValueError, TypeError) as error:
        # The SDK's word on arguments that it does not even send.
        raise _usage(error) from error


async def told(error: ModelyardError, address: str) -> Failure:
    """The failure, with a closer look at who answers where that is no control plane."""
    from modelyard.client._errors import FOREIGN_PEER

    failure = from_sdk(error, address)
    if error.metadata.get("peer") == FOREIGN_PEER and await _is_model_server(address):
        failure = replace(failure, message=f"what answers at {address} is a model server, not a control plane")
    return failure


async def _is_model_server(address: str) -> bool:
    """Whether the standard health service there knows of a ModelServer."""
    import grpc.aio

    from modelyard.rpc.channels import channel

    name = b"modelyard.v1.ModelServer"
    async with channel(address) as link:
        check = link.unary_unary("/grpc.health.v1.Health/Check")
        try:
            await check(b"\x0a" + bytes([len(name)]) + name, timeout=_PROBE_SECONDS)
        except grpc.aio.AioRpcError:
            return False
    return True


def _usage(error: Exception) -> Failed:
    return Failed(Failure(USAGE, "INVALID_REQUEST", words(error)))
