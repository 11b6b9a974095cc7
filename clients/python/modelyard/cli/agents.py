"""`modelyard agents`: who can do a task, who is to do it, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelyard.cli import output
from modelyard.cli.connection import call
from modelyard.cli.decision_view import CHOSEN, ELIGIBLE, REJECTED
from modelyard.cli.errors import NOT_FOUND, UNAVAILABLE, USAGE, CliError
from modelyard.cli.options import SECONDS, TASK_TYPES, Number, as_json, tenant_option
from modelyard.cli.output import Column
from modelyard.cli.session import Session

if TYPE_CHECKING:
    from modelyard.client import AgentStatus, AsyncAssignment, AsyncClient, RoutingDecision, ScoreTerm

_TRANSIENT = {"busy", "lost"}
"""Reasons of rejection that pass."""

F = TypeVar("F", bound=Callable[..., Any])


@click.group("agents")
def agents() -> None:
    """List agents, and route tasks among them.

    \b
    modelyard agents match "Review a change in Python" --skill "code review"
    modelyard agents route "Review a change in Python" --skill python:0.5
    modelyard agents report 4f1c... --score 0.8
    """


_skill = click.option(
    "--skill",
    "skills",
    multiple=True,
    metavar="NAME[:LEVEL]",
    help="A skill without which nobody will do, and the least level, 0 to 1. May be repeated.",
)
_task_type = click.option("--task-type", type=click.Choice(TASK_TYPES), metavar="TYPE", help="The kind of work.")


def _routing(function: F) -> F:
    for option in (
        click.option("--exclude", multiple=True, metavar="AGENT", help="Never this agent. May be repeated."),
        click.option(
            "--label", "labels", multiple=True, metavar="NAME=VALUE", help="The agent has it. May be repeated."
        ),
        _task_type,
        _skill,
        click.argument("description", default=""),
    ):
        function = option(function)
    return function


@agents.command("list")
@tenant_option
@as_json
@click.pass_obj
def list_agents(session: Session, /) -> None:
    """List the agents that are registered."""
    found = call(session, lambda client: client.agents.list())
    if session.json:
        output.print_json({"agents": [status.to_dict() for status in found]})
        return
    output.print_table(
        (
            Column("agent", style="bold"),
            Column("state"),
            Column("running", right=True),
            Column("skills", flexible=True),
            Column("tasks", right=True, optional=1),
            Column("success", right=True, optional=1),
            Column("endpoint", optional=2),
        ),
        [_status(status) for status in found],
        empty="no agents",
    )


def _status(status: AgentStatus) -> tuple[str, ...]:
    agent = status.agent
    tasks = sum(one.tasks for one in status.experience)
    successes = sum(one.successes for one in status.experience)
    return (
        agent.id,
        status.state,
        f"{status.running}/{agent.max_concurrency}",
        ", ".join(name if level == 1 else f"{name} {level:g}" for name, level in agent.skills.items()),
        f"{tasks:.1f}",
        f"{successes / tasks:.2f}" if tasks else "-",
        agent.endpoint,
    )


@agents.command("match")
@click.argument("description", default="")
@_skill
@_task_type
@click.option("--kind", type=click.Choice(("model", "agent")), help="Only these. Default: both.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, metavar="N", help="Most matches. Default: 20.")
@click.option("--all", "include_rejected", is_flag=True, help="Show also who will not do, and why.")
@tenant_option
@as_json
@click.pass_obj
def match(session: Session, /, description: str, skills: tuple[str, ...], **options: Any) -> None:
    """Rank models and agents by how well they fit a task."""
    needed = _skills(skills)
    found = call(session, lambda client: client.agents.match(description, skills=needed, **options))
    if session.json:
        output.print_json(found.to_dict())
        return
    rows, terms = [], [one.terms for one in found.matches]
    names = _names(terms)
    for one in found.matches:
        mark = REJECTED if one.rejections else ELIGIBLE
        rows.append([mark, one.kind, one.id, f"{one.score:.3f}", "yes" if one.available else "no",
                     *_values(one.terms, names)])  # fmt: skip
    columns = (Column(""), Column("kind"), Column("name"), Column("score", right=True, style="bold"), Column("free"))
    output.print_table((*columns, *(Column(name, right=True) for name in names)), rows, empty="nobody fits")
    _explain([(one.id, [found.detail for found in one.rejections]) for one in found.matches], terms)
    _compared(found.similarity, found.similarity_detail)


@agents.command("route")
@_routing
@click.option("--from", "from_agent", metavar="AGENT", help="The agent that hands the task over.")
@click.option(
    "--within", type=Number(1, SECONDS.max), metavar="SECONDS", help="Report it in so many seconds, or it has failed."
)
@click.option("--dry-run", is_flag=True, help="Only show who would be chosen, and why.")
@tenant_option
@as_json
@click.pass_obj
def route(
    session: Session,
    /,
    description: str,
    skills: tuple[str, ...],
    labels: tuple[str, ...],
    from_agent: str | None,
    within: float | None,
    dry_run: bool,
    **options: Any,
) -> int:
    """Choose an agent for a task and reserve a place; report it afterwards with `modelyard agents report`.

    Exit status 4 if no agent ever could do it, 5 if all who could are busy or away; with --dry-run, too.
    """
    asked: dict[str, Any] = {"skills": _skills(skills), "labels": _labels(labels), **options}
    if dry_run:
        decision = call(session, lambda client: client.agents.explain(description, **asked))
        if session.json:
            output.print_json({"decision": decision.to_dict()})
        else:
            _decision(decision)
        return _verdict(decision)

    async def work(client: AsyncClient) -> AsyncAssignment:
        return await client.agents.route(description, from_agent=from_agent, within=within, **asked)

    made = call(session, work)
    deadline = made.deadline.isoformat() if made.deadline else None
    if session.json:
        told = {"id": made.id, "agent": made.agent.to_dict(), "deadline": deadline}
        output.print_json({"assignment": told, "decision": made.decision.to_dict()})
        return 0
    _decision(made.decision)
    print(output.printable(f"{made.id}  {made.agent.id}  {made.agent.endpoint}".rstrip()))
    return 0


def _verdict(decision: RoutingDecision) -> int:
    """The exit status for a dry run: 0 if an agent would be chosen, 5 if one might be later, 4 if none ever could."""
    if decision.agent_id:
        return 0
    hopeful = any({found.reason for found in one.rejections} <= _TRANSIENT for one in decision.candidates)
    return UNAVAILABLE if hopeful else NOT_FOUND


@agents.command("report")
@click.argument("assignment")
@click.option("--failed", is_flag=True, help="The task was not done.")
@click.option("--score", type=Number(0, 1), metavar="S", help="How good the result was, 0 to 1.")
@click.option("--duration", type=SECONDS, metavar="SECONDS", help="How long it took.")
@tenant_option
@as_json
@click.pass_obj
def report(session: Session, /, assignment: str, failed: bool, score: float | None, duration: float | None) -> None:
    """Say how an assignment ended."""
    if failed and score is not None:
        raise CliError("--failed and --score exclude each other", USAGE, "USAGE")
    outcome = call(
        session,
        lambda client: client.agents.report(assignment, success=not failed, score=score, duration=duration),
    )
    if session.json:
        output.print_json({"outcome": outcome})
    elif outcome == ("success" if failed else "failure"):
        print(f"it had been reported as a {outcome} before, that stands")
    else:
        print(outcome)


@agents.command("interactions")
@click.argument("agent", required=False)
@click.option("--limit", type=click.IntRange(1, 1000), default=100, metavar="N", help="Most rows. Default: 100.")
@tenant_option
@as_json
@click.pass_obj
def interactions(session: Session, /, agent: str | None, limit: int) -> None:
    """Show which agents have handed tasks to which; with AGENT only those in which it takes part."""
    found = call(session, lambda client: client.agents.interactions(agent, limit=limit))
    if session.json:
        output.print_json({"interactions": [one.to_dict() for one in found]})
        return
    output.print_table(
        (
            Column("from", style="bold"),
            Column("to", style="bold"),
            Column("assigned", right=True),
            Column("succeeded", right=True),
            Column("failed", right=True),
            Column("mean time", right=True),
        ),
        [
            (
                one.from_agent_id, one.to_agent_id, str(one.assigned), str(one.succeeded), str(one.failed),
                output.seconds(one.mean_duration),
            )
            for one in found
        ],
        empty="no interactions",
    )  # fmt: skip


# ------------------------------------------------------------------ parse ---


def _skills(given: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, colon, level = text.rpartition(":")
        try:
            found[name if colon else text] = float(level) if colon else 0.0
        except ValueError:
            raise CliError(f"--skill: {level!r} is no level, 0 to 1", USAGE, "USAGE") from None
    return found


def _labels(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise CliError(f"--label: {text!r} is not NAME=VALUE", USAGE, "USAGE")
        found[name] = value
    return found


# ----------------------------------------------------------------- render ---


def _decision(decision: RoutingDecision) -> None:
    print(output.printable(decision.summary))
    terms = [one.terms for one in decision.candidates]
    names = _names(terms)
    rows = []
    for one in decision.candidates:
        mark = REJECTED if one.rejections else CHOSEN if one.agent_id == decision.agent_id else ELIGIBLE
        rows.append([mark, one.agent_id, f"{one.score:.3f}", *_values(one.terms, names)])
    if rows:
        columns = (Column(""), Column("agent"), Column("score", right=True, style="bold"))
        output.print_table((*columns, *(Column(name, right=True) for name in names)), rows)
        weights = ", ".join(f"{term.name} x{term.weight:g}" for term in terms[0])
        output.note(f"score: weighted mean of {weights}")
    _explain(
        [(one.agent_id, [found.detail for found in one.rejections]) for one in decision.candidates],
        [(*one.capability_terms, *one.terms) for one in decision.candidates],
    )
    _compared(decision.similarity, decision.similarity_detail)


_EXPLAINED = 3
"""Candidates whose values are explained."""


def _names(terms: Sequence[Sequence[ScoreTerm]]) -> list[str]:
    return [term.name for term in terms[0]] if terms else []


def _values(terms: Sequence[ScoreTerm], names: Sequence[str]) -> list[str]:
    values = {term.name: f"{term.value:.2f}" for term in terms}
    return [values.get(name, "") for name in names]


def _explain(refusals: Sequence[tuple[str, list[str]]], terms: Sequence[Sequence[ScoreTerm]]) -> None:
    """Why some will not do, and what the best ones' values were made of."""
    for place, ((id, details), parts) in enumerate(zip(refusals, terms, strict=True)):
        if details:
            print(output.printable(f"{REJECTED} {id}: {'; '.join(details)}"))
        elif place < _EXPLAINED and (
            said := [f"{part.name} {part.value:.2f} ({part.detail})" for part in parts if part.detail]
        ):
            output.note(f"{id}: {', '.join(said)}")


def _compared(similarity: str, detail: str) -> None:
    if similarity == "embedding":
        output.note(f"texts were compared by embeddings of {detail}")
    elif similarity:
        output.note("texts were compared by words" + (f": {detail}" if detail else ""))
