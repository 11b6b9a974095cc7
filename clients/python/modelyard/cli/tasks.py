"""`modelyard tasks`: durable tasks. They outlive this command, the control plane and the server that runs them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli import output
from modelyard.cli.callbacks import callbacks
from modelyard.cli.connection import call
from modelyard.cli.errors import FAILED, USAGE, CliError
from modelyard.cli.options import (
    SECONDS,
    TASK_STATES,
    TASK_TYPES,
    as_json,
    batch_options,
    read_prompt,
    request,
    request_options,
    tenant_option,
    timeout_option,
    zoned,
)
from modelyard.cli.output import Column
from modelyard.cli.session import Session

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, Task, TaskEvent

_LOOK = 1.5
"""Seconds between two looks at what a task waits for."""

_states = click.option(
    "--state", "states", multiple=True, type=click.Choice(TASK_STATES), help="In this state. May be repeated."
)
_types = click.option(
    "--task-type", "task_types", multiple=True, type=click.Choice(TASK_TYPES), metavar="TYPE", help="Of this kind."
)
_group = click.option("--group", metavar="NAME", help="Of this group.")


@click.group("tasks")
def tasks() -> None:
    """Submit, follow and steer durable tasks.

    \b
    modelyard tasks submit --wait "What is modelyard?"
    modelyard tasks batch prompts.jsonl -o results.jsonl
    modelyard tasks list --state failed
    """


tasks.add_command(callbacks)


# -------------------------------------------------------------------- submit ---


def _to_time(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | float | None:
    """A time, by default of this machine's zone, or seconds from now."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        pass
    else:
        try:
            datetime.now(UTC) + timedelta(seconds=seconds)
        except (OverflowError, ValueError):
            raise click.BadParameter(f"{value!r} seconds from now is no time", ctx, param) from None
        return seconds
    try:
        return zoned(value)
    except OverflowError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    except ValueError:
        told = f'{value!r} is neither a number of seconds nor a time such as "2030-01-31T12:00+00:00"'
        raise click.BadParameter(told, ctx, param) from None


@tasks.command("submit")
@click.argument("prompt", required=False)
@request_options
@click.option("--key", "idempotency_key", metavar="TEXT", help="The same task with the same key is submitted once.")
@click.option("--group", metavar="NAME", help="A name to list and watch tasks by.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A note. May be repeated.")
@click.option("--not-before", callback=_to_time, metavar="TIME", help="Earliest start: seconds from now, or a time.")
@click.option("--deadline", callback=_to_time, metavar="TIME", help="Not finished by then, it expires.")
@click.option("--max-attempts", type=click.IntRange(1, 100), metavar="N", help="Attempts that may fail.")
@click.option("--attempt-timeout", type=SECONDS, metavar="SECONDS", help="Of one attempt.")
@click.option("--callback", metavar="URL", help="An https address to be told when it is terminal.")
@click.option("--wait", is_flag=True, help="Wait for the answer and print it.")
@timeout_option
@tenant_option
@as_json
@click.pass_obj
def submit(
    session: Session, /, prompt: str | None, labels: tuple[str, ...], wait: bool, timeout: float | None, **options: Any
) -> int:
    """Submit a task and print its id. It is on disk then.

    The prompt is an argument, or - or nothing to read it from standard input.
    """
    notes = dict(_label(text) for text in labels)
    asked, given = request(read_prompt(prompt), **options)

    async def work(client: AsyncClient) -> Task:
        await _tell_of_absent(client, given.get("server_id"))
        task = await client.tasks.submit(asked, task_labels=notes, **given)
        if not wait:
            return task
        output.note(f"task {task.id}")
        try:
            return await _wait(client, task.id, timeout)
        except asyncio.CancelledError:  # by Ctrl-C
            whose = f" --tenant {session.tenant}" if session.tenant else ""
            output.note(f"task {task.id} goes on: `modelyard tasks get {task.id} --wait{whose}` waits for it again")
            raise

    task = call(session, work)
    if session.json:
        output.print_json(task.to_dict())
    elif task.result is not None:
        print(output.printable(task.result.text) if output.is_terminal(sys.stdout) else task.result.text)
    elif not wait:
        print(task.id)
    return _status(task) if wait else 0


