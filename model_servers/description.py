"""The server's picture of itself, from which every report is made."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Hashable

from model_servers import convert
from model_servers.admission import Admission
from model_servers.condition import Condition
from model_servers.engine import EngineStatus
from model_servers.lifecycle import Lifecycle
from model_servers.performance import Recorder
from modelyard.v1 import fleet_pb2


def this_host() -> convert.Host:
    return convert.Host(os.cpu_count() or 0, f"{sys.platform}-{platform.machine()}")


class SelfDescription:
    """Cheap to ask: everything is already known somewhere."""

    def __init__(
        self,
        identity: convert.Identity,
        condition: Condition,
        admission: Admission,
        lifecycle: Lifecycle,
        recorder: Recorder,
        *,
        manages_models: bool,
    ) -> None:
        self.identity = identity
        self._host = this_host()
        self._condition = condition
        self._admission = admission
        self._lifecycle = lifecycle
        self._recorder = recorder
        self._manages_models = manages_models

    def report(self, orchestrator_id: str = "", lease_epoch: int = 0) -> fleet_pb2.ServerReport:
        """The whole state, as it is told to that control plane (empty: to nobody in particular)."""
        status = self._condition.status()
        means = {model.name: found for model in status.models if (found := self._recorder.means(model.name))}
        return convert.server_report(
            self.identity,
            self._host,
            status,
            self._load(status, orchestrator_id),
            means,
            manages_models=self._manages_models,
            draining=self._lifecycle.draining,
            lease_epoch=lease_epoch,
        )

    def _load(self, status: EngineStatus, orchestrator_id: str) -> convert.Load:
        # The engine counts what others may have sent it directly; the door counts what has not
        # reached the engine yet. Both are work in hand.
        slots = max(status.load.slots, 1)
        inside = self._admission.count()
        running = max(status.load.running, min(inside, slots))
        waiting = max(status.load.waiting, inside - running, 0)
        own = self._admission.count_of(orchestrator_id)
        return convert.Load(slots, running, waiting, max(running + waiting - own, 0))

    def news(self) -> Hashable:
        """What is worth a report at once when it changes: not load, which changes all the time."""
        status = self._condition.status()
        models = tuple((m.provider, m.name, m.context_length, m.features, m.state) for m in status.models)
        return status.health, status.health_detail, status.load.slots, models
