"""FairQueue: fair, bounded, cheap; nothing lost, nothing twice."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from control_plane.domain.errors import DomainError
from control_plane.domain.model import ModelName, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import Priority
from control_plane.scheduling.queue import BACKGROUND, FAIR_QUANTUM, FairQueue, Turn, Waiting, lane_of

TIMEOUTS = {Priority.LOW: 40.0, Priority.NORMAL: 30.0, Priority.HIGH: 20.0, Priority.CRITICAL: 10.0}
REQUEST = RouteRequest("r")


def queue(bound: int = 1000, total: int | None = None) -> FairQueue[str]:
    return FairQueue(dict.fromkeys(Priority, bound), TIMEOUTS, total)


def push(
    waiting: FairQueue[str], name: str, model: str = "m", priority: Priority = Priority.NORMAL, now: float = 0.0
) -> Waiting[str]:
    return waiting.push(replace(REQUEST, model=ModelName(model), priority=priority), name, now=now, rate=1.0)


def take(waiting: FairQueue[str], room: dict[str, int]) -> tuple[list[str], int]:
    """Dispatch onto places per model; the names placed and the number of tries."""
    placed: list[str] = []
    tries = 0

    def try_place(entry: Waiting[str]) -> bool:
        nonlocal tries
        tries += 1
        model = str(entry.request.model)
        if room.get(model, 0) < 1:
            return False
        room[model] -= 1
        placed.append(entry.payload)
        return True

    assert waiting.dispatch(try_place).left == len(placed)
    return placed, tries


def test_higher_classes_first_then_order_of_arrival() -> None:
    waiting = queue()
    push(waiting, "n1")
    push(waiting, "l1", priority=Priority.LOW)
    push(waiting, "c1", priority=Priority.CRITICAL)
    push(waiting, "n2", model="other")
    push(waiting, "n3")
    assert waiting.depth() == {Priority.CRITICAL: 1, Priority.HIGH: 0, Priority.NORMAL: 3, Priority.LOW: 1}
    assert take(waiting, {"m": 9, "other": 9})[0] == ["c1", "n1", "n2", "n3", "l1"]
    assert len(waiting) == 0 and not any(waiting.depth().values())


def test_a_busy_model_holds_nobody_up_and_costs_one_try() -> None:
    waiting = queue(10_000)
    for number in range(5000):
        push(waiting, f"busy{number}", model="busy")
    push(waiting, "free", model="free")
    assert take(waiting, {"free": 1}) == (["free"], 2)
    assert take(waiting, {"busy": 2}) == (["busy0", "busy1"], 3)


def test_refused_ones_make_way() -> None:
    waiting = queue()
    push(waiting, "hopeless")
    push(waiting, "next")
    seen: list[str] = []
    assert waiting.dispatch(lambda entry: not seen.append(entry.payload)).left == 2
    assert seen == ["hopeless", "next"]


def test_an_error_in_placing_loses_nothing() -> None:
    waiting = queue()
    push(waiting, "a")

    def fail(entry: Waiting[str]) -> bool:
        raise RuntimeError(entry.payload)

    with pytest.raises(RuntimeError):
        waiting.dispatch(fail)
    assert take(waiting, {"m": 1})[0] == ["a"]


def test_a_nested_dispatch_goes_round_once_more() -> None:
    waiting = queue()
    push(waiting, "blocked", model="full")
    push(waiting, "gives a place back")
    room = {"m": 1}
    placed: list[str] = []

    def try_place(entry: Waiting[str]) -> bool:
        if entry.request.model == "m":
            room["full"] = 1
            assert waiting.dispatch(try_place).left == 0
        if not room.pop(str(entry.request.model), 0):
            return False
        placed.append(entry.payload)
        return True

    assert waiting.dispatch(try_place).left == 2
    assert placed == ["gives a place back", "blocked"]


def test_full_class_refuses_with_an_estimate() -> None:
    waiting = queue(2)
    push(waiting, "a")
    push(waiting, "b")
    with pytest.raises(DomainError) as refusal:
        waiting.push(REQUEST, "c", now=0.0, rate=0.25)
    assert (refusal.value.reason, refusal.value.retry_after) == ("QUEUE_FULL", 8.0)
    push(waiting, "other class", priority=Priority.LOW)


@pytest.mark.parametrize(("rate", "seconds"), [(0.0, 30.0), (1e-9, 30.0), (1e9, 0.5)])
def test_the_estimate_is_bounded(rate: float, seconds: float) -> None:
    waiting = queue(1)
    push(waiting, "a")
    with pytest.raises(DomainError) as refusal:
        waiting.push(REQUEST, "b", now=0.0, rate=rate)
    assert refusal.value.retry_after == seconds


def test_total_bound() -> None:
    waiting = queue(5, total=2)
    push(waiting, "a", priority=Priority.LOW)
    push(waiting, "b", priority=Priority.HIGH)
    with pytest.raises(DomainError, match="2 may"):
        push(waiting, "c")


def test_expiry_by_class_and_deadline() -> None:
    waiting = queue()
    push(waiting, "normal")
    push(waiting, "critical", priority=Priority.CRITICAL)
    waiting.push(REQUEST, "hurried", now=0.0, rate=1.0, deadline=5.0)
    assert waiting.next_expiry() == 5.0
    assert waiting.expire(4.9) == []
    assert [entry.payload for entry in waiting.expire(29.0)] == ["hurried", "critical"]
    assert take(waiting, {"m": 5})[0] == ["normal"]
    assert waiting.expire(1e9) == [] and waiting.next_expiry() is None


def test_remove_once() -> None:
    waiting = queue()
    first, second = push(waiting, "a"), push(waiting, "b")
    assert waiting.remove(first) and not waiting.remove(first)
    assert take(waiting, {"m": 5})[0] == ["b"]
    assert not waiting.remove(second)


def test_the_removed_leave_nothing_behind() -> None:
    waiting = queue()
    push(waiting, "stuck")
    for number in range(5000):
        waiting.remove(push(waiting, str(number), model=str(number % 7)))
    assert len(waiting._expiry) < 200
    assert sum(len(lanes) for lanes in waiting._lanes.values()) == 1


def test_drain_in_order_of_arrival() -> None:
    waiting = queue()
    push(waiting, "a", priority=Priority.LOW)
    push(waiting, "b", priority=Priority.HIGH)
    assert [entry.payload for entry in waiting.drain()] == ["a", "b"]
    assert len(waiting) == 0


@pytest.mark.parametrize("missing", ["bounds", "timeouts"])
def test_every_class_must_be_configured(missing: str) -> None:
    maps: dict[str, dict[Priority, float]] = {"bounds": dict.fromkeys(Priority, 1), "timeouts": dict(TIMEOUTS)}
    del maps[missing][Priority.HIGH]
    with pytest.raises(ValueError, match=rf"{missing}\.high"):
        FairQueue(**maps)  # type: ignore[arg-type]


def test_lanes() -> None:
    a, b = ServerId("a"), ServerId("b")
    assert lane_of(replace(REQUEST, request_id="x", prompt_tokens=5000)) == lane_of(
        replace(REQUEST, prompt_tokens=8191)
    )
    assert lane_of(replace(REQUEST, prompt_tokens=8191)) != lane_of(replace(REQUEST, prompt_tokens=8192))
    assert lane_of(REQUEST, {a, b}) == lane_of(replace(REQUEST, excluded=frozenset({a})), {b})
    assert lane_of(REQUEST, {a}) != lane_of(REQUEST)


def test_a_place_is_kept_for_who_comes_again() -> None:
    waiting = queue()
    early = waiting.take_place()
    push(waiting, "n1")
    push(waiting, "other", model="other")
    push(waiting, "c", priority=Priority.CRITICAL)
    assert not waiting.goes_before(REQUEST, frozenset(), early)
    again = replace(REQUEST, model=ModelName("m"))
    entry = waiting.push(again, "again", now=0.0, rate=1.0, place=early)
    assert waiting.goes_before(again, frozenset(), early + 1)
    waiting.remove(entry)
    # The same place once more, with another expiry: the old one means nothing any more.
    waiting.push(again, "again", now=100.0, rate=1.0, place=early)
    assert [entry.payload for entry in waiting.expire(50.0)] == ["c", "n1", "other"]
    push(waiting, "n2")
    assert take(waiting, {"m": 5, "other": 5})[0] == ["again", "n2"]


def test_who_was_let_in_once_is_not_turned_away() -> None:
    waiting = queue(1, total=1)
    push(waiting, "a")
    with pytest.raises(DomainError):
        push(waiting, "b")
    waiting.push(REQUEST, "b", now=0.0, rate=1.0, again=True)
    assert len(waiting) == 2


def test_bytes_are_bounded() -> None:
    waiting: FairQueue[str] = FairQueue(dict.fromkeys(Priority, 9), TIMEOUTS, max_bytes=100)
    first = waiting.push(REQUEST, "a", now=0.0, rate=1.0, size=60)
    with pytest.raises(DomainError, match=r"queue\.max_bytes") as refusal:
        waiting.push(REQUEST, "b", now=0.0, rate=1.0, size=41)
    assert (refusal.value.reason, refusal.value.retry_after) == ("QUEUE_FULL", 1.0)
    waiting.push(REQUEST, "b", now=0.0, rate=1.0, size=40)
    assert waiting.bytes == 100
    waiting.remove(first)
    assert waiting.bytes == 40
    waiting.expire(1e9)
    assert waiting.bytes == 0


def test_only_the_kinds_that_are_asked_for_are_looked_at() -> None:
    waiting = queue(10_000)
    for number in range(3000):
        # No two of a lane, all of a kind.
        request = replace(REQUEST, model=ModelName("busy"), excluded=frozenset({ServerId(str(number))}))
        waiting.push(request, f"busy{number}", now=0.0, rate=1.0)
    free = push(waiting, "free", model="free")
    kinds = dict(waiting.kinds())
    assert len(kinds) == 2 and len(waiting.firsts()) == 3001
    seen: list[str] = []
    told = waiting.dispatch(lambda entry: not seen.append(entry.payload), kinds={free.kind})
    assert (seen, told.left, told.reached) == (["free"], 1, None)


def test_a_dispatch_may_be_interrupted_and_goes_on_where_it_was() -> None:
    waiting = queue()
    for name in "abcd":
        push(waiting, name, model=name)
    push(waiting, "high", priority=Priority.HIGH)
    seen: list[str] = []

    def refuse(entry: Waiting[str]) -> bool:
        seen.append(entry.payload)
        return False

    told = waiting.dispatch(refuse, going=lambda: len(seen) < 2)
    assert seen == ["high", "a"] and told.reached and told.reached.entry.payload == "a"
    waiting.remove(told.reached.entry)
    push(waiting, "e", model="e")
    told = waiting.dispatch(refuse, after=told.reached)
    assert seen == ["high", "a", "b", "c", "d", "e"] and told.reached is None


def test_the_background_is_behind_everybody_of_its_class_and_counts_for_nothing() -> None:
    waiting = queue(1, total=2)
    places = [waiting.take_place(background=True) for _ in range(3)]
    for name, place, priority in zip(
        ("b1", "b2", "high"), places, (Priority.NORMAL, Priority.NORMAL, Priority.HIGH), strict=True
    ):
        waiting.push(replace(REQUEST, model=ModelName("m"), priority=priority), name, now=0.0, rate=1.0, place=place)
    push(waiting, "n")
    push(waiting, "l", priority=Priority.LOW)
    assert waiting.depth()[Priority.NORMAL] == 1 and len(waiting) == 5
    assert [entry.payload for entry in waiting.expire(1e9)] == ["n", "l"]
    push(waiting, "n")
    push(waiting, "l", priority=Priority.LOW)
    assert take(waiting, {"m": 9})[0] == ["high", "n", "b1", "b2", "l"]


def test_who_must_start_first_goes_first_and_who_is_late_goes_last() -> None:
    waiting = queue()
    for name, due in (("late", 1.0), ("later", 2.0), ("soon", 5.0), ("whenever", 9.0)):
        waiting.push(replace(REQUEST, model=ModelName(name)), name, now=0.0, rate=1.0, due=due)
    room = {"late": 1, "later": 1, "soon": 1, "whenever": 1}
    waiting.demote(3.0)
    assert take(waiting, room)[0] == ["soon", "whenever", "late", "later"]


def test_who_is_judged_late_gives_way_until_judged_again() -> None:
    waiting = queue()
    entries = {}
    for name, due in (("first", 4.0), ("second", 5.0), ("third", 6.0)):
        request = replace(REQUEST, model=ModelName(name))
        entries[name] = waiting.push(request, name, now=0.0, rate=1.0, due=due)
    room = {"first": 1, "second": 1, "third": 1}
    waiting.judge(entries["first"], in_time=False)
    assert [entry.payload for entry, _ in waiting.foremost(1.0, 9)] == ["first", "second", "third"]
    assert [entry.late for entry in entries.values()] == [True, False, False]
    waiting.judge(entries["second"], in_time=False)
    waiting.judge(entries["first"], in_time=True)
    assert take(waiting, room)[0] == ["first", "third", "second"]


def test_only_the_foremost_are_judged_and_the_others_go_behind_them() -> None:
    waiting = queue()
    for number in range(5):
        waiting.push(replace(REQUEST, tenant=f"t{number % 2}"), f"{number}", now=0.0, rate=1.0, due=10.0 - number)
    waiting.push(replace(REQUEST, priority=Priority.HIGH), "high", now=0.0, rate=1.0, due=99.0)
    waiting.push(REQUEST, "background", now=0.0, rate=1.0, place=waiting.take_place(background=True))
    waiting.charge("t0", Priority.NORMAL, 10 * FAIR_QUANTUM)
    found = waiting.foremost(6.5, 4)
    assert [entry.payload for entry, _ in found] == ["high", "3", "1", "2"], "not one that is due already"
    ranks = [rank for _, rank in found]
    assert ranks[1] == ranks[2] != ranks[3] != ranks[0]
    assert [entry.payload for entry, _ in waiting.foremost(6.5, 9)] == ["high", "3", "1", "2", "0"]
    for entry, _ in found:
        waiting.judge(entry, in_time=True)
    waiting.demote(6.5)
    placed = []
    waiting.dispatch(lambda entry: placed.append(entry.payload) or True)  # type: ignore[func-returns-value]
    assert placed == ["high", "3", "1", "2", "4", "0", "background"]


def test_tenants_share_by_seconds_of_service() -> None:
    waiting = queue()
    for number in range(20):
        waiting.push(replace(REQUEST, tenant="many"), f"m{number}", now=0.0, rate=1.0)
    waiting.charge("many", Priority.NORMAL, 100 * FAIR_QUANTUM)  # which it had while nobody else was there
    for number in range(5):
        waiting.push(replace(REQUEST, tenant="few"), f"f{number}", now=0.0, rate=1.0)
    order: list[str] = []

    def serve(entry: Waiting[str]) -> bool:
        order.append(entry.payload)
        waiting.charge(entry.request.tenant, entry.request.priority, FAIR_QUANTUM)
        return True

    waiting.dispatch(serve)
    assert order[:10] == ["f0", "m0", "f1", "m1", "f2", "m2", "f3", "m3", "f4", "m4"]
    assert order[10:] == [f"m{number}" for number in range(5, 20)]


def test_whoever_comes_back_after_a_pause_has_saved_up_a_quantum_at_most() -> None:
    waiting = queue()
    waiting.charge("back", Priority.NORMAL, 1.0)
    waiting.push(replace(REQUEST, tenant="busy"), "b", now=0.0, rate=1.0)
    waiting.charge("busy", Priority.NORMAL, 100 * FAIR_QUANTUM)
    for number in range(3):
        waiting.push(replace(REQUEST, tenant="back"), f"r{number}", now=0.0, rate=1.0)
    order: list[str] = []

    def serve(entry: Waiting[str]) -> bool:
        order.append(entry.payload)
        waiting.charge(entry.request.tenant, entry.request.priority, FAIR_QUANTUM)
        return True

    waiting.dispatch(serve)
    assert order == ["r0", "b", "r1", "r2"]


def test_who_floods_the_queue_with_fresh_requests_does_not_keep_late_ones_of_others_waiting() -> None:
    waiting = queue()
    waiting.push(replace(REQUEST, tenant="few"), "late", now=0.0, rate=1.0, due=1.0)
    for number in range(3):
        waiting.push(replace(REQUEST, tenant="many"), f"m{number}", now=0.0, rate=1.0, due=100.0)
    waiting.charge("many", Priority.NORMAL, 2 * FAIR_QUANTUM)
    waiting.demote(2.0)
    order: list[str] = []
    waiting.dispatch(lambda entry: order.append(entry.payload) is None)
    assert order == ["late", "m0", "m1", "m2"]


def test_a_limited_price_makes_a_lane_of_each_size() -> None:
    cheap = replace(REQUEST, max_cost_nano_usd=5)
    assert lane_of(replace(cheap, prompt_tokens=100)) != lane_of(replace(cheap, prompt_tokens=101))
    assert lane_of(replace(REQUEST, prompt_tokens=100)) == lane_of(replace(REQUEST, prompt_tokens=101))
    other = frozenset({(ModelName("m"), None)})
    assert lane_of(replace(REQUEST, excluded_models=other)) != lane_of(REQUEST)
    assert lane_of(replace(REQUEST, labels=(("a", "b"),))) != lane_of(REQUEST)


priorities = st.sampled_from(list(Priority))
names = st.sampled_from(["m1", "m2", "m3"])


@given(
    st.lists(st.tuples(names, priorities), max_size=60), st.lists(st.dictionaries(names, st.integers(0, 5)), max_size=4)
)
def test_places_as_a_scan_of_everything_would(
    arrivals: list[tuple[str, Priority]], events: list[dict[str, int]]
) -> None:
    waiting = queue()
    naive: list[tuple[int, int, str]] = []
    for number, (model, priority) in enumerate(arrivals):
        push(waiting, str(number), model, priority)
        naive.append((-priority, number, model))
    naive.sort()
    for room in events:
        left, expected = dict(room), []
        for item in list(naive):
            if left.get(item[2], 0) > 0:
                left[item[2]] -= 1
                naive.remove(item)
                expected.append(str(item[1]))
        placed, tries = take(waiting, dict(room))
        assert placed == expected
        assert tries <= len(placed) + 3 * len(Priority)
    assert len(waiting) == len(naive)


class Life(RuleBasedStateMachine):
    """Every request that got in comes out exactly once."""

    BOUND = 3

    def __init__(self) -> None:
        super().__init__()
        self.queue = queue(self.BOUND, total=8)
        self.now = 0.0
        self.inside: dict[str, Waiting[str]] = {}
        self.out: Counter[str] = Counter()
        self.count = 0

    def _leave(self, name: str) -> None:
        del self.inside[name]
        self.out[name] += 1

    def _foreground(self) -> list[Waiting[str]]:
        return [entry for entry in self.inside.values() if not entry.background]

    @rule(model=names, priority=priorities)
    def stand_in_the_background(self, model: str, priority: Priority) -> None:
        self.count += 1
        request = replace(REQUEST, model=ModelName(model), priority=priority)
        place = self.queue.take_place(background=True)
        entry = self.queue.push(request, str(self.count), now=self.now, rate=1.0, place=place)
        assert entry.background
        self.inside[entry.payload] = entry

    @rule(model=names, priority=priorities, slack=st.floats(-5, 20), tenant=st.sampled_from(["one", "two"]))
    def arrive(self, model: str, priority: Priority, slack: float, tenant: str) -> None:
        same = sum(entry.request.priority is priority for entry in self._foreground())
        fits = same < self.BOUND and len(self._foreground()) < 8
        self.count += 1
        try:
            request = replace(REQUEST, model=ModelName(model), priority=priority, tenant=tenant)
            entry = self.queue.push(request, str(self.count), now=self.now, rate=1.0, due=self.now + slack)
        except DomainError:
            assert not fits
        else:
            assert fits
            self.inside[entry.payload] = entry

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), model=names)
    def come_again(self, data: st.DataObject, model: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.inside)))
        entry = self.inside[name]
        self.queue.remove(entry)
        request = replace(entry.request, model=ModelName(model))
        self.inside[name] = self.queue.push(
            request, name, now=self.now, rate=1.0, place=entry.place, again=True, due=entry.turn.due
        )

    @rule()
    def demote(self) -> None:
        self.queue.demote(self.now)
        for entry in self.inside.values():
            assert entry.background or (entry.turn.due < self.now) == (entry.turn.standing == 1)

    @rule(room=st.dictionaries(names, st.integers(0, 3)))
    def dispatch(self, room: dict[str, int]) -> None:
        for name in take(self.queue, room)[0]:
            self._leave(name)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.inside)))
        assert self.queue.remove(self.inside[name])
        self._leave(name)

    @rule(seconds=st.floats(0, 25))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        due = {name for name, entry in self.inside.items() if entry.expires_at <= self.now}
        expired = self.queue.expire(self.now)
        assert {entry.payload for entry in expired} == due and len(expired) == len(due)
        for name in due:
            self._leave(name)

    @invariant()
    def nothing_lost_nothing_twice(self) -> None:
        assert len(self.queue) == len(self.inside)
        assert sum(self.queue.depth().values()) == len(self._foreground())
        assert all(times == 1 for times in self.out.values())
        firsts: dict[object, Turn] = {}
        for entry in self.inside.values():
            key = entry.request.priority, entry.lane
            firsts[key] = min(entry.turn, firsts.get(key, entry.turn))
        waited_for = sorted(turn.place for turn in firsts.values() if turn.place < BACKGROUND)
        assert sorted(entry.place for entry in self.queue.firsts()) == waited_for
        heads = [
            places for tenants in self.queue._heads.values() for kinds in tenants.values() for places in kinds.values()
        ]
        assert sorted(place for places in heads for place in places) == sorted(firsts.values())
        assert all(places == sorted(places) and places for places in heads)
        dues = [entry.expires_at for entry in self._foreground()]
        assert self.queue.next_expiry() == (min(dues) if dues else None)


TestLife = Life.TestCase


# -------------------------------------------------------------------- floors ---


def crowded(floors: dict[Priority, float], each: int = 200) -> FairQueue[str]:
    waiting: FairQueue[str] = FairQueue(dict.fromkeys(Priority, 1000), dict.fromkeys(Priority, 1000.0), floors=floors)
    for priority in Priority:
        for number in range(each):
            waiting.push(replace(REQUEST, priority=priority), f"{priority.name} {number}", now=0.0, rate=1.0)
    return waiting


def served(waiting: FairQueue[str], slots: int, work: float = 1.0, at_once: int = 1) -> list[Priority]:
    """The classes of those that get a slot, so many slots at a time."""
    order: list[Priority] = []

    def place(entry: Waiting[str]) -> bool:
        if len(order) >= limit:
            return False
        waiting.charge(entry.request.tenant, entry.request.priority, work)
        order.append(entry.request.priority)
        return True

    while len(order) < slots:
        limit = min(slots, len(order) + at_once)
        waiting.dispatch(place)
    return order


@pytest.mark.parametrize("at_once", [1, 7])
def test_a_class_with_a_floor_gets_its_share_while_higher_ones_wait(at_once: int) -> None:
    order = served(crowded({Priority.LOW: 0.1, Priority.NORMAL: 0.2}), 100, at_once=at_once)
    counts = {priority: order.count(priority) for priority in Priority}
    assert counts[Priority.LOW] == pytest.approx(10, abs=2) and counts[Priority.NORMAL] == pytest.approx(20, abs=2)
    assert counts[Priority.CRITICAL] == 100 - counts[Priority.LOW] - counts[Priority.NORMAL]
    assert order[0] is Priority.CRITICAL, "nobody is owed anything at first"


def test_without_floors_priority_is_strict_and_what_is_not_used_is_not_saved_up() -> None:
    assert set(served(crowded({}), 100)) == {Priority.CRITICAL}
    waiting = crowded({Priority.LOW: 0.5}, each=0)
    for _ in range(1000):
        waiting.charge("t", Priority.HIGH, 1.0)  # nobody of the class waits
    for number in range(100):
        waiting.push(replace(REQUEST, priority=Priority.LOW), f"low {number}", now=0.0, rate=1.0)
        waiting.push(replace(REQUEST, priority=Priority.HIGH), f"high {number}", now=0.0, rate=1.0)
    order = served(waiting, 40)
    assert order[0] is Priority.HIGH and order.count(Priority.LOW) == pytest.approx(20, abs=2)


def test_floors_that_leave_nothing_are_refused() -> None:
    for floors in ({Priority.LOW: 0.6, Priority.HIGH: 0.4}, {Priority.LOW: 1.0}, {Priority.LOW: -0.1}):
        with pytest.raises(ValueError, match="floors"):
            crowded(floors)
