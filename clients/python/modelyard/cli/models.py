"""`modelyard models`: the models of the fleet, and orders to pull, load and unload one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli import output
from modelyard.cli.connection import call
from modelyard.cli.errors import SERVERS, Failed
from modelyard.cli.options import as_json, timeout_option
from modelyard.cli.output import Column
from modelyard.cli.session import Session

if TYPE_CHECKING:
    from modelyard.cli.progress_view import ProgressView
    from modelyard.client import AsyncClient, Model, ModelProgress, Placement


class _NameOrCommand(click.Group):
    """`modelyard models NAME` is short for `modelyard models show NAME`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None:
            args = ["show", *args]
        return super().resolve_command(ctx, args)


@click.group("models", cls=_NameOrCommand, invoke_without_command=True, subcommand_metavar="[NAME | COMMAND]")
@as_json
@click.pass_context
def models(ctx: click.Context) -> None:
    """List the models of the fleet, show one, or pull, load and unload one."""
    if ctx.invoked_subcommand is None:
        _list(ctx.obj)


@models.command("show")
@click.argument("name")
@as_json
@click.pass_obj
def show(session: Session, name: str) -> None:
    """Show one model: where it is and what it can do."""
    model = call(session, lambda client: client.model(name))
    if session.json:
        output.print_json(model.to_dict())
    else:
        _print_model(model)


def _list(session: Session) -> None:
    found = call(session, lambda client: client.models())
    if session.json:
        output.print_json({"models": [model.to_dict() for model in found]})
        return
    output.print_table(
        (
            Column("model", style="bold"),
            Column("provider"),
            Column("servers", flexible=True),
            Column("context", right=True),
            Column("features", flexible=True),
        ),
        [
            (
                model.name,
                ", ".join(model.providers),
                ", ".join(_place(place) for place in model.placements) or "(none)",
                str(model.context_length or "-"),
                " ".join(model.features),
            )
            for model in found
        ],
        empty="no models: no model server is attached",
    )


def _place(place: Placement) -> str:
    return place.server_id if place.info.state == "warm" else f"{place.server_id} ({place.info.state})"


def _print_model(model: Model) -> None:
    rows = [
        ("providers", ", ".join(model.providers)),
        ("context", f"{model.context_length} tokens"),
        ("features", " ".join(model.features)),
        ("good at", " ".join(f"{kind} {score:g}" for kind, score in _best_first(model))),
    ]
    output.print_table((Column("model", style="bold"), Column(model.name, flexible=True)), rows)
    output.print_table(
        (
            Column("server", style="bold"),
            Column("state"),
            Column("model is"),
            Column("provider"),
            Column("context", right=True),
            Column("weights"),
            Column("memory", right=True, optional=2),
            Column("load", right=True, optional=1),
            Column("TTFT", right=True),
            Column("TPOT", right=True),
            Column("$/M tokens in, out", right=True),
        ),
        [
            (
                place.server_id,
                place.lease_state,
                place.info.state,
                place.info.provider,
                str(place.info.context_length),
                place.info.quantization,
                output.size(place.info.memory_bytes),
                output.seconds(place.info.load_time),
                output.seconds(place.info.ttft),
                output.seconds(place.info.tpot),
                f"{place.info.price.prompt:g}, {place.info.price.completion:g}",
            )
            for place in model.placements
        ],
        empty="no server has it",
    )
    for place in model.placements:
        if place.info.state_detail:
            output.note(f"{place.server_id}: {place.info.state}: {place.info.state_detail}")


def _best_first(model: Model) -> list[tuple[str, float]]:
    return sorted(model.capabilities.items(), key=lambda item: -item[1])


# ---------------------------------------------------- pull, load and unload ---


def _order(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the three orders have in common."""
    for decorate in (
        click.pass_obj,
        as_json,
        timeout_option,
        click.option(
            "--server", "server_id", metavar="ID", help="On this server. Needed where several could be meant."
        ),
        click.argument("name"),
    ):
        function = decorate(function)
    return function


@models.command("pull")
@_order
def pull(session: Session, name: str, server_id: str | None, timeout: float | None) -> None:
    """Fetch a model's files on a model server. Ctrl-C stops it."""
    _carry_out(session, name, lambda client: client.pull_model(name, server_id=server_id, timeout=timeout))


@models.command("load")
@_order
def load(session: Session, name: str, server_id: str | None, timeout: float | None) -> None:
    """Bring a model into a model server's memory. Ctrl-C stops it."""
    _carry_out(session, name, lambda client: client.load_model(name, server_id=server_id, timeout=timeout))


@models.command("unload")
@_order
def unload(session: Session, name: str, server_id: str | None, timeout: float | None) -> None:
    """Take a model out of a model server's memory, once its requests have ended."""
    _carry_out(session, name, lambda client: client.unload_model(name, server_id=server_id, timeout=timeout))


def _carry_out(
    session: Session, name: str, order: Callable[[AsyncClient], AsyncGenerator[ModelProgress, None]]
) -> None:
    async def work(client: AsyncClient) -> ModelProgress | None:
        last = None
        with _view(session, name) as view:
            async with contextlib.aclosing(order(client)) as steps:
                async for step in steps:
                    view.step(step)
                    last = step
        return last

    try:
        end = call(session, work)
    except Failed as error:
        if error.failure.reason in ("NO_CAPABLE_SERVER", "UNSUPPORTED"):  # told with the cure of a request elsewhere
            raise Failed(replace(error.failure, cure=SERVERS)) from error
        raise
    if end is not None and not session.json:
        print(output.printable(f"{name} is {end.state} on {end.server_id}"))


def _view(session: Session, name: str) -> contextlib.AbstractContextManager[ProgressView]:
    from modelyard.cli.progress_view import Bar, JsonLines, Lines

    if session.json:
        return JsonLines()
    return Bar(name) if output.is_terminal(sys.stderr) else Lines(name)
