"""The SDK: stream, ask for JSON, explain, handle a refusal.

python clients/examples/sdk.py            # address from MODELYARD_ADDRESS, else 127.0.0.1:7460
"""

import asyncio

from modelyard.client import AsyncClient, ModelyardError, NoCapableServer


async def main() -> None:
    async with AsyncClient(timeout=60) as client:
        stream = client.stream("What is modelyard?", task_type="chat", priority="high")
        async for delta in stream.deltas():
            print(delta.text, end="", flush=True)
        result = stream.result
        print(f"\n[{result.server_id}/{result.model}, TTFT {result.timings.ttft * 1e3:.0f} ms]")

        schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
        answer = await client.generate("Give me a name as JSON.", response_format=schema, max_tokens=40)
        print(answer.text)

        decision = await client.explain("Write a haiku", task_type="writing")
        print(decision.summary)

        try:
            await client.generate("Hello", min_context_length=10_000_000)
        except NoCapableServer as error:
            print(f"refused: {error.message}")
        except ModelyardError as error:
            raise SystemExit(f"{error.reason}: {error.message}") from error


asyncio.run(main())
