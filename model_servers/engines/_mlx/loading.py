"""Loading a model. Everything here but `Model` itself runs on the engine thread."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model_servers.engine import EngineFailed, Feature, Sampling
from model_servers.engines._mlx.markup import Marks
from model_servers.engines._mlx.settings import BUNDLED, MlxSettings

log = logging.getLogger(__name__)

_HERMES = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model and what was found out about it."""

    network: Any
    """mlx_lm model: (tokens [batch, length], cache) -> logits [batch, length, vocabulary]. None: not in memory."""
    tokenizer: Any
    """mlx_lm TokenizerWrapper."""
    name: str
    context_length: int
    vocabulary: int
    eos: frozenset[int]
    skipped: frozenset[int]
    """Control tokens that have no text."""
    features: Feature
    marks: Marks
    grammar_tokenizer: Any
    """llguidance LLTokenizer, or None where it cannot be had."""
    defaults: Sampling
    """From generation_config.json; temperature 0 where it says nothing."""
    step_tokens: int
    """Tokens computed at most between two decode steps."""
    quantization: str
    version: str
    device: str
    memory_bytes: int
    """Of the device."""
    weight_bytes: int = 0
    """Of the weights: as computed from their shapes, or as measured when they were loaded."""
    most_bytes_per_token: int | None = None
    """Most bytes of text that one token can stand for; None: not known."""
    texts: dict[int, str] = field(default_factory=dict)

    def text_of(self, token: int) -> str:
        """Text of one token on its own."""
        text = self.texts.get(token)
        if text is None:
            text = self.texts[token] = str(self.tokenizer.decode([token]))
        return text


def load(settings: MlxSettings) -> Model:
    """Imports MLX and loads what the settings name. Raises EngineFailed with a cure."""
    mx = import_mlx(fast_blas=settings.fast_blas)
    before = mx.get_active_memory()
    model = _open(mx, settings)
    try:
        # Evaluated, and computed with: what cannot compute one token must not report itself ready.
        mx.eval(model.network.parameters(), model.network(mx.array([[0]])))
    except Exception as error:
        raise EngineFailed(f"cannot load the weights of the MLX model {model.name}: {error}") from error
    return replace(model, weight_bytes=max(mx.get_active_memory() - before, 0) or model.weight_bytes)


def describe(settings: MlxSettings) -> Model:
    """As `load`, but the weights are not read: `network` is None."""
    model = _open(import_mlx(fast_blas=settings.fast_blas), settings)
    return replace(model, network=None)


def _open(mx: Any, settings: MlxSettings) -> Model:
    """Everything about a model. MLX computes when asked for a value: until then no weight is read."""
    folder, name = locate(settings)
    import mlx_lm
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load as load_folder

    if settings.memory_limit_bytes is not None:
        mx.set_memory_limit(settings.memory_limit_bytes)
    try:
        network, tokenizer, config = load_folder(
            str(folder), tokenizer_config={"trust_remote_code": False}, return_config=True, lazy=True
        )
    except Exception as error:
        raise EngineFailed(f"cannot load the MLX model in {folder}: {error}") from error
    gpu = on_gpu(mx)
    dtype = settings.dtype or (None if gpu else "float32")
    quantization = _quantization(config)
    if dtype is not None:
        network.set_dtype(getattr(mx, dtype))
    if not all(hasattr(layer, "merge") for layer in make_prompt_cache(network)):
        raise EngineFailed(f"the architecture {config.get('model_type')!r} of {name} cannot generate in batches")
    probe = network(mx.array([[0]]))
    vocabulary = int(probe.shape[-1])
    eos = frozenset(int(token) for token in tokenizer.eos_token_ids)
    grammar_tokenizer = _grammar_tokenizer(tokenizer, vocabulary, eos)
    marks = _marks(tokenizer)
    features = Feature.STREAMING | Feature.LOGPROBS
    if grammar_tokenizer is not None:
        features |= Feature.JSON | Feature.JSON_SCHEMA
    if marks.call_start:
        features |= Feature.FUNCTION_CALLING
    if _gives_hidden_states(mx, network, probe):
        features |= Feature.EMBEDDING
    if settings.prompt_cache_entries and settings.prompt_cache_bytes:
        features |= Feature.PREFIX_CACHE
    info = mx.device_info()
    return Model(
        network=network,
        tokenizer=tokenizer,
        name=name,
        context_length=_context_length(settings, config, tokenizer),
        vocabulary=vocabulary,
        eos=eos,
        skipped=_skipped(tokenizer, eos, marks),
        features=features,
        marks=marks,
        grammar_tokenizer=grammar_tokenizer,
        defaults=_defaults(folder),
        step_tokens=settings.prefill_step_size or (512 if gpu else 128),
        quantization=quantization,
        version=f"mlx-lm {mlx_lm.__version__}, mlx {mx.__version__}",
        device=str(info.get("device_name", "GPU")) if gpu else f"{platform.machine()} CPU",
        memory_bytes=_gpu_memory(info) if gpu else _ram(),
        weight_bytes=sum(array.nbytes for _, array in tree_flatten(network.parameters())),
        most_bytes_per_token=most_bytes_per_token(tokenizer),
    )


