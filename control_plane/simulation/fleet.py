"""Fleets and scripts of faults, built in or from YAML files.

A fleet file:

    classes:              # beside the built-in gpu, mac and cpu; or changes of them
      h100: {prefill: 20000, decode_single: 100, decode_aggregate: 4000, slots: 128, cache_tokens: 1000000}
    hosts:
      - {hardware: h100, count: 2}           # h100-1, h100-2
      - {hardware: mac, id: studio, slots: 4}  # one host that differs from its class
    faults:
      - {host: h100-1, fault: hang, at: 60, until: 90}

A script of faults is a file with the list `faults` alone. `host` is an id, or the number of a host from 1 on; times are
seconds, or as `25%` a share of the time in which requests arrive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from control_plane.simulation.engine import Fault, HostSpec
from control_plane.simulation.harness import FaultEvent

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

CLASSES: Mapping[str, HostSpec] = {
    "gpu": HostSpec("", "gpu", 10_000.0, 80.0, 2_000.0, 64, 500_000),
    "mac": HostSpec("", "mac", 800.0, 40.0, 120.0, 8, 100_000),
    "cpu": HostSpec("", "cpu", 120.0, 12.0, 24.0, 2, 20_000),
}
"""Classes of hardware that a fleet may name: rates in tokens/s."""


class FleetError(Exception):
    """A fleet or a script that cannot be used; the message has the file and what is wrong in it."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HardwareClass(_Strict):
    """What is not given is as in the built-in class of this name; a new class needs the first five."""

    prefill: Positive | None = None
    """Tokens/s of the prefill lane."""
    decode_single: Positive | None = None
    """Tokens/s of a stream alone."""
    decode_aggregate: Positive | None = None
    """Tokens/s of all streams together."""
    slots: Annotated[int, Field(ge=1)] | None = None
    cache_tokens: Annotated[int, Field(ge=0)] | None = None
    """Size of the prefix cache."""
    interference: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of its rate that decoding keeps during a prefill; 0.5 where not given."""
    load_seconds: Seconds | None = None
    """To load a model."""
    cold: bool | None = None
    """No model is loaded at the start."""
    models: tuple[str, ...] | None = None
    """Served models; all where not given."""
    resident: Annotated[int, Field(ge=1)] | None = None
    """Models loaded at the same time; 1 where not given."""

    def over(self, base: HostSpec) -> HostSpec:
        given = {name: value for name in HardwareClass.model_fields if (value := getattr(self, name)) is not None}
        return dataclasses.replace(base, **given)


class HostEntry(HardwareClass):
    hardware: str
    id: str = ""
    count: Annotated[int, Field(ge=1, le=100_000)] = 1

    @model_validator(mode="after")
    def _one_of_a_name(self) -> HostEntry:
        if self.id and self.count > 1:
            raise ValueError("id names one host: leave out id, or count")
        return self


def _moment(given: float | str, span: float) -> float:
    """Raises ValueError."""
    if isinstance(given, str):
        if not given.endswith("%"):
            raise ValueError(f"{given!r}: a time is a number of seconds, or a share as 25%")
        seconds = float(given[:-1]) / 100.0 * span
    else:
        seconds = given
    if not 0.0 <= seconds < float("inf"):
        raise ValueError(f"{given!r}: not a time of the run")
    return seconds


class FaultEntry(_Strict):
    host: str | int
    fault: Literal["refuse", "hang", "http500", "reset", "slowdown", "gone"]
    at: float | str
    until: float | str | None = None
    """When all is well again; never where not given."""
    factor: Annotated[float, Field(ge=1)] = 10.0
    """Of a slowdown."""
    healthy: bool | None = None
    """What the host reports of itself meanwhile. Where not given: not healthy for refuse and gone, healthy else."""

    @field_validator("at", "until")
    @classmethod
    def _is_a_time(cls, given: float | str | None) -> float | str | None:
        if given is not None:
            _moment(given, 1.0)
        return given


class FleetFile(_Strict):
    classes: dict[str, HardwareClass] = Field(default_factory=dict)
    hosts: Annotated[tuple[HostEntry, ...], Field(min_length=1)]
    faults: tuple[FaultEntry, ...] = ()


class ScriptFile(_Strict):
    faults: tuple[FaultEntry, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Fleet:
    name: str
    hosts: tuple[HostSpec, ...]
    faults: tuple[FaultEntry, ...] = ()
    classes: Mapping[str, HostSpec] = dataclasses.field(default_factory=lambda: CLASSES)

    def plus(self, hardware: str, count: int) -> Fleet:
        """With `count` more hosts of a class. Raises FleetError."""
        more = _numbered(hardware, count, _class(self.classes, hardware), {host.id for host in self.hosts})
        return dataclasses.replace(self, name=f"{self.name} + {count} {hardware}", hosts=(*self.hosts, *more))


def _class(classes: Mapping[str, HostSpec], name: str) -> HostSpec:
    if name not in classes:
        raise FleetError(f"no class of hardware {name!r}: there are {', '.join(sorted(classes))}")
    return classes[name]


def _numbered(hardware: str, count: int, spec: HostSpec, taken: set[str]) -> list[HostSpec]:
    made: list[HostSpec] = []
    number = 0
    while len(made) < count:
        number += 1
        if (name := f"{hardware}-{number}") not in taken:
            made.append(dataclasses.replace(spec, id=name))
    return made


def _built_in(name: str, **counts: int) -> Fleet:
    fleet = Fleet(name, ())
    for hardware, count in counts.items():
        fleet = fleet.plus(hardware, count)
    return dataclasses.replace(fleet, name=name)


BUILT_IN = {
    "yardstick": _built_in("yardstick", gpu=2, mac=3, cpu=4),
    "uniform": _built_in("uniform", gpu=4),
}


def fleet(given: str) -> Fleet:
    """A built-in fleet by its name, or that of a file. Raises FleetError and OSError."""
    if given in BUILT_IN:
        return BUILT_IN[given]
    path = Path(given)
    if not path.exists():
        raise FleetError(f"no fleet {given!r}: neither a file nor one of {', '.join(BUILT_IN)}")
    file = _read(path, FleetFile)
    try:
        classes = dict(CLASSES)
        for name, changes in file.classes.items():
            classes[name] = _changed(changes, classes.get(name), name)
        hosts: list[HostSpec] = []
        for entry in file.hosts:
            spec = _changed(entry, _class(classes, entry.hardware), entry.hardware)
            taken = {host.id for host in hosts}
            if entry.id in taken:
                raise FleetError(f"two hosts have the id {entry.id}")
            named = [dataclasses.replace(spec, id=entry.id)] if entry.id else None
            hosts += named or _numbered(entry.hardware, entry.count, spec, taken)
    except FleetError as error:
        raise FleetError(f"{path}: {error}") from None
    return Fleet(path.stem, tuple(hosts), file.faults, classes)


def _changed(changes: HardwareClass, base: HostSpec | None, name: str) -> HostSpec:
    if base is None:
        needed = ("prefill", "decode_single", "decode_aggregate", "slots", "cache_tokens")
        if missing := [key for key in needed if getattr(changes, key) is None]:
            raise FleetError(f"class {name}: {', '.join(missing)} missing")
        base = HostSpec("", name, 1.0, 1.0, 1.0, 1, 0)
    return changes.over(base)


# ------------------------------------------------------------------- faults ---

YARDSTICK_FAULTS = tuple(
    FaultEntry(host=host, fault=fault, at=f"{at}%", until=f"{until}%")
    for host, fault, at, until in (
        (1, "hang", 5, 15),
        (3, "refuse", 10, 25),
        (2, "http500", 20, 30),
        (4, "reset", 30, 45),
        (1, "reset", 40, 50),
        (3, "hang", 50, 70),
        (2, "slowdown", 55, 65),
        (1, "gone", 70, 80),
        (4, "slowdown", 75, 90),
        (2, "refuse", 85, 92),
    )
)
"""Every kind of fault on the first four hosts, never all well and never more than two away; the last 8% are calm."""


def script(given: str, fleet: Fleet) -> tuple[FaultEntry, ...]:
    """The faults of the fleet for "", none for `none`, those built in for `yardstick`, else those of a file.

    Raises FleetError and OSError."""
    if not given:
        return fleet.faults
    if given == "none":
        return ()
    if given == "yardstick":
        return YARDSTICK_FAULTS
    path = Path(given)
    if not path.exists():
        raise FleetError(f"no script {given!r}: neither a file nor one of none, yardstick")
    return _read(path, ScriptFile).faults


def events(faults: Sequence[FaultEntry], fleet: Fleet, span: float) -> list[FaultEvent]:
    """The faults as events of a run in which requests arrive for `span` seconds. Raises FleetError."""
    found: list[FaultEvent] = []
    spans: dict[str, list[tuple[float, float]]] = {}
    known = {host.id for host in fleet.hosts}
    for entry in faults:
        host = _host(entry.host, fleet, known)
        begin = _moment(entry.at, span)
        end = _moment(entry.until, span) if entry.until is not None else float("inf")
        if end <= begin:
            raise FleetError(f"fault {entry.fault} on {host}: ends before it begins")
        if any(begin < other_end and other_begin < end for other_begin, other_end in spans.get(host, [])):
            raise FleetError(f"fault {entry.fault} on {host}: there is another one at that time")
        spans.setdefault(host, []).append((begin, end))
        healthy = entry.fault not in ("refuse", "gone") if entry.healthy is None else entry.healthy
        found.append(FaultEvent(begin, host, Fault[entry.fault.upper()], entry.factor, healthy))
        if entry.until is not None:
            found.append(FaultEvent(end, host, Fault.NONE))
    # Where one ends as the next begins, the end comes first.
    return sorted(found, key=lambda event: (event.at, event.fault is not Fault.NONE))


def _host(given: str | int, fleet: Fleet, known: set[str]) -> str:
    if isinstance(given, int):
        if not 1 <= given <= len(fleet.hosts):
            raise FleetError(f"fault on host number {given}: the fleet has {len(fleet.hosts)}")
        return fleet.hosts[given - 1].id
    if given not in known:
        raise FleetError(f"fault on {given}: no such host in the fleet")
    return given


Model = TypeVar("Model", bound=BaseModel)


_LISTS = {
    "hosts": "must be a list of hosts, such as [{hardware: gpu, count: 2}]",
    "faults": "must be a list of faults, such as [{host: 1, fault: hang, at: 10}]",
}


def _read(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except yaml.YAMLError as error:
        raise FleetError(f"{path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = _LISTS.get(where, "must be a list") if first["type"] == "tuple_type" else first["msg"]
        raise FleetError(f"{path}: {where}: {message}" if where else f"{path}: {message}") from None
