"""The SDK in direct mode: from the model server where it can be reached, through the control plane where not."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest

from modelyard.client import (
    AsyncClient,
    Client,
    Decision,
    Delta,
    InvalidRequest,
    NoCapableServer,
    ServersAway,
    StreamBroken,
    UnknownModel,
    Unsupported,
    _direct,
)
from tests.harness.front_door import PATIENCE, front_door
from tests.harness.model_servers import model_server
from tests.harness.programs import simulated_server, until
from tests.harness.tickets import counted, scripted, until_counted, until_direct

QUICK = {"report_interval": 0.05}
WORSE = {"models": [{"name": "sim", "capabilities": {"chat": 0.1}}]}
CACHING = {"models": [{"name": "sim", "features": ["streaming", "prefix_cache"]}]}
PRICED = {"models": [{"name": "sim", "price": {"prompt": 1.0, "completion": 2.0}}]}


def generated(door, method="Complete") -> float:
    labels = {"method": method, "outcome": "ok"}
    return door.plane.metrics.registry.get_sample_value("modelyard_requests_total", labels) or 0.0


async def test_a_prompt_is_looked_for_in_caches_whichever_way_it_went():
    async with front_door() as door, model_server(
        server_id="a", orchestrators=(door.address,), engine_settings=CACHING
    ), AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a")

        async def cached(prompt: str, **options) -> float:
            result = await client.generate(prompt, max_tokens=1, explain=True, **options)
            return result.decisions[0].candidates[0].terms["cached_tokens"]

        rules, others = "Answer as a pirate would. " * 40, "Answer as a judge would. " * 40
        assert await cached(f"{rules} Who are you?", direct="always") == 0
        await until_counted(door, "ok", 1)
        assert await cached(f"{rules} And where?", direct="always") == 256, "four blocks of 64"
        assert await cached(f"{rules} And when?", direct="never") > 0, "less is trusted, as the server tells of none"
        assert await cached(f"{others} Who are you?", direct="never") == 0
        assert await cached(f"{others} And where?", direct="always") > 0


async def test_a_long_prompt_takes_no_ticket_that_was_made_for_any():
    async with front_door() as door, model_server(server_id="a", orchestrators=(door.address,)), AsyncClient(
        door.address, direct="always"
    ) as client:  # fmt: skip
        await until_direct(door, "a")
        await client.generate("x" * 4 * 600, max_tokens=1)
        assert client._ahead is not None and not client._ahead._shapes
        await client.generate("x" * 4 * 400, max_tokens=1)
        assert len(client._ahead._shapes) == 1


async def test_the_same_answer_and_summary_without_the_detour():
    async with front_door() as door, model_server(
        server_id="a", orchestrators=(door.address,), engine_settings=PRICED
    ), AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a")
        asked = {"max_tokens": 12, "seed": 5, "explain": True, "request_id": "mine"}
        relayed = await client.generate("Hello", direct="never", **asked)
        assert generated(door) == 1
        events = []
        async with client.stream("Hello", direct="always", **asked) as stream:
            async for event in stream:
                events.append(type(event))
        direct = stream.result
        assert generated(door) == 1  # the other one did not come by here
        await until_counted(door, "ok", 1)
        assert events[0] is Decision and set(events[1:]) == {Delta}
        same = ("text", "finish_reason", "usage", "server_id", "model", "provider", "cost_usd", "request_id")
        assert {name: getattr(direct, name) for name in same} == {name: getattr(relayed, name) for name in same}
        assert direct.cost_usd > 0
        assert [(each.server_id, each.failure_reason) for each in direct.attempts] == [("a", "")]
        assert [decision.server_id for decision in direct.decisions] == ["a"]
        timings = direct.timings
        assert timings.ttft is not None and timings.tpot is not None
        assert 0 <= timings.queued <= timings.ttft <= timings.total


async def test_a_whole_answer_comes_as_one_message():
    async with front_door() as door, model_server(
        server_id="a", orchestrators=(door.address,), engine_settings=PRICED
    ) as server, AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a")
        asked = {"max_tokens": 12, "seed": 5, "request_id": "mine"}
        streamed = await client.stream("Hello", direct="always", **asked).collect()
        whole = await client.generate("Hello", direct="always", **asked)
        host = client._hosts._hosts[server.address]
        assert not host.only_streams and generated(door) == 0
        same = ("text", "finish_reason", "usage", "server_id", "model", "provider", "cost_usd", "request_id")
        assert {name: getattr(whole, name) for name in same} == {name: getattr(streamed, name) for name in same}
        assert [(each.server_id, each.failure_reason) for each in whole.attempts] == [("a", "")]
        assert whole.attempts[0].started_at is not None
        timings = whole.timings
        assert timings.ttft is not None and timings.tpot is not None
        assert 0 <= timings.queued <= timings.ttft <= timings.total
        await until_counted(door, "ok", 2)


async def test_a_model_server_that_knows_no_whole_answers_streams_them_with_the_same_ticket(monkeypatch):
    from model_servers.servicer import ModelServerServicer

    monkeypatch.delattr(ModelServerServicer, "Complete")
    async with front_door() as door, model_server(
        server_id="a", orchestrators=(door.address,)
    ) as server, AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a")
        for number in (1, 2):
            result = await client.generate("Hello", max_tokens=5, explain=True)
            assert result.usage.completion_tokens == 5 and len(result.decisions) == 1
            assert [each.failure_reason for each in result.attempts] == [""]
            await until_counted(door, "ok", number)
        assert client._hosts._hosts[server.address].only_streams and generated(door) == 0


async def test_a_call_that_was_read_to_its_end_ends_by_itself():
    async with front_door() as door, model_server(
        server_id="a", orchestrators=(door.address,)
    ) as server, AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a")
        for _ in range(3):
            async for _ in client.stream("Hello", max_tokens=3, direct="always"):
                pass
        host = client._hosts._hosts[server.address]
        assert not host.calls

        async def none_left() -> bool:
            return not host._ending

        await until(none_left)
        await until_counted(door, "ok", 3)
        assert counted(door, "cancelled") == 0


async def test_what_the_preset_says_goes_to_the_model_server():
    async with front_door() as door, model_server(
        server_id="a", orchestrators=(door.address,)
    ), AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a")
        asked = {"preset": "critic", "max_tokens": 5, "seed": 1}
        relayed = await client.generate("Hello", direct="never", **asked)
        direct = await client.generate("Hello", direct="always", **asked)
        plain = await client.generate("Hello", direct="always", max_tokens=5, seed=1)
        # Its system message is part of the prompt.
        assert direct.usage.prompt_tokens == relayed.usage.prompt_tokens > plain.usage.prompt_tokens


async def test_the_blocking_client_too():
    async with front_door() as door, model_server(server_id="a", orchestrators=(door.address,)):
        await until_direct(door, "a")

        def work() -> str:
            with Client(door.address, direct="always") as client:
                return client.generate("Hello", max_tokens=3).text

        assert await asyncio.to_thread(work)
        await until_counted(door, "ok", 1)


# ------------------------------------------------------------- falling back ---


async def test_who_cannot_be_reached_is_asked_through_the_control_plane(monkeypatch):
    monkeypatch.setattr(_direct, "_MUST_CONNECT_SECONDS", 0.5)
    # The first one holds a lease, and nobody listens at its endpoint.
    async with front_door(fleet=QUICK, limits={"ticket_lifetime": 60}) as door, scripted(
        door, "a-gone"
    ), model_server(server_id="b", orchestrators=(door.address,), engine_settings=WORSE
    ), AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a-gone", "b")
        result = await client.generate("Hello", max_tokens=3)
        tried = [(each.server_id, each.failure_reason) for each in result.attempts]
        assert tried == [("a-gone", "SERVERS_AWAY"), ("b", "")]
        assert [each.started_at for each in result.attempts] == sorted(each.started_at for each in result.attempts)
        assert (await door.server("a-gone")).assigned == 0  # given back, not waited for
        assert counted(door, "unused") == 1
        with pytest.raises(ServersAway, match="cannot be reached"):
            await client.generate("Hello", server_id="a-gone", direct="always")


async def test_loopback_is_another_machine_where_the_control_plane_is_one():
    async with front_door() as door, model_server(server_id="a", orchestrators=(door.address,)):
        await until_direct(door, "a")
        elsewhere = door.address.replace("127.0.0.1", "0.0.0.0")
        async with AsyncClient(elsewhere) as client:
            result = await client.generate("Hello", max_tokens=3)
            assert [each.failure_reason for each in result.attempts] == ["SERVERS_AWAY", ""]
            assert generated(door) == 1


async def test_a_refusal_before_the_first_token_goes_the_other_way():
    faults = {"faults": [{"kind": "error", "at_request": 2}]}
    async with front_door(retry={"max_attempts": 1}) as door, model_server(
        server_id="a", orchestrators=(door.address,), engine_settings=faults
    ), AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a")
        await client.generate("Hello", max_tokens=3, direct="always")  # the way there is known now
        result = await client.generate("Hello", max_tokens=3)
        assert [each.failure_reason for each in result.attempts] == ["ENGINE_FAILED", ""]
        await until_counted(door, "ENGINE_FAILED", 1)
        assert (await door.server("a")).models[0].failures == 1


async def test_errors_are_those_of_the_relayed_call():
    async with front_door() as door, model_server(
        server_id="a", orchestrators=(door.address,), engine_settings={"context_length": 64}
    ), AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a")
        for direct in ("auto", "always", "never"):
            with pytest.raises(UnknownModel):
                await client.generate("Hello", model="nowhere", direct=direct)
            with pytest.raises(InvalidRequest) as invalid:
                await client.generate("Hello", temperature=3.0, direct=direct)
            assert "sampling.temperature" in invalid.value.violations[0].field
            with pytest.raises(NoCapableServer):
                await client.generate("many short words " * 3, max_tokens=60, direct=direct)


async def test_a_fleet_without_tickets_is_not_asked_each_time():
    from modelyard.testing import FakeOrchestrator

    async with FakeOrchestrator() as fake, AsyncClient(fake.address) as client:
        assert client._hosts.assigned
        assert (await client.generate("Hello")).text == "Hello, world"
        assert not client._hosts.assigned
        assert (await client.generate("Hello")).text == "Hello, world"
        with pytest.raises(Unsupported):
            await client.generate("Hello", direct="always")
        assert [call.method for call in fake.calls] == ["Complete", "Complete"]


# ------------------------------------------------------------- in mid-stream ---


async def test_a_server_that_dies_under_a_direct_stream():
    async with front_door(fleet={"report_interval": 0.1, "lease_duration": 0.5}) as door:
        slow = {"decode_tokens_per_second": 50, "answer_tokens": 1000}
        async with simulated_server("a", door.address, **slow) as server, AsyncClient(door.address) as client:
            await until_direct(door, "a")
            with pytest.raises(StreamBroken) as broken:
                async with asyncio.timeout(PATIENCE), client.stream("Hello", direct="always") as stream:
                    async for _ in stream:
                        server.kill()
            assert broken.value.partial.text
            assert broken.value.metadata["server_id"] == "a" and "a broke off" in str(broken.value)
            await until_counted(door, "lost", 1)
            assert (await door.server("a")).in_flight == 0


@pytest.mark.parametrize("direct", ["auto", "never"])
async def test_after_a_broken_stream_the_next_is_held_back_and_can_be_had_elsewhere(direct):
    fails = {"faults": [{"kind": "error", "tokens": 2}]}
    async with front_door(fleet=QUICK) as door, model_server(
        server_id="a", orchestrators=(door.address,), engine_settings=fails
    ), model_server(
        server_id="b", orchestrators=(door.address,), engine_settings=WORSE
    ), AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a", "b")
        with pytest.raises(StreamBroken):
            await client.stream("Hello", max_tokens=5, direct=direct).collect()
        if direct == "auto":
            await until_counted(door, "ENGINE_FAILED", 1)
        result = await client.stream("Hello", max_tokens=5, direct=direct).collect()
        assert result.usage.completion_tokens == 5
        assert [(each.server_id, each.failure_reason) for each in result.attempts] == [
            ("a", "ENGINE_FAILED"),
            ("b", ""),
        ]


@pytest.mark.parametrize("direct", ["auto", "never"])
async def test_a_whole_answer_survives_a_server_that_fails_in_the_middle(direct):
    """Nobody has seen the beginning: another server gives the whole of it."""
    fails = {"faults": [{"kind": "error", "tokens": 2}]}
    async with front_door() as door, model_server(
        server_id="a", orchestrators=(door.address,), engine_settings=fails
    ), model_server(
        server_id="b", orchestrators=(door.address,), engine_settings=WORSE
    ), AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a", "b")
        with pytest.raises(StreamBroken) as broken:
            await client.stream("Hello", max_tokens=5, direct=direct).collect()
        assert broken.value.partial.usage.completion_tokens == 0 and broken.value.partial.text
        result = await client.generate("Hello", max_tokens=5, direct=direct)
        assert result.usage.completion_tokens == 5 and result.server_id == "b"
        assert [(each.server_id, each.failure_reason) for each in result.attempts] == [
            ("a", "ENGINE_FAILED"),
            ("b", ""),
        ]
        if direct == "auto":
            await until_counted(door, "ENGINE_FAILED", 2)
        assert (await door.server("a")).in_flight == 0


async def test_a_whole_answer_survives_a_server_that_dies_in_the_middle():
    hangs = {"faults": [{"kind": "hang", "tokens": 2}]}
    async with front_door(fleet={"report_interval": 0.1, "lease_duration": 0.5}) as door, model_server(
        server_id="b", orchestrators=(door.address,), engine_settings=WORSE
    ), AsyncClient(door.address) as client, simulated_server("a", door.address, **hangs) as server:  # fmt: skip
        await until_direct(door, "a", "b")
        asking = asyncio.create_task(client.generate("Hello", max_tokens=5))

        async def at_work() -> bool:
            return (await door.server("a")).report.load.running > 0

        await until(at_work, PATIENCE)
        server.kill()
        result = await asyncio.wait_for(asking, PATIENCE)
        assert result.usage.completion_tokens == 5
        assert [each.server_id for each in result.attempts] == ["a", "b"] and result.attempts[0].failure_reason


async def test_whoever_leaves_stops_the_model():
    hang = {"faults": [{"kind": "hang", "tokens": 1}]}
    async with front_door() as door, model_server(
        server_id="a", orchestrators=(door.address,), engine_settings=hang
    ) as server, AsyncClient(door.address) as client:  # fmt: skip
        await until_direct(door, "a")
        async with client.stream("Hello", direct="always") as stream:
            await anext(stream)
        await server.until_load(0)
        await until_counted(door, "cancelled", 1)
        await door.until_idle()


async def test_cancelled_while_it_waits_for_a_slot():
    async with front_door(limits={"ticket_lifetime": 60}, drain_grace=0) as door, scripted(door, slots=1), AsyncClient(
        door.address
    ) as client:  # fmt: skip
        from tests.harness.tickets import assign

        await assign(door)
        stream = client.stream("Hello")
        reading = asyncio.create_task(stream.collect())

        async def queued() -> bool:
            return sum(door.plane.scheduler.depth().values()) == 1

        await until(queued)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

        async def gone() -> bool:
            return not await queued()

        await until(gone)


# ---------------------------------------------------------------------- CLI ---


async def run_cli(address: str, *arguments: str, **env: str) -> dict:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "modelyard.cli", "--address", address, "generate", "Hello", "--max-tokens", "3", "--json",
        *arguments, stdout=asyncio.subprocess.PIPE, env={**os.environ, **env},
    )  # fmt: skip
    async with asyncio.timeout(60):
        return json.loads((await process.communicate())[0])


async def test_the_command_line_goes_either_way():
    async with front_door() as door, model_server(server_id="a", orchestrators=(door.address,)):
        await until_direct(door, "a")
        assert (await run_cli(door.address, "--direct"))["server_id"] == "a"
        await until_counted(door, "ok", 1)
        assert (await run_cli(door.address, "--no-direct", MODELYARD_DIRECT="always"))["server_id"] == "a"
        assert generated(door, "Generate") == 1
        assert (await run_cli(door.address, MODELYARD_DIRECT="never"))["server_id"] == "a"
        assert generated(door, "Generate") == 2
        told = await run_cli(door.address, MODELYARD_DIRECT="sometimes")
        assert "MODELYARD_DIRECT" in told["error"]["message"]
