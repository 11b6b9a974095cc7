"""The fleet as the contract shows it."""

from __future__ import annotations

import asyncio

from control_plane.api import convert
from control_plane.domain.model import ModelCard, ModelName, ServerId
from control_plane.domain.server import BreakerState
from control_plane.fleet.registry import Fleet, placements
from control_plane.fleet.server import Server
from modelyard.v1 import fleet_pb2
from modelyard.v1.orchestrator_pb2 import WatchFleetResponse

# Changes of load alone are told at most this often, in seconds.
_LOAD_INTERVAL = 1.0


def server_status(server: Server, now: float) -> fleet_pb2.ModelServerStatus:
    report = server.report
    identity, load, pool = report.identity, report.load, report.pool
    return fleet_pb2.ModelServerStatus(
        report=fleet_pb2.ServerReport(
            identity=fleet_pb2.ServerIdentity(
                server_id=identity.server_id,
                instance_id=identity.instance_id,
                endpoint=identity.endpoint,
                labels=identity.labels,
                version=identity.version,
            ),
            engine=fleet_pb2.EngineInfo(
                name=report.engine, version=report.engine_version, manages_models=report.manages_models
            ),
            hardware=fleet_pb2.HardwareInfo(
                device=report.hardware.device,
                memory_bytes=report.hardware.memory_bytes,
                cpu_cores=report.hardware.cpu_cores,
                platform=report.hardware.platform,
                memory_used_bytes=report.hardware.memory_used_bytes,
            ),
            models=[convert.model_info(card) for card in server.cards],
            load=fleet_pb2.ServerLoad(
                slots=load.slots,
                running=load.running,
                waiting=load.waiting,
                foreign=load.foreign,
                kv_cache_utilization=load.kv_cache_utilization,
            ),
            health=report.health.value,  # type: ignore[arg-type]
            health_detail=report.health_detail,
            lease_epoch=server.lease.epoch,
            state=fleet_pb2.DESIRED_STATE_DRAIN if report.draining else fleet_pb2.DESIRED_STATE_SERVE,
            pool=fleet_pb2.ConnectionPool(size=pool.size, in_use=pool.in_use, opened=pool.opened, reused=pool.reused)
            if pool
            else None,
        ),
        lease_state=server.state.value,  # type: ignore[arg-type]
        lease_epoch=server.lease.epoch,
        attached_at=convert.timestamp(server.attached_wall),
        reported_at=convert.timestamp(server.reported_wall),
        in_flight=len(server.flights),
        models=[_runtime(server, card, now) for card in server.cards],
        assigned=sum(flight.assigned for flight in server.flights),
    )


def _runtime(server: Server, card: ModelCard, now: float) -> fleet_pb2.ModelRuntime:
    pair = server.pairs[card.name, card.provider]
    stats = pair.stats
    runtime = fleet_pb2.ModelRuntime(
        model=card.name,
        success_rate=stats.success_at(now),
        requests=stats.requests,
        failures=stats.failures,
        breaker=BreakerState(pair.breaker.state).value,  # type: ignore[arg-type]
    )
    if stats.ttft is not None:
        runtime.ttft.CopyFrom(convert.duration(stats.ttft))
    if stats.tpot is not None:
        runtime.tpot.CopyFrom(convert.duration(stats.tpot))
    return runtime


def models(fleet: Fleet) -> dict[str, fleet_pb2.Model]:
    """Every model offered or defined, by name."""
    placed = placements(fleet.servers())
    return {name: _model(fleet, ModelName(name), placed.get(ModelName(name), [])) for name in fleet.model_names()}


def _model(fleet: Fleet, name: ModelName, placed: list[tuple[Server, ModelCard]]) -> fleet_pb2.Model:
    defined = [definition for definition in fleet.definitions if definition.name == name]
    cards = [card for _, card in placed]
    best: dict[int, float] = {}
    for scores in [card.capabilities for card in cards] or [d.capabilities or {} for d in defined]:
        for kind, score in scores.items():
            best[kind] = max(score, best.get(kind, 0.0))
    features = convert.feature_set(())
    for offered in [card.features for card in cards] or [d.features for d in defined if d.features]:
        features |= offered
    return fleet_pb2.Model(
        name=name,
        providers=sorted({card.provider for card in cards} | {definition.provider for definition in defined}),
        placements=[
            fleet_pb2.ModelPlacement(
                server_id=server.id,
                lease_state=server.state.value,  # type: ignore[arg-type]
                info=convert.model_info(card),
            )
            for server, card in placed
        ],
        context_length=max([card.context_length for card in cards] or [d.context_length or 0 for d in defined]),
        features=convert.feature_numbers(features),  # type: ignore[arg-type]
        capabilities=[
            fleet_pb2.Capability(task_type=kind, score=score)  # type: ignore[arg-type]
            for kind, score in sorted(best.items())
        ],
    )


class Watch:
    """One watcher's view: collects which servers changed until it is ready to hear of them.

    Levels, not edges: a slow reader finds the latest state of each server, however many
    changes it missed.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._dirty: set[ServerId] = set()
        self._urgent = asyncio.Event()
        self._any = asyncio.Event()
        self._stop = fleet.listen(self._note)

    def _note(self, server_id: ServerId, urgent: bool) -> None:
        self._dirty.add(server_id)
        self._any.set()
        if urgent:
            self._urgent.set()

    def close(self) -> None:
        self._stop()

    def snapshot(self, now: float) -> WatchFleetResponse:
        """Everything."""
        self._take()
        return WatchFleetResponse(
            snapshot=True, servers=[server_status(server, now) for server in self._fleet.servers()]
        )

    async def changed(self) -> None:
        """Return when there is something to tell: at once if it is urgent, else after a while."""
        await self._any.wait()
        try:
            async with asyncio.timeout(_LOAD_INTERVAL):
                await self._urgent.wait()
        except TimeoutError:
            pass

    def changes(self, now: float) -> WatchFleetResponse:
        """What changed since the last message."""
        dirty = self._take()
        present = {server.id: server for server in self._fleet.servers()}
        return WatchFleetResponse(
            servers=[server_status(present[server_id], now) for server_id in sorted(dirty & present.keys())],
            removed_server_ids=sorted(dirty - present.keys()),
        )

    def _take(self) -> set[ServerId]:
        dirty, self._dirty = self._dirty, set()
        self._any.clear()
        self._urgent.clear()
        return dirty
