"""Durable tasks with the SDK: submit, submit many, follow, handle a failure.

python clients/examples/tasks.py          # address from MODELYARD_ADDRESS, else 127.0.0.1:7460
"""

import asyncio

from modelyard.client import AsyncClient, NewTask, TaskFailed

QUESTIONS = ["What is modelyard?", "What is a lease?", "What is a slot?"]


async def main() -> None:
    # With retries, a call that found nobody is made again; tasks are never submitted twice by that.
    async with AsyncClient(timeout=60, retries=3) as client:
        task = await client.tasks.submit("What is modelyard?", max_tokens=40, group="example")
        async for event in client.tasks.watch(task.id):
            print(event.type, f"{event.server_id}/{event.model}" if event.server_id else "")
        result = await client.tasks.result(task.id)
        print(f"{result.text}\n[{result.server_id}/{result.model}]")

        questions = (NewTask(question, max_tokens=20, group="example") for question in QUESTIONS)
        accepted = [each.task.id async for each in client.tasks.submit_many(questions) if each.task]
        for id in accepted:
            print(await answer(client, id))

        states = [task.state async for task in client.tasks.list(group="example", limit=4)]
        print(states)


async def answer(client: AsyncClient, id: str) -> str:
    try:
        return (await client.tasks.result(id, timeout=60)).text
    except TaskFailed as error:
        return f"{error.task.state} after {error.task.attempt_count} attempts: {error.reason}"


asyncio.run(main())
