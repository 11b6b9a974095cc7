"""`modelyard control-plane`, `model-server`, `db`, `predictor`, `simulate`: the programs, all arguments passed on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from modelyard.cli import service_unit
from modelyard.cli.errors import CliError
from modelyard.cli.extras import cure
from modelyard.cli.session import Session

_PASS_ON = {"ignore_unknown_options": True, "help_option_names": []}


def command(module: str, arguments: Sequence[str]) -> list[str]:
    """The command line of one of modelyard's programs.

    -P: what lies in the working directory must not take the place of an installed package.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def _run(name: str, module: str, arguments: Sequence[str]) -> None:
    kind, rest = service_unit.split(arguments)
    if kind is not None:
        click.echo(service_unit.unit(kind, name, module, rest), nl=False)
    else:
        _become(f"modelyard {name}", module, rest)


def _become(what: str, module: str, arguments: Sequence[str]) -> NoReturn:
    problem = cure(what, "server")
    if problem:
        raise CliError(problem, reason="NOT_INSTALLED")
    line = command(module, arguments)
    os.execv(line[0], line)  # noqa: S606 - to become the program is the point


@click.command("control-plane", context_settings=_PASS_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def control_plane(arguments: tuple[str, ...]) -> None:
    """Run a control plane; see `modelyard control-plane --help` for its settings."""
    _run("control-plane", "control_plane", arguments)


@click.command("model-server", context_settings=_PASS_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def model_server(arguments: tuple[str, ...]) -> None:
    """Run a model server; see `modelyard model-server --help` for its settings."""
    _run("model-server", "model_servers", arguments)


@click.command("db", context_settings=_PASS_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def db(session: Session, arguments: tuple[str, ...]) -> None:
    """Show or upgrade the tables of the task store; see `modelyard db --help`."""
    config = ["--config", str(session.config)] if session.config and len(arguments) > 0 else []
    _become("modelyard db", "control_plane.db", [*arguments, *config])


@click.command("predictor", context_settings=_PASS_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def predictor(session: Session, arguments: tuple[str, ...]) -> None:
    """Train, compare and put in force predictors of tasks, show the forecast; see `modelyard predictor --help`."""
    config = ["--config", str(session.config)] if session.config and len(arguments) > 0 else []
    _become("modelyard predictor", "control_plane.predictor", [*arguments, *config])


@click.command("simulate", context_settings=_PASS_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def simulate(arguments: tuple[str, ...]) -> None:
    """Replay a trace on a simulated fleet and compare policies; see `modelyard simulate --help`."""
    _become("modelyard simulate", "control_plane.simulation", arguments)
