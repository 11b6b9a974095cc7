"""What `up` shows: a spinner and colours on a terminal, plain lines in a pipe, events as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelyard.cli.fleet_process import CONTROL_PLANE, Event
from modelyard.cli.output import Column, is_terminal, print_table, printable
from modelyard.cli.progress_view import Bar, Lines, ProgressView

if TYPE_CHECKING:
    from modelyard.client import ModelProgress, ServerStatus


class UpView:
    """Plain lines: logs and remarks to standard error, the summary to standard output."""

    def event(self, event: Event) -> None:
        """Called for everything that happens to a child."""
        if event.kind == "log":
            self.log(event.name, event.text)
        elif event.kind == "exited":
            self.remark(f"{event.text}\nStarting {event.name} again in {event.restart_in:.3g} s.")
        elif event.kind == "given_up":
            self.remark(f"{event.text}\nNot starting {event.name} again.")

    def log(self, name: str, text: str) -> None:
        print(f"[{name}] {text}", file=sys.stderr, flush=True)

    def remark(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, name: str) -> ProgressView:
        """How a model is shown while it is fetched and loaded."""
        return Lines(name)

    def up(self, facts: Mapping[str, Any], servers: Sequence[ServerStatus]) -> None:
        """Everything is ready."""
        print(f"\nmodelyard is up at {facts['address']}")
        if "gateway" in facts:
            print(f"OpenAI's API at {facts['gateway']}/v1")
        if "metrics" in facts:
            print(f"metrics at {facts['metrics']}")
        if servers:
            print_table(
                (
                    Column("server"),
                    Column("engine", flexible=True),
                    Column("models", flexible=True),
                    Column("slots", right=True),
                ),
                [(s.server_id, _engine(s), ", ".join(model.name for model in s.models), str(s.slots)) for s in servers],
            )
        else:
            print("no model servers")
        print(f"try: {_try(str(facts['address']))}", flush=True)

    def draining(self, signal_name: str) -> None:
        if signal_name:
            self.remark(f"\n{signal_name}: finishing what runs; again to end at once")

    def stopped(self) -> None:
        self.remark("stopped")

    def close(self) -> None:
        """Nothing is shown any more."""


def _engine(server: ServerStatus) -> str:
    return f"{server.engine} ({server.engine_version})" if server.engine_version else server.engine


def _try(address: str) -> str:
    from modelyard.cli.session import DEFAULT_ADDRESS

    where = "" if address == DEFAULT_ADDRESS else f" --address {address}"
    return f"modelyard{where} generate 'What is modelyard?'"


class TerminalView(UpView):
    """The same with colours, and a spinner until all is ready."""

    def __init__(self) -> None:
        from modelyard.cli.output import console

        self._console = console(stderr=True)
        self._status = self._console.status("starting")
        self._status.start()
        self._starting: list[str] = []

    def event(self, event: Event) -> None:
        if event.kind == "starting":
            self._starting.append(event.name)
        elif event.kind == "ready" and event.name == CONTROL_PLANE:
            self._starting = [name for name in self._starting if name != event.name]
        if self._starting:
            self._status.update(f"starting {', '.join(self._starting)}")
        super().event(event)

    def log(self, name: str, text: str) -> None:
        self._console.print(f"[{name}] {printable(text)}", style="dim", soft_wrap=True)

    def remark(self, text: str) -> None:
        self._console.print(printable(text), style="yellow", soft_wrap=True)

    def progress(self, name: str) -> ProgressView:
        self.close()  # two moving lines would tear each other up
        return Bar(name)

    def up(self, facts: Mapping[str, Any], servers: Sequence[ServerStatus]) -> None:
        self.close()
        super().up(facts, servers)

    def draining(self, signal_name: str) -> None:
        self.close()
        super().draining(signal_name)

    def close(self) -> None:
        self._status.stop()


class JsonView(UpView):
    """One JSON object a line on standard output; logs stay on standard error."""

    def event(self, event: Event) -> None:
        if event.kind == "log":
            self.log(event.name, event.text)
            return
        facts: dict[str, Any] = {"event": event.kind, "name": event.name}
        facts |= {key: value for key, value in event.facts.items() if key != "event"}
        if event.kind in ("exited", "given_up"):
            facts |= {"status": event.status, "message": event.text}
        if event.restart_in is not None:
            facts["restart_in"] = event.restart_in
        self._print(facts)

    def remark(self, text: str) -> None:
        self._print({"event": "remark", "message": text.strip()})

    def progress(self, name: str) -> ProgressView:
        return _Steps(self._print, name)

    def up(self, facts: Mapping[str, Any], servers: Sequence[ServerStatus]) -> None:
        ready = {"event": "up", "address": facts["address"]}
        ready |= {name: facts.get(name) for name in ("gateway", "metrics")}
        self._print({**ready, "servers": [server.to_dict() for server in servers]})

    def draining(self, signal_name: str) -> None:
        self._print({"event": "draining", "signal": signal_name or None})

    def stopped(self) -> None:
        self._print({"event": "stopped"})

    def _print(self, facts: Mapping[str, Any]) -> None:
        print(json.dumps(facts, ensure_ascii=False), flush=True)


class _Steps(ProgressView):
    """Each step as an event."""

    def __init__(self, show: Callable[[Mapping[str, Any]], None], name: str) -> None:
        self._show = show
        self._name = name

    def step(self, step: ModelProgress) -> None:
        self._show({"event": "model", "model": self._name, **step.to_dict()})


def view_for(*, as_json: bool) -> UpView:
    if as_json:
        return JsonView()
    return TerminalView() if is_terminal(sys.stderr) else UpView()
