"""`modelyard presets`: named bundles of parameters and requirements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from modelyard.cli import output
from modelyard.cli.connection import call
from modelyard.cli.options import as_json
from modelyard.cli.output import Column
from modelyard.cli.session import Session

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, Preset


@click.command("presets")
@as_json
@click.pass_obj
def presets(session: Session) -> None:
    """List the presets that a request may name with --preset."""

    async def work(client: AsyncClient) -> tuple[Preset, ...]:
        return await client.presets()

    found = call(session, work)
    if session.json:
        output.print_json({"presets": [preset.to_dict() for preset in found]})
        return
    output.print_table(
        (
            Column("preset", style="bold"),
            Column("task type", optional=1),
            Column("sampling", flexible=True),
            Column("description", flexible=True),
        ),
        [
            (
                preset.name,
                preset.task_type or "-",
                " ".join(f"{key}={value}" for key, value in preset.sampling.items()) or "-",
                preset.description,
            )
            for preset in found
        ],
        empty="no presets",
    )
