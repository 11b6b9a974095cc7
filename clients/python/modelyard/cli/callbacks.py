"""`modelyard tasks callbacks`: who was told of tasks that ended, and who was not."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import click

from modelyard.cli import output
from modelyard.cli.connection import call
from modelyard.cli.errors import NOT_FOUND, USAGE, CliError
from modelyard.cli.options import as_json, tenant_option
from modelyard.cli.output import Column
from modelyard.cli.session import Session

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, CallbackDelivery

STATES = ("pending", "delivered", "dead")
"""As in the SDK, which is not imported to show --help; a test holds them equal."""


@click.group("callbacks")
def callbacks() -> None:
    """Callbacks of tasks: list them, send those again that were given up."""


@callbacks.command("list")
@click.argument("task_id", required=False)
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), help="In this state. May be repeated.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, metavar="N", help="Most callbacks.")
@tenant_option
@as_json
@click.pass_obj
def list_callbacks(session: Session, /, task_id: str | None, states: tuple[str, ...], limit: int) -> None:
    """List callbacks, of one task or of all, those of the newest tasks first."""

    async def work(client: AsyncClient) -> list[CallbackDelivery]:
        return [one async for one in client.callbacks.list(states=states, task_id=task_id, limit=limit)]

    found = call(session, work)
    if session.json:
        output.print_json({"callbacks": [one.to_dict() for one in found]})
        return
    output.print_table(
        (
            Column("callback", style="bold"),
            Column("type"),
            Column("state"),
            Column("attempts", right=True),
            Column("next", optional=2),
            Column("url", optional=1, flexible=True),
            Column("failure", flexible=True),
        ),
        [
            (
                one.id,
                one.type,
                one.state,
                str(one.attempt_count),
                _time(one.next_attempt_at),
                one.url,
                one.failure_message,
            )
            for one in found
        ],
        empty="no callbacks",
    )


@callbacks.command("resend")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--dead", is_flag=True, help="All that were given up.")
@tenant_option
@as_json
@click.pass_obj
def resend(session: Session, /, ids: tuple[str, ...], dead: bool) -> None:
    """Send callbacks again, at once and with their full number of attempts."""
    if bool(ids) == dead:
        raise CliError("name callbacks, or give --dead", USAGE, "USAGE")

    async def work(client: AsyncClient) -> list[CallbackDelivery]:
        from modelyard.client import UnknownTask

        wanted = ids
        if dead:
            # All are known before the first is sent: one that dies again meanwhile is not sent for ever.
            wanted = tuple([one.id async for one in client.callbacks.list(states="dead", page_size=500)])
        try:
            return [await client.callbacks.resend(id) for id in wanted]
        except UnknownTask as error:
            cure = "see `modelyard tasks callbacks list`"
            raise CliError(error.message, NOT_FOUND, error.reason, cure) from error

    sent = call(session, work)
    if session.json:
        output.print_json({"callbacks": [one.to_dict() for one in sent]})
    else:
        output.note(f"{len(sent)} sent again")


def _time(at: datetime | None) -> str:
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if at else "-"
