"""python -m control_plane.simulation, which is what `modelyard simulate` runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from control_plane.arguments import Parser
from control_plane.progress import bar
from control_plane.simulation import compare, report, traces
from control_plane.simulation.fleet import BUILT_IN, Fleet, FleetError, events, fleet, script
from control_plane.simulation.harness import Settings
from control_plane.simulation.metrics import Objective
from control_plane.simulation.policies import BEST_ORACLE, NAMES, POLICIES

PROGRAM = "modelyard simulate"
USAGE, INTERRUPTED = 2, 130
LOADS = (0.75, 1.0, 1.3)


def main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    try:
        if arguments.report and not arguments.report.parent.is_dir():
            raise ValueError(f"--report {arguments.report}: there is no such folder")
        heading, rows = _compared(arguments)
    except (FleetError, traces.TraceError, ValueError, OSError) as error:
        return _refused(arguments, "USAGE", str(error), USAGE)
    except KeyboardInterrupt:
        return _refused(arguments, "INTERRUPTED", "stopped; nothing was written", INTERRUPTED)
    print(json.dumps(report.facts(heading, rows), indent=2) if arguments.json else report.text(heading, rows))
    if arguments.report:
        try:
            arguments.report.write_text(report.page(heading, rows), encoding="utf-8")
        except OSError as error:
            print(f"{PROGRAM}: --report: {error}", file=sys.stderr)
            return USAGE
        print(f"{PROGRAM}: written to {arguments.report}", file=sys.stderr)
    return 0


def _refused(arguments: argparse.Namespace, reason: str, message: str, status: int) -> int:
    if arguments.json:
        print(json.dumps({"error": {"reason": reason, "message": message}}))
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description="Replay a trace on a simulated fleet and compare policies. Nothing is started or sent anywhere.",
    )
    parser.add_argument(
        "--fleet", default="yardstick", metavar="FILE", help=f"YAML file, or one of {', '.join(BUILT_IN)} (%(default)s)"
    )
    parser.add_argument("--trace", required=True, type=Path, metavar="FILE", help="Azure .csv, Mooncake or own .jsonl")
    parser.add_argument(
        "--policy",
        type=_names,
        default=[*POLICIES, BEST_ORACLE],
        metavar="A,B,...",
        help=f"of {', '.join(NAMES)}; `{BEST_ORACLE}` is the best of the oracles (default: all but the single oracles)",
    )
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument(
        "--load",
        type=_numbers,
        metavar="A,B,...",
        help=f"shares of the capacity of the fleet, which is measured first ({','.join(map(str, LOADS))})",
    )
    speed.add_argument("--rate", type=_numbers, metavar="A,B,...", help="arrivals per second instead")
    parser.add_argument(
        "--add", type=_more, action="append", default=[], metavar="CLASS:N", help="N more hosts, as mac:2"
    )
    parser.add_argument(
        "--capacity-of",
        metavar="FILE",
        help="fleet whose capacity --load is a share of (default: the fleet before --add, so that rates stay the same)",
    )
    parser.add_argument(
        "--faults", default="", metavar="FILE", help="script of faults, `yardstick` or `none` (the fleet's)"
    )
    parser.add_argument("--slice", type=_span, metavar="A:B", help="only what arrives from second A to B of the trace")
    parser.add_argument("--count", type=_count, metavar="N", help="only the first N requests")
    parser.add_argument("--loop", type=_count, default=1, metavar="N", help="the trace N times over")
    objective = Objective()
    for name, default, text in (
        ("--ttft", objective.ttft, "objective: seconds to the first token"),
        ("--ttft-per-token", objective.ttft_per_token, "more seconds per prompt token"),
        ("--tpot", objective.tpot, "objective: mean seconds per output token"),
        ("--timeout", Settings().client_timeout, "seconds after which a client leaves"),
    ):
        parser.add_argument(name, type=_positive, default=default, metavar="S", help=f"{text} (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of policies that draw (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write an HTML report")
    return parser.parse_args(argv)


def _compared(arguments: argparse.Namespace) -> tuple[report.Heading, list[compare.Row]]:
    """Raises FleetError, TraceError, ValueError and OSError."""
    trace = _trace(arguments)
    before = fleet(arguments.fleet)
    after: Fleet = before
    for hardware, count in arguments.add:
        after = after.plus(hardware, count)
    faults = script(arguments.faults, before)
    # What is wrong in the script is said before anything runs.
    events(faults, after, trace.span)
    with bar() as progress:
        capacity = None
        rates: list[tuple[float, float | None]] = [(rate, None) for rate in arguments.rate or ()]
        if not rates:
            measured = fleet(arguments.capacity_of) if arguments.capacity_of else before
            capacity = compare.capacity(trace, measured.hosts, progress)
            rates = [(load * capacity, load) for load in arguments.load or LOADS]
        rows = list(
            compare.rows(
                trace,
                after,
                arguments.policy,
                rates,
                faults=faults,
                settings=Settings(client_timeout=arguments.timeout),
                objective=Objective(arguments.ttft, arguments.ttft_per_token, arguments.tpot),
                seed=arguments.seed,
                progress=progress,
            )
        )
    shown = "" if not faults else arguments.faults or "of the fleet"
    heading = report.Heading(trace.name, len(trace.jobs), after.name, len(after.hosts), shown, capacity, arguments.seed)
    return heading, rows


def _trace(arguments: argparse.Namespace) -> traces.Trace:
    trace = traces.read(arguments.trace)
    if arguments.slice:
        trace = trace.between(*arguments.slice)
    if arguments.count:
        trace = trace.part(0, arguments.count)
    return trace.looped(arguments.loop)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"no policy {', '.join(unknown)}: there are {', '.join(NAMES)}")
    if not names:
        raise argparse.ArgumentTypeError("no policy named")
    return list(dict.fromkeys(names))


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _numbers(text: str) -> list[float]:
    return [_positive(part) for part in text.split(",")]


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _more(text: str) -> tuple[str, int]:
    hardware, _, count = text.partition(":")
    return hardware, _count(count or "1")


def _span(text: str) -> tuple[float, float]:
    start, _, end = text.partition(":")
    try:
        begin, until = float(start or 0.0), float(end) if end else float("inf")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B in seconds") from None
    if not 0.0 <= begin < until:
        raise argparse.ArgumentTypeError(f"{text!r}: A must be before B")
    return begin, until


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
