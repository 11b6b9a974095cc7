"""Prometheus metrics of the control plane.

Counters and histograms are written by the request path; everything that is a state (fleet,
queue, breakers) is read from its owner when Prometheus asks, so it costs the hot path nothing.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from control_plane.api.tallies import Counts, Distribution
from control_plane.domain.agent import AssignmentOutcome
from control_plane.domain.server import BreakerState, LeaseState
from control_plane.domain.task import Priority
from control_plane.fleet.registry import Fleet
from control_plane.fleet.scheduler import Scheduler
from control_plane.tasks.dispatcher import Dispatcher
from control_plane.tasks.model import TaskState
from modelyard.v1.generation_pb2 import Usage

_PRIORITIES = {priority: (priority.name.lower(),) for priority in Priority}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1)
_SELECTION_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3)


class Metrics:
    """Every metric, on a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counts(
            "modelyard_requests",
            "Finished requests by method and outcome: ok, cancelled, or the reason of the refusal.",
            ("method", "outcome"),
            registry=self.registry,
        )
        self.ttft = Distribution(
            "modelyard_ttft_seconds",
            "Time from receipt of a request to its first token, queue and failed attempts included.",
            ("model",),
            bounds=_SECONDS,
            registry=self.registry,
        )
        self.tpot = Distribution(
            "modelyard_tpot_seconds",
            "Mean time per output token after the first, one observation per request.",
            ("model",),
            bounds=_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.queue_time = Distribution(
            "modelyard_queue_seconds",
            "Time that a request waited for a free slot, per attempt.",
            ("priority",),
            bounds=_SECONDS,
            registry=self.registry,
        )
        self.selection_time = Distribution(
            "modelyard_selection_seconds",
            "Time that one selection took.",
            (),
            bounds=_SELECTION_SECONDS,
            registry=self.registry,
        )
        self.explored = Counter(
            "modelyard_explored",
            "Requests that went to a server about as good as the best, to learn of it.",
            ["model"],
            registry=self.registry,
        )
        self.hedged = Counter(
            "modelyard_hedged",
            "Requests for which a second server was asked, the first being slow to begin; by its model.",
            ["model"],
            registry=self.registry,
        )
        self.retries = Counter(
            "modelyard_retries",
            "Attempts that were followed by another one, by the reason of the failure.",
            ("reason",),
            registry=self.registry,
        )
        self.tokens = Counts(
            "modelyard_tokens",
            "Tokens of finished requests, by model and kind: prompt, cached_prompt, completion.",
            ("model", "kind"),
            registry=self.registry,
        )

        self.task_states = Counts(
            "modelyard_task_states",
            "Tasks that entered a state by what this control plane did: scheduled, running, queued (again), "
            "succeeded, failed, expired.",
            ("state",),
            registry=self.registry,
        )
        self.task_attempts = Counts(
            "modelyard_task_attempts",
            "Attempts of tasks by outcome: ok, expired, taken_away (cancelled or in other hands), given_back, or the "
            "reason of the failure.",
            ("outcome",),
            registry=self.registry,
        )
        self.task_hand_over = Histogram(
            "modelyard_task_claim_to_start_seconds",
            "Time from the grant of a slot until the task that was claimed for it went to the server.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.task_refused_writes = Counter(
            "modelyard_task_refused_writes",
            "Writes that were refused because the task had passed into other hands.",
            registry=self.registry,
        )
        self.callbacks = Counter(
            "modelyard_callbacks",
            "Attempts to deliver callbacks by outcome: delivered, failed (and repeated), dead (given up).",
            ("outcome",),
            registry=self.registry,
        )
        self.agent_assignments = Counter(
            "modelyard_agent_assignments",
            "Ended assignments of agents by outcome: success, failure, expired.",
            ("outcome",),
            registry=self.registry,
        )
        self.agent_comparisons = Counter(
            "modelyard_agent_comparisons",
            "Comparisons of a description with agents and models by method: embedding, lexical.",
            ("method",),
            registry=self.registry,
        )
        self.store_time = Histogram(
            "modelyard_task_store_seconds",
            "Time that a transaction of the task store took, until it was on disk.",
            buckets=(0.001, *_SECONDS),
            registry=self.registry,
        )

        self._tasks = _TaskStates()
        self.registry.register(self._tasks)

    def finished(self, method: str, outcome: str) -> None:
        """A call ended: "ok", "cancelled", or the reason of its refusal."""
        self.requests.add((method, outcome))

    def granted(self, priority: Priority, queued: float) -> None:
        """A request got a server after so many seconds."""
        self.queue_time.observe(queued, _PRIORITIES[priority])

    def explore(self, model: str, propensity: float) -> None:
        """A request explores."""
        self.explored.labels(model).inc()

    def first_token(self, model: str, ttft: float) -> None:
        """A request got its first token after so many seconds."""
        self.ttft.observe(ttft, (model,))

    def pace(self, model: str, tpot: float) -> None:
        """Mean seconds per output token of a finished request."""
        self.tpot.observe(tpot, (model,))

    def used(self, model: str, usage: Usage) -> None:
        """Tokens of a finished request."""
        for kind, amount in (
            ("prompt", usage.prompt_tokens),
            ("cached_prompt", usage.cached_prompt_tokens),
            ("completion", usage.completion_tokens),
        ):
            if amount:
                self.tokens.add((model, kind), amount)

    def assignment(self, outcome: AssignmentOutcome) -> None:
        """An assignment of an agent has ended."""
        self.agent_assignments.labels(outcome.name.lower()).inc()

    def compared(self, method: str) -> None:
        """A description was compared by "embedding" or "lexical"."""
        self.agent_comparisons.labels(method).inc()

    def entered(self, state: TaskState) -> None:
        """A task has entered a state."""
        self.task_states.add((state.name.lower(),))

    def attempted(self, outcome: str) -> None:
        """An attempt of a task has ended."""
        self.task_attempts.add((outcome,))

    def handed_over(self, seconds: float) -> None:
        """A task went to its server so long after its slot was granted."""
        self.task_hand_over.observe(seconds)

    def refused_write(self) -> None:
        """A write of an attempt came too late."""
        self.task_refused_writes.inc()

    def observe_tasks(self, dispatcher: Dispatcher) -> None:
        """Show the states of the dispatcher."""
        self._tasks.dispatcher = dispatcher

    def observe(self, fleet: Fleet, scheduler: Scheduler) -> None:
        """Show the states of these owners."""
        self.registry.register(_States(fleet, scheduler))


class _TaskStates(Collector):
    """Collects on a thread, as _States does."""

    def __init__(self) -> None:
        self.dispatcher: Dispatcher | None = None
        """None: no tasks."""

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        dispatcher = self.dispatcher
        running = GaugeMetricFamily("modelyard_tasks_running", "Tasks that this control plane has in hand.")
        running.add_metric([], dispatcher.running_here if dispatcher else 0)
        yield running
        age = GaugeMetricFamily(
            "modelyard_task_queue_age_seconds", "Age of the oldest task that waits for a server; 0 if none does."
        )
        oldest = dispatcher.oldest() if dispatcher else None
        age.add_metric([], max(0.0, dispatcher.store.now() - oldest) if dispatcher and oldest is not None else 0.0)
        yield age


class _States(Collector):
    """Collects on a thread of the metrics server while the event loop goes on: what may change its size in between is
    copied first, in one step of the interpreter."""

    def __init__(self, fleet: Fleet, scheduler: Scheduler) -> None:
        self._fleet = fleet
        self._scheduler = scheduler

    def describe(self) -> list[Metric]:
        return []  # nothing to clash with: no need to collect before anybody asks

    def collect(self) -> Iterator[Metric]:
        servers = self._fleet.servers()
        depth = GaugeMetricFamily("modelyard_queue_depth", "Requests that wait for a free slot.", labels=["priority"])
        waiting = self._scheduler.depth()
        for priority in Priority:
            depth.add_metric([priority.name.lower()], waiting.get(priority, 0))
        yield depth
        states = Tally(server.state for server in servers)
        leases = GaugeMetricFamily("modelyard_servers", "Model servers by lease state.", labels=["state"])
        for state in LeaseState:
            leases.add_metric([state.name.lower()], states.get(state, 0))
        yield leases
        flights = GaugeMetricFamily(
            "modelyard_in_flight", "Requests that a server is working on for this control plane.", labels=["server"]
        )
        slots = GaugeMetricFamily("modelyard_slots", "Slots that a server reports.", labels=["server"])
        breakers = GaugeMetricFamily(
            "modelyard_breaker_state",
            "Circuit breaker per server, model and provider: 1 in the state that holds, else 0.",
            labels=["server", "model", "provider", "state"],
        )
        success = GaugeMetricFamily(
            "modelyard_success_rate", "Moving average of success, 0 to 1.", labels=["server", "model", "provider"]
        )
        for server in servers:
            flights.add_metric([server.id], len(server.flights))
            slots.add_metric([server.id], server.report.load.slots)
            for (model, provider), pair in list(server.pairs.items()):
                success.add_metric([server.id, model, provider], pair.stats.success)
                held = pair.breaker.state
                for breaker in BreakerState:
                    breakers.add_metric([server.id, model, provider, breaker.name.lower()], float(held is breaker))
        yield from (flights, slots, breakers, success)
