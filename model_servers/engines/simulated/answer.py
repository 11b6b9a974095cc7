"""What the simulated engine will answer: known in full before the first token is sent."""

from __future__ import annotations

from dataclasses import dataclass

from model_servers.engine import (
    Delta,
    FinishReason,
    GenerationRequest,
    TokenLogprob,
    ToolCallDelta,
    ToolChoiceMode,
)
from model_servers.engines.simulated.schema import minimal_json
from model_servers.engines.simulated.text import CHARACTERS_PER_TOKEN, count_tokens, filler

_LIKELY, _UNLIKELY = -0.0625, -2.75
_SHORTEST, _SPREAD = 40, 160


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is still to be sent piece by piece."""

    text: str
    tokens: int
    finish_reason: FinishReason
    number: int
    """Determines everything that looks random."""
    call_id: str = ""
    tool: str = ""
    """Not empty: `text` is the arguments of a call of this tool."""
    top_logprobs: int | None = None
    """None: no log-probabilities were asked for."""

    def piece(self, start: int, tokens: int) -> Delta:
        """The delta with tokens [start, start + tokens)."""
        text = self.text[start * CHARACTERS_PER_TOKEN : (start + tokens) * CHARACTERS_PER_TOKEN]
        if self.tool:
            first = start == 0
            call = ToolCallDelta(0, self.call_id if first else "", self.tool if first else "", text)
            return Delta(tokens=tokens, tool_calls=(call,))
        if self.top_logprobs is None:
            return Delta(text, tokens)
        return Delta(text, tokens, self._logprobs(text, start))

    def _logprobs(self, text: str, start: int) -> tuple[TokenLogprob, ...]:
        found = []
        for n, at in enumerate(range(0, len(text), CHARACTERS_PER_TOKEN)):
            token = text[at : at + CHARACTERS_PER_TOKEN]
            likely = (self.number >> ((start + n) % 48)) & 3
            logprob = _LIKELY * (1 + likely)
            others = [(f"~{i}", _UNLIKELY - i / 4) for i in range(1, self.top_logprobs or 0)]
            found.append(TokenLogprob(token, logprob, ((token, logprob), *others) if self.top_logprobs else ()))
        return tuple(found)


def is_held(request: GenerationRequest) -> bool:
    """Whether the answer has to satisfy a schema of the request."""
    return request.json_schema is not None or request.tool_choice is ToolChoiceMode.REQUIRED


def compose(request: GenerationRequest, number: int, engine_seed: int, answer_tokens: int, room: int) -> Answer:
    """The answer to a request: `room` is what max_tokens and the context length leave.

    Raises Unsupported for schemas that no value is known for, InvalidRequest for those that are none. With
    `is_held(request)` it may take a quarter of a second.
    """
    sampling = request.sampling
    most = room * CHARACTERS_PER_TOKEN + 1
    tool = ""
    if request.tools and request.tool_choice is ToolChoiceMode.REQUIRED:
        index = next((n for n, each in enumerate(request.tools) if each.name == request.tool_name), 0)
        tool = request.tools[index].name
        text = minimal_json(request.tools[index].parameters_schema, f"tools[{index}].parameters_schema", most)
    elif request.json_schema is not None:
        text = minimal_json(request.json_schema, "response_format.json_schema.schema", most)
    elif request.json_object:
        text = '{"simulated": true}'
    else:
        wanted = answer_tokens or _SHORTEST + number % _SPREAD
        # A text cut short by max_tokens is the beginning of the uncut one.
        text = filler(number, wanted, engine_seed, whole_sentences=not answer_tokens)
    reason = FinishReason.TOOL_CALLS if tool else FinishReason.STOP
    tokens = count_tokens(text)
    if tokens > room:
        text, tokens, reason = text[: room * CHARACTERS_PER_TOKEN], room, FinishReason.LENGTH
    if sampling.stop and not tool:
        ends = [at for at in map(text.find, sampling.stop) if at >= 0]
        if ends:
            text = text[: min(ends)]
            tokens, reason = count_tokens(text), FinishReason.STOP
    return Answer(
        text=text,
        tokens=tokens,
        finish_reason=reason,
        number=number,
        call_id=f"call_{number & 0xFFFFFFFF:08x}" if tool else "",
        tool=tool,
        top_logprobs=sampling.top_logprobs if sampling.logprobs else None,
    )
