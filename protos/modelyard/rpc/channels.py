"""Channels: how every modelyard program connects to another one."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import grpc.aio

Option = tuple[str, int | str]

MAX_MESSAGE_BYTES = 64 << 20
"""Most bytes of one message: 2,048 embeddings of 8,192 floats."""

_OPTIONS: tuple[Option, ...] = (
    # While calls are active a stopped peer is noticed after keepalive_time + ping_timeout:
    # keepalive_timeout_ms alone does not decide it (measured; http2.ping_timeout does).
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Retries are the control plane's business; nothing may be configured over DNS.
    ("grpc.service_config_disable_resolution", 1),
    # http_proxy in the environment is meant for the web, not for hosts of the fleet.
    ("grpc.enable_http_proxy", 0),
)


def channel_options(options: Sequence[Option] = (), *, own_connection: bool = False) -> tuple[Option, ...]:
    """The standard options with `options` taking precedence."""
    given = {name for name, _ in options}
    standard = tuple(option for option in _OPTIONS if option[0] not in given)
    # Channels to one target share a connection unless told otherwise.
    own: tuple[Option, ...] = (("grpc.use_local_subchannel_pool", 1),) if own_connection else ()
    return (*standard, *own, *options)


def channel(target: str, *, options: Sequence[Option] = (), own_connection: bool = False) -> grpc.aio.Channel:
    """An asyncio channel to "host:port".

    Notices a stopped peer within about 4 s while calls are active, reconnects after 0.1 to 1 s,
    and never retries by itself what a server may have seen.
    """
    return grpc.aio.insecure_channel(target, options=channel_options(options, own_connection=own_connection))


def sync_channel(target: str, *, options: Sequence[Option] = (), own_connection: bool = False) -> grpc.Channel:
    """As `channel`, for code without an event loop."""
    return grpc.insecure_channel(target, options=channel_options(options, own_connection=own_connection))
