"""What `up` starts: read from modelyard.yaml and the command line, turned into command lines of the programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelyard.cli.discover import Offer, choose
from modelyard.cli.errors import USAGE, CliError
from modelyard.cli.extras import missing
from modelyard.cli.fleet_process import Program
from modelyard.cli.session import section

_SERVER_KEYS = ("server_id", "host", "port", "advertise", "labels", "drain_grace", "log_level")
"""Keys of --server that are settings of the model server; all others are settings of its engine."""
_MAPPINGS = ("engine_settings", "labels")
"""Settings of the model server that are mappings themselves, not groups of settings."""


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """One model server: its settings as in section `model_server` of modelyard.yaml."""

    server_id: str
    engine: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def program(self, orchestrator: str, config: Path | None) -> Program:
        arguments = [*_config(config), "--engine", self.engine, "--server-id", self.server_id]
        arguments += ["--orchestrators", json.dumps([orchestrator])]
        arguments += _flags({"port": 0, **self.settings})
        return Program(self.server_id, "model_servers", tuple(arguments))


@dataclass(frozen=True, slots=True)
class Plan:
    """One control plane and its model servers."""

    control_plane: tuple[str, ...]
    servers: tuple[ServerPlan, ...]
    config: Path | None = None
    remarks: tuple[str, ...] = ()
    """What people should know about the choice."""
    pulls: tuple[str, ...] = ()
    """Models to fetch and load once the servers are there."""


def make_plan(
    config: Path | None,
    *,
    port: int | None,
    metrics_port: int | None,
    servers: Sequence[str],
    no_servers: bool,
    offers: Callable[[], Sequence[Offer]] = tuple,
    wanted: Sequence[str] = (),
    pulls: Sequence[str] = (),
    gateway_port: int | None = None,
    store: str | None = None,
) -> Plan:
    """The plan of `up`. Raises CliError naming what does not fit.

    `offers` looks for engines on this machine, and is asked where nobody says what to start; `wanted` are the hosted
    ones among them that may be used.
    """
    arguments = list(_config(config))
    if port is not None:
        arguments += ["--port", str(port)]
    if metrics_port is not None:
        arguments += ["--metrics-port", str(metrics_port)]
    if gateway_port is not None:
        arguments += ["--gateway.port", str(gateway_port)]
    if store is not None:
        arguments += ["--tasks.store", store]
    remarks: tuple[str, ...] = ()
    if no_servers:
        entries: list[dict[str, Any]] = []
    elif servers:
        entries = [parse_server(text) for text in servers]
    else:
        part = section(config, "up")
        unknown = sorted(set(part) - {"servers"})
        if unknown:
            raise CliError(f"{config}: up.{unknown[0]}: unknown setting", USAGE, "INVALID_CONFIG")
        if "servers" in part:
            entries = _entries(part["servers"], f"{config}: up.servers")
        else:
            entries, remarks = found_servers(offers(), wanted)
    return Plan(tuple(arguments), name_servers(entries), config, remarks, tuple(pulls))


def found_servers(offers: Sequence[Offer], wanted: Sequence[str]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """A server beside each engine found; the bundled model where no engine on this machine was found."""
    absent = sorted(set(wanted) - {offer.name for offer in offers})
    if absent:
        raise CliError(
            f"--with {absent[0]}: not found on this machine; found: {', '.join(o.name for o in offers) or 'nothing'}",
            USAGE,
            "USAGE",
        )
    chosen, remarks = choose(offers, wanted)
    entries = [dict(offer.entry) for offer in chosen]
    if all(offer.hosted for offer in chosen):
        entry, more = default_server()
        return [entry, *entries], (*remarks, *more)
    return entries, tuple(remarks)


def default_server() -> tuple[dict[str, Any], tuple[str, ...]]:
    """The bundled model on MLX, or a simulated server where that cannot run."""
    absent = missing("mlx")
    if absent:
        why = f"{', '.join(absent)} not installed; pip install 'modelyard[local]' brings a real model"
    elif bundled_model() is None:
        why = "this installation has no bundled model"
    else:
        return {"engine": "mlx"}, ()
    return {"engine": "simulated"}, (f"Starting a simulated server, whose answers mean nothing: {why}.",)


def bundled_model() -> Path | None:
    """Where the model that comes with modelyard lies."""
    found = find_spec("model_servers")
    for folder in (found.submodule_search_locations or ()) if found else ():
        model = Path(folder) / "bundled" / "yardling"
        if (model / "config.json").exists():
            return model
    return None


def parse_server(text: str) -> dict[str, Any]:
    """--server ENGINE[:key=value,...] as a mapping like an entry of up.servers."""
    import yaml

    engine, _, rest = text.partition(":")
    entry: dict[str, Any] = {"engine": engine.strip()}
    options: dict[str, Any] = {}
    for pair in _split(rest):
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise CliError(f"--server {text}: {pair!r} is not key=value", USAGE, "USAGE")
        try:
            parsed = yaml.safe_load(value)
        except Exception:  # PyYAML lets pass what its conversions raise: ValueError for 2024-13-45
            parsed = value
        key = "server_id" if key == "id" else key
        (entry if key in _SERVER_KEYS else options)[key] = parsed
    if options:
        entry["engine_settings"] = options
    return _entries([entry], f"--server {text}")[0]


def _split(text: str) -> list[str]:
    """At the commas that stand outside of brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]


def _entries(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise CliError(f"{where}: must be a list of model server settings", USAGE, "INVALID_CONFIG")
    for number, entry in enumerate(value):
        if not isinstance(entry, dict) or not isinstance(entry.get("engine"), str) or not entry["engine"]:
            raise CliError(f"{where}[{number}]: needs the name of an engine, such as {{engine: mlx}}", USAGE, "USAGE")
        if "orchestrators" in entry or "watch_parent" in entry:
            raise CliError(f"{where}[{number}]: orchestrators and watch_parent are set by `up`", USAGE, "USAGE")
    return value


def name_servers(entries: Sequence[Mapping[str, Any]]) -> tuple[ServerPlan, ...]:
    """Servers without an id get one: the engine's name and a number."""
    taken = [str(entry["server_id"]) for entry in entries if entry.get("server_id")]
    for name in taken:
        if taken.count(name) > 1:
            raise CliError(f"two servers have the server_id {name!r}", USAGE, "USAGE")
    plans = []
    for entry in entries:
        settings = {key: value for key, value in entry.items() if key not in ("engine", "server_id")}
        name = str(entry.get("server_id") or "")
        number = 1
        while not name:
            candidate = f"{entry['engine'].replace('_', '-')}-{number}"
            name = "" if candidate in taken else candidate
            number += 1
        taken.append(name)
        plans.append(ServerPlan(name, entry["engine"], settings))
    return tuple(plans)


def _config(path: Path | None) -> tuple[str, ...]:
    return ("--config", str(path)) if path else ()


def _flags(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    flags: list[str] = []
    for key, value in settings.items():
        if value is None:
            continue
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in _MAPPINGS:
            flags += _flags(value, f"{name}.")
        else:
            flags += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    return flags
