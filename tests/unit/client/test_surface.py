"""What is public, and that it stays light and documented."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing

import pytest

from modelyard import client
from modelyard.client import _agent_types, _requests, _task_messages, _task_types, _types


def test_all_is_sorted_and_complete() -> None:
    public = {name for name, value in vars(client).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert set(client.__all__) == public
    assert len(client.__all__) == len(set(client.__all__))


@pytest.mark.parametrize("name", [name for name in client.__all__ if isinstance(getattr(client, name), type)])
def test_everything_public_is_documented(name: str) -> None:
    kind = getattr(client, name)
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{name}(")  # what dataclass makes up
    for member, value in vars(kind).items():
        if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            assert (value.fget if isinstance(value, property) else value).__doc__, f"{name}.{member}"


def test_every_value_is_public_and_frozen() -> None:
    for name, kind in {**vars(_types), **vars(_task_types), **vars(_agent_types)}.items():
        if dataclasses.is_dataclass(kind):
            assert name in client.__all__
            assert kind.__dataclass_params__.frozen


def test_sync_client_has_the_surface_of_the_async_one() -> None:
    def surface(kind: type) -> dict[str, list[str]]:
        members = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
        return {name: list(inspect.signature(value).parameters) for name, value in members.items() if callable(value)}

    assert surface(client.Client) == surface(client.AsyncClient)
    assert surface(client.Tasks) == surface(client.AsyncTasks)
    assert surface(client.Agents) == surface(client.AsyncAgents)
    streams = surface(client.SyncGenerationStream).keys() | {"aclose", "abandon"}
    assert streams - {"close"} == surface(client.GenerationStream).keys()


@pytest.mark.parametrize(
    ("builder", "options"),
    [
        (_requests.generate_request, _requests.GenerateOptions),
        (_requests.embed_request, _requests.Requirements),
    ],
)
def test_typed_options_are_those_that_are_understood(builder, options) -> None:
    keywords = {
        name
        for name, parameter in inspect.signature(builder).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert keywords == set(typing.get_type_hints(options))


def test_typed_options_of_a_task() -> None:
    parameters = inspect.signature(_task_messages.submit_request).parameters.values()
    own = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    everything = set(typing.get_type_hints(_task_messages.TaskOptions))
    assert own == everything - set(typing.get_type_hints(_requests.GenerateOptions))


def test_import_is_light() -> None:
    code = "import sys, modelyard.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"grpc_health.v1", "grpc_reflection.v1alpha", "pydantic", "numpy", "yaml", "rich", "click", "control_plane"}
    assert not heavy & set(loaded)
    assert not {"modelyard.rpc.server", "modelyard.rpc.validation", "model_servers"} & set(loaded)
