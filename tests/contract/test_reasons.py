"""The error table in orchestrator.proto and modelyard.rpc.reasons say the same."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from control_plane.domain import errors as domain_errors
from modelyard.client import _errors as client_errors
from modelyard.rpc.reasons import CODES, Reason

PROTOS = Path(__file__).parents[2] / "protos" / "modelyard" / "v1"
ROW = re.compile(r"^// \| ([A-Z_]+) *\| ([A-Z_]+) *\|(.+)\|(.+)\|$", re.MULTILINE)


def table() -> dict[str, str]:
    return {row[1]: row[0] for row in ROW.findall((PROTOS / "orchestrator.proto").read_text())}


def test_table_is_found() -> None:
    assert len(table()) >= 18


def test_reasons_are_those_of_the_table() -> None:
    assert {reason.value for reason in Reason} == set(table())


def test_codes_are_those_of_the_table() -> None:
    assert {reason.value: CODES[reason].name for reason in Reason} == table()


def test_names_equal_values() -> None:
    assert all(reason.name == reason.value for reason in Reason)


def test_every_reason_named_by_an_rpc_exists() -> None:
    services = ("orchestrator", "model_server", "task_queue", "belief", "accounting", "agents")
    for proto in [f"{name}.proto" for name in services]:
        for block in re.findall(
            r"(?:Errors|Errors of the stream): (.+?)\n *(?:rpc|// buf)", (PROTOS / proto).read_text(), re.DOTALL
        ):
            for word in re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b|\b(?:UNSUPPORTED|DRAINING|SUPERSEDED|INTERNAL)\b", block):
                assert word in Reason.__members__, f"{proto} names {word}"


def test_every_domain_error_has_a_reason_of_the_table() -> None:
    given = set(re.findall(r'DomainError\(\s*"([A-Z_]+)"', inspect.getsource(domain_errors)))
    assert given
    assert given <= set(Reason.__members__)


def test_every_reason_has_an_exception_of_the_client() -> None:
    assert set(client_errors.BY_REASON) == set(Reason)
    assert len(set(client_errors.BY_REASON.values())) == len(Reason)
    for reason, kind in client_errors.BY_REASON.items():
        assert kind.default_reason == reason.value


def test_the_tree_names_every_exception() -> None:
    drawn = set(re.findall(r"\+-- (\w+)", client_errors.__doc__ or ""))

    def below(kind: type) -> set[str]:
        return {sub.__name__ for sub in kind.__subclasses__()}.union(*(below(sub) for sub in kind.__subclasses__()))

    assert drawn == below(client_errors.ModelyardError)