async def _tell_of_absent(client: AsyncClient, server_id: str | None) -> None:
    """A task may wait for a server that has yet to come, so one that is not there is no error; but worth a word."""
    if not server_id:
        return
    known = [server.server_id for server in await client.servers()]
    if server_id not in known:
        there = f"known: {', '.join(known)}" if known else "none has attached"
        output.note(f"no model server {server_id!r} is known now ({there}): what is for it waits until it comes")


async def _wait(client: AsyncClient, id: str, timeout: float | None) -> Task:
    """The task when it is terminal; says meanwhile why it is still queued."""
    teller = asyncio.create_task(_tell_why(client, id))
    try:
        return await client.tasks.wait(id, timeout=timeout)
    finally:
        teller.cancel()
        await asyncio.gather(teller, return_exceptions=True)


async def _tell_why(client: AsyncClient, id: str) -> None:
    from modelyard.client import ModelyardError

    told = ""
    while True:
        await asyncio.sleep(_LOOK)
        with contextlib.suppress(ModelyardError):  # whoever waits hears of it
            why = (await client.tasks.get(id)).waiting_for
            # A time that runs down or a queue that moves is no news.
            gist = re.sub(r"\d[\d.,]*( (ms|s|min|h|d))?", "#", why)
            if why and gist != told:
                output.note(f"queued: {why}")
            told = gist


def _label(text: str) -> tuple[str, str]:
    key, given, value = text.partition("=")
    if not given or not key:
        raise CliError(f"--label {text}: must be KEY=VALUE", USAGE, "USAGE")
    return key, value


def _status(task: Task) -> int:
    """The exit status for a task that should have succeeded."""
    if task.state == "succeeded":
        return 0
    why = task.failure_message or task.failure_reason
    output.problem(f"task {task.id} is {task.state}" + (f": {why}" if why else ""))
    return FAILED


# --------------------------------------------------------------------- batch ---


@tasks.command("batch")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True, dir_okay=False))
@click.option(
    "-o",
    "--output",
    "results",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RESULTS",
    help="A JSONL file.",
)
@click.option("--group", metavar="NAME", help="Group of the tasks. Default: the name of the file.")
@click.option("--retry-failed", is_flag=True, help="Do again what has failed before.")
@batch_options
@tenant_option
@as_json
@click.pass_obj
def batch(
    session: Session, /, file: Path, results: Path | None, group: str | None, retry_failed: bool, **options: Any
) -> int:
    """Answer every prompt of a file; run again after Ctrl-C, it goes on where it was.

    Each line of FILE is a JSON object: {"prompt": "..."} or {"messages": [...]}, with options of the task such as id,
    model, max_tokens, temperature, task_type, priority, labels beside it. Options here hold for lines that do not say
    otherwise. The form of all lines is checked before anything is submitted.

    The key of a task is made of its line, the options and the group: the same file run twice submits nothing twice, an
    edited line is a new task. Results come as they are ready and stand in the order of FILE when all are there. What is
    in RESULTS already is kept: results of other files and of edited lines stay behind those of FILE.

    Exit status 1 if some failed.
    """
    from modelyard.cli import batch_file
    from modelyard.cli.batch import run
    from modelyard.client import ModelyardError

    common = {name: value for name, value in options.items() if value not in (None, (), False)}
    if results is not None and file != Path("-") and results.exists() and file.exists() and results.samefile(file):
        raise CliError("the results would replace the prompts: choose another file", USAGE, "USAGE")
    piped = str(file) == "-"
    name = "standard input" if piped else str(file)
    group = group or ("stdin" if piped else file.name)
    text = read_prompt("-") if piped else batch_file.read_text(file)
    entries = batch_file.read_entries(name, text, group, common)

    async def work(client: AsyncClient) -> dict[str, Any]:
        with contextlib.suppress(ModelyardError):  # the batch tells of it, or waits
            await _tell_of_absent(client, common.get("server_id"))
        return await run(client, entries, results, group, retry_failed=retry_failed, quiet=session.json)

    counts = call(session, work)
    failed = counts["failed"]
    if session.json:
        if results is not None:
            output.print_json(counts)
    else:
        where = f" in {results}" if results else ""
        output.note(f"{counts['prompts']} results{where}: {counts['succeeded']} succeeded, {failed} failed")
    return FAILED if failed else 0


# ------------------------------------------------------------------- looking ---

_TASK_COLUMNS = (
    Column("task", style="bold"),
    Column("state"),
    Column("type", optional=2),
    Column("priority", optional=3),
    Column("group", optional=4),
    Column("attempts", right=True),
    Column("age", right=True),
    Column("failure", flexible=True),
)


