"""Time of one `select()` and one `explain()`, microseconds.

`python -m tests.benchmarks.select`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

from control_plane.domain.model import ModelCard, ModelName, ModelState, Price, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import Feature, TaskType
from control_plane.prediction.features import Coefficients
from control_plane.selection.policy import Policy
from control_plane.selection.query import Query
from control_plane.selection.select import explain, select
from control_plane.selection.table import CandidateRow, CandidateTable

SIZES = (3, 100, 1000)
TASKS = tuple(TaskType)


def fleet(size: int, cold: int = 0) -> CandidateTable:
    """A ready fleet of `size` pairs, four models a server; `cold` of every ten models are cold."""
    table = CandidateTable(
        CandidateRow(
            ServerId(f"host-{number // 4:03}"),
            ModelCard(
                name=ModelName(f"model-{number % 20}"),
                provider=Provider(("mlx", "vllm", "openai")[number % 3]),
                context_length=8192 << number % 4,
                capabilities={task: (number * 7 + task) % 10 / 10 for task in TASKS},
                features=Feature.STREAMING | Feature.JSON,
                state=ModelState.COLD if number % 10 < cold else ModelState.WARM,
                load_time=5.0,
                price=Price(prompt=0.1 * (number % 3), completion=0.4 * (number % 3)),
            ),
        )
        for number in range(size)
    )
    for server_id in table.spans:
        table.set_work(server_id, streams=hash(server_id) % 8, lane_until=0.0, slot_at=1.0)
        table.set_server(server_id, ready=True, draining=False, slots=8, used=hash(server_id) % 8, waiting=0)
    for row in range(size):
        table.set_prediction(row, learned(row))
    return table


def learned(row: int) -> Coefficients[float]:
    """What was measured of a row."""
    return Coefficients(
        base=0.02, per_prompt_token=1e-4 * (1 + row % 7), per_backlog_token=1e-4 * (1 + row % 7), per_waiting=0.0,
        tpot_base=0.01 * (1 + row % 5), tpot_per_stream=0.001, ttft_spread=(1.0, 1.4), tpot_spread=(1.0, 1.2),
        evidence=100.0,
    )  # fmt: skip


def distinct(count: int) -> list[RouteRequest]:
    """Requests of which no two ask for the same."""
    return [
        RouteRequest(
            f"r{number}",
            task_type=TASKS[number % len(TASKS)],
            prompt_tokens=100 + number,
            max_tokens=None if number % 3 else 200,
            model=ModelName(f"model-{number % 20}") if number % 4 == 0 else None,
            excluded=frozenset({ServerId(f"host-{number % 10:03}")}) if number % 5 == 0 else frozenset(),
            features=Feature.JSON if number % 2 else Feature.NONE,
        )
        for number in range(count)
    ]


def run() -> dict[str, float]:
    """Medians in microseconds by name of the measurement."""
    policy = Policy()
    results: dict[str, float] = {}
    for size in SIZES:
        table = fleet(size)
        for name, requests in (("distinct", distinct(2000)), ("repeated", [RouteRequest("r")] * 2000)):
            results[f"select, {size} candidates, {name}"] = _median(
                lambda r, t=table: select(Query(t, r, policy)), requests
            )
    table = fleet(100, cold=3)
    results["select, 100 candidates, 30 cold"] = _median(lambda r: select(Query(table, r, policy)), distinct(2000))
    table = fleet(100)
    results["explain, 100 candidates, distinct"] = _median(lambda r: explain(Query(table, r, policy)), distinct(200))
    return results


def _median(call: Callable[[RouteRequest], object], requests: Sequence[RouteRequest]) -> float:
    for request in requests[:50]:
        call(request)
    times = []
    for request in requests:
        begun = perf_counter()
        call(request)
        times.append(perf_counter() - begun)
    return median(times) * 1e6


if __name__ == "__main__":
    for measurement, microseconds in run().items():
        print(f"{measurement:45} {microseconds:9.1f} µs")
