"""A decision for people: the verdict, every candidate with the parts of its score, and why others were refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelyard.cli.output import Column, aligned, console, fitting_table, printable

if TYPE_CHECKING:
    from rich.console import Console

    from modelyard.client import Candidate, Decision

# Scorer -> heading, short enough that six of them fit into 80 columns.
_HEADINGS = {"capability": "able", "success": "succ", "latency": "fast", "cost": "cheap", "load": "free"}
_HEADINGS["provider"] = "prov"

CHOSEN, ELIGIBLE, REJECTED = "\N{RIGHTWARDS ARROW}", " ", "\N{MULTIPLICATION X}"


def print_decision(decision: Decision, *, stderr: bool = False) -> None:
    """The whole record, to standard output or standard error."""
    decision_lines(console(stderr=stderr), decision)


def decision_lines(screen: Console, decision: Decision, *, legend: bool = True, summary: bool = True) -> None:
    """Coloured and with short headings on a terminal, aligned text in a pipe."""
    if not screen.is_terminal:
        columns, rows = candidates(decision)
        lines = [f"{decision.verdict}: {decision.summary}"] if summary else []
        for line in (*lines, *(aligned(columns, rows) if rows else ()), *refusals(decision)):
            print(printable(line), file=screen.file)
        return
    from rich.text import Text

    columns, rows = candidates(decision, short=True)
    style = {"chosen": "green", "wait": "yellow"}.get(decision.verdict, "red")
    if summary:
        screen.print(Text(decision.verdict, style=f"bold {style}"), printable(decision.summary))
    if rows:
        screen.print(fitting_table(screen, columns, rows))
    for line in refusals(decision):
        screen.print(printable(line), style="dim")
    if rows and legend:
        screen.print(weights_of(decision), style="dim")


def print_arithmetic(decision: Decision, most: int = 2) -> None:
    """Step by step, of the candidates with the best scores: `most` of them."""
    from modelyard.cli.arithmetic import steps

    for candidate in decision.candidates[:most]:
        print(printable(f"\n{_mark(decision, candidate)} {candidate.server_id}/{candidate.model}"))
        rows = [
            [step.name, f"{step.value:.4g}", f"= {step.text}", f"= {step.numbers}"]
            for step in steps(decision, candidate)
        ]
        for name, value, text, numbers in rows:
            print(f"  {name:<13} {value:>9} {text}")
            print(f"  {'':<13} {'':>9} {numbers}")


def candidates(decision: Decision, *, short: bool = False) -> tuple[list[Column], list[list[str]]]:
    """One row per candidate."""
    scorers = [part.scorer for part in decision.candidates[0].parts] if decision.candidates else []
    columns = [
        Column(""),
        Column("server"),
        Column("model"),
        Column("score", right=True, style="bold"),
        *(Column(_HEADINGS.get(scorer, scorer) if short else scorer, right=True) for scorer in scorers),
    ]
    rows = []
    for candidate in decision.candidates:
        values = {part.scorer: f"{part.value:.2f}" for part in candidate.parts}
        rows.append(
            [
                _mark(decision, candidate),
                candidate.server_id,
                candidate.model,
                f"{candidate.score:.3f}",
                *(values.get(scorer, "") for scorer in scorers),
            ]
        )
    return columns, rows


def _mark(decision: Decision, candidate: Candidate) -> str:
    if candidate.rejections:
        return REJECTED
    chosen = (candidate.server_id, candidate.model) == (decision.server_id, decision.model)
    return CHOSEN if chosen else ELIGIBLE


def refusals(decision: Decision) -> list[str]:
    """One line per refused candidate."""
    return [
        f"{REJECTED} {candidate.server_id}/{candidate.model}: "
        + "; ".join(found.detail or found.reason for found in candidate.rejections)
        for candidate in decision.candidates
        if candidate.rejections
    ]


def weights_of(decision: Decision) -> str:
    """The legend of the score: heading, scorer and weight."""
    if not decision.candidates:
        return ""
    parts = decision.candidates[0].parts
    return "score: " + ", ".join(f"{_HEADINGS.get(p.scorer, p.scorer)} = {p.scorer} x{p.weight:g}" for p in parts)
