"""`modelyard simulate`: fleets, scripts of faults, capacity, and the command itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from control_plane.simulation import fleet as fleets
from control_plane.simulation.__main__ import main
from control_plane.simulation.compare import KEEPS_UP, capacity
from control_plane.simulation.engine import Fault
from control_plane.simulation.fleet import BUILT_IN, YARDSTICK_FAULTS, FleetError, events, fleet, script
from tests.unit.simulation.fleets import PLAIN, jobs

EXAMPLE = Path(fleets.__file__).with_name("example.yaml")


def written(folder: Path, text: str, name: str = "fleet.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_built_in_fleets_are_those_of_the_yardstick() -> None:
    hosts = fleet("yardstick").hosts
    assert [host.id for host in hosts] == [
        "gpu-1", "gpu-2", "mac-1", "mac-2", "mac-3", "cpu-1", "cpu-2", "cpu-3", "cpu-4"
    ]  # fmt: skip
    rates = {
        host.hardware: (host.prefill, host.decode_single, host.decode_aggregate, host.slots, host.cache_tokens)
        for host in hosts
    }
    assert rates == {
        "gpu": (10_000, 80, 2000, 64, 500_000),
        "mac": (800, 40, 120, 8, 100_000),
        "cpu": (120, 12, 24, 2, 20_000),
    }
    assert {host.hardware for host in fleet("uniform").hosts} == {"gpu"}


def test_the_example_fleet_is_one() -> None:
    found = fleet(str(EXAMPLE))
    assert len({host.id for host in found.hosts}) == len(found.hosts) > 2
    assert events(script("", found), found, 100.0)


def test_a_fleet_of_a_file(tmp_path: Path) -> None:
    found = fleet(
        written(
            tmp_path,
            """
            classes:
              mac: {slots: 6}
              h100: {prefill: 20000, decode_single: 100, decode_aggregate: 4000, slots: 128, cache_tokens: 1000000}
            hosts:
              - {hardware: h100, count: 2}
              - {hardware: mac, id: studio, prefill: 900, models: [a, b], load_seconds: 4, cold: true}
              - {hardware: mac}
            """,
        )
    )
    assert [host.id for host in found.hosts] == ["h100-1", "h100-2", "studio", "mac-1"]
    studio, mac = found.hosts[2:]
    assert (studio.prefill, studio.slots, studio.models, studio.cold) == (900, 6, ("a", "b"), True)
    assert (mac.prefill, mac.slots, mac.interference) == (800, 6, 0.5)
    more = found.plus("mac", 2)
    assert [host.id for host in more.hosts[4:]] == ["mac-2", "mac-3"]
    assert more.hosts[4].slots == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hosts: []", "hosts: Tuple should have at least 1 item"),
        ("hosts: 3", "hosts: must be a list of hosts, such as [{hardware: gpu, count: 2}]"),
        ("hosts: [{hardware: gpu}]\nfaults: {}", "faults: must be a list of faults"),
        ("hosts: [{hardware: gpu, models: yardling}]", "hosts.0.models: must be a list"),
        ("{", "while parsing a flow node"),
        ("hosts: [{hardware: tpu}]", "no class of hardware 'tpu': there are cpu, gpu, mac"),
        ("classes: {tpu: {slots: 1}}\nhosts: [{hardware: tpu}]", "prefill, decode_single"),
        ("hosts: [{hardware: gpu, speed: 3}]", "hosts.0.speed: Extra inputs"),
        ("hosts: [{hardware: gpu, prefill: 0}]", "hosts.0.prefill: Input should be greater than 0"),
        ("hosts: [{hardware: gpu, id: a, count: 2}]", "id names one host"),
        ("hosts: [{hardware: gpu, id: a}, {hardware: gpu, id: a}]", "two hosts have the id a"),
        ("hosts: [{hardware: gpu}]\nfaults: [{host: 1, fault: hang, at: soon}]", "faults.0.at: Value error, 'soon'"),
        ("hosts: [{hardware: gpu}]\nfaults: [{host: 1, fault: flood, at: 1}]", "faults.0.fault: Input should be"),
    ],
)
def test_fleets_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FleetError) as caught:
        fleet(written(tmp_path, text))
    assert str(tmp_path / "fleet.yaml") in str(caught.value)
    assert message in str(caught.value)


def test_fleets_and_scripts_that_are_not_there() -> None:
    with pytest.raises(FleetError, match="neither a file nor one of yardstick, uniform"):
        fleet("nowhere.yaml")
    with pytest.raises(FleetError, match="neither a file nor one of none, yardstick"):
        script("nowhere.yaml", fleet("uniform"))


def test_scripts(tmp_path: Path) -> None:
    uniform = fleet("uniform")
    given = written(
        tmp_path,
        "faults: [{host: gpu-2, fault: slowdown, factor: 4, at: 10, until: 50%}, {host: 1, fault: gone, at: 25%},"
        " {host: gpu-2, fault: refuse, at: 50%, until: 150}]",
    )
    found = events(script(given, uniform), uniform, 200.0)
    assert [(event.at, event.host, event.fault, event.healthy) for event in found] == [
        (10.0, "gpu-2", Fault.SLOWDOWN, True),
        (50.0, "gpu-1", Fault.GONE, False),
        (100.0, "gpu-2", Fault.NONE, True),
        (100.0, "gpu-2", Fault.REFUSE, False),
        (150.0, "gpu-2", Fault.NONE, True),
    ]
    assert found[0].factor == 4
    assert script("none", uniform) == script("", uniform) == ()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{host: gpu-9, fault: hang, at: 1}", "gpu-9: no such host"),
        ("{host: 9, fault: hang, at: 1}", "the fleet has 4"),
        ("{host: 1, fault: hang, at: 5, until: 1}", "ends before it begins"),
        ("{host: 1, fault: hang, at: 5}, {host: gpu-1, fault: gone, at: 9}", "another one at that time"),
    ],
)
def test_scripts_that_are_wrong(tmp_path: Path, entries: str, message: str) -> None:
    uniform = fleet("uniform")
    with pytest.raises(FleetError, match=message):
        events(script(written(tmp_path, f"faults: [{entries}]"), uniform), uniform, 100.0)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_script_has_every_fault_and_spares_two_hosts(name: str) -> None:
    found = events(YARDSTICK_FAULTS, fleet(name), 100.0)
    assert {event.fault for event in found} == set(Fault)
    away: set[str] = set()
    for event in found:
        away = away - {event.host} if event.fault is Fault.NONE else away | {event.host}
        assert len(away) <= 2
        assert not away >= {"gpu-1", "gpu-2"}
    assert not away


# ----------------------------------------------------------------- capacity ---


def test_capacity_of_one_host_is_what_its_prefill_lane_does() -> None:
    # 1,000 tokens/s and prompts of 500: at most 2 requests/s; answers are short.
    trace = jobs(*((float(n), 500, 2) for n in range(1000)))
    found = capacity(trace, [PLAIN])
    # With 1% unfinished at the end the rate may be 1% above.
    assert 1.95 <= found <= 2.0 / KEEPS_UP + 0.01
    assert capacity(trace, [PLAIN, replace(PLAIN, id="two")]) == pytest.approx(4.0, rel=0.03)


def test_capacity_needs_a_trace() -> None:
    with pytest.raises(ValueError, match="too few"):
        capacity(jobs((0, 1, 1)), [PLAIN])
    with pytest.raises(ValueError, match="at once"):
        capacity(jobs(*((0.0, 1, 1),) * 200), [PLAIN])


# ------------------------------------------------------------------ command ---


@pytest.fixture
def trace_file(tmp_path: Path) -> str:
    lines = (
        json.dumps({"arrival": n * 0.1, "prompt_tokens": 300 + n * 611 % 4000, "output_tokens": 3 + n % 50})
        for n in range(300)
    )
    return written(tmp_path, "\n".join(lines), "some.jsonl")


def test_table(trace_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", trace_file, "--policy", "round_robin,oracle", "--load", "0.5,1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "trace some, 300 requests; fleet yardstick, 9 hosts; seed 0"
    assert lines[1].startswith("capacity: ")
    assert lines[2].split()[:4] == ["load", "req/s", "policy", "goodput"]
    assert [line.split()[0] for line in lines[3:]] == ["0.50", "0.50", "1.00", "1.00"]
    assert [line.split()[2] for line in lines[3:]] == ["round_robin", "oracle"] * 2
    assert "(oracle_" in lines[4]
    places = {line.index("gpu ") for line in lines[3:]}
    assert len(places) == 1, "columns are aligned"


def test_json_and_report(trace_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out.html"
    arguments = ["--trace", trace_file, "--fleet", "uniform", "--add", "mac:2", "--rate", "3", "--faults", "yardstick"]
    assert main([*arguments, "--policy", "p2c,least_inflight", "--seed", "3", "--json", "--report", str(page)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["fleet"], facts["hosts"], facts["faults"], facts["capacity"], facts["seed"]) == (
        "uniform + 2 mac", 6, "yardstick", None, 3,
    )  # fmt: skip
    rows = facts["rows"]
    assert [row["policy"] for row in rows] == ["p2c", "least_inflight"]
    assert rows[0]["summary"]["requests"] == 300
    assert len(rows[0]["summary"]["hosts"]) == 6
    assert sum(rows[0]["summary"]["kinds"].values()) == round(rows[0]["summary"]["errors"] * 300) > 0

    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.text = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.append(tag)
            assert tag not in ("script", "link", "img"), "needs nothing else"

        def handle_data(self, data: str) -> None:
            self.text += data

    parsed = Page()
    parsed.feed(page.read_text())
    assert parsed.tags.count("svg") == 3
    assert f"{rows[0]['summary']['goodput']:.3f}" in parsed.text
    assert "mac-2: " in parsed.text


def test_loads_are_those_of_the_fleet_before_hosts_are_added(
    trace_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def rate(*more: str) -> float:
        assert main(["--trace", trace_file, "--policy", "random", "--load", "1", "--json", *more]) == 0
        return float(json.loads(capsys.readouterr().out)["rows"][0]["rate"])

    assert rate() == rate("--add", "gpu:2")
    assert rate("--add", "gpu:2", "--capacity-of", "uniform") != rate()


def test_slices(trace_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    def requests(*more: str) -> int:
        assert main(["--trace", trace_file, "--policy", "random", "--rate", "1", "--json", *more]) == 0
        return int(json.loads(capsys.readouterr().out)["requests"])

    assert requests("--count", "20") == 20
    assert requests("--slice", "10:20") == 100
    assert requests("--slice", ":5", "--loop", "3") == 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "magic"], "no policy magic: there are modelyard"),
        (["--policy", ","], "no policy named"),
        (["--load", "0"], "'0' is not a number above 0"),
        (["--load", "1", "--rate", "1"], "not allowed with argument"),
        (["--count", "few"], "'few' is not a whole number"),
        (["--slice", "9:1"], "A must be before B"),
    ],
)
def test_wrong_usage(trace_file: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--trace", trace_file, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fleet", "nowhere"], "no fleet 'nowhere'"),
        (["--faults", "nowhere"], "no script 'nowhere'"),
        (["--add", "tpu:1"], "no class of hardware 'tpu'"),
        (["--slice", "900:"], "no job from 900 s"),
        (["--count", "5"], "too few to measure capacity: give --rate"),
        (["--rate", "1", "--report", "/nowhere/at/all.html", "--count", "5"], "/nowhere/at/all.html"),
    ],
)
def test_what_cannot_be_done(
    trace_file: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", trace_file, "--json", "--policy", "random", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in json.loads(shown.out)["error"]["message"]
    assert shown.err.startswith("modelyard simulate: ")
    assert main(["--trace", "nowhere.csv"]) == 2


def test_the_command_of_modelyard(trace_file: str) -> None:
    line = [sys.executable, "-m", "modelyard.cli", "simulate", "--trace", trace_file, "--policy", "p2c", "--rate", "2"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "p2c" in done.stdout
    assert done.stderr == ""


def test_a_run_that_is_stopped_says_so(
    trace_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("control_plane.simulation.compare.capacity", stopped)
    assert main(["--trace", trace_file, "--policy", "random", "--json"]) == 130
    told = capsys.readouterr()
    assert json.loads(told.out)["error"]["reason"] == "INTERRUPTED" and "Traceback" not in told.err
