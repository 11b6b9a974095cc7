"""The door for tickets: who may enter, what is remembered, what is told and until when."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_servers.lifecycle import Changes
from model_servers.tickets import CANCELLED, Ledger, Tickets
from modelyard.rpc import tickets as signing
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason
from modelyard.v1.fleet_pb2 import ServerDirective
from modelyard.v1.generation_pb2 import GenerationResult
from modelyard.v1.model_server_pb2 import ModelServerGenerateResponse
from modelyard.v1.ticket_pb2 import Ticket

KEY = b"k" * 32
LEASE = 3.0


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def directive(clock: float, *, key: bytes = KEY, acknowledged: int = 0, since: int = 0) -> ServerDirective:
    made = ServerDirective(orchestrator_id="cp", lease_epoch=max(since, 1))
    made.lease_duration.FromNanoseconds(round(LEASE * 1e9))
    made.tickets.key, made.tickets.acknowledged, made.tickets.since_epoch = key, acknowledged, since
    made.tickets.clock.FromNanoseconds(round(clock * 1e9))
    return made


def ticket(number: int, expires_at: float, **fields: object) -> bytes:
    values = {"orchestrator_id": "cp", "server_id": "s", "instance_id": "i", "lease_epoch": 1, "model": "m", **fields}
    made = Ticket(id=number, **values)  # type: ignore[arg-type]
    made.expires_at.FromNanoseconds(round(expires_at * 1e9))
    return signing.sign(KEY, made)


class Door:
    """A door that has heard of one control plane whose clock shows 50 now."""

    def __init__(self, *, required: bool = False) -> None:
        self.clock = Clock()
        self.tickets = Tickets(required=required, clock=self.clock)
        self.tickets.server_id, self.tickets.instance_id = "s", "i"
        self.news = Changes()
        self.ledger: Ledger = self.tickets.ledger("there", self.news)
        self.ledger.obey(directive(50.0))

    def enter(self, signed: bytes, model: str = "m") -> str:
        """The reason of the refusal; empty if it was let in."""
        try:
            with self.tickets.use(signed, model, "claimed") as use:
                assert use.orchestrator_id == ("cp" if signed else "claimed")
                use.ends_with(ModelServerGenerateResponse(result=GenerationResult()).SerializeToString())
        except Refusal as refusal:
            assert refusal.reason is Reason.TICKET_REFUSED
            return refusal.message
        return ""


def test_a_good_ticket_is_good_once() -> None:
    door = Door()
    good = ticket(1, 55.0)
    assert not door.enter(good)
    assert "used before" in door.enter(good)
    assert not door.enter(ticket(2, 55.0))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"server_id": "t"}, "for model server 't'"),
        ({"instance_id": "j"}, "earlier run"),
        ({"model": "n"}, "for model 'n'"),
        ({"expires_at": 49.0}, "expired"),
        ({"expires_at": 50.0}, "expired"),
    ],
)
def test_what_is_not_for_here_and_now_is_refused(fields: dict, why: str) -> None:
    values = {"number": 1, "expires_at": 55.0, **fields}
    assert why in Door().enter(ticket(**values))


def test_forged_and_unknown_ones_are_refused() -> None:
    door = Door()
    good = ticket(1, 55.0)
    assert "signed" in door.enter(good[:-1] + bytes([good[-1] ^ 1]))
    door.ledger.obey(directive(50.0, key=b"x" * 32))
    assert "signed" in door.enter(good)
    door.tickets.ledger("there", door.news)  # another process answers there now
    assert "signed" in door.enter(good)


def test_a_ticket_of_a_lost_lease_is_void() -> None:
    door = Door()
    door.ledger.obey(directive(50.0, since=2))
    assert "lease was lost" in door.enter(ticket(1, 55.0, lease_epoch=1))
    assert not door.enter(ticket(2, 55.0, lease_epoch=2))


def test_a_key_is_good_for_as_long_as_the_lease() -> None:
    door = Door()
    door.clock.now += LEASE
    assert "not been heard of" in door.enter(ticket(1, 99.0))
    door.ledger.obey(directive(53.0))
    assert not door.enter(ticket(1, 99.0))


def test_expiry_is_told_by_the_control_planes_clock() -> None:
    door = Door()
    door.clock.now += 2.0
    assert door.ledger.now() == 52.0
    assert "expired" in door.enter(ticket(1, 51.9))
    assert not door.enter(ticket(2, 52.1))
    door.ledger.obey(directive(51.5))  # a directive that was long under way turns nothing back
    assert door.ledger.now() == 52.0
    assert "expired" in door.enter(ticket(3, 51.9))


def test_without_a_ticket() -> None:
    assert not Door().enter(b"")
    assert "nobody without" in Door(required=True).enter(b"")
    assert not Door(required=True).enter(ticket(1, 55.0))


def test_what_is_not_in_use_any_more_has_an_outcome_until_it_is_acknowledged() -> None:
    door = Door()
    with door.tickets.use(ticket(7, 55.0), "m", ""):
        told = door.ledger.report(required=False, whole=True)
        assert list(told.in_use) == [7] and not told.outcomes and told.as_of.seconds == 50
    told = door.ledger.report(required=False, whole=True)
    assert not told.in_use
    assert [(each.sequence, each.ticket_id, each.failure_reason) for each in told.outcomes] == [
        (1, 7, Reason.ENGINE_FAILED)  # it ended without a result
    ]
    assert door.news.version == 1
    with pytest.raises(Refusal), door.tickets.use(ticket(8, 55.0), "m", ""):
        raise Refusal(Reason.SERVER_BUSY, "full")
    with pytest.raises(ValueError), door.tickets.use(ticket(9, 55.0), "m", ""):
        raise ValueError
    alone = door.ledger.report(required=True, whole=False)
    assert alone.required and not alone.HasField("as_of")
    assert [each.failure_reason for each in alone.outcomes] == ["ENGINE_FAILED", "SERVER_BUSY", "INTERNAL"]
    door.ledger.obey(directive(50.0, acknowledged=2))
    assert [each.ticket_id for each in door.ledger.report(required=False, whole=False).outcomes] == [9]
    door.ledger.obey(directive(50.0, acknowledged=3))
    assert not door.ledger.owes


def test_who_has_the_result_has_the_answer() -> None:
    door = Door()
    with pytest.raises(Refusal), door.tickets.use(ticket(1, 55.0), "m", "") as use:
        use.ends_with(ModelServerGenerateResponse(result=GenerationResult(finish_reason=1)).SerializeToString())
        raise Refusal(Reason.SLOW_READER, "gone")
    (outcome,) = door.ledger.report(required=False, whole=False).outcomes
    assert outcome.result.finish_reason == 1 and not outcome.failure_reason


async def test_a_client_that_goes_away_is_told_as_that() -> None:
    import asyncio

    door = Door()
    with pytest.raises(asyncio.CancelledError), door.tickets.use(ticket(1, 55.0), "m", ""):
        raise asyncio.CancelledError
    assert door.ledger.report(required=False, whole=False).outcomes[0].failure_reason == CANCELLED


def test_of_relayed_requests_nothing_is_told() -> None:
    door = Door(required=True)
    relayed = ticket(1, 55.0, relayed=True)
    assert not door.enter(relayed)
    assert not door.ledger.owes and not door.ledger.report(required=True, whole=True).in_use
    assert "used before" in door.enter(relayed)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2), min_size=1, max_size=300), st.floats(0.01, 3))
def test_memory_holds_what_could_be_replayed_and_little_more(pauses: list[float], lifetime: float) -> None:
    door = Door()
    clock, alive, most = 50.0, [], 0
    for number, pause in enumerate(pauses, 1):
        clock += pause / 10
        door.clock.now += pause / 10
        door.ledger.obey(directive(clock))
        clock = door.ledger.now()
        assert not door.enter(ticket(number, clock + lifetime))
        assert "used before" in door.enter(ticket(number, clock + lifetime))
        alive = [each for each in alive if each >= clock] + [clock + lifetime]
        most = max(most, len(alive))
        assert len(alive) <= door.ledger.remembered <= most + 1