def import_mlx(*, fast_blas: bool = True) -> Any:
    """mlx.core, set up for this machine. Raises EngineFailed with a cure."""
    if fast_blas and sys.platform == "linux" and "mlx.core" not in sys.modules:
        _load_fast_blas()
    try:
        import mlx.core as mx
        import mlx_lm  # noqa: F401 - found out here whether it can be imported
    except ImportError as error:
        if "GLIBC" in str(error):
            cure = "MLX needs glibc 2.35 or newer (Ubuntu 22.04, Debian 12); use another engine on this host"
        elif sys.platform == "darwin" and platform.machine() != "arm64":
            cure = "MLX runs on Apple silicon, not on Intel Macs; use another engine on this host"
        else:
            cure = "install it: pip install 'modelyard[mlx]'"
        raise EngineFailed(f"the MLX engine cannot start ({error}); {cure}") from error
    if not on_gpu(mx):
        # On a CPU "compile" means running g++ for several seconds at the first token.
        mx.disable_compile()
    return mx


def on_gpu(mx: Any) -> bool:
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def _load_fast_blas() -> None:
    """The wheels for Linux CPUs carry a BLAS that is ten times slower than it need be; see the module imported here.

    Half of the cores: the other half serves requests, and threads that wait for a core they do not get cost more
    than they bring.
    """
    try:
        from model_servers.engines._mlx import fast_blas
    except ImportError:
        return
    reason = fast_blas.load(threads=max(1, (os.cpu_count() or 1) // 2))
    if reason is not None:
        log.warning("MLX multiplies matrices slowly on this CPU, prompts take long: %s", reason)


def locate(settings: MlxSettings) -> tuple[Path, str]:
    """(folder of the model, its public name). Raises EngineFailed if it is not on this machine."""
    if settings.model == BUNDLED:
        try:
            from model_servers import bundled

            folder = Path(bundled.path())
        except (ImportError, FileNotFoundError) as error:
            raise EngineFailed(f"this installation lacks the bundled model ({error}); name another one") from error
        return folder, settings.name or folder.name
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        return folder, settings.name or folder.resolve().name
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            settings.model,
            local_files_only=not settings.allow_download,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"],
        )
    except Exception as error:  # the hub library has no common base for "bad id", "not cached" and "no network"
        raise EngineFailed(
            f"model {settings.model!r} is neither a folder nor in the local Hugging Face cache; "
            f"fetch it (hf download {settings.model}) or set allow_download ({type(error).__name__})"
        ) from error
    return Path(found), settings.name or settings.model


def _quantization(config: dict[str, Any]) -> str:
    quantized = config.get("quantization") or config.get("quantization_config") or {}
    if quantized.get("bits"):
        return f"{quantized['bits']}bit"
    stored = str(config.get("dtype") or config.get("torch_dtype") or "")
    return {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}.get(stored, stored)


def _context_length(settings: MlxSettings, config: dict[str, Any], tokenizer: Any) -> int:
    text_config = config.get("text_config") or {}
    found = config.get("max_position_embeddings") or text_config.get("max_position_embeddings")
    if not found:
        limit = int(getattr(tokenizer, "model_max_length", 0) or 0)
        # transformers writes 10**30 where nothing is known
        found = limit if 0 < limit < 1 << 31 else settings.context_length or 4096
    return min(int(found), settings.context_length or int(found))


def _marks(tokenizer: Any) -> Marks:
    template = str(getattr(tokenizer, "chat_template", None) or "")
    start, end, parse = "", "", None
    if "tools" in template:
        if tokenizer.has_tool_calling:
            start, end = tokenizer.tool_call_start, tokenizer.tool_call_end
            if not str(getattr(tokenizer.tool_parser, "__module__", "")).endswith("json_tools"):
                parse = tokenizer.tool_parser
        elif _HERMES[0] in template:
            start, end = _HERMES
    if not end:
        # Formats whose call runs to the end of the answer cannot be told apart from text that follows.
        start, parse = "", None
    return Marks(
        call_start=start,
        call_end=end,
        # What the template writes between the tag and the call: a forced call has to begin in the same way.
        call_glue="\n" if start and re.search(re.escape(start) + r"(\\n|\n)", template) else "",
        parse_call=_one_argument(parse),
        think_start=tokenizer.think_start or "",
        think_end=tokenizer.think_end or "",
    )


def _one_argument(parse: Callable[..., Any] | None) -> Callable[[str], Any] | None:
    return None if parse is None else lambda text: parse(text, None)


def _skipped(tokenizer: Any, eos: frozenset[int], marks: Marks) -> frozenset[int]:
    """Special tokens, except those that carry meaning in an answer."""
    tags = {marks.call_start, marks.call_end, marks.think_start, marks.think_end}
    special = {
        int(token)
        for token, text in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False)
        if str(text) not in tags
    }
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {int(token) for token, text in added.items() if text.special and text.content not in tags}
    return frozenset(special | eos)


