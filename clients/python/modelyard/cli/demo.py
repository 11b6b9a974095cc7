"""`modelyard demo`: a private fleet is started, asked, explained and stopped."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli import output
from modelyard.cli.attachment import until_attached
from modelyard.cli.demo_script import CONTROL_PLANE, STEPS, Step, servers
from modelyard.cli.demo_view import DemoView, Quiet
from modelyard.cli.errors import CliError
from modelyard.cli.extras import cure
from modelyard.cli.fleet_process import Event, FleetProcess
from modelyard.cli.generate import answer
from modelyard.cli.options import as_json
from modelyard.cli.session import Session

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, Decision, GenerationResult, ModelyardError, ServerStatus

_START_SECONDS = 120.0
_REQUEST_SECONDS = 60.0
_DRAIN_SECONDS = 10.0


@click.command("demo")
@as_json
@click.pass_obj
def demo(session: Session) -> None:
    """Show a small fleet at work: start it, ask it, explain it, stop it.

    A control plane, the bundled model on MLX and two simulated servers are started on free ports of this machine,
    apart from any other fleet. No network is needed.
    """
    problem = cure("modelyard demo", "server", install="local")
    if problem:
        raise CliError(problem, reason="NOT_INSTALLED")
    facts = asyncio.run(_demo(Quiet() if session.json else DemoView()))
    if session.json:
        output.print_json(facts)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request of the demo ended."""

    step: Step
    result: GenerationResult | None = None
    decision: Decision | None = None
    """The dry run behind a refusal."""
    error: ModelyardError | None = None
    simulated: bool = False

    def to_dict(self) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "title": self.step.title,
            "prompt": self.step.shown or self.step.prompt,
            "task_type": self.step.task_type,
            "priority": self.step.priority,
        }
        if self.error and self.decision:
            return {**asked, "error": self.error.to_dict(), "decisions": [self.decision.to_dict()]}
        return {**asked, "simulated": self.simulated, **(self.result.to_dict() if self.result else {})}


@dataclass(slots=True)
class _Log:
    """The last lines of all programs, for when something goes wrong."""

    lines: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    def event(self, event: Event) -> None:
        if event.kind in ("log", "exited", "given_up"):
            self.lines.append(f"[{event.name}] {event.text}")

    def tail(self) -> str:
        return "".join(f"\n    {line}" for line in self.lines)


async def _demo(view: Quiet) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    if task:
        # As for Ctrl-C: everything is ended on the way out.
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    begun = loop.time()
    log = _Log()
    plans, remark = servers()
    if remark:
        view.remark(remark)
    try:
        async with FleetProcess(log.event, _private_environment()) as fleet:
            view.starting("starting the control plane")
            facts = await fleet.start_control_plane(("--config", os.devnull, *CONTROL_PLANE))
            address = str(facts["address"])
            view.starting(f"starting {', '.join(plan.server_id for plan in plans)}")
            supervisors = {
                plan.server_id: fleet.start_server(plan.program(address, Path(os.devnull))) for plan in plans
            }
            async with asyncio.timeout(_START_SECONDS):
                attached = await until_attached(address, supervisors)
            if len(attached) < len(plans):
                lost = {plan.server_id for plan in plans} - {server.server_id for server in attached}
                raise CliError(f"{', '.join(sorted(lost))} did not start", reason="START_FAILED")
            started = loop.time() - begun
            view.fleet(attached, started)
            outcomes = await _requests(address, attached, view)
            view.starting("draining")
            try:
                async with asyncio.timeout(_DRAIN_SECONDS):
                    await fleet.drain()
            except TimeoutError:
                raise CliError(f"the fleet did not drain within {_DRAIN_SECONDS:g} s") from None
            view.close()
            total = loop.time() - begun
            view.summary(outcomes, total)
    except CliError as error:
        raise CliError(f"{error.message}{log.tail()}", error.status, error.reason) from error
    except TimeoutError:
        raise CliError(f"the fleet was not ready after {_START_SECONDS:g} s{log.tail()}") from None
    finally:
        view.close()
    return _facts(attached, outcomes, started, total, remark)


def _private_environment() -> dict[str, str]:
    """Without settings that are meant for other fleets."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MODELYARD_")}


async def _requests(address: str, attached: Sequence[ServerStatus], view: Quiet) -> list[Outcome]:
    from modelyard.client import AsyncClient

    engines = {server.server_id: server.engine for server in attached}
    async with AsyncClient(address, timeout=_REQUEST_SECONDS) as client:
        return [await _request(client, number, step, engines, view) for number, step in enumerate(STEPS, 1)]


async def _request(client: AsyncClient, number: int, step: Step, engines: Mapping[str, str], view: Quiet) -> Outcome:
    from modelyard.client import ModelyardError, NoCapableServer

    view.step(number, step)
    options = dict(step.options)
    try:
        result = await answer(client, step.prompt, {**options, "explain": True}, view)
    except NoCapableServer as error:
        if not step.refused:
            raise CliError(f"request {number} ({step.title}) was refused: {error}", reason=error.reason) from error
        outcome = Outcome(step, decision=await client.explain(step.prompt, **options), error=error)
        if outcome.decision:
            view.refused(error, outcome.decision)
        return outcome
    except ModelyardError as error:
        raise CliError(f"request {number} ({step.title}) failed: {error}", reason=error.reason) from error
    if step.refused:
        raise CliError(f"request {number} ({step.title}) should have been refused, but {result.server_id} answered")
    outcome = Outcome(step, result, simulated=engines.get(result.server_id) == "simulated")
    view.outcome(outcome)
    return outcome


def _facts(
    attached: Sequence[ServerStatus], outcomes: Sequence[Outcome], started: float, total: float, remark: str
) -> dict[str, Any]:
    return {
        "startup_seconds": round(started, 3),
        "total_seconds": round(total, 3),
        "remark": remark or None,
        "servers": [{**server.to_dict(), "simulated": server.engine == "simulated"} for server in attached],
        "requests": [outcome.to_dict() for outcome in outcomes],
    }
