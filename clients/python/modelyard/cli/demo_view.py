"""What `modelyard demo` shows: the fleet, each request with its decision and timings, a summary."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modelyard.cli import output
from modelyard.cli.decision_view import decision_lines
from modelyard.cli.demo_script import STEPS, Step
from modelyard.cli.generate import Silent, statistics
from modelyard.cli.output import Column

if TYPE_CHECKING:
    from modelyard.cli.demo import Outcome
    from modelyard.client import Decision, Delta, ModelyardError, ServerStatus

_WIDEST = 100
_NAMED = 2


class Quiet(Silent):
    """Shows nothing: with --json only the facts are printed, in one object, at the end."""

    def starting(self, what: str) -> None:
        """Something takes a moment."""

    def remark(self, text: str) -> None:
        """Something to know."""

    def fleet(self, servers: Sequence[ServerStatus], seconds: float) -> None:
        """All servers are ready."""

    def step(self, number: int, step: Step) -> None:
        """The next request."""

    def outcome(self, outcome: Outcome) -> None:
        """How it ended."""

    def refused(self, error: ModelyardError, decision: Decision) -> None:
        """Nobody could do it, as was expected."""

    def summary(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        """All requests, one line each."""

    def close(self) -> None:
        """Nothing is shown any more."""


class DemoView(Quiet):
    """For people: coloured on a terminal, plain text in a pipe."""

    def __init__(self) -> None:
        self._screen = output.console()
        self._screen.width = min(self._screen.width, _WIDEST)
        self._status: Any = None
        self._writer = Writer(self._screen.width)
        self._attempt = 0
        self._legend = True  # with the first decision only

    def starting(self, what: str) -> None:
        if not output.is_terminal(sys.stdout):
            return
        if self._status is None:
            self._status = self._screen.status(what)
            self._status.start()
        self._status.update(what)

    def remark(self, text: str) -> None:
        self._screen.print(text, style="yellow")

    def fleet(self, servers: Sequence[ServerStatus], seconds: float) -> None:
        self.close()
        self._screen.print(f"A fleet of {len(servers)} model servers, ready after {output.seconds(seconds)}:")
        self._table(
            (
                Column("server", style="bold"),
                Column("engine"),
                Column("model"),
                Column("slots", right=True),
                Column("context", right=True),
                Column("offers", flexible=True),
            ),
            [
                (
                    server.server_id,
                    server.engine,
                    model.name,
                    str(server.slots),
                    str(model.context_length),
                    _offers(model.capabilities),
                )
                for server in servers
                for model in server.models
            ],
        )
        if any(model.name == "yardling" for server in servers for model in server.models):
            self._screen.print("yardling is a tiny demonstration model: quick, not clever.", style="dim")
        if any(server.engine == "simulated" for server in servers):
            self._screen.print("Simulated servers compute nothing: their speeds and answers are made up.", style="dim")

    def _table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        if output.is_terminal(sys.stdout):
            self._screen.print(output.fitting_table(self._screen, columns, rows))
        else:
            print("\n".join(output.aligned(columns, rows)))

    def step(self, number: int, step: Step) -> None:
        from rich.rule import Rule
        from rich.text import Text

        self._attempt = 0
        self._screen.print()
        title = Text(f"{number}/{len(STEPS)} {step.title}", style="bold")
        title.append(f" ({step.task_type}, priority {step.priority})", style="not bold dim")
        self._screen.print(Rule(title, align="left", style="dim"))
        if step.note:
            self._screen.print(step.note, style="dim italic")
        self._screen.print(Text("> ", style="bold cyan").append(step.shown or step.prompt, style="default not bold"))

    def decision(self, decision: Decision) -> None:
        self._attempt += 1
        if self._attempt > 1:
            self._writer.end()
            self._screen.print(f"That failed. Attempt {self._attempt}:", style="yellow")
        decision_lines(self._screen, decision, legend=self._legend, summary=decision.verdict != "chosen")
        self._legend = False

    def delta(self, delta: Delta) -> None:
        self._writer.write(delta.text)
        for fragment in delta.tool_calls:
            self._writer.write(f"{fragment.name} " if fragment.name else "")
            self._writer.write(fragment.arguments_json)

    def end(self) -> None:
        self._writer.end()

    def outcome(self, outcome: Outcome) -> None:
        result = outcome.result
        if result is None:
            return
        for attempt in result.attempts:
            if attempt.failure_reason:
                failed = f"{attempt.server_id} failed: {attempt.failure_reason} ({attempt.failure_message})"
                self._screen.print(f"  {failed}", style="yellow")
        simulated = " (simulated)" if outcome.simulated else ""
        self._screen.print(f"  {statistics(result)}{simulated}", style="dim")

    def refused(self, error: ModelyardError, decision: Decision) -> None:
        from rich.text import Text

        decision_lines(self._screen, decision, legend=False, summary=False)
        text = Text(f"{error.reason} ", style="bold red").append(output.printable(str(error)), style="default not bold")
        self._screen.print(text)

    def summary(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        self._screen.print()
        self._table(
            (
                Column("request", style="bold"),
                Column("server"),
                Column("model"),
                Column("tries", right=True, optional=1),
                Column("queued", right=True),
                Column("TTFT", right=True),
                Column("TPOT", right=True),
                Column("tok/s", right=True),
                Column("tokens", right=True),
            ),
            [_summary_row(outcome) for outcome in outcomes],
        )
        self._screen.print(f"All of it took {output.seconds(seconds)}. Your own fleet: modelyard up")

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()


def _offers(capabilities: Any) -> str:
    best = sorted(capabilities.items(), key=lambda item: (-item[1], item[0]))
    more = f" +{len(best) - _NAMED}" if len(best) > _NAMED else ""
    return ", ".join(f"{kind} {score:g}" for kind, score in best[:_NAMED]) + more


def _summary_row(outcome: Outcome) -> list[str]:
    result = outcome.result
    kind = outcome.step.task_type
    if result is None:
        return [kind, "(refused)", "", "0", "", "", "", "", ""]
    speed = output.rate(1, result.timings.tpot)
    return [
        kind,
        result.server_id,
        result.model,
        str(len(result.attempts)),
        output.seconds(result.timings.queued),
        output.seconds(result.timings.ttft),
        output.seconds(result.timings.tpot),
        f"{speed:.0f}" if speed else "-",
        f"{result.usage.prompt_tokens}+{result.usage.completion_tokens}",
    ]


class Writer:
    """Streams text with an indent, wrapped at words."""

    _INDENT = "  "

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._word = ""

    def write(self, text: str) -> None:
        for character in output.printable(text):
            if character.isspace():
                self._flush()
                if character == "\n":
                    self._newline()
                elif 0 < self._column < self._width:
                    sys.stdout.write(" ")
                    self._column += 1
            else:
                self._word += character
        sys.stdout.flush()

    def _flush(self) -> None:
        if not self._word:
            return
        if self._column + len(self._word) > self._width and self._column > len(self._INDENT):
            self._newline()
        if self._column == 0:
            sys.stdout.write(self._INDENT)
            self._column = len(self._INDENT)
        sys.stdout.write(self._word)
        self._column += len(self._word)
        self._word = ""

    def _newline(self) -> None:
        sys.stdout.write("\n")
        self._column = 0

    def end(self) -> None:
        """Finish the last line, if one was begun."""
        self._flush()
        if self._column:
            self._newline()
        sys.stdout.flush()
