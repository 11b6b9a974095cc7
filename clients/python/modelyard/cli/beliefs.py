"""`modelyard beliefs`: what is held to be true, shared with agents and services."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli import output
from modelyard.cli.connection import call
from modelyard.cli.errors import USAGE, CliError
from modelyard.cli.options import Number, as_json, read_prompt, tenant_option
from modelyard.cli.output import Column
from modelyard.cli.session import Session

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, Belief


@click.group("beliefs")
def beliefs() -> None:
    """Write, read and follow facts that agents and services share.

    \b
    modelyard beliefs put weather/berlin '{"sky": "grey"}' --confidence 0.8
    modelyard beliefs list tasks/
    modelyard beliefs watch tasks/
    """


@beliefs.command("put")
@click.argument("key")
@click.argument("value", required=False)
@click.option("--confidence", type=Number(0, 1), default=1.0, metavar="C", help="0 to 1. Default: 1.")
@click.option("--source", default="", metavar="TEXT", help="Who says so.")
@click.option("--text", is_flag=True, help="The value is a text, not JSON.")
@tenant_option
@as_json
@click.pass_obj
def put(session: Session, /, key: str, value: str | None, confidence: float, source: str, text: bool) -> None:
    """Write a fact over whatever was there. The value is JSON, - or nothing reads it from standard input.

    Numbers are doubles: integers beyond 2**53 are refused, give them as texts.
    """
    given = read_prompt(value)
    parsed = given if text else _parsed(given)
    belief = call(session, lambda client: client.beliefs.put(key, parsed, confidence=confidence, source=source))
    if session.json:
        output.print_json(belief.to_dict())


def _parsed(given: str) -> Any:
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        raise CliError("the value is not valid JSON; for a plain text add --text", USAGE, "USAGE") from None


@beliefs.command("get")
@click.argument("key")
@tenant_option
@as_json
@click.pass_obj
def get(session: Session, /, key: str) -> None:
    """Print the value of a fact as JSON, with --json all that is known of it."""
    belief = call(session, lambda client: client.beliefs.get(key))
    if session.json:
        output.print_json(belief.to_dict())
    else:
        text = json.dumps(belief.value, indent=2, ensure_ascii=False)
        print(output.printable(text) if output.is_terminal(sys.stdout) else text)


@beliefs.command("list")
@click.argument("prefix", default="")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Most facts.")
@tenant_option
@as_json
@click.pass_obj
def list_beliefs(session: Session, /, prefix: str, limit: int | None) -> None:
    """List the facts whose keys begin with PREFIX, by key."""

    async def work(client: AsyncClient) -> list[Belief]:
        return [belief async for belief in client.beliefs.list(prefix, limit=limit, page_size=500)]

    found = call(session, work)
    if session.json:
        output.print_json({"beliefs": [belief.to_dict() for belief in found]})
        return
    most = _CELL if output.is_terminal(sys.stdout) else _LINE
    output.print_table(
        (
            Column("key", style="bold"),
            Column("value", flexible=True),
            Column("confidence", right=True, optional=1),
            Column("source", optional=3),
            Column("updated", optional=2),
        ),
        [
            (belief.key, _short(belief.value, most), f"{belief.confidence:g}", belief.source, _time(belief))
            for belief in found
        ],
        empty="no beliefs",
    )


@beliefs.command("delete")
@click.argument("key")
@tenant_option
@as_json
@click.pass_obj
def delete(session: Session, /, key: str) -> None:
    """Forget a fact."""
    call(session, lambda client: client.beliefs.delete(key))
    if session.json:
        output.print_json({"deleted": key})


@beliefs.command("watch")
@click.argument("prefix", default="")
@click.option(
    "--after",
    type=click.IntRange(0, 2**63 - 1),
    metavar="VERSION",
    help="Only later ones; 0: all that are known first.",
)
@tenant_option
@as_json
@click.pass_obj
def watch(session: Session, /, prefix: str, after: int | None) -> None:
    """Print facts as they change, until Ctrl-C. One that changes faster than it is read is shown as it is last."""

    async def work(client: AsyncClient) -> None:
        async for belief in client.beliefs.watch(prefix, after=after):
            if session.json:
                output.print_json(belief.to_dict(), indent=None)
            else:
                value = "deleted" if belief.deleted else _short(belief.value)
                print(output.printable(f"{_time(belief)}  {belief.key}  {value}"), flush=True)

    call(session, work)


_CELL, _LINE = 60, 200
"""Most characters of a value in a table on a terminal, and in a line."""


def _short(value: Any, most: int = _LINE) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _time(belief: Belief) -> str:
    return belief.updated_at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if belief.updated_at else "-"
