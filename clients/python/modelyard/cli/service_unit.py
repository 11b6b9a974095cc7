"""`modelyard model-server --print-service`: a unit that keeps a model server running on a Mac or a Linux host."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from modelyard.cli.errors import USAGE, CliError

KINDS = ("launchd", "systemd")


def unit(kind: str, name: str, module: str, arguments: Sequence[str]) -> str:
    """The text of a unit that runs `modelyard NAME ARGUMENTS` and starts it again when it dies."""
    program = [sys.executable, "-P", "-m", module, *arguments]
    if kind == "launchd":
        return _launchd(f"dev.modelyard.{name}", program)
    if kind == "systemd":
        return _systemd(name, program)
    raise CliError(f"--print-service {kind}: choose one of {', '.join(KINDS)}", USAGE, "USAGE")


def split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --print-service, if it is there, and all other arguments."""
    rest, kind = [], None
    given = iter(arguments)
    for argument in given:
        if argument == "--print-service":
            kind = next(given, "")
        elif argument.startswith("--print-service="):
            kind = argument.partition("=")[2]
        else:
            rest.append(argument)
    return kind, rest


def _systemd(name: str, program: Sequence[str]) -> str:
    return f"""\
# Install for your user:
#   modelyard {name} ... --print-service systemd > ~/.config/systemd/user/modelyard-{name}.service
#   systemctl --user daemon-reload && systemctl --user enable --now modelyard-{name}
# `loginctl enable-linger` keeps it running while you are logged out. Keys of hosted providers belong into
# ~/.config/modelyard/environment (NAME=value a line, readable by you alone), not into this file.
[Unit]
Description=modelyard {name}
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
ExecStart={_systemd_line(program)}
EnvironmentFile=-%h/.config/modelyard/environment
Restart=always
RestartSec=2
KillSignal=SIGTERM
TimeoutStopSec=60

[Install]
WantedBy=default.target
"""


def _systemd_line(program: Sequence[str]) -> str:
    # systemd reads quotes as a shell does, but expands % and $ by itself.
    return " ".join(shlex.quote(word.replace("%", "%%").replace("$", "$$")) for word in program)


def _launchd(label: str, program: Sequence[str]) -> str:
    words = "\n".join(f"    <string>{escape(word)}</string>" for word in program)
    log = escape(str(Path.home() / "Library" / "Logs" / f"{label}.log"))
    path = escape(os.environ.get("PATH", "/usr/bin:/bin"))
    return f"""\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<!-- Install for your user:
       modelyard ... > ~/Library/LaunchAgents/{label}.plist
       launchctl bootstrap gui/$(id -u) ~/Library/LaunchAgents/{label}.plist -->
<plist version="1.0">
<dict>
  <key>Label</key>
  <string>{label}</string>
  <key>ProgramArguments</key>
  <array>
{words}
  </array>
  <key>EnvironmentVariables</key>
  <dict>
    <key>PATH</key>
    <string>{path}</string>
  </dict>
  <key>RunAtLoad</key>
  <true/>
  <key>KeepAlive</key>
  <true/>
  <key>ExitTimeOut</key>
  <integer>60</integer>
  <key>StandardErrorPath</key>
  <string>{log}</string>
</dict>
</plist>
"""
