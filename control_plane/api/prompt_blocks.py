"""The prompt of a request as blocks that tell equal beginnings, and nothing else."""

from __future__ import annotations

from zlib import crc32

from control_plane.domain.prompt import Blocks
from control_plane.prefix.blocks import BYTES_PER_TOKEN, fingerprint
from modelyard.rpc.routing import TOKENS_PER_IMAGE, TOKENS_PER_MESSAGE
from modelyard.v1 import generation_pb2

# Texts are UTF-8, in which this byte does not occur: no text can pass for the end of another, or for the mark of a
# field.
_END = b"\xff"
_NAME, _ANSWERS, _CALL, _PROMPT = b"\xffn", b"\xffa", b"\xffc", b"\xffp"

# As long as the tokens that stand for them.
_HEADERS = {
    role: (b"\xffm%d" % role).ljust(TOKENS_PER_MESSAGE * BYTES_PER_TOKEN, _END) for role in generation_pb2.Role.values()
}
_IMAGE_BYTES = TOKENS_PER_IMAGE * BYTES_PER_TOKEN


def prompt_blocks(source: generation_pb2.GenerationInput, secret: bytes, tenant: str) -> Blocks:
    """Blocks of a checked input. `secret` is that of `fingerprint`.

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
    return fingerprint(b"".join(parts), secret, tenant)


def _image(data: bytes) -> bytes:
    told = b"%08x%08x" % (crc32(data), len(data) & 0xFFFFFFFF)
    return told * (_IMAGE_BYTES // len(told))
