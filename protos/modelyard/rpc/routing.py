"""What routing may know of an input, reckoned the same way by the control plane and by clients of direct mode."""

from __future__ import annotations

from modelyard.v1 import fleet_pb2, generation_pb2

# A tokenizer is the model's own affair; routing only has to know whether a prompt can fit.
# UTF-8 bytes per token are steadier over languages than characters are.
BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
TOKENS_PER_IMAGE = 768


def estimated_tokens(source: generation_pb2.GenerationInput) -> int:
    """Prompt tokens of an input, estimated from its size."""
    total = len(source.prompt.encode()) // BYTES_PER_TOKEN
    for message in source.messages:
        total += TOKENS_PER_MESSAGE
        for part in message.content:
            if part.HasField("image"):
                total += TOKENS_PER_IMAGE
            else:
                total += len(part.text.encode()) // BYTES_PER_TOKEN
        for call in message.tool_calls:
            total += len(call.arguments_json.encode()) // BYTES_PER_TOKEN
    for tool in source.tools:
        total += (len(tool.description.encode()) + len(tool.parameters_schema.encode())) // BYTES_PER_TOKEN
    return max(total, 1)


def implied_features(source: generation_pb2.GenerationInput) -> list[fleet_pb2.ModelFeature]:
    """Features that the input cannot do without."""
    features = []
    if source.tools and source.tool_choice.mode != generation_pb2.TOOL_CHOICE_MODE_NONE:
        features.append(fleet_pb2.MODEL_FEATURE_FUNCTION_CALLING)
    if source.HasField("response_format"):
        form = source.response_format.WhichOneof("format")
        if form == "json":
            features.append(fleet_pb2.MODEL_FEATURE_JSON)
        elif form == "json_schema":
            features.append(fleet_pb2.MODEL_FEATURE_JSON_SCHEMA)
    if source.sampling.logprobs:
        features.append(fleet_pb2.MODEL_FEATURE_LOGPROBS)
    for message in source.messages:
        for part in message.content:
            if part.HasField("image"):
                features.append(fleet_pb2.MODEL_FEATURE_VISION)
                return features
    return features
