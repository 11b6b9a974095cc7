"""From a command to the control plane and back: one client, one event loop, expected failures told in one line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from modelyard.cli.errors import Failed, from_sdk
from modelyard.cli.session import ClientSettings, Session, client_settings

if TYPE_CHECKING:
    from modelyard.client import AsyncClient

T = TypeVar("T")


def call(session: Session, work: Callable[[AsyncClient], Awaitable[T]]) -> T:
    """Run `work` with a client. Ctrl-C cancels it, and KeyboardInterrupt is raised when it has ended."""
    return asyncio.run(_with_client(client_settings(session), work))


async def _with_client(settings: ClientSettings, work: Callable[[AsyncClient], Awaitable[T]]) -> T:
    from modelyard.client import AsyncClient, ModelyardError

    try:
        async with AsyncClient(settings.address, timeout=settings.timeout) as client:
            return await work(client)
    except ModelyardError as error:
        raise Failed(from_sdk(error, settings.address)) from error
    except (ValueError, TypeError) as error:
        # The SDK's word on arguments that it does not even send.
        raise _usage(error) from error


def _usage(error: Exception) -> Failed:
    from modelyard.cli.errors import USAGE, Failure

    return Failed(Failure(USAGE, "INVALID_REQUEST", str(error)))
