"""The command group. Commands are imported when they are called, so that --help is quick."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from modelyard.cli.errors import FAILED, INTERRUPTED, USAGE, CliError, Failed, Failure
from modelyard.cli.output import print_json, problem
from modelyard.cli.session import Session

# Name -> (module, function, one line for --help). In the order of --help.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "up": ("up", "up", "Run a control plane and model servers on this machine."),
    "demo": ("demo", "demo", "Show a small fleet at work: start it, ask it, explain it, stop it."),
    "generate": ("generate", "generate", "Answer a prompt on the best server of the fleet."),
    "chat": ("chat", "chat", "Talk with the fleet, turn by turn."),
    "embed": ("generate", "embed", "Turn texts into vectors."),
    "explain": ("inspect", "explain", "Show what would be chosen for a request, and why."),
    "feedback": ("inspect", "feedback", "Say how good an answer was."),
    "tasks": ("tasks", "tasks", "Submit, follow and steer durable tasks; answer a file of prompts."),
    "beliefs": ("beliefs", "beliefs", "Write, read and follow facts that agents and services share."),
    "agents": ("agents", "agents", "List agents, and route tasks among them."),
    "usage": ("usage", "usage", "Show what a tenant has used, and how its budgets stand."),
    "models": ("models", "models", "List the models of the fleet; pull, load and unload one."),
    "presets": ("presets", "presets", "List the presets that a request may name."),
    "servers": ("inspect", "servers", "List the model servers of the fleet."),
    "drain": ("inspect", "drain", "Let a model server finish what it has and take nothing new."),
    "simulate": ("programs", "simulate", "Replay a trace on a simulated fleet and compare policies."),
    "predictor": ("programs", "predictor", "Train, compare and put in force predictors of tasks; show the forecast."),
    "db": ("programs", "db", "Show or upgrade the tables of the task store."),
    "control-plane": ("programs", "control_plane", "Run a control plane."),
    "model-server": ("programs", "model_server", "Run a model server beside an engine."),
}

_CLOSED_PIPE = 141  # what a shell reports for a program that SIGPIPE ended


class ReaderLeft(Exception):
    """Whoever read our output has closed the pipe."""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports only the one that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, function, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"modelyard.cli.{module}"), function)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderLeft from error  # click would make it a failure

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="The control plane. Default: MODELYARD_ADDRESS, client.address in modelyard.yaml, 127.0.0.1:7460.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration file. Default: MODELYARD_CONFIG, ./modelyard.yaml.",
)
@click.version_option(package_name="modelyard", message="modelyard %(version)s")
@click.pass_obj
def root(session: Session, address: str | None, config: Path | None) -> None:
    """One front door for a mixed fleet of language models.

    Try it: `modelyard demo`, or `modelyard up` and then `modelyard generate "What is modelyard?"`.
    """
    session.address = address
    session.config = config


def run(arguments: list[str]) -> int:
    """Run the command line; the exit status. Expected failures end in one line, never in a traceback."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    session = Session()
    try:
        status = _invoke(arguments, session)
        flushed = _flush()
        return status or flushed
    except (ReaderLeft, BrokenPipeError):
        _drop_output()
        return _CLOSED_PIPE


def _flush() -> int:
    """Write what is left of the output; the exit status."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk
        _drop_output()
        problem(str(error))
        return FAILED
    return 0


def _open_standard_streams() -> None:
    """What the shell has closed (>&-) is /dev/null now. Python has None there, and files would take its number."""
    names = {0: "stdin", 1: "stdout", 2: "stderr"}
    for number, name in names.items():
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def _drop_output() -> None:
    """The interpreter must not complain at exit about what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _invoke(arguments: list[str], session: Session) -> int:
    try:
        result = root.main(arguments, prog_name="modelyard", standalone_mode=False, obj=session)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except click.UsageError as error:
        if session.json:
            print_json(Failure(USAGE, "USAGE", error.format_message()).to_dict(), indent=None)
        error.show()
        return USAGE
    except click.ClickException as error:
        return tell(Failure(error.exit_code, "FAILED", error.format_message()), session)
    except CliError as error:
        return tell(Failure(error.status, error.reason, error.message, error.cure), session)
    except Failed as error:
        return tell(error.failure, session)
    except BrokenPipeError:
        raise
    except OSError as error:
        return tell(Failure(FAILED, "FAILED", str(error)), session)


def tell(failure: Failure, session: Session) -> int:
    """Print the failure where it belongs and return the exit status."""
    try:
        if session.json:
            print_json(failure.to_dict(), indent=None)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        _drop_output()
    problem(failure.line())
    return failure.status
