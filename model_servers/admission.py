"""The door: who is inside, for which control plane, and whether another one may enter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.rpc.server import InFlight

_SHORTEST_RETRY, _LONGEST_RETRY = 0.1, 30.0
_MEMORY = 0.2


class Admission:
    """Admits slots + waiting room; what is beyond is refused at once, so that it can go elsewhere."""

    def __init__(
        self,
        *,
        slots: Callable[[], int],
        max_waiting: int | None,
        draining: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._slots = slots
        self._max_waiting = max_waiting
        self._draining = draining
        self._clock = clock
        self._by_sender: Counter[str] = Counter()
        self._duration = 1.0
        self.in_flight = InFlight()

    def count(self) -> int:
        return self.in_flight.count

    def count_of(self, orchestrator_id: str) -> int:
        """Requests of that control plane; the empty id is nobody's."""
        return self._by_sender[orchestrator_id] if orchestrator_id else 0

    @contextmanager
    def place(self, orchestrator_id: str) -> Iterator[None]:
        """Hold a place. Raises Refusal: DRAINING or SERVER_BUSY."""
        if self._draining():
            raise Refusal(Reason.DRAINING, "this model server is draining; another one must serve the request")
        slots = self._slots()
        room = slots + (2 * slots if self._max_waiting is None else self._max_waiting)
        if self.in_flight.count >= room:
            raise Refusal(
                Reason.SERVER_BUSY,
                f"all {room} places ({slots} slots and the waiting room) are taken",
                retry_after=self._retry_after(slots),
            )
        entered = self._clock()
        self._by_sender[orchestrator_id] += 1
        try:
            with self.in_flight:
                yield
        finally:
            self._duration += _MEMORY * (self._clock() - entered - self._duration)
            self._by_sender[orchestrator_id] -= 1
            if not self._by_sender[orchestrator_id]:
                del self._by_sender[orchestrator_id]  # control planes come and go with ever new ids

    def _retry_after(self, slots: int) -> float:
        """About when the next place becomes free."""
        return min(max(self._duration / slots, _SHORTEST_RETRY), _LONGEST_RETRY)
