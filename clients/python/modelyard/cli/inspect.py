"""`modelyard servers`, `explain` and `drain`: looking at a fleet, and one order to it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli import output
from modelyard.cli.connection import call
from modelyard.cli.options import as_json, read_prompt, request, request_options, tenant_option
from modelyard.cli.output import Column
from modelyard.cli.session import Session

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, ServedModel, ServerStatus


# ------------------------------------------------------------------- servers ---

# Longer words of a server about a model's state do not fit into a table.
_DETAIL_LENGTH = 20

_SERVER_COLUMNS = (
    Column("server", style="bold"),
    Column("state"),
    Column("engine"),
    Column("device", optional=4),
    Column("endpoint", optional=5),
    Column("model"),
    Column("model is"),
    Column("memory", right=True, optional=2),
    Column("host memory", right=True, optional=3),
    Column("slots", right=True),
    Column("TTFT", right=True),
    Column("TPOT", right=True),
    Column("success", right=True),
    Column("epoch", right=True, optional=1),
)


@click.command("servers")
@click.option("--watch", is_flag=True, help="Go on, showing every change, until Ctrl-C.")
@as_json
@click.pass_obj
def servers(session: Session, watch: bool) -> None:
    """List the model servers of the fleet, one line for each model on each."""
    if watch:
        call(session, lambda client: _watch(client, json_lines=session.json))
        return

    async def work(client: AsyncClient) -> list[ServerStatus]:
        return list(await client.servers())

    found = call(session, work)
    if session.json:
        output.print_json({"servers": [server.to_dict() for server in found]})
    else:
        output.print_table(_SERVER_COLUMNS, server_rows(found), empty="no model servers")


async def _watch(client: AsyncClient, *, json_lines: bool) -> None:
    """One JSON object a change, a table that stays in place, or in a pipe a line for each change."""
    fleet: dict[str, ServerStatus] = {}
    if json_lines or not output.is_terminal(sys.stdout):
        async for change in client.watch_fleet():
            if json_lines:
                print(json.dumps(change.to_dict(), ensure_ascii=False), flush=True)
                continue
            lines = output.aligned(_SERVER_COLUMNS, server_rows(change.servers))
            print("\n".join(lines if change.snapshot else lines[1:]), flush=True)
            for name in change.removed_server_ids:
                print(f"{name}  forgotten", flush=True)
        return
    from rich.live import Live

    screen = output.console()
    with Live(console=screen, auto_refresh=False) as live:
        async for change in client.watch_fleet():
            if change.snapshot:
                fleet.clear()
            fleet.update({server.server_id: server for server in change.servers})
            for name in change.removed_server_ids:
                fleet.pop(name, None)
            rows = server_rows([fleet[name] for name in sorted(fleet)])
            live.update(output.fitting_table(screen, _SERVER_COLUMNS, rows), refresh=True)


def server_rows(found: Any) -> list[list[str]]:
    """One row per server and model; a server without models has one row."""
    rows = []
    for server in found:
        for model in server.models or (None,):
            runtime = model.runtime if model else None
            rows.append(
                [
                    server.server_id,
                    _state(server),
                    server.engine,
                    server.device,
                    server.endpoint,
                    model.name if model else "-",
                    _life(model) if model else "-",
                    output.size(model.memory_bytes if model else 0),
                    _memory(server),
                    f"{max(server.in_flight + server.foreign, server.running)}/{server.slots}",
                    output.seconds(runtime.ttft if runtime else None),
                    output.seconds(runtime.tpot if runtime else None),
                    f"{runtime.success_rate:.0%}" if runtime else "-",
                    str(server.lease_epoch),
                ]
            )
    return rows


def _life(model: ServedModel) -> str:
    """The model's state; why or how far, where there is room for it."""
    detail = model.state_detail
    return f"{model.state}: {detail}" if detail and len(detail) <= _DETAIL_LENGTH else model.state


def _memory(server: ServerStatus) -> str:
    """Of the host: what all models take, of what there is."""
    used, all_of_it = output.size(server.memory_used_bytes), output.size(server.memory_bytes)
    return used if used == all_of_it == "-" else f"{used} of {all_of_it}"


def _state(server: ServerStatus) -> str:
    """The lease, and where that is fine the health."""
    return server.lease_state if server.lease_state != "live" or server.health == "ready" else server.health


# ------------------------------------------------------------------- explain ---


@click.command("explain")
@click.argument("prompt", required=False)
@click.option("--arithmetic", is_flag=True, help="Show how the two best scores are computed, step by step.")
@request_options
@as_json
@tenant_option
@click.pass_obj
def explain(session: Session, /, prompt: str | None, arithmetic: bool, **options: Any) -> int:
    """Show what would be chosen for a request, and why. Nothing is generated.

    Exit status 0 if a server would be chosen now, 4 if none ever could, 5 if the request would have to wait.
    """
    from modelyard.cli.decision_view import print_arithmetic, print_decision
    from modelyard.cli.errors import NOT_FOUND, UNAVAILABLE

    asked, given = request(read_prompt(prompt), **options)
    decision = call(session, lambda client: client.explain(asked, **given))
    if session.json:
        output.print_json(decision.to_dict())
    else:
        print_decision(decision)
        if arithmetic:
            print_arithmetic(decision)
    return {"chosen": 0, "wait": UNAVAILABLE}.get(decision.verdict, NOT_FOUND)


# ------------------------------------------------------------------ feedback ---


@click.command("feedback")
@click.argument("request_id")
@click.argument("score", metavar="good|bad|0..1")
@as_json
@tenant_option
@click.pass_obj
def feedback(session: Session, request_id: str, score: str) -> None:
    """Say how good the answer to a request was: models that answer a kind of work badly get less of it.

    The id of a request is in `modelyard generate --json` and in a task's result. Each answer can be judged once.
    """
    value = {"good": 1.0, "bad": 0.0}.get(score)
    if value is None:
        try:
            value = float(score)
        except ValueError:
            raise click.BadParameter("must be `good`, `bad` or a number from 0 to 1", param_hint="SCORE") from None
    counted = call(session, lambda client: client.report_feedback(request_id, value))
    if session.json:
        output.print_json({"request_id": request_id, "score": value, "counted": counted})
    else:
        print("noted" if counted else "it had been judged before, that stands")


# --------------------------------------------------------------------- drain ---


@click.command("drain")
@click.argument("server_id", metavar="SERVER")
@click.option("--undo", is_flag=True, help="Let it serve again.")
@as_json
@click.pass_obj
def drain(session: Session, server_id: str, undo: bool) -> None:
    """Let a model server finish what it has and take nothing new."""
    status = call(session, lambda client: client.drain(server_id, undo=undo))
    if session.json:
        output.print_json(status.to_dict())
    elif undo:
        print(f"{server_id} serves again")
    else:
        running = f", {status.in_flight} still running" if status.in_flight else ""
        print(f"{server_id} takes nothing new{running}; undo with `modelyard drain {server_id} --undo`")
