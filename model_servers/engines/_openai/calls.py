"""Generating and embedding over OpenAI's API. Importing this module needs aiohttp."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import msgspec

from model_servers.engine import (
    Delta,
    Embeddings,
    EngineError,
    EngineFailed,
    Finished,
    GenerationRequest,
)
from model_servers.engines._openai import answers, errors, requests
from model_servers.engines._openai.answers import Reader
from model_servers.engines._openai.dialect import Dialect
from model_servers.engines._openai.errors import Source
from model_servers.engines._openai.transport import Transport
from modelyard.openai import wire


class Calls:
    """What is asked of one server."""

    def __init__(self, transport: Transport, source: Source, dialect: Dialect, embedding_batch: int) -> None:
        self._transport = transport
        self._source = source
        self._dialect = dialect
        self._embedding_batch = embedding_batch

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta | Finished, None]:
        """See Engine.generate; nothing is queued here."""
        dialect, sampling = self._dialect, request.sampling
        completion = requests.as_completion(request, dialect)
        path = "/completions" if completion else "/chat/completions"
        body = requests.completion(request, dialect) if completion else requests.chat(request, dialect)
        reader = Reader(
            self._source,
            completion=completion,
            stops=requests.local_stops(sampling, dialect),
            top=sampling.top_logprobs if sampling.logprobs else None,
        )
        pending: Delta | None = None
        passed = False
        async with self._transport.stream(path, msgspec.json.encode(body)) as events:
            try:
                while not reader.over:
                    try:
                        payloads = await events.next()
                    except EngineFailed:
                        if not reader.finished:
                            raise
                        break  # the answer is whole, only its usage did not come
                    if not payloads:
                        break
                    for payload in payloads:
                        delta = reader.read(payload)
                        if delta is not None:
                            if pending is not None:
                                passed = True
                                yield pending
                            pending = delta
                        if reader.over:
                            break
                    if pending is not None and not reader.over:
                        passed = True
                        yield pending
                        pending = None
                    if reader.begun:
                        events.extend()
                finished = reader.end(pending)
            except EngineFailed:
                raise
            except EngineError as error:
                if passed:
                    raise EngineFailed(str(error)) from error
                raise
            if reader.done:
                await events.drain()
        if not finished.usage.prompt_tokens:
            finished = replace(finished, usage=replace(finished.usage, prompt_tokens=_estimate(request)))
        yield finished

    async def embed(self, model: str, inputs: Sequence[str]) -> Embeddings:
        """See Engine.embed; long lists are sent in batches, one after the other."""
        vectors: list[Sequence[float]] = []
        tokens = 0
        for start in range(0, len(inputs), self._embedding_batch):
            batch = list(inputs[start : start + self._embedding_batch])
            body = wire.EmbeddingRequest(model=model, input=batch, encoding_format="float")
            reply = await self._transport.post("/embeddings", msgspec.json.encode(body))
            if reply.status != 200:
                raise errors.from_response(self._source, reply.status, reply.headers, reply.body)
            loop = asyncio.get_running_loop()
            found, counted = await loop.run_in_executor(None, answers.vectors, self._source, reply.body, len(batch))
            vectors += found
            tokens += counted or sum(answers.estimated(len(text)) for text in batch)
        return Embeddings(tuple(vectors), tokens)


def _estimate(request: GenerationRequest) -> int:
    texts = [request.prompt or "", *(message.text for message in request.messages)]
    return answers.estimated(sum(map(len, texts)))
