"""Dispatchers that see everything but the future: every rate, queue, cache, fault and output length.

None of them is optimal, which would be a scheduling problem on unrelated machines. The `oracle` of a scenario is the
one of them with the highest goodput there:

- `oracle_earliest` sends a request at once to where its first token comes first;
- `oracle_slack` sends it at once to the slowest host that still meets the objective, else as above;
- `oracle_late_earliest` and `oracle_late_slack` make the same choice in a plan of all waiting requests, the earliest
  deadline first, and send a request only when its host can start it. Where not all can be in time, the one with the
  most work makes room (Moore and Hodgson's rule for one machine); requests past hope come last, the shortest first.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from control_plane.simulation.dispatcher import Action, Cancel, GiveUp, Report, Send, Usage
from control_plane.simulation.engine import Fault, Host
from control_plane.simulation.harness import Maker, World
from control_plane.simulation.metrics import Objective
from control_plane.simulation.traces import BLOCK_TOKENS, Job

USABLE = (Fault.NONE, Fault.SLOWDOWN)
MARGIN = 0.005
"""Seconds that a plan leaves before a deadline."""


@dataclass(slots=True)
class Sight:
    """What the oracle keeps of a host beside the host itself."""

    host: Host
    pending: dict[Job, float] = field(default_factory=dict)
    """Sent there, without a first token yet; with the seconds that their prefills take."""
    usable: bool = True


class Oracle:
    """What the strategies share: truth about hosts, and what to do when one fails."""

    def __init__(self, world: World, objective: Objective = Objective()) -> None:
        self.world = world
        self.objective = objective
        self.network = world.settings.network
        self.sights = {name: Sight(host) for name, host in world.hosts.items()}
        self.streaming: set[Job] = set()
        self.actions: list[Action] = []

    # ----------------------------------------------------------------- truth ---

    def deadline(self, job: Job) -> float:
        return job.arrival + self.objective.patience(job.prompt_tokens) - MARGIN

    def work(self, job: Job, sight: Sight) -> float:
        """Seconds in the prefill lane, as its cache is now."""
        host = sight.host
        cached = min(host.cache.matched(job.blocks) * BLOCK_TOKENS, job.prompt_tokens - 1)
        return (job.prompt_tokens - cached) * host.slowness / host.spec.prefill

    def lane_free(self, sight: Sight, now: float) -> float:
        """When the lane is free of everything that was sent there. 0 for at once."""
        host = sight.host
        if not sight.pending:
            return now
        busy = host.lane_end if host.lane is not None else now
        in_lane = host.lane.job if host.lane is not None else None
        return max(busy, now) + sum(work for job, work in sight.pending.items() if job is not in_lane)

    def slot_free(self, sight: Sight, now: float) -> float:
        """When there is a slot, beside those for all that was sent."""
        host = sight.host
        behind = host.decoding + len(sight.pending) - host.spec.slots
        if behind < 0:
            return now
        ends = sorted(host.streaming_ends())
        if behind >= len(ends) or not host.rate:
            return self.lane_free(sight, now)
        return now + ends[behind] / host.rate

    def paced(self, sight: Sight) -> bool:
        """Whether one more stream leaves all on this host within the objective."""
        host, spec = sight.host, sight.host.spec
        streams = host.decoding + len(sight.pending)
        share = min(spec.decode_single, spec.decode_aggregate / (streams + 1)) / host.slowness
        # Alone nothing interferes; with others there, the new prompt does.
        return share * (spec.interference if streams else 1.0) * self.objective.tpot >= 1.0

    def able(self, job: Job) -> list[Sight]:
        return [
            sight
            for sight in self.sights.values()
            if sight.usable and (not job.model or not (served := sight.host.spec.models) or job.model in served)
        ]

    # ---------------------------------------------------------------- choice ---

    def wanted(self, job: Job) -> None:
        """A request is there to be sent."""
        raise NotImplementedError

    def plan(self, now: float) -> None: ...

    def send(self, job: Job, sight: Sight, work: float) -> None:
        sight.pending[job] = work
        self.actions.append(Send(job, sight.host.id))

    # ------------------------------------------------------------ Dispatcher ---

    def arrive(self, job: Job, now: float) -> None:
        self.wanted(job)

    def first_token(self, job: Job, host_id: str, now: float, cached_tokens: int) -> None:
        self.sights[host_id].pending.pop(job, None)
        self.streaming.add(job)

    def finished(self, job: Job, host_id: str, now: float, usage: Usage) -> None:
        self.streaming.discard(job)

    def failed(self, job: Job, host_id: str, kind: str, now: float, tokens_so_far: int) -> None:
        if host_id:
            self.sights[host_id].pending.pop(job, None)
        if kind == "timeout":
            self.gone(job)
        elif job in self.streaming:
            self.actions.append(GiveUp(job, kind))
        else:
            self.wanted(job)
            return
        self.streaming.discard(job)

    def gone(self, job: Job) -> None:
        """The client has left."""

    def report(self, host_id: str, reported: Report, now: float) -> None: ...

    def decide(self, now: float) -> Iterable[Action]:
        for sight in self.sights.values():
            usable = sight.host.fault in USABLE
            if sight.usable and not usable:
                sight.usable = False
                for job in list(sight.pending):
                    self.actions.append(Cancel(job, sight.host.id))
                    self.wanted(job)
                sight.pending.clear()
            sight.usable = usable
        self.plan(now)
        actions, self.actions = self.actions, []
        return actions

    def wake_at(self) -> float | None:
        return None


class AtOnce(Oracle):
    """Sends a request as soon as it is there."""

    def __init__(self, world: World, slack: bool) -> None:
        super().__init__(world)
        self.slack = slack
        self.unsent: list[Job] = []

    def wanted(self, job: Job) -> None:
        self.unsent.append(job)

    def gone(self, job: Job) -> None:
        if job in self.unsent:
            self.unsent.remove(job)

    def plan(self, now: float) -> None:
        unsent, self.unsent = self.unsent, []
        for job in unsent:
            able = self.able(job)
            if not able:
                self.unsent.append(job)
                continue
            offers = []
            for sight in able:
                work = self.work(job, sight)
                begin = max(self.lane_free(sight, now), self.slot_free(sight, now))
                offers.append((begin + work + 2 * self.network, sight, work))
            deadline = self.deadline(job)
            good = [offer for offer in offers if offer[0] <= deadline and self.paced(offer[1])]
            if good and self.slack:
                _, sight, work = min(good, key=lambda offer: (offer[1].host.spec.prefill, offer[0]))
            else:
                _, sight, work = min(good or offers, key=lambda offer: offer[0])
            self.send(job, sight, work)


class Late(Oracle):
    """Plans all waiting requests, and sends one when its host can start it."""

    def __init__(self, world: World, slack: bool) -> None:
        super().__init__(world)
        self.slack = slack
        self.waiting: list[tuple[float, int, Job]] = []
        """By deadline."""
        self._wake: float | None = None

    def wanted(self, job: Job) -> None:
        bisect.insort(self.waiting, (self.deadline(job), job.id, job))

    def gone(self, job: Job) -> None:
        self.drop(job)

    def drop(self, job: Job) -> None:
        place = bisect.bisect_left(self.waiting, (self.deadline(job), job.id))
        if place < len(self.waiting) and self.waiting[place][2] is job:
            del self.waiting[place]

    def plan(self, now: float) -> None:
        self._wake = None
        if not self.waiting:
            return
        lead = 2 * self.network
        begins: dict[str, float] = {}
        open_hosts: set[str] = set()
        for name, sight in self.sights.items():
            if not sight.usable or not self.paced(sight):
                continue
            begin = max(self.lane_free(sight, now), self.slot_free(sight, now))
            begins[name] = max(begin, now + self.network)
            if begin - now <= lead:
                open_hosts.add(name)
            else:
                self._wake = min(self._wake or math.inf, begin - lead)
        if not open_hosts:
            return
        planned, hopeless = self._planned(begins, now)
        free = set(open_hosts)
        for name, jobs in planned.items():
            if jobs and name in free:
                job, work = jobs[0]
                self.drop(job)
                self.send(job, self.sights[name], work)
                free.discard(name)
        # A host that nothing is planned for may as well serve one that is late.
        idle = [name for name in begins if name in free and not planned[name]]
        if idle and hopeless:
            self._serve_late(idle, hopeless, now)

    def _planned(self, begins: dict[str, float], now: float) -> tuple[dict[str, list[tuple[Job, float]]], list[Job]]:
        """By host, in order: jobs in time, with their work; and the jobs that cannot be in time."""
        planned: dict[str, list[tuple[Job, float]]] = {name: [] for name in begins}
        ends = dict(begins)
        hopeless: list[Job] = []
        fastest = max(self.sights[name].host.spec.prefill for name in begins) if begins else 0.0
        for deadline, _, job in self.waiting:
            offers = []
            late = []
            for sight in self.able(job):
                name = sight.host.id
                if name not in ends:
                    continue
                work = self.work(job, sight)
                end = ends[name] + work + self.network
                if end <= deadline:
                    offers.append((end, name, work))
                elif now + 2 * self.network + work <= deadline:
                    late.append((work, name))
            if offers:
                if self.slack:
                    end, name, work = min(offers, key=lambda offer: (self.sights[offer[1]].host.spec.prefill, offer[0]))
                else:
                    end, name, work = min(offers)
                planned[name].append((job, work))
                ends[name] += work
                continue
            # Too much is planned before it: the one with the most work makes room, if that helps.
            best: tuple[float, str, int, float] | None = None
            for work, name in late:
                if self.sights[name].host.spec.prefill < fastest or not planned[name]:
                    continue
                place = max(range(len(planned[name])), key=lambda at: planned[name][at][1])
                most = planned[name][place][1]
                if most > work and ends[name] - most + work + self.network <= deadline:
                    gain = most - work
                    if best is None or gain > best[0]:
                        best = (gain, name, place, work)
            if best is None:
                hopeless.append(job)
                continue
            _, name, place, work = best
            dropped, most = planned[name].pop(place)
            hopeless.append(dropped)
            planned[name].append((job, work))
            ends[name] += work - most
        return planned, hopeless

    def _serve_late(self, idle: list[str], hopeless: list[Job], now: float) -> None:
        patience = self.world.settings.client_timeout
        hopeless.sort(key=lambda job: (job.prompt_tokens, job.id))
        idle.sort(key=lambda name: -self.sights[name].host.spec.prefill)
        for name in idle:
            sight = self.sights[name]
            for job in hopeless:
                work = self.work(job, sight)
                spec = sight.host.spec
                rest = self.world.output_tokens(job) / min(spec.decode_single, spec.decode_aggregate / spec.slots)
                if now + work + rest < job.arrival + patience:
                    hopeless.remove(job)
                    self.drop(job)
                    self.send(job, sight, work)
                    break

    def wake_at(self) -> float | None:
        return self._wake


ORACLES: dict[str, Maker] = {
    "oracle_earliest": lambda world: AtOnce(world, slack=False),
    "oracle_slack": lambda world: AtOnce(world, slack=True),
    "oracle_late_earliest": lambda world: Late(world, slack=False),
    "oracle_late_slack": lambda world: Late(world, slack=True),
}
