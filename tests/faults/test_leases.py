"""Real processes that die, freeze and come back: what the control plane believes of them, and when."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time

from modelyard.v1 import fleet_pb2
from tests.harness.front_door import LIVE, LOST, SUSPECT, ask, attempts_of, client, front_door, watching
from tests.harness.programs import control_plane, simulated_server, until

LEASE = 0.6
FLEET = {"report_interval": 0.15, "lease_duration": LEASE}
SLOW = {"decode_tokens_per_second": 20, "answer_tokens": 100_000, "context_length": 200_000}
TERMINAL_WITHIN = 1.0
"""Seconds from the reset of a connection to the status that its clients get: the promise of the project."""


async def test_a_killed_server_is_suspect_at_once_and_lost_when_its_lease_ends():
    # A lease so long that only the broken stream can tell.
    async with (
        front_door(fleet={**FLEET, "lease_duration": 3.0}) as door,
        watching(door) as watch,
        simulated_server("one", door.address, **SLOW) as server,
    ):
        await door.until_ready("one")
        streaming = await door.stream(ask()).first_delta()
        killed = time.monotonic()
        server.kill()
        reply = await streaming.rest()
        assert time.monotonic() - killed < TERMINAL_WITHIN
        assert reply.reason == "STREAM_BROKEN" and reply.text
        await watch.until(lambda: watch.states("one") == [LIVE, SUSPECT])
        assert time.monotonic() - killed < TERMINAL_WITHIN
        await watch.until(lambda: watch.states("one") == [LIVE, SUSPECT, LOST])
        # Counted from the last report, not from the break.
        assert 3.0 - FLEET["report_interval"] - 0.5 < time.monotonic() - killed < 3.0 + 2.0
        assert (await door.server("one")).in_flight == 0


async def test_a_frozen_server_is_lost_and_live_again_under_a_new_epoch():
    async with (
        front_door(fleet=FLEET) as door,
        watching(door) as watch,
        simulated_server("one", door.address, **SLOW) as server,
    ):
        await door.until_ready("one")
        streaming = await door.stream(ask()).first_delta()
        epoch = (await door.server("one")).lease_epoch
        server.signal(signal.SIGSTOP)
        stopped = time.monotonic()
        # Nothing resets the connection: only the lease says that no more tokens will come.
        assert (await streaming.rest()).reason == "STREAM_BROKEN"
        assert time.monotonic() - stopped < LEASE + 1.0
        await watch.until(lambda: watch.states("one")[-1] == LOST)
        assert (await door.server("one")).in_flight == 0
        assert (await door.generate()).reason == "SERVERS_AWAY"
        server.signal(signal.SIGCONT)
        await watch.until(lambda: watch.states("one")[-1] == LIVE)
        assert (await door.server("one")).lease_epoch > epoch
        assert (await door.generate(ask(max_tokens=2))).done.server_id == "one"


async def test_a_frozen_server_is_replaced_by_another():
    async with (
        front_door(fleet=FLEET) as door,
        simulated_server("a-first", door.address) as first,
        simulated_server("b-second", door.address),
    ):
        await door.until_ready("a-first", "b-second")
        first.signal(signal.SIGSTOP)
        reply = await door.generate(ask(max_tokens=2))
        # Before the lease ends it may be sent to the frozen one; no token came, so the other answers.
        assert reply.done.server_id == "b-second"
        assert attempts_of(reply.done) in (
            [("b-second", "")],
            [("a-first", "SERVERS_AWAY"), ("b-second", "")],
        )


async def test_a_restarted_control_plane_has_its_fleet_back_within_a_report_interval():
    interval = 1.0
    arguments = ("--fleet.report-interval", str(interval), "--fleet.lease-duration", "5", "--fleet.warm-up", "5")
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(control_plane(*arguments))
        for server_id in ("one", "two"):
            await stack.enter_async_context(simulated_server(server_id, first.address, instant=True))
        async with client(first.address) as door:
            await door.until_ready("one", "two")
        first.kill()
        await first.process.wait()
        port = first.address.rpartition(":")[2]
        async with control_plane(*arguments, "--port", port) as second, client(second.address) as door:
            assert second.address == first.address
            began = time.monotonic()
            await door.until_ready("one", "two")
            took = time.monotonic() - began
            assert took < interval + 1.0, f"the fleet was back after {took:.2f} s"
            assert (await door.generate()).done


async def test_a_second_instance_ends_the_first_process():
    async with front_door(fleet=FLEET) as door, simulated_server("one", door.address, instant=True) as old:
        await door.until_ready("one")
        async with simulated_server("one", door.address, instant=True) as new:
            assert await asyncio.wait_for(old.process.wait(), 30) == 1
            status = await door.until_server("one", lambda status: status.lease_state == LIVE)
            assert status.report.identity.endpoint == new.address
            assert (await door.generate()).done
            assert b"newer instance" in old.log


async def test_a_stopped_model_server_finishes_its_streams():
    engine = {"decode_tokens_per_second": 60, "aggregate_tokens_per_second": 0, "answer_tokens": 60}
    async with front_door(fleet=FLEET) as door, simulated_server("one", door.address, **engine) as server:
        await door.until_ready("one")
        streams = [await door.stream(ask(f"{n}")).first_delta() for n in range(3)]
        stopping = asyncio.create_task(server.stop())
        # It says so itself, well before its lease ends.
        await door.until_server(
            "one",
            lambda status: status.report.state == fleet_pb2.DESIRED_STATE_DRAIN or status.lease_state != LIVE,
        )
        for stream in streams:
            assert (await stream.rest()).done.usage.completion_tokens == 60
        assert await stopping == 0


async def test_a_server_whose_engine_breaks_is_passed_over_until_it_recovers():
    fault = {"kind": "disconnect", "at_request": 1, "seconds": 0.5}
    async with front_door(fleet=FLEET) as door, simulated_server("one", door.address, instant=True, faults=[fault]):
        await door.until_ready("one")
        assert (await door.generate()).reason in ("ATTEMPTS_EXHAUSTED", "SERVERS_AWAY")

        async def serves() -> bool:
            return (await door.generate()).error is None

        await until(serves)
