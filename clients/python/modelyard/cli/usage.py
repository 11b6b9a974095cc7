"""`modelyard usage`: what a tenant has used, and how its budgets stand."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from modelyard.cli import output
from modelyard.cli.connection import call
from modelyard.cli.errors import USAGE, CliError
from modelyard.cli.options import BEYOND, as_json, tenant_option, zoned
from modelyard.cli.output import Column
from modelyard.cli.session import Session

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, BudgetStatus, UsageReport, UsageRow

# As in the contract. Written out, for the SDK is not imported to show --help; a test holds them equal.
DIMENSIONS = ("model", "provider", "server", "task_type", "hour", "day")
_FIELDS = {"server": "server_id", "hour": "start", "day": "start"}
_AGO = re.compile(r"(\d+(?:\.\d+)?)([hdw])")
_HOURS = {"h": 1, "d": 24, "w": 7 * 24}


@click.command("usage")
@click.option(
    "--since", metavar="TIME", help='"36h", "7d", "2w" ago, or ISO 8601 ("2026-01-31"). Default: all that is kept.'
)
@click.option("--until", metavar="TIME", help="The same. Default: now.")
@click.option(
    "--by",
    metavar="LIST",
    default="model,server",
    show_default=True,
    help=f"What is told apart, separated by commas: {', '.join(DIMENSIONS)}.",
)
@tenant_option
@as_json
@click.pass_obj
def usage(session: Session, since: str | None, until: str | None, by: str) -> None:
    """Show what a tenant has used, and how its budgets stand.

    \b
    modelyard usage --since 7d --by model,task_type
    modelyard usage --by day --tenant team-a --json
    """
    dimensions = _dimensions(by)
    now = datetime.now(UTC)
    begin, end = _time(since, "--since", now), _time(until, "--until", now)

    async def work(client: AsyncClient) -> UsageReport:
        return await client.usage(since=begin, until=end, by=dimensions)

    report = call(session, work)
    if session.json:
        output.print_json(report.to_dict())
        return
    rows = [(*_group(row, dimensions), *_sums(row)) for row in report.rows]
    if dimensions:
        rows.append((*(("total",) + ("",) * (len(dimensions) - 1)), *_sums(report.total)))
    else:
        rows.append(_sums(report.total))
    output.print_table(
        (
            *(
                Column(dimension.replace("_", " "), style="bold" if not i else "")
                for i, dimension in enumerate(dimensions)
            ),
            Column("requests", right=True),
            Column("failed", right=True, optional=1),
            Column("prompt", right=True),
            Column("cached", right=True, optional=2),
            Column("answer", right=True),
            Column("US dollars", right=True),
        ),
        rows,
    )
    if report.truncated:
        output.note("there are more rows; the total has them")
    if report.budgets:
        output.print_table(
            (
                Column("budget", style="bold"),
                Column("limit", right=True),
                Column("spent", right=True),
                Column("held", right=True, optional=1),
                Column("left", right=True),
                Column("renews", optional=2),
            ),
            [_budget(budget) for budget in report.budgets],
        )


def _dimensions(by: str) -> list[str]:
    found = [word.strip().replace("-", "_") for word in by.split(",") if word.strip()]
    for word in found:
        if word not in DIMENSIONS:
            raise CliError(f"--by: {word!r} is none of {', '.join(DIMENSIONS)}", USAGE, "USAGE")
    return found


def _time(given: str | None, option: str, now: datetime) -> datetime | None:
    if given is None:
        return None
    try:
        if ago := _AGO.fullmatch(given.strip()):
            return now - timedelta(hours=float(ago[1]) * _HOURS[ago[2]])
        return zoned(given)
    except OverflowError:
        raise CliError(f"{option}: {given!r} {BEYOND}", USAGE, "USAGE") from None
    except ValueError:
        raise CliError(f'{option}: {given!r} is neither a time like "7d" nor ISO 8601', USAGE, "USAGE") from None


def _group(row: UsageRow, dimensions: list[str]) -> tuple[str, ...]:
    cells = []
    for dimension in dimensions:
        value = getattr(row, _FIELDS.get(dimension, dimension))
        if isinstance(value, datetime):
            value = value.astimezone(UTC).strftime("%Y-%m-%d" if dimension == "day" else "%Y-%m-%d %H:00")
        cells.append(value or "-")
    return tuple(cells)


def _sums(row: UsageRow) -> tuple[str, ...]:
    return (
        f"{row.requests:,}",
        f"{row.failed:,}",
        f"{row.prompt_tokens:,}",
        f"{row.cached_prompt_tokens:,}",
        f"{row.completion_tokens:,}",
        f"{row.cost_usd:.6f}",
    )


def _budget(budget: BudgetStatus) -> tuple[str, ...]:
    money = budget.unit == "nano_usd"

    def amount(value: int) -> str:
        return f"{value / 1e9:.6f}" if money else f"{value:,}"

    what = "US dollars" if money else "tokens"
    name = f"{what} in total" if budget.window == "total" else f"{what} a {budget.window}"
    renews = budget.renews_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if budget.renews_at else "never"
    return name, amount(budget.limit), amount(budget.spent), amount(budget.held), amount(budget.left), renews
