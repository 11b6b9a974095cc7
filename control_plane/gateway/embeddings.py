"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np

from control_plane.gateway import inputs
from control_plane.gateway.answers import encode
from control_plane.gateway.errors import refuse
from control_plane.gateway.hints import pin
from modelyard.openai import wire
from modelyard.v1.orchestrator_pb2 import EmbedRequest, EmbedResponse

LABEL = "http_embeddings"

_decoder = msgspec.json.Decoder(wire.EmbeddingRequest)


class AskedEmbeddings(NamedTuple):
    request: EmbedRequest
    metadata: Mapping[str, str] | None
    base64: bool


def parse(body: bytes) -> AskedEmbeddings:
    """The request in a body. Raises INVALID_REQUEST."""
    asked = inputs.decode(_decoder, body)
    request = EmbedRequest()
    pin(request.requirements, asked.model)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    for text in texts:
        if not isinstance(text, str):
            raise refuse("input", "must be text: token numbers are not supported, as models of a fleet differ in them")
        request.inputs.append(text)
    if asked.dimensions is not None:
        raise refuse("dimensions", "is not supported: vectors have the length that the model gives them")
    if asked.encoding_format not in (None, "float", "base64"):
        raise refuse("encoding_format", "must be float or base64")
    return AskedEmbeddings(request, asked.metadata, asked.encoding_format == "base64")


def rename(path: str) -> str:
    """The field of an embedding request that a field of the contract was made from."""
    return {"inputs": "input", "requirements.model": "model"}.get(path, path)


def render(response: EmbedResponse, as_base64: bool) -> bytes:
    """The body of the answer; base64 means little-endian float32."""
    data = []
    for index, embedding in enumerate(response.embeddings):
        values: list[float] | str
        if as_base64:
            values = base64.b64encode(np.asarray(embedding.values, dtype="<f4").tobytes()).decode()
        else:
            values = list(embedding.values)
        data.append(wire.Embedding(index=index, embedding=values))
    tokens = response.usage.prompt_tokens
    usage = wire.Usage(prompt_tokens=tokens, total_tokens=tokens)
    return encode(wire.EmbeddingResponse(data=data, model=response.model, usage=usage))
