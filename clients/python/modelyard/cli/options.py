"""Options that several commands share, and the request that they make."""

from __future__ import annotations

import json
import mimetypes
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelyard.cli.errors import NOT_UTF8, USAGE, CliError
from modelyard.cli.output import is_terminal
from modelyard.cli.session import MOST_SECONDS, Session

if TYPE_CHECKING:
    from modelyard.client import Message

F = TypeVar("F", bound=Callable[..., Any])

# As in the contract. Written out, for the SDK is not imported to show --help; a test holds them equal.
# fmt: off
TASK_TYPES = (
    "chat", "reasoning", "code_generation", "code_review", "summarization", "translation", "writing", "extraction",
    "classification", "data_analysis", "research", "planning", "tool_use", "vision", "embedding",
)
# fmt: on
PRIORITIES = ("low", "normal", "high", "critical")
TASK_STATES = ("queued", "scheduled", "running", "succeeded", "failed", "cancelled", "expired")

WHOLE = 2**31 - 1
"""The largest whole number that the contract takes where it has no limit of its own."""


class Number(click.FloatRange):
    """A number within a range. NaN is none, which click lets pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        if number != number:  # NaN
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


SECONDS = Number(0, MOST_SECONDS, min_open=True)
"""A span of time."""


BEYOND = "is not within the years 1 to 9999 of UTC"


def zoned(text: str) -> datetime:
    """A time of ISO 8601, in UTC; without a zone it is of this machine's. Raises ValueError, and OverflowError
    for one that is not of UTC's years."""
    given = datetime.fromisoformat(text)
    try:
        return given.astimezone(UTC)
    except (OverflowError, ValueError, OSError):
        raise OverflowError(f"{text!r} {BEYOND}") from None


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Session).json = True


as_json: Callable[[F], F] = click.option(
    "--json",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_remember_json,
    help="Print JSON, errors too.",
)


def _remember_tenant(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value:
        ctx.ensure_object(Session).tenant = value


tenant_option: Callable[[F], F] = click.option(
    "--tenant",
    metavar="NAME",
    expose_value=False,
    callback=_remember_tenant,
    help='Who asks, or whose. Default: MODELYARD_TENANT, "default".',
)

_REQUIREMENTS = (
    click.option("--model", metavar="NAME", help='Only this model: "name" or "provider/name".'),
    click.option("--provider", metavar="NAME", help="Only models of this provider."),
    click.option("--server", "server_id", metavar="ID", help="Only this server."),
    click.option(
        "--exclude-model", "excluded_models", multiple=True, metavar="NAME", help="Never this model. May be repeated."
    ),
    click.option(
        "--max-cost",
        type=Number(1e-9, 9e9),
        metavar="USD",
        help="Only where it is expected to cost no more US dollars.",
    ),
    click.option("--priority", type=click.Choice(PRIORITIES), help="Urgency. Default: normal."),
)
_ROUTING = (
    *_REQUIREMENTS,
    click.option("--task-type", type=click.Choice(TASK_TYPES), metavar="TYPE", help="The kind of work. Default: chat."),
    click.option("--preset", metavar="NAME", help="Fills what is not given here: see `modelyard presets`."),
    click.option("--system", metavar="TEXT", help="Instructions that hold for the whole conversation."),
    click.option("--max-tokens", type=click.IntRange(1, WHOLE), metavar="N", help="Most tokens to generate."),
)
_SAMPLING = (
    click.option("--temperature", type=Number(0, 2), metavar="T", help="0 (greedy) to 2."),
    click.option("--top-p", type=Number(0, 1, min_open=True), metavar="P", help="Nucleus sampling."),
    click.option(
        "--top-k", type=click.IntRange(0, WHOLE), metavar="K", help="Draw from the K likeliest tokens; 0: all."
    ),
    click.option("--min-p", type=Number(0, 1), metavar="P", help="Drop tokens below P times the likeliest."),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), metavar="N", help="Same seed, same input: same output."),
)
_SHAPE = (
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be repeated."),
    click.option("--json-object", is_flag=True, help="The answer is a JSON object."),
    click.option("--schema", metavar="FILE|JSON", help="The answer satisfies this JSON Schema."),
    click.option(
        "--image",
        "images",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="An image to look at. May be repeated.",
    ),
    click.option("--raw", "raw_prompt", is_flag=True, help="Continue the prompt as it stands, no chat template."),
    click.option("--logprobs", is_flag=True, help="Ask for the log-probability of each token; shown with --json."),
)


