"""The beginnings of a prompt as hashes, by which a request finds where its own is cached: reckoned the same way by the
control plane, and by clients of direct mode, who do not show it their prompts."""

from __future__ import annotations

from bisect import bisect_right
from hashlib import blake2b
from itertools import accumulate
from struct import unpack
from zlib import crc32

from modelyard.rpc.routing import BYTES_PER_TOKEN, TOKENS_PER_IMAGE, TOKENS_PER_MESSAGE
from modelyard.v1 import generation_pb2

MOST_DIGESTS = 512
"""Of one prompt."""

# Blocks of 64 tokens at first; after every 32 of them the next are twice as long. So a chat has nearly as fine a grain
# as engines have, and a megabyte has 224 blocks, none of them longer than 64 tokens or a 16th of what comes before it.
_FIRST_BLOCK = 64
_BLOCKS_OF_A_SIZE = 32
BLOCK_TOKENS = tuple(_FIRST_BLOCK << number // _BLOCKS_OF_A_SIZE for number in range(MOST_DIGESTS))
"""Of each block."""
BLOCK_ENDS = tuple(accumulate(BLOCK_TOKENS))
"""Tokens up to the end of each."""
_ENDS = tuple(tokens * BYTES_PER_TOKEN for tokens in BLOCK_ENDS)

# Longer blocks enter the chain as their CRC, which takes a quarter of the time. Two unlike blocks that follow the same
# beginning are taken for the same once in 2**32 times.
_LONGEST_HASHED = 1024

# Texts are UTF-8, in which this byte does not occur: no text can pass for the end of another, or for the mark of a
# field.
_END = b"\xff"
_NAME, _ANSWERS, _CALL, _PROMPT = b"\xffn", b"\xffa", b"\xffc", b"\xffp"

# As long as the tokens that stand for them.
_HEADERS = {
    role: (b"\xffm%d" % role).ljust(TOKENS_PER_MESSAGE * BYTES_PER_TOKEN, _END) for role in generation_pb2.Role.values()
}
_IMAGE_BYTES = TOKENS_PER_IMAGE * BYTES_PER_TOKEN


def prompt_bytes(source: generation_pb2.GenerationInput) -> bytes:
    """What is hashed of an input.

    The order is that in which chat templates put things: tools, then messages. Of an image its checksum and size go in,
    as often as makes the tokens that it is taken for. How to sample and the form of the answer are no part of a prompt.
    """
    parts: list[bytes] = []
    for tool in source.tools:
        parts += (tool.name.encode(), _END, tool.description.encode(), _END, tool.parameters_schema.encode(), _END)
    for message in source.messages:
        parts.append(_HEADERS[message.role])
        if message.name:
            parts += (_NAME, message.name.encode())
        if message.tool_call_id:
            parts += (_ANSWERS, message.tool_call_id.encode())
        for part in message.content:
            text = part.text
            parts += (_END, text.encode() if text or not part.HasField("image") else _image(part.image.data))
        for call in message.tool_calls:
            parts += (_CALL, call.id.encode(), _END, call.name.encode(), _END, call.arguments_json.encode())
    if source.prompt:
        parts += (_PROMPT, source.prompt.encode())
    return b"".join(parts)


def digests(prompt: bytes) -> tuple[int, ...]:
    """Of each block and all before it, 64 bits, about 1 µs each; what is left after the last whole one is in none."""
    count = bisect_right(_ENDS, len(prompt))
    chain = blake2b(digest_size=8)
    found = []
    view = memoryview(prompt)
    begin = 0
    for end in _ENDS[:count]:
        block = view[begin:end]
        chain.update(block if end - begin <= _LONGEST_HASHED else crc32(block).to_bytes(4, "little"))
        found.append(chain.digest())
        begin = end
    return unpack(f"<{count}Q", b"".join(found))


def _image(data: bytes) -> bytes:
    told = b"%08x%08x" % (crc32(data), len(data) & 0xFFFFFFFF)
    return told * (_IMAGE_BYTES // len(told))
