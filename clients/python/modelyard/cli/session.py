"""What holds for one run of the command line: where the control plane is and how to answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelyard.cli.errors import CliError

DEFAULT_ADDRESS = "127.0.0.1:7460"
DEFAULT_FILE = "modelyard.yaml"
MOST_SECONDS = 1e9
"""That a call may take. Written out, for the SDK is not imported to show --help; a test holds it equal to its limit."""


@dataclass(slots=True)
class Session:
    """Filled in by the global options and by --json."""

    address: str | None = None
    """Of the control plane, as given with --address."""
    config: Path | None = None
    """The configuration file, as given with --config."""
    tenant: str | None = None
    """Whose tasks and beliefs are meant, as given with --tenant."""
    json: bool = False
    """Print facts, and errors too, as JSON on standard output."""
    direct: bool | None = None
    """As given with --direct or --no-direct."""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How to reach the control plane."""

    address: str = DEFAULT_ADDRESS
    timeout: float | None = None
    """Seconds that a request may take; None leaves it to the control plane."""
    direct: Literal["auto", "always", "never"] = "auto"
    """Whether answers come from the model server itself."""


def configuration_file(chosen: Path | None, env: Mapping[str, str] | None = None) -> Path | None:
    """--config, else MODELYARD_CONFIG, else ./modelyard.yaml if it exists."""
    given = chosen or (env if env is not None else os.environ).get("MODELYARD_CONFIG")
    if given:
        return Path(given)
    default = Path(DEFAULT_FILE)
    return default if default.exists() else None


def section(path: Path | None, name: str) -> dict[str, Any]:
    """One section of the configuration file; empty where file or section is missing."""
    if path is None:
        return {}
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{path}: cannot be read: {error}", status=2, reason="INVALID_CONFIG") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        raise CliError(f"{path}{where}: not valid YAML: {problem}", status=2, reason="INVALID_CONFIG") from None
    except Exception as error:  # PyYAML lets pass what its conversions raise: dates such as 2024-13-45, deep nesting
        raise CliError(f"{path}: not valid YAML: {error}", status=2, reason="INVALID_CONFIG") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise CliError(f"{path}: must be a mapping with sections such as '{name}:'", status=2, reason="INVALID_CONFIG")
    part = data.get(name)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise CliError(f"{path}: {name}: must be a mapping", status=2, reason="INVALID_CONFIG")
    return part


def client_settings(session: Session, env: Mapping[str, str] | None = None) -> ClientSettings:
    """File, then environment, then flags; later ones win."""
    environment = os.environ if env is None else env
    path = configuration_file(session.config, environment)
    given = section(path, "client")
    unknown = sorted(set(given) - {"address", "timeout", "direct"})
    if unknown:
        raise CliError(f"{path}: client.{unknown[0]}: unknown setting", status=2, reason="INVALID_CONFIG")
    address = session.address or environment.get("MODELYARD_ADDRESS") or given.get("address") or DEFAULT_ADDRESS
    name, value = f"{path}: client.timeout", given.get("timeout")
    if environment.get("MODELYARD_TIMEOUT"):
        name, value = "MODELYARD_TIMEOUT", environment["MODELYARD_TIMEOUT"]
    timeout: float | None = None
    if value is not None:
        try:
            timeout = float(value)
        except (TypeError, ValueError):
            timeout = 0.0
        if not 0 < timeout <= MOST_SECONDS:
            told = f"must be a number of seconds above 0, at most {MOST_SECONDS:g} (got {value!r})"
            raise CliError(f"{name}: {told}", 2, "INVALID_CONFIG")
    return ClientSettings(address=str(address), timeout=timeout, direct=_direct(session, environment, path, given))


def _direct(
    session: Session, env: Mapping[str, str], path: Path | None, given: Mapping[str, Any]
) -> Literal["auto", "always", "never"]:
    name, value = f"{path}: client.direct", given.get("direct", "auto")
    if env.get("MODELYARD_DIRECT"):
        name, value = "MODELYARD_DIRECT", env["MODELYARD_DIRECT"]
    if session.direct is not None:
        return "always" if session.direct else "never"
    for mode in ("auto", "always", "never"):
        if value == mode:
            return mode
    raise CliError(f"{name}: must be auto, always or never (got {value!r})", 2, "INVALID_CONFIG")
