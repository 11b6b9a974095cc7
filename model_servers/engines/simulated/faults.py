"""Which scripted fault strikes which request."""

from __future__ import annotations

import random
from collections.abc import Sequence

from model_servers.engines.simulated.settings import Fault


class FaultScript:
    """Counts requests and picks the first fault whose conditions all hold."""

    def __init__(self, faults: Sequence[Fault], seed: int) -> None:
        self._faults = tuple(fault for fault in faults if fault.kind not in ("refuse_start", "refuse_load"))
        self._load_faults = {fault: fault.times for fault in faults if fault.kind == "refuse_load"}
        self._struck = [0] * len(self._faults)
        self._random = random.Random(seed)
        self._requests = 0
        self.refuses_start = any(fault.kind == "refuse_start" for fault in faults)

    def next(self, model: str) -> Fault | None:
        """The fault of the next request, if one strikes it."""
        if not self._faults:
            return None
        self._requests += 1
        for index, fault in enumerate(self._faults):
            if self._holds(fault, model) and (not fault.times or self._struck[index] < fault.times):
                self._struck[index] += 1
                return fault
        return None

    def refuses_load(self, model: str) -> bool:
        """Whether the next load of that model fails."""
        for fault, left in self._load_faults.items():
            if (not fault.model or fault.model == model) and (left or not fault.times):
                self._load_faults[fault] = left - 1
                return True
        return False

    def _holds(self, fault: Fault, model: str) -> bool:
        number = self._requests
        return (
            (not fault.model or fault.model == model)
            and (fault.at_request is None or number == fault.at_request)
            and (fault.after_requests is None or number > fault.after_requests)
            and (fault.every is None or number % fault.every == 0)
            and (fault.probability >= 1 or self._random.random() < fault.probability)
        )
