"""The chat format of yardling: ChatML with Hermes-style tools, as a Jinja template and as segments for training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .corpus import Conversation, Message

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TOOL_MARKS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>")

_TOOLS_OPEN = "You can call these tools:\n<tools>\n"
_TOOLS_CLOSE = (
    '\n</tools>\nTo call one, answer <tool_call>{"name": "the name", "arguments": {the arguments}}</tool_call>.'
)

TEMPLATE = (
    "{%- if tools %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- 'You can call these tools:\\n<tools>' }}"
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    '{{- \'\\n</tools>\\nTo call one, answer <tool_call>{"name": "the name", "arguments": {the arguments}}'
    "</tool_call>.<|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if not (loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content %}{{- message.content }}{%- endif %}"
    "{%- if message.tool_calls %}{%- for tool_call in message.tool_calls %}"
    "{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}"
    '{{- \'<tool_call>{"name": "\' + tool_call.name + \'", "arguments": \' }}'
    "{%- if tool_call.arguments is string %}{{- tool_call.arguments }}"
    "{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}"
    "{{- '}</tool_call>' }}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def segments(conversation: Conversation) -> Iterator[tuple[str, bool]]:
    """Yield the text of a conversation in pieces, each with whether the model is to learn to write it."""
    messages = list(conversation.messages)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    if conversation.tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
        system = (f"{system}\n\n" if system else "") + _TOOLS_OPEN + listed + _TOOLS_CLOSE
    if system is not None:
        yield f"{START}system\n{system}{END}\n", False
    for message in messages:
        yield f"{START}{message['role']}\n", False
        yield _body(message) + END, message["role"] == "assistant"
        yield "\n", False


def _body(message: Message) -> str:
    text: str = message.get("content") or ""
    for call in message.get("tool_calls", ()):
        function: dict[str, Any] = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        text += f'<tool_call>{{"name": "{function["name"]}", "arguments": {arguments}}}</tool_call>'
    return text
