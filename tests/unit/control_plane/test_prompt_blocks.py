"""prompt_blocks: what of a request is a block, and what is not."""

from __future__ import annotations

import pytest

from control_plane.api.prompt_blocks import prompt_blocks
from modelyard.rpc.routing import estimated_tokens
from modelyard.v1.generation_pb2 import (
    ROLE_ASSISTANT,
    ROLE_SYSTEM,
    ROLE_TOOL,
    ROLE_USER,
    TOOL_CHOICE_MODE_NONE,
    ContentPart,
    GenerationInput,
    Image,
    Message,
    ResponseFormat,
    SamplingParams,
    TextFormat,
    Tool,
    ToolCall,
    ToolChoice,
)

SECRET = b"secret"
RULES = "You are a careful assistant. " * 60
PAPER = "".join(f"Line {number} of the paper. " for number in range(200))


def ids(source: GenerationInput, tenant: str = "acme") -> tuple[int, ...]:
    return prompt_blocks(source, SECRET, tenant).ids


def said(role: int, *texts: str, **fields: object) -> Message:
    return Message(role=role, content=[ContentPart(text=text) for text in texts], **fields)  # type: ignore[arg-type]


def chat(*messages: Message, **fields: object) -> GenerationInput:
    return GenerationInput(messages=messages, **fields)  # type: ignore[arg-type]


def equal_blocks(one: GenerationInput, other: GenerationInput) -> int:
    first, second = ids(one), ids(other)
    return next((n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), len(first))


def test_a_conversation_that_goes_on_begins_with_what_it_was() -> None:
    before = chat(said(ROLE_SYSTEM, RULES), said(ROLE_USER, PAPER))
    after = chat(*before.messages, said(ROLE_ASSISTANT, "An answer."), said(ROLE_USER, "And why? " * 200))
    assert len(ids(before)) > 20 and len(ids(after)) > len(ids(before))
    assert ids(after)[: len(ids(before))] == ids(before)


def test_messages_that_begin_equally_share_their_beginning() -> None:
    one, other = (chat(said(ROLE_USER, PAPER + question)) for question in ("Why?" * 100, "What?" * 200))
    assert equal_blocks(one, other) == len(ids(chat(said(ROLE_USER, PAPER))))


def test_no_block_is_of_two_tenants() -> None:
    source = chat(said(ROLE_USER, PAPER))
    assert not set(ids(source)) & set(ids(source, "evil"))


IMAGE = ContentPart(image=Image(data=b"pixels" * 1000, media_type="image/png"))


@pytest.mark.parametrize(
    "other",
    [
        chat(said(ROLE_SYSTEM, PAPER), said(ROLE_USER, RULES)),
        chat(said(ROLE_USER, PAPER + RULES)),
        chat(said(ROLE_USER, PAPER, RULES)),
        chat(said(ROLE_USER, PAPER), said(ROLE_ASSISTANT, RULES)),
        chat(said(ROLE_USER, PAPER), said(ROLE_USER, RULES, name="ann")),
        chat(said(ROLE_USER, PAPER), said(ROLE_TOOL, RULES, tool_call_id="1")),
        chat(said(ROLE_USER, PAPER), said(ROLE_TOOL, RULES, tool_call_id="2")),
        chat(said(ROLE_USER, PAPER), said(ROLE_USER, "x\xff\xffm2" + RULES)),
        chat(said(ROLE_USER, PAPER), Message(role=ROLE_USER, content=[IMAGE, ContentPart(text=RULES)])),
        chat(said(ROLE_USER, PAPER), said(ROLE_USER, RULES), tools=[Tool(name="find")]),
        chat(said(ROLE_USER, PAPER), said(ROLE_USER, RULES), tools=[Tool(name="find", description="it")]),
        chat(said(ROLE_USER, PAPER), said(ROLE_USER, RULES), tools=[Tool(name="find", parameters_schema="it")]),
        chat(
            said(ROLE_USER, PAPER),
            Message(role=ROLE_ASSISTANT, tool_calls=[ToolCall(id="1", name="find", arguments_json=RULES)]),
        ),
        GenerationInput(prompt=PAPER + RULES),
    ],
)
def test_what_the_model_is_told_otherwise_is_another_prompt(other: GenerationInput) -> None:
    source = chat(said(ROLE_USER, PAPER), said(ROLE_USER, RULES))
    assert ids(source)[-1] not in ids(other)
    assert ids(other) == ids(GenerationInput.FromString(other.SerializeToString()))


def test_the_same_text_in_other_fields_is_another_prompt() -> None:
    named = chat(said(ROLE_USER, PAPER, name="ann"))
    quoted = chat(said(ROLE_USER, "ann", PAPER))
    answering = chat(said(ROLE_USER, PAPER, tool_call_id="ann"))
    assert len({ids(source)[0] for source in (named, quoted, answering)}) == 3


def test_how_to_answer_is_no_part_of_the_prompt() -> None:
    plain = chat(said(ROLE_USER, PAPER))
    told = chat(
        said(ROLE_USER, PAPER),
        sampling=SamplingParams(temperature=1.0, max_tokens=5),
        response_format=ResponseFormat(text=TextFormat()),
        tool_choice=ToolChoice(mode=TOOL_CHOICE_MODE_NONE),
    )
    assert ids(plain) == ids(told)


def test_an_image_is_known_by_its_content_and_takes_its_tokens() -> None:
    def about(data: bytes) -> GenerationInput:
        image = ContentPart(image=Image(data=data, media_type="image/png"))
        return chat(Message(role=ROLE_USER, content=[image, ContentPart(text=PAPER)]))

    one = b"pixels" * 100_000
    other = one[:-1] + b"?"
    assert ids(about(one)) == ids(about(bytes(one)))
    assert equal_blocks(about(one), about(other)) == 0
    assert equal_blocks(about(one), about(one + b"s")) == 0
    assert prompt_blocks(about(one), SECRET, "acme").tokens >= 768 + len(PAPER) // 4


@pytest.mark.parametrize(
    "source",
    [
        chat(said(ROLE_SYSTEM, RULES), said(ROLE_USER, "Grüße, 世界! " * 500)),
        chat(Message(role=ROLE_USER, content=[IMAGE, IMAGE]), tools=[Tool(name="find", description=RULES)]),
        GenerationInput(prompt=PAPER),
    ],
)
def test_tokens_are_about_what_routing_reckons(source: GenerationInput) -> None:
    assert prompt_blocks(source, SECRET, "acme").tokens == pytest.approx(estimated_tokens(source), rel=0.01)


def test_no_text_is_kept() -> None:
    blocks = prompt_blocks(chat(said(ROLE_USER, "a secret " * 100)), SECRET, "acme")
    assert "secret" not in repr(blocks) and all(type(block) is int for block in blocks.ids)


def test_short_and_empty_inputs_have_no_blocks() -> None:
    assert ids(GenerationInput()) == () and ids(chat(said(ROLE_USER, "Hi"))) == ()