@tasks.command("list")
@_states
@_types
@_group
@click.option("--key", "idempotency_key", metavar="TEXT", help="With this idempotency key.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, metavar="N", help="Most tasks.")
@click.option("--all", "everything", is_flag=True, help="No limit.")
@tenant_option
@as_json
@click.pass_obj
def list_tasks(session: Session, /, limit: int, everything: bool, **wanted: Any) -> None:
    """List tasks, the newest first."""

    async def work(client: AsyncClient) -> list[Task]:
        most = None if everything else limit
        return [task async for task in client.tasks.list(limit=most, page_size=500, **wanted)]

    found = call(session, work)
    if session.json:
        output.print_json({"tasks": [task.to_dict() for task in found]})
        return
    output.print_table(_TASK_COLUMNS, [_row(task) for task in found], empty="no tasks")
    if not everything and len(found) == limit:
        output.note(f"the newest {limit}; --all shows every one")


def _row(task: Task) -> list[str]:
    return [
        task.id,
        task.state,
        task.task_type,
        task.priority,
        task.group,
        str(task.attempt_count),
        _age(task.created_at),
        task.failure_reason,
    ]


def _age(since: datetime | None) -> str:
    if since is None:
        return "-"
    seconds = max(0.0, (datetime.now(UTC) - since).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@tasks.command("get")
@click.argument("id")
@click.option("--wait", is_flag=True, help="Wait until it is terminal.")
@timeout_option
@tenant_option
@as_json
@click.pass_obj
def get(session: Session, /, id: str, wait: bool, timeout: float | None) -> int:
    """Show one task: its attempts, its history, its result."""

    async def work(client: AsyncClient) -> Task:
        if wait:
            await _wait(client, id, timeout)
        return await client.tasks.get(id)

    task = call(session, work)
    if session.json:
        output.print_json(task.to_dict())
    else:
        _print_task(task)
    return _status(task) if wait else 0


def _print_task(task: Task) -> None:
    facts = (
        ("state", task.state),
        ("type", task.task_type),
        ("priority", task.priority),
        ("group", task.group),
        ("key", task.idempotency_key),
        ("created", _time(task.created_at)),
        ("finished", _time(task.finished_at)),
        ("starts after", _time(task.ready_at)),
        ("attempts", f"{task.attempt_count}, {task.failure_count} of {task.max_attempts} failed"),
        ("failure", " ".join(part for part in (task.failure_reason, task.failure_message) if part)),
        ("waits for", task.waiting_for),
        ("cost", f"${sum(attempt.cost_usd for attempt in task.attempts):.6f}" if task.result else ""),
    )
    rows = [(name, value) for name, value in facts if value and value != "-"]
    output.print_table((Column("task", style="bold"), Column(task.id, flexible=True)), rows)
    if task.attempts:
        output.print_table(
            (
                Column("attempt", right=True),
                Column("server", style="bold"),
                Column("model"),
                Column("took", right=True),
                Column("expected", right=True, optional=1),
                Column("failure", flexible=True),
            ),
            [
                (
                    str(attempt.number),
                    attempt.server_id,
                    attempt.model,
                    _took(attempt.started_at, attempt.ended_at),
                    output.seconds(attempt.predicted.p50) if attempt.predicted else "-",
                    " ".join(part for part in (attempt.failure_reason, attempt.failure_message) if part),
                )
                for attempt in task.attempts
            ],
        )
    output.print_table(_EVENT_COLUMNS, [_event_row(event) for event in task.history])
    if task.result is not None:
        print(output.printable(task.result.text) if output.is_terminal(sys.stdout) else task.result.text)


def _time(at: datetime | None) -> str:
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if at else "-"


def _took(start: datetime | None, end: datetime | None) -> str:
    return output.seconds((end - start).total_seconds()) if start and end else "-"


_EVENT_COLUMNS = (
    Column("time"),
    Column("event", style="bold"),
    Column("server", optional=1),
    Column("model", optional=2),
    Column("reason", flexible=True),
)


def _event_row(event: TaskEvent) -> list[str]:
    at = event.at.astimezone().strftime("%H:%M:%S.%f")[:-3] if event.at else "-"
    reason = " ".join(part for part in (event.reason, event.message) if part)
    return [at, event.type, event.server_id, event.model, reason]


@tasks.command("watch")
@click.argument("id", required=False)
@_states
@_types
@_group
@click.option(
    "--after", type=click.IntRange(0, 2**63 - 1), metavar="EVENT", help="Only later events; 0: from the beginning."
)
@tenant_option
@as_json
@click.pass_obj
def watch(
    session: Session, /, id: str | None, states: tuple[str, ...], task_types: tuple[str, ...], group: str | None,
    after: int | None,
) -> int:  # fmt: skip
    """Print the events of one task until it is terminal, or without ID those of all, until Ctrl-C.

    With ID the exit status is 1 if it did not succeed.
    """
    if id is not None and (states or task_types or group):
        raise CliError("--state, --task-type and --group are for all tasks, not for one", USAGE, "USAGE")

    async def work(client: AsyncClient) -> Task | None:
        if id is not None:
            events = client.tasks.watch(id, after=after or 0)
        else:
            events = client.tasks.watch_all(states=states, task_types=task_types, group=group, after=after)
        last = None
        async for event in events:
            _print_event(event, one=id is not None, as_json=session.json)
            last = event.task or last
        return last if last is not None or id is None else await client.tasks.get(id)

    task = call(session, work)
    return _status(task) if task is not None else 0


def _print_event(event: TaskEvent, *, one: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps(event.to_dict(), ensure_ascii=False), flush=True)
        return
    parts = _event_row(event)
    cells = [parts[0], *([] if one else [event.task_id]), f"{event.type:14}", *(part for part in parts[2:] if part)]
    print(output.printable("  ".join(cells)).rstrip(), flush=True)


@tasks.command("stats")
@tenant_option
@as_json
@click.pass_obj
def stats(session: Session) -> None:
    """How many tasks there are in which state, and why the waiting ones wait."""
    found = call(session, lambda client: client.tasks.stats())
    if session.json:
        output.print_json(found.to_dict())
        return
    rows = [(state, str(count)) for state, count in found.states.items()]
    output.print_table((Column("state", style="bold"), Column("tasks", right=True)), rows, empty="no tasks")
    if found.lanes:
        output.print_table(
            (
                Column("waiting", right=True, style="bold"),
                Column("type"),
                Column("priority"),
                Column("model"),
                Column("oldest", right=True),
                Column("waits for", flexible=True),
            ),
            [
                (
                    f"{lane.count}+" if lane.count >= 10_000 else str(lane.count),
                    lane.task_type,
                    lane.priority,
                    f"{lane.provider}/{lane.model or '*'}" if lane.provider else lane.model or "any",
                    _age(lane.oldest_created_at),
                    lane.waiting_for,
                )
                for lane in found.lanes
            ],
        )
    output.note(
        f"{found.running_here} of {found.workers} workers busy; "
        f"callbacks: {found.callbacks_pending} waiting, {found.callbacks_dead} given up"
    )


# -------------------------------------------------------------------- orders ---


def _order(name: str, about: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A command that does one thing to each of some tasks."""

    def decorate(work: Callable[[AsyncClient, str], Awaitable[Task | None]]) -> click.Command:
        @tasks.command(name, help=about)
        @click.argument("ids", metavar="ID...", nargs=-1, required=True)
        @tenant_option
        @as_json
        @click.pass_obj
        def command(session: Session, /, ids: tuple[str, ...]) -> None:
            for id in ids:
                task = call(session, _bound(work, id))
                if session.json:
                    output.print_json(task.to_dict() if task else {"id": id, "state": "deleted"}, indent=None)
                else:
                    print(output.printable(f"{id} is {task.state}" if task else f"{id} is deleted"))

        return command

    return decorate


def _bound(
    work: Callable[[AsyncClient, str], Awaitable[Task | None]], id: str
) -> Callable[[AsyncClient], Awaitable[Task | None]]:
    return lambda client: work(client, id)


@_order("cancel", "End tasks that are not terminal; what runs is stopped.")
def cancel(client: AsyncClient, id: str) -> Coroutine[Any, Any, Task | None]:
    return client.tasks.cancel(id)


@_order("retry", "Queue tasks again that failed, expired or were cancelled.")
def retry(client: AsyncClient, id: str) -> Coroutine[Any, Any, Task | None]:
    return client.tasks.retry(id)


@_order("delete", "Forget terminal tasks, their results and their keys.")
def delete(client: AsyncClient, id: str) -> Coroutine[Any, Any, None]:
    return client.tasks.delete(id)
