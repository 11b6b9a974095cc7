"""`modelyard up`: a control plane and model servers on this machine, drained by Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelyard.cli.attachment import until_attached
from modelyard.cli.discover import discover
from modelyard.cli.errors import FAILED, INTERRUPTED, CliError
from modelyard.cli.extras import cure
from modelyard.cli.fleet_process import Child, FleetProcess
from modelyard.cli.options import as_json
from modelyard.cli.plan import Plan, make_plan
from modelyard.cli.session import Session, configuration_file
from modelyard.cli.up_view import UpView, view_for

if TYPE_CHECKING:
    from modelyard.client import ServerStatus

_LAST_WORDS = 1.0


@click.command("up")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Configuration file, section `up`.")
@click.option("--port", type=click.IntRange(0, 65535), help="gRPC port of the control plane; 0 takes a free one.")
@click.option("--metrics-port", type=click.IntRange(-1, 65535), help="Port of /metrics; 0: a free one, -1: none.")
@click.option("--gateway-port", type=click.IntRange(-1, 65535), help="Port of OpenAI's API; 0: a free one, -1: none.")
@click.option(
    "--store",
    metavar="URL",
    help="Database of durable tasks: sqlite:///PATH or postgresql://USER@HOST/NAME; empty: none.",
)
@click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="ENGINE[:KEY=VALUE,...]",
    help="A model server with settings of its engine; `id` names it. May be repeated; replaces up.servers.",
)
@click.option("--no-servers", is_flag=True, help="The control plane only; model servers attach from elsewhere.")
@click.option("--no-discover", is_flag=True, help="Do not look for engines on this machine.")
@click.option(
    "--with",
    "wanted",
    multiple=True,
    metavar="PROVIDER",
    help="Also use this hosted provider, found by its key in the environment. May be repeated.",
)
@click.option(
    "--pull",
    "pulls",
    multiple=True,
    metavar="MODEL",
    help="Fetch this model and load it, where a model server can, before anything else. May be repeated.",
)
@as_json
@click.pass_obj
def up(
    session: Session,
    config: Path | None,
    port: int | None,
    metrics_port: int | None,
    gateway_port: int | None,
    store: str | None,
    servers: tuple[str, ...],
    no_servers: bool,
    no_discover: bool,
    wanted: tuple[str, ...],
    pulls: tuple[str, ...],
) -> int:
    """Run a control plane and model servers on this machine.

    Without settings: a model server beside each engine that is found on this machine (a running Ollama or vLLM, an
    MLX model in the cache), or else one with the bundled model. Ctrl-C lets running requests finish; a second one ends
    everything at once. With --json, what happens is printed as one JSON object a line.

    \b
    modelyard up
    modelyard up --server mlx:model=/models/qwen3-4b,slots=4 --server simulated:id=spare
    """
    problem = cure("modelyard up", "server", install="local")
    if problem:
        raise CliError(problem, reason="NOT_INSTALLED")
    plan = make_plan(
        configuration_file(config or session.config),
        port=port,
        metrics_port=metrics_port,
        gateway_port=gateway_port,
        store=store,
        servers=servers,
        no_servers=no_servers,
        offers=tuple if no_discover else discover,
        wanted=wanted,
        pulls=pulls,
    )
    return asyncio.run(_up(plan, view_for(as_json=session.json)))


class Stop:
    """SIGINT, SIGTERM and SIGHUP: the first asks to drain, the second kills."""

    def __init__(self, fleet: FleetProcess) -> None:
        self.signal: signal.Signals | None = None
        self.killed = False
        self._fleet = fleet
        self._event = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._heard, number)

    def _heard(self, number: signal.Signals) -> None:
        if self._event.is_set():
            self.killed = True
            self._fleet.kill()
        self.signal = number
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


async def _up(plan: Plan, view: UpView) -> int:
    async with FleetProcess(view.event) as fleet:
        stop = Stop(fleet)
        work = asyncio.create_task(_serve(fleet, plan, view), name="serve")
        told = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait({work, told}, return_when=asyncio.FIRST_COMPLETED)
            failure: CliError | None = None
            if work.done():
                failure = await _reason(work)
            work.cancel()
            with suppress(OSError):  # the terminal may have hung up, which is how we were told
                view.draining(stop.signal.name if stop.signal else "")
            await fleet.drain()
            await asyncio.gather(work, return_exceptions=True)
        finally:
            told.cancel()
            with suppress(OSError):
                view.close()
        if failure and not stop.killed:
            raise failure
        with suppress(OSError):
            view.stopped()
        return INTERRUPTED if stop.killed else 0


async def _reason(work: asyncio.Task[str]) -> CliError:
    try:
        return CliError(await work, FAILED, "CONTROL_PLANE_DIED")
    except CliError as error:
        return error


async def _attached(
    address: str, supervisors: Mapping[str, asyncio.Task[Child]], pulls: Sequence[str], view: UpView
) -> tuple[ServerStatus, ...]:
    """The servers, once they are there and have fetched and loaded what they should."""
    servers = await until_attached(address, supervisors)
    if not pulls:
        return servers
    from modelyard.client import AsyncClient, ModelyardError

    async with AsyncClient(address) as client:
        for name in pulls:
            try:
                with view.progress(name) as progress:
                    for order in (client.pull_model, client.load_model):
                        async for step in order(name):
                            progress.step(step)
            except ModelyardError as error:
                view.remark(f"{name}: {error.message}")
        return await client.servers()


async def _serve(fleet: FleetProcess, plan: Plan, view: UpView) -> str:
    """Start everything and wait until the control plane has ended for good; how it ended."""
    for remark in plan.remarks:
        view.remark(remark)
    facts = await fleet.start_control_plane(plan.control_plane)
    address = str(facts["address"])
    supervisors = {
        server.server_id: fleet.start_server(server.program(address, plan.config)) for server in plan.servers
    }
    end = asyncio.create_task(fleet.control_plane_end(), name="control-plane-end")
    attached = asyncio.create_task(_attached(address, supervisors, plan.pulls, view), name="attached")
    try:
        await asyncio.wait({end, attached}, return_when=asyncio.FIRST_COMPLETED)
        if attached.done() and attached.exception():
            # It may be the control plane's end that made it fail; that is then the better story.
            await asyncio.wait({end}, timeout=_LAST_WORDS)
        if not end.done():
            view.up(facts, attached.result())
        return await end
    finally:
        end.cancel()
        attached.cancel()