def _all(options: tuple[Callable[[Any], Any], ...]) -> Callable[[F], F]:
    return lambda function: reduce(lambda wrapped, option: option(wrapped), reversed(options), function)


requirement_options: Callable[[F], F] = _all(_REQUIREMENTS)
chat_options: Callable[[F], F] = _all((*_ROUTING, *_SAMPLING))
request_options: Callable[[F], F] = _all((*_ROUTING, *_SAMPLING, *_SHAPE))
batch_options: Callable[[F], F] = _all((*_ROUTING, *_SAMPLING))


def _remember_direct(ctx: click.Context, _: click.Parameter, value: bool | None) -> None:
    ctx.ensure_object(Session).direct = value


direct_option: Callable[[F], F] = click.option(
    "--direct/--no-direct",
    default=None,
    expose_value=False,
    callback=_remember_direct,
    help="The answer comes from the model server itself, or through the control plane. Default: as it can.",
)

timeout_option: Callable[[F], F] = click.option(
    "--timeout", type=SECONDS, metavar="SECONDS", help="Most seconds the request may take."
)


def request(
    prompt: str,
    *,
    json_object: bool = False,
    schema: str | None = None,
    images: tuple[Path, ...] = (),
    **options: Any,
) -> tuple[str | list[Message], dict[str, Any]]:
    """Input and options for the SDK's `stream`, `generate` and `explain`. Raises CliError."""
    given = {name: value for name, value in options.items() if not (value is None or value is False or value == ())}
    if json_object and schema:
        raise CliError("--json-object and --schema exclude each other", USAGE, "USAGE")
    if json_object:
        given["response_format"] = "json"
    elif schema:
        given["response_format"] = _schema(schema)
    if not images:
        return prompt, given
    if given.get("raw_prompt"):
        raise CliError("--image and --raw exclude each other", USAGE, "USAGE")
    from modelyard.client import Image, Message

    parts = tuple(Image(path.read_bytes(), _media_type(path)) for path in images)
    return [Message("user", (*parts, prompt))], given


def _schema(given: str) -> dict[str, Any]:
    inline = given.lstrip().startswith("{")
    if not inline and not Path(given).is_file():
        raise CliError(f"--schema: {given}: no such file, and no JSON object either", USAGE, "USAGE")
    try:
        schema = json.loads(given if inline else Path(given).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CliError(f"--schema: not valid JSON: {error}", USAGE, "USAGE") from None
    if not isinstance(schema, dict):
        raise CliError("--schema: must be a JSON object", USAGE, "USAGE")
    return schema


def _media_type(path: Path) -> str:
    kind, _ = mimetypes.guess_type(path.name)
    if not kind or not kind.startswith("image/"):
        raise CliError(f"--image {path}: not an image by its name; known are .png, .jpg, .gif, .webp", USAGE, "USAGE")
    return kind


def read_prompt(given: str | None) -> str:
    """The argument, or standard input for "-" and where nothing was given and something is piped in."""
    if given not in (None, "-"):
        return str(given)
    if given is None and is_terminal(sys.stdin):
        raise CliError("a prompt is missing: give it as an argument, or - to read standard input", USAGE, "USAGE")
    try:
        prompt = sys.stdin.read()
    except UnicodeDecodeError:
        raise CliError(f"standard input {NOT_UTF8}", USAGE, "USAGE") from None
    if not prompt.strip():
        raise CliError("the prompt on standard input is empty", USAGE, "USAGE")
    return prompt