def _grammar_tokenizer(tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> Any:
    try:
        from model_servers.engines._mlx import grammar

        return grammar.make_tokenizer(tokenizer, vocabulary, sorted(eos))
    except ImportError:
        log.warning("llguidance is not installed: no JSON output and no forced tool calls")
    except Exception as error:  # a tokenizer that llguidance cannot read costs a feature, not the engine
        log.warning("no JSON output and no forced tool calls: %s", error)
    return None


def most_bytes_per_token(tokenizer: Any) -> int | None:
    """Most bytes of text that one token can stand for. None where tokens may swallow any number of them.

    Known for BPE over bytes, or with bytes to fall back on: an unknown token would stand for text of any length.
    Composing characters (NFC) makes text shorter, by at most three quarters.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    described = json.loads(backend.to_str())
    model, steps = described["model"], [*_steps(described["normalizer"]), *_steps(described["pre_tokenizer"])]
    kinds = {step["type"] for step in steps}
    if model.get("type") != "BPE" or not ("ByteLevel" in kinds or model.get("byte_fallback")):
        return None
    swallows = any(token.get("lstrip") or token.get("rstrip") for token in described["added_tokens"])
    if swallows or any(_shortens(step) for step in steps):
        return None
    # A token's name is never shorter than what it stands for: names of bytes have one character, or "<0x0A>".
    longest = max(len(token.encode()) for token in backend.get_vocab(with_added_tokens=True))
    return longest * (4 if "NFC" in kinds else 1)


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [part] if inner is None else [step for each in inner for step in _steps(each)]


def _shortens(step: dict[str, Any]) -> bool:
    """Whether it may make a text shorter, other than NFC does."""
    if step["type"] == "Split":
        return bool(step.get("behavior") == "Removed")
    if step["type"] == "Replace":
        return bool(step.get("pattern") != {"String": " "} or not step.get("content"))
    return step["type"] not in {"ByteLevel", "Digits", "Metaspace", "NFC", "Prepend"}


def _gives_hidden_states(mx: Any, network: Any, logits: Any) -> bool:
    """Whether `network.model(tokens, cache=...)` gives the last hidden states, [batch, length, width]."""
    from mlx_lm.models.cache import make_prompt_cache

    try:
        hidden = network.model(mx.array([[0]]), cache=make_prompt_cache(network))
        return bool(hidden.ndim == 3 and hidden.shape[:2] == logits.shape[:2])
    except Exception:  # architectures differ; the answer is simply no
        return False


def _defaults(folder: Path) -> Sampling:
    path = folder / "generation_config.json"
    try:
        said = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        said = {}
    temperature = said.get("temperature")
    if said.get("do_sample") is False or (temperature is None and not said.get("do_sample")):
        temperature = 0.0
    return Sampling(
        temperature=1.0 if temperature is None else float(temperature),
        top_p=said.get("top_p"),
        top_k=said.get("top_k"),
        min_p=said.get("min_p"),
        repetition_penalty=said.get("repetition_penalty"),
    )


def _gpu_memory(info: Any) -> int:
    return int(info.get("max_recommended_working_set_size") or info.get("memory_size") or 0)


def _ram() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
