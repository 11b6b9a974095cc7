"""What this machine has to offer: engines that run, models that lie in the cache, keys in the environment.

Looking changes nothing and sends nothing beyond loopback. Engines on this machine are used as they are found; a
key means that prompts would leave the machine and cost money, so hosted providers are only offered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from modelyard.cli.extras import missing

_PATIENCE = 1.0
"""Seconds that an engine on this machine may take to answer."""
_OLLAMA = "http://127.0.0.1:11434"
_VLLM = "http://127.0.0.1:8000"
_LARGEST_SHARE = 0.5
"""Part of the memory that the files of a model from the cache may take."""

Get = Callable[[str], Any]
"""The JSON behind an address; raises OSError or ValueError."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Something that a model server could be started beside."""

    name: str
    """For --with, and to tell people."""
    what: str
    """One line for people."""
    entry: Mapping[str, Any]
    """As in up.servers."""
    hosted: bool = False
    """Prompts leave the machine and cost money."""
    extra: str = ""
    """Extra of modelyard that the engine needs."""

    @property
    def cure(self) -> str:
        """How to install what it lacks; empty if it lacks nothing."""
        if not self.extra or not missing(self.extra):
            return ""
        return f"pip install 'modelyard[{self.extra}]'"


@dataclass(frozen=True, slots=True)
class Key:
    """A hosted provider, recognised by a variable of the environment."""

    variable: str
    name: str
    engine: str
    extra: str
    settings: Mapping[str, Any] = field(default_factory=dict)


KEYS = (
    Key("OPENAI_API_KEY", "openai", "openai_compatible", "openai", {"provider": "openai"}),
    Key("ANTHROPIC_API_KEY", "anthropic", "anthropic", "anthropic"),
    Key("GROQ_API_KEY", "groq", "openai_compatible", "openai", {"provider": "groq"}),
    Key("XAI_API_KEY", "xai", "openai_compatible", "openai", {"provider": "xai"}),
    Key("OPENROUTER_API_KEY", "openrouter", "openai_compatible", "openai", {"provider": "openrouter"}),
    Key("TOGETHER_API_KEY", "together", "openai_compatible", "openai", {"provider": "together"}),
)


def discover(env: Mapping[str, str] | None = None) -> list[Offer]:
    """Everything found, local engines first. Takes about a second where something hangs, else much less."""
    env = os.environ if env is None else env
    looks: list[Callable[[], Iterable[Offer]]] = [
        lambda: ollama(env, _get),
        lambda: vllm(env, _get),
        lambda: mlx_cache(cache_folder(env), memory_bytes()),
        lambda: hosted(env),
    ]
    with ThreadPoolExecutor(len(looks)) as pool:
        return [offer for found in pool.map(lambda look: list(look()), looks) for offer in found]


# ------------------------------------------------------------------- engines ---


