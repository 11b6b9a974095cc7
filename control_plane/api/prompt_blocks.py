"""The prompt of a request as blocks that tell equal beginnings, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.domain.prompt import Blocks
from control_plane.prefix.blocks import own_blocks
from modelyard.rpc.prompts import BLOCK_ENDS, BLOCK_TOKENS, digests, prompt_bytes
from modelyard.rpc.routing import BYTES_PER_TOKEN
from modelyard.v1 import generation_pb2


def prompt_blocks(source: generation_pb2.GenerationInput, secret: bytes, tenant: str) -> Blocks:
    """Blocks of a checked input. `secret` is that of `own_blocks`."""
    prompt = prompt_bytes(source)
    return digest_blocks(digests(prompt), len(prompt) // BYTES_PER_TOKEN, secret, tenant)


def digest_blocks(
    hashes: Sequence[int],
    tokens: int,
    secret: bytes,
    tenant: str,
    before: generation_pb2.GenerationInput | None = None,
) -> Blocks:
    """Blocks of a prompt of `tokens` whose hashes are given, and which comes after what is in `before`."""
    first = prompt_bytes(before) if before is not None else b""
    return own_blocks(hashes, BLOCK_TOKENS, BLOCK_ENDS, tokens, secret, tenant, first)
