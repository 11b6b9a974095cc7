"""Channels to model servers: one per endpoint, reused, closed when the endpoint is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc

from modelyard.rpc.calls import SharedChannel, UnaryMethod
from modelyard.rpc.channels import channel
from modelyard.v1.model_server_pb2 import DESCRIPTOR

_SERVICE = DESCRIPTOR.services_by_name["ModelServer"].full_name


class Upstream:
    """One model server as the control plane calls it. Requests and answers are bytes: what need
    not be read is not decoded."""

    def __init__(self, endpoint: str) -> None:
        self.channel = SharedChannel(channel(endpoint))
        self.generate: grpc.aio.UnaryStreamMultiCallable = self.channel.unary_stream(f"/{_SERVICE}/Generate")
        self.complete: UnaryMethod = self.channel.unary_unary(f"/{_SERVICE}/Complete")
        self.only_streams = ""
        """The instance that was found to have no Complete."""
        self.embed: UnaryMethod = self.channel.unary_unary(f"/{_SERVICE}/Embed")
        self.pull_model: grpc.aio.UnaryStreamMultiCallable = self.channel.unary_stream(f"/{_SERVICE}/PullModel")
        self.load_model: grpc.aio.UnaryStreamMultiCallable = self.channel.unary_stream(f"/{_SERVICE}/LoadModel")
        self.unload_model: grpc.aio.UnaryStreamMultiCallable = self.channel.unary_stream(f"/{_SERVICE}/UnloadModel")


class Upstreams:
    """The pool."""

    def __init__(self) -> None:
        self._by_endpoint: dict[str, Upstream] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, endpoint: str) -> Upstream:
        upstream = self._by_endpoint.get(endpoint)
        if upstream is None:
            upstream = self._by_endpoint[endpoint] = Upstream(endpoint)
        return upstream

    def keep_only(self, endpoints: Iterable[str]) -> None:
        """Close the channels of all other endpoints."""
        kept = set(endpoints)
        for endpoint in self._by_endpoint.keys() - kept:
            task = asyncio.ensure_future(self._by_endpoint.pop(endpoint).channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        self.keep_only(())
        await asyncio.gather(*self._closing)