def ollama(env: Mapping[str, str], get: Get) -> Iterable[Offer]:
    """A running Ollama, where OLLAMA_HOST says or at its usual port."""
    url = _base_url(env.get("OLLAMA_HOST", ""), _OLLAMA, 11434)
    try:
        version = str(get(f"{url}/api/version")["version"])
        models = [str(model["name"]) for model in get(f"{url}/api/tags").get("models") or ()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    what = f"Ollama {version} at {url} with {_listed(models)}"
    yield Offer("ollama", what, {"engine": "ollama", "engine_settings": {"url": url}}, extra="ollama")


def vllm(env: Mapping[str, str], get: Get) -> Iterable[Offer]:
    """A running `vllm serve`, where VLLM_URL says or at its usual port."""
    url = _base_url(env.get("VLLM_URL", ""), _VLLM, 8000)
    try:
        models = get(f"{url}/v1/models")["data"]
        if not any(model.get("owned_by") == "vllm" for model in models):
            return  # something else speaks OpenAI's API there
        version = str(get(f"{url}/version")["version"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    what = f"vLLM {version} at {url} with {_listed([str(model['id']) for model in models])}"
    yield Offer("vllm", what, {"engine": "vllm", "engine_settings": {"base_url": url}}, extra="vllm")


def mlx_cache(folder: Path, memory: int) -> Iterable[Offer]:
    """The largest MLX model in the cache of the Hugging Face hub that leaves room for other things."""
    if missing("mlx"):
        return
    found = []
    for repository in sorted(folder.glob("models--mlx-community--*")):
        snapshots = [each.parent for each in repository.glob("snapshots/*/config.json")]
        complete = [each for each in snapshots if any(each.glob("*.safetensors"))]
        if complete:
            newest = max(complete, key=lambda each: each.stat().st_mtime)
            size = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
            found.append((size, repository.name.removeprefix("models--").replace("--", "/"), newest))
    fitting = [each for each in found if not memory or each[0] <= _LARGEST_SHARE * memory]
    if fitting:
        size, name, path = max(fitting)
        what = f"MLX model {name} in the cache ({size / 2**30:.1f} GiB)"
        settings = {"model": str(path), "name": name.split("/")[-1]}
        yield Offer("mlx", what, {"engine": "mlx", "engine_settings": settings}, extra="mlx")


def hosted(env: Mapping[str, str]) -> Iterable[Offer]:
    """Providers whose key is in the environment. The key itself is not looked at."""
    for key in KEYS:
        if env.get(key.variable):
            entry: dict[str, Any] = {"engine": key.engine, "server_id": f"{key.name}-1"}
            if key.settings:
                entry["engine_settings"] = dict(key.settings)
            yield Offer(key.name, f"{key.variable} in the environment", entry, hosted=True, extra=key.extra)
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
    if region and (env.get("AWS_ACCESS_KEY_ID") or env.get("AWS_PROFILE")):
        entry = {"engine": "bedrock", "engine_settings": {"region": region}, "labels": {"region": region}}
        yield Offer("bedrock", f"AWS credentials for {region} in the environment", entry, hosted=True, extra="bedrock")


# --------------------------------------------------------------------- tools ---


def choose(offers: Iterable[Offer], wanted: Iterable[str]) -> tuple[list[Offer], list[str]]:
    """The offers to use, and remarks about the others. Hosted ones are used only if `wanted` names them."""
    names = set(wanted)
    chosen, remarks = [], []
    for offer in offers:
        if offer.hosted and offer.name not in names:
            remarks.append(f"Found {offer.what}; `--with {offer.name}` sends requests there, which costs money.")
        elif offer.cure:
            remarks.append(f"Found {offer.what}, but not the engine for it: {offer.cure}")
        else:
            chosen.append(offer)
            remarks.append(f"Found {offer.what}.")
    return chosen, remarks


def cache_folder(env: Mapping[str, str]) -> Path:
    """Where the Hugging Face hub keeps its models."""
    if env.get("HF_HUB_CACHE"):
        return Path(env["HF_HUB_CACHE"])
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home) / "hub"


def memory_bytes() -> int:
    """Of this machine; 0 if it cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _base_url(given: str, default: str, port: int) -> str:
    """OLLAMA_HOST and the like: a URL, host:port, host or :port. A wildcard is where to listen, not where to call."""
    if not given:
        return default
    parts = urlsplit(given if "://" in given else f"http://{given}")
    host = parts.hostname or "127.0.0.1"
    if host in ("0.0.0.0", "::"):  # noqa: S104  compared with, not bound
        host = "127.0.0.1"
    if ":" in host:
        host = f"[{host}]"
    try:
        return f"{parts.scheme}://{host}:{parts.port or port}"
    except ValueError:  # the port is no number
        return default


def _listed(models: list[str]) -> str:
    if not models:
        return "no models yet"
    return ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")


def _get(url: str) -> Any:
    # No proxy: what is looked for is on this machine.
    with build_opener(ProxyHandler({})).open(url, timeout=_PATIENCE) as answer:
        return json.loads(answer.read(1 << 20))
