"""Time of one `select()` and one `explain()`, and of keeping the table, microseconds.

`python -m tests.benchmarks.select`

"Everything on" is a decision as the scheduler takes it, the question included: predictions, the prompt looked up in
the prefix index, a budget that some rows exceed, what those in front are expected to take, a third of the models cold,
servers that failed before and some that are full. Wanted: 150, 500 and 3,000 us at 100, 1,000 and 10,000 candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import TypeVar

from control_plane.domain.funds import Amounts, Funds, Reckoning
from control_plane.domain.model import ModelCard, ModelName, ModelState, Price, Provider, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import Feature, TaskType
from control_plane.prediction.features import Coefficients
from control_plane.prefix.blocks import known_blocks
from control_plane.prefix.cache import CacheRow
from control_plane.prefix.index import PrefixIndex
from control_plane.selection.forecast import Planned
from control_plane.selection.policy import Policy
from control_plane.selection.query import Query
from control_plane.selection.select import explain, select
from control_plane.selection.table import CandidateRow, CandidateTable

Asked = TypeVar("Asked")
SIZES = (3, 100, 1000)
BARS = {100: 150, 1000: 500, 10_000: 3000}
"""Of a decision with everything on, by candidates: microseconds."""
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
    for size in BARS:
        decide, count = everything(size)
        results[f"select, {size} candidates, everything on"] = _median(decide, range(count))
    results |= keeping(10_000)
    table = fleet(100)
    results["explain, 100 candidates, distinct"] = _median(lambda r: explain(Query(table, r, policy)), distinct(200))
    return results


def everything(size: int) -> tuple[Callable[[int], object], int]:
    """A decision with everything on, for the number of a request, and how many there are."""
    table, policy = fleet(size, cold=3), Policy()
    index = PrefixIndex()
    index.align(
        CacheRow(row.server_id, row.card.name, row.card.provider, "1", "", caches=True, resident=True)
        for row in table.rows
    )
    prompts = [known_blocks(range(family * 100, family * 100 + 16), 8000) for family in range(50)]
    for number, row in enumerate(table.rows):
        for family in (number % 50, number * 7 % 50, 0):  # some prompts are almost everywhere
            index.confirm(index.dispatch((row.server_id, row.card.name, row.card.provider), prompts[family]))
    servers = list(table.spans)
    planned = Planned.nothing(size)
    for server_id in servers[:: max(1, len(servers) // 20)]:
        planned.add(table.spans[server_id], 0.5)
    for server_id in servers[::5]:
        table.set_server(server_id, ready=True, draining=False, slots=8, used=8, waiting=1)
    requests = distinct(500)
    # Enough for the models that cost nothing, and for the cheaper of the others.
    funds = Funds(Amounts(600_000, 40_000), Amounts(900_000, 60_000), Reckoning())
    avoid = frozenset(servers[1:4])

    def decide(number: int) -> object:
        request, cached = requests[number], index.match(prompts[number % 50])
        return select(Query(table, request, policy, avoid, 2, funds, 100.0, 0.1, cached, planned))

    return decide, len(requests)


def keeping(size: int) -> dict[str, float]:
    """What a change costs: of the set of rows, and of one server."""
    table = fleet(size)
    rows, server_id = table.rows, next(iter(table.spans))

    def refresh(_: object) -> None:
        table.set_server(server_id, ready=True, draining=False, slots=8, used=1, waiting=0)
        table.set_work(server_id, streams=1.0, lane_until=0.0, slot_at=1.0)
        for row in range(*table.spans[server_id].indices(size)):
            table.set_prediction(row, learned(row))

    return {
        f"new table, {size} candidates": _median(lambda _: CandidateTable(rows), range(60), warm=2),
        f"refresh of one server's rows, {size} candidates": _median(refresh, range(2000)),
    }


def _median(call: Callable[[Asked], object], requests: Sequence[Asked], warm: int = 50) -> float:
    for request in requests[:warm]:
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
