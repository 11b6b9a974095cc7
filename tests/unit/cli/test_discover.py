from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelyard.cli import discover
from modelyard.cli.discover import Offer, choose, hosted, mlx_cache, ollama, vllm
from modelyard.cli.errors import CliError
from modelyard.cli.plan import found_servers, make_plan


def web(answers: dict[str, Any]):
    def get(url: str) -> Any:
        if url not in answers:
            raise ConnectionRefusedError(url)
        return answers[url]

    return get


OLLAMA = {
    "http://127.0.0.1:11434/api/version": {"version": "0.9.0"},
    "http://127.0.0.1:11434/api/tags": {"models": [{"name": f"m{n}"} for n in range(5)]},
}


def test_a_running_ollama_is_found() -> None:
    (offer,) = ollama({}, web(OLLAMA))
    assert offer.what == "Ollama 0.9.0 at http://127.0.0.1:11434 with m0, m1, m2 and 2 more"
    assert offer.entry == {"engine": "ollama", "engine_settings": {"url": "http://127.0.0.1:11434"}}
    assert not offer.hosted


@pytest.mark.parametrize("given", ["0.0.0.0:11500", "127.0.0.1:11500", "http://127.0.0.1:11500", ":11500"])
def test_ollama_is_looked_for_where_its_variable_says(given: str) -> None:
    answers = {address.replace("11434", "11500"): answer for address, answer in OLLAMA.items()}
    assert [offer.name for offer in ollama({"OLLAMA_HOST": given}, web(answers))] == ["ollama"]


@pytest.mark.parametrize("answer", [[], {}, {"version": "1"}, "x", None, {"data": [{"id": "a", "owned_by": "openai"}]}])
def test_whatever_else_listens_there_is_no_engine(answer: Any) -> None:
    everywhere = dict.fromkeys(["http://127.0.0.1:8000/v1/models", "http://127.0.0.1:8000/version"], answer)
    assert list(vllm({}, web(everywhere))) == []
    assert list(ollama({}, web(dict.fromkeys(["http://127.0.0.1:11434/api/version"], answer)))) == []


def test_a_running_vllm_is_found() -> None:
    (offer,) = vllm(
        {},
        web(
            {
                "http://127.0.0.1:8000/v1/models": {"data": [{"id": "llama", "owned_by": "vllm"}]},
                "http://127.0.0.1:8000/version": {"version": "0.32"},
            }
        ),
    )
    assert offer.what == "vLLM 0.32 at http://127.0.0.1:8000 with llama"


def cached(folder: Path, name: str, size: int, *, complete: bool = True) -> None:
    snapshot = folder / f"models--mlx-community--{name}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    if complete:
        (snapshot / "model.safetensors").write_bytes(b"0" * size)


def test_the_largest_cached_model_that_leaves_room_is_offered(tmp_path: Path) -> None:
    cached(tmp_path, "small-4bit", 10)
    cached(tmp_path, "medium-4bit", 40)
    cached(tmp_path, "large-4bit", 60)
    cached(tmp_path, "partial-4bit", 45, complete=False)
    (offer,) = mlx_cache(tmp_path, memory=100)
    assert offer.entry["engine_settings"]["name"] == "medium-4bit"
    assert list(mlx_cache(tmp_path / "nothing", memory=100)) == []


def test_keys_are_offered_but_never_read_out() -> None:
    env = {"OPENAI_API_KEY": "sk-secret", "GROQ_API_KEY": "", "AWS_PROFILE": "p", "AWS_REGION": "eu-west-1"}
    offers = list(hosted(env))
    assert [(offer.name, offer.hosted) for offer in offers] == [("openai", True), ("bedrock", True)]
    assert "sk-secret" not in repr(offers)


def test_hosted_providers_are_used_only_on_demand() -> None:
    local = Offer("ollama", "Ollama", {"engine": "ollama"})
    far = Offer("openai", "OPENAI_API_KEY in the environment", {"engine": "openai_compatible"}, hosted=True)
    chosen, remarks = choose([local, far], [])
    assert chosen == [local] and any("--with openai" in remark for remark in remarks)
    assert choose([local, far], ["openai"])[0] == [local, far]


def test_what_is_not_installed_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover, "missing", lambda extra: ("ollama",))
    chosen, remarks = choose([Offer("ollama", "Ollama", {"engine": "ollama"}, extra="ollama")], [])
    assert chosen == [] and "pip install 'modelyard[ollama]'" in remarks[0]


def test_the_bundled_model_stands_in_where_no_engine_is_found() -> None:
    far = Offer("openai", "a key", {"engine": "openai_compatible", "server_id": "openai-1"}, hosted=True)
    assert [entry["engine"] for entry in found_servers([], [])[0]] == ["mlx"]
    assert [entry["engine"] for entry in found_servers([far], ["openai"])[0]] == ["mlx", "openai_compatible"]
    with pytest.raises(CliError, match="--with groq: not found"):
        found_servers([far], ["groq"])


def test_nobody_looks_where_servers_are_named() -> None:
    def look() -> list[Offer]:
        raise AssertionError("looked")

    plan = make_plan(None, port=0, metrics_port=-1, servers=["simulated"], no_servers=False, offers=look)
    assert [server.engine for server in plan.servers] == ["simulated"]
