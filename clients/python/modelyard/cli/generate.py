"""`modelyard generate` and `modelyard embed`: one request, the answer on standard output."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli import output
from modelyard.cli.connection import call
from modelyard.cli.options import (
    as_json,
    direct_option,
    read_prompt,
    request,
    request_options,
    requirement_options,
    tenant_option,
    timeout_option,
)
from modelyard.cli.session import Session

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, Decision, Delta, EmbedResult, GenerationResult


@click.command("generate")
@click.argument("prompt", required=False)
@request_options
@timeout_option
@direct_option
@click.option("--explain", is_flag=True, help="Show the decision behind the answer, on standard error.")
@click.option("-q", "--quiet", is_flag=True, help="No line about server and speed.")
@as_json
@tenant_option
@click.pass_obj
def generate(
    session: Session, /, prompt: str | None, timeout: float | None, explain: bool, quiet: bool, **options: Any
) -> None:
    """Answer a prompt on the best server of the fleet.

    The prompt is an argument, or - or nothing to read it from standard input. The answer is printed as it comes.
    Ctrl-C stops the engine.

    \b
    modelyard generate "What is modelyard?"
    git diff | modelyard generate --task-type code_review --priority high
    modelyard generate --schema '{"type": "object", ...}' --json "..."
    """
    asked, given = request(read_prompt(prompt), **options)

    async def work(client: AsyncClient) -> GenerationResult:
        printer = Silent() if session.json else AnswerPrinter(explain=explain)
        return await answer(client, asked, {**given, "explain": explain, "timeout": timeout}, printer)

    result = call(session, work)
    if session.json:
        output.print_json(result.to_dict())
    elif not quiet and output.is_terminal(sys.stderr):
        output.note(statistics(result))


async def answer(client: AsyncClient, asked: Any, options: dict[str, Any], printer: Silent) -> GenerationResult:
    """Stream one answer through the printer."""
    from modelyard.client import Decision

    try:
        async with client.stream(asked, **options) as stream:
            async for event in stream:
                if isinstance(event, Decision):
                    printer.decision(event)
                else:
                    printer.delta(event)
            return stream.result
    finally:
        printer.end()


class Silent:
    """Shows nothing."""

    def decision(self, decision: Decision) -> None:
        """The choice of a server; once per attempt."""

    def delta(self, delta: Delta) -> None:
        """The next piece of the answer."""

    def end(self) -> None:
        """No more pieces: the answer is complete, or has failed."""


class AnswerPrinter(Silent):
    """The answer to standard output as it comes, decisions to standard error."""

    def __init__(self, *, explain: bool = False) -> None:
        self._explain = explain
        self._terminal = output.is_terminal(sys.stdout)
        self._open_line = False
        self._reasoning = False

    def decision(self, decision: Decision) -> None:
        if self._explain:
            from modelyard.cli.decision_view import print_decision

            print_decision(decision, stderr=True)

    def delta(self, delta: Delta) -> None:
        # Visible reasoning is no part of the answer: people see it, programs in a pipe do not.
        if delta.reasoning_text and self._terminal:
            self._write(f"\x1b[2m{output.printable(delta.reasoning_text)}\x1b[0m")
            self._reasoning = True
        if delta.text:
            if self._reasoning:
                self._write("\n")
                self._reasoning = False
            self._write(output.printable(delta.text) if self._terminal else delta.text)
            self._open_line = not delta.text.endswith("\n")
        for fragment in delta.tool_calls:
            if fragment.name:
                self._write(f"{fragment.name} ")
            self._write(fragment.arguments_json)
            self._open_line = True

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        if self._open_line or self._reasoning:
            self._write("\n")
        self._open_line = self._reasoning = False


def statistics(result: GenerationResult) -> str:
    """One line about an answer: where, how fast, how much."""
    timings, usage = result.timings, result.usage
    speed = output.rate(1, timings.tpot)
    cached = f" ({usage.cached_prompt_tokens} cached)" if usage.cached_prompt_tokens else ""
    parts = [
        f"{result.server_id}/{result.model}",
        f"queued {output.seconds(timings.queued)}",
        f"TTFT {output.seconds(timings.ttft)}",
        f"{speed:.1f} tok/s" if speed else "",
        f"{usage.prompt_tokens}+{usage.completion_tokens} tokens{cached}",
        f"{len(result.attempts)} attempts" if len(result.attempts) > 1 else "",
        f"${result.cost_usd:.6f}" if result.cost_usd else "",
        f"cut off at {usage.completion_tokens} tokens" if result.finish_reason == "length" else "",
        "withheld by the provider" if result.finish_reason == "content_filter" else "",
        f"request {result.request_id}",
    ]
    return ", ".join(part for part in parts if part)


@click.command("embed")
@click.argument("texts", nargs=-1)
@requirement_options
@timeout_option
@as_json
@tenant_option
@click.pass_obj
def embed(session: Session, /, texts: tuple[str, ...], timeout: float | None, **options: Any) -> None:
    """Turn texts into vectors, one each; without arguments, each line of standard input.

    Prints one line of numbers per text.
    """
    inputs = list(texts) or [line for line in read_prompt(None).splitlines() if line.strip()]
    given = {name: value for name, value in options.items() if value is not None}

    async def work(client: AsyncClient) -> EmbedResult:
        return await client.embed(inputs, **given, timeout=timeout)

    result = call(session, work)
    if session.json:
        output.print_json(result.to_dict(), indent=None)
        return
    for vector in result.vectors:
        print(" ".join(f"{value:.6g}" for value in vector))
