"""OpenAI's Python SDK against modelyard's gateway: chat, streams, tools, JSON, embeddings, errors.

pip install openai && python openai_tour.py http://127.0.0.1:7462/v1
"""

from __future__ import annotations

import json
import sys
from typing import Any

import openai

WEATHER: Any = {
    "name": "get_weather",
    "description": "Tells the weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
NAME: Any = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}


def main(base_url: str) -> None:
    # The key is not looked at: there is no authentication yet.
    client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0)
    ask: Any = [{"role": "user", "content": "What is modelyard?"}]

    print("models:", [model.id for model in client.models.list()])

    # "auto" leaves the choice to modelyard; headers say what is wanted of it.
    raw = client.chat.completions.with_raw_response.create(
        model="auto",
        messages=ask,
        max_tokens=40,
        temperature=0,
        extra_headers={"X-Modelyard-Priority": "high", "X-Modelyard-Explain": "true"},
    )
    answer = raw.parse()
    print("chat:", answer.choices[0].message.content)
    print("chosen:", raw.headers["x-modelyard-server"], "because", raw.headers["x-modelyard-decision"])

    stream = client.chat.completions.create(
        model="auto", messages=ask, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    pieces, tokens = 0, 0
    for chunk in stream:
        pieces += bool(chunk.choices and chunk.choices[0].delta.content)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    print("stream:", pieces, "pieces,", tokens, "tokens")

    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    tools: Any = [{"type": "function", "function": WEATHER}]
    called = client.chat.completions.create(
        model="auto", messages=question, tools=tools, tool_choice="required", temperature=0
    )
    message: Any = called.choices[0].message
    (call,) = message.tool_calls
    print("tool:", call.function.name, json.loads(call.function.arguments))
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}
    told = client.chat.completions.create(
        model="auto", messages=[*question, message.model_dump(exclude_none=True), result], tools=tools, max_tokens=40
    )
    print("after the tool:", told.choices[0].message.content)

    form: Any = {"type": "json_schema", "json_schema": {"name": "name", "schema": NAME, "strict": True}}
    named = client.chat.completions.create(
        model="auto",
        messages=[{"role": "user", "content": "Give me a name as JSON."}],
        response_format=form,
        temperature=0,
    )
    print("schema:", json.loads(named.choices[0].message.content or ""))

    response = client.responses.create(model="auto", input="What is a lease?", max_output_tokens=40)
    print("response:", response.output_text)
    with client.responses.stream(model="auto", input="What is a lease?", max_output_tokens=40) as events:
        deltas = sum(event.type == "response.output_text.delta" for event in events)
    print("response stream:", deltas, "pieces")

    completion = client.completions.create(model="auto", prompt="Once upon a time", max_tokens=10)
    print("completion:", completion.choices[0].text)

    vectors = client.embeddings.create(model="auto", input=["one", "two"])
    print("embeddings:", len(vectors.data), "of length", len(vectors.data[0].embedding))

    try:
        client.chat.completions.create(model="gpt-9", messages=ask)
    except openai.NotFoundError as error:
        print("error:", error.status_code, error.code, error.request_id is not None)
    try:
        client.chat.completions.create(model="auto", messages=ask, temperature=9)
    except openai.BadRequestError as error:
        print("error:", error.status_code, error.param)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7462/v1")
