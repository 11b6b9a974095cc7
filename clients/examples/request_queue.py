"""RequestQueue and beliefs: many requests, a bounded number at a time, each told of when it is done.

python clients/examples/request_queue.py  # address from MODELYARD_ADDRESS, else 127.0.0.1:7460
"""

import asyncio

from modelyard.client import AsyncClient, RequestQueue, Task

QUESTIONS = ("What is modelyard?", "What is a lease?", "What is a model server?", "Say hello.")


async def tell(task: Task) -> None:
    result = task.result
    print(f"{task.id} {task.state}", f"on {result.server_id}/{result.model}" if result else task.failure_message)


async def main() -> None:
    async with AsyncClient() as client:
        async with RequestQueue(client, concurrency=2, timeout=60, max_attempts=3) as queue:
            ids = [await queue.submit(text, max_tokens=30, on_done=tell) for text in QUESTIONS]
            print((await queue.result(ids[0])).text)
        print(queue.statistics())

        # The end of every task is a belief, and so is whatever others hold to be true.
        print(await client.beliefs.get(f"tasks/{ids[0]}"))
        await client.beliefs.put("weather/berlin", {"sky": "grey"}, confidence=0.8, source="the window")
        async for belief in client.beliefs.watch("weather/", after=0):
            print(belief.key, belief.value, belief.confidence)
            break


asyncio.run(main())
