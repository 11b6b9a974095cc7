"""Train yardling from nothing: tokenizer, model and evaluation, on text that `corpus.py` makes up.

    python -m model_servers.bundled.train --out DIR     train, write the model folder DIR
    python -m model_servers.bundled.train --eval        print greedy answers of the bundled model to unseen questions

Needs MLX and mlx-lm; runs on any CPU or Apple GPU. The result depends on the seed and, in its last digits, on the
machine. The folder is complete when it appears: it is written beside its place and renamed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_servers.bundled import path
from model_servers.engines._mlx import fast_blas

from .chat_format import END, END_OF_TEXT, START, TEMPLATE, TOOL_MARKS, segments
from .corpus import Conversation, conversations
from .questions import QUESTIONS

if TYPE_CHECKING:
    import mlx.core as mx
    from tokenizers import Tokenizer

SIZE_LIMIT = 7_500_000  # bytes, all files of the model folder together
CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result of a training run."""

    seed: int = 20
    conversations: int = 45_000
    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 3
    heads: int = 4
    intermediate: int = 704
    longest: int = 512  # tokens; longer conversations are left out
    batch_tokens: int = 2048
    streams: int = 2  # parts of a batch that are computed at the same time, on a CPU
    learning_rate: float = 3e-3  # of AdamW, for embeddings and norms
    muon_rate: float = 0.02  # of Muon, for the matrices of the layers
    warmup_steps: int = 20
    weight_decay: float = 0.1


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one conversation, and for each whether it is a target."""

    ids: tuple[int, ...]
    targets: tuple[bool, ...]


def train_tokenizer(recipe: Recipe, sample: Sequence[Conversation]) -> Tokenizer:
    """Return a byte-level BPE tokenizer with one token for each mark of the chat format."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, START, END]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary - len(TOOL_MARKS),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    marks = (*special, *TOOL_MARKS)

    def texts() -> Iterator[str]:
        for conversation in sample:
            text = "".join(piece for piece, _ in segments(conversation))
            for mark in marks:
                text = text.replace(mark, " ")
            yield text

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in TOOL_MARKS])
    return tokenizer


def encode(tokenizer: Tokenizer, conversation: Conversation) -> Example:
    """Turn a conversation into token ids; the targets are what the assistant writes, with its stop token."""
    pieces = list(segments(conversation))
    encoded = tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
    ids: list[int] = []
    targets: list[bool] = []
    for piece, (_, learned) in zip(encoded, pieces, strict=True):
        ids += piece.ids
        targets += [learned] * len(piece.ids)
    return Example(tuple(ids), tuple(targets))


def batches(examples: Sequence[Example], recipe: Recipe, rng: random.Random) -> list[list[Example]]:
    """Group examples of about equal length, so that little padding is needed, in random order."""
    order = sorted(examples, key=lambda example: (len(example.ids), rng.random()))
    groups: list[list[Example]] = [[]]
    for example in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(example.ids) > recipe.batch_tokens:
            groups.append([])
        groups[-1].append(example)
    rng.shuffle(groups)
    return groups


def arrays(batch: Sequence[Example]) -> tuple[mx.array, mx.array, mx.array]:
    """Return the padded inputs (batch, length), and the flat positions and the labels of the targets."""
    import mlx.core as mx
    import numpy as np

    length = max(len(example.ids) for example in batch) - 1
    inputs = np.zeros((len(batch), length), dtype=np.int32)
    positions: list[int] = []
    labels: list[int] = []
    for row, example in enumerate(batch):
        inputs[row, : len(example.ids) - 1] = example.ids[:-1]
        for at, learned in enumerate(example.targets[1:]):
            if learned:
                positions.append(row * length + at)
                labels.append(example.ids[at + 1])
    return mx.array(inputs), mx.array(positions), mx.array(labels)


def model_config(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return `config.json` in Hugging Face form."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "head_dim": recipe.hidden // recipe.heads,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": recipe.vocabulary,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def fit(
    recipe: Recipe, config: dict[str, Any], examples: Sequence[Example], held_out: Sequence[Example]
) -> tuple[Any, float]:
    """Train the model; returns it with the loss on the held-out conversations, in nats per assistant token."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(recipe.seed)
    rng = random.Random(recipe.seed)
    model = Model(ModelArgs.from_dict(config))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.02 if p.ndim == 2 else p, model.parameters()))
    count = sum(parameter.size for _, parameter in tree_flatten(model.parameters()))
    print(f"{count:,} parameters, {2 * count:,} bytes in 16 bit", flush=True)

    def loss_of(inputs: mx.array, positions: mx.array, labels: mx.array) -> mx.array:
        hidden = model.model(inputs).reshape(-1, recipe.hidden)[positions]
        loss: mx.array = nn.losses.cross_entropy(model.model.embed_tokens.as_linear(hidden), labels, reduction="mean")
        return loss

    plan = batches(examples, recipe, rng)
    warmup = min(recipe.warmup_steps, len(plan) // 10 + 1)

    def schedule(peak: float) -> Any:
        rise = optim.linear_schedule(peak / 50, peak, warmup)
        fall = optim.cosine_decay(peak, len(plan) - warmup, peak / 50)
        return optim.join_schedules([rise, fall], [warmup])

    # Most of a step on a CPU is spent in element-wise operations, which use one core for each stream.
    streams = [mx.default_stream(mx.default_device())]
    if mx.default_device() == mx.Device(mx.cpu):
        streams = [mx.new_stream(mx.cpu) for _ in range(recipe.streams)]

    class StreamedMuon(optim.Muon):  # type: ignore[misc]
        """Muon that computes the updates of some matrices on one stream."""

        def __init__(self, stream: mx.Stream) -> None:
            super().__init__(schedule(recipe.muon_rate), weight_decay=0.0)
            self.stream = stream

        def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
            with mx.stream(self.stream):
                updated: mx.array = super().apply_single(gradient, parameter, state)
            return updated

    def owner(name: str, parameter: mx.array) -> int | None:
        """Return which stream updates a matrix inside a layer; None for the rest, which AdamW updates."""
        if parameter.ndim != 2 or "embed" in name:
            return None
        return sum(name.encode()) % len(streams)

    adam = optim.AdamW(
        schedule(recipe.learning_rate), betas=[0.9, 0.98], weight_decay=recipe.weight_decay, bias_correction=True
    )
    optimizer = optim.MultiOptimizer(
        [*(StreamedMuon(stream) for stream in streams), adam],
        [lambda name, p, at=at: owner(name, p) == at for at in range(len(streams))],
    )
    gradients_of = nn.value_and_grad(model, loss_of)

    def step_of(batch: Sequence[Example]) -> tuple[mx.array, Any]:
        parts = [part for at in range(len(streams)) if (part := batch[at :: len(streams)])]
        losses, gradients, sizes = [], [], []
        for part, stream in zip(parts, streams, strict=False):
            data = arrays(part)
            with mx.stream(stream):
                loss, gradient = gradients_of(*data)
            losses.append(loss)
            gradients.append(gradient)
            sizes.append(data[2].size)
        share = [size / sum(sizes) for size in sizes]
        loss = sum(part * weight for part, weight in zip(losses, share, strict=True))
        return loss, tree_map(lambda *leaves: sum(p * w for p, w in zip(leaves, share, strict=True)), *gradients)

    started, tokens, recent = time.monotonic(), 0, []
    for step, batch in enumerate(plan, 1):
        loss, gradients = step_of(batch)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)
        tokens += sum(len(example.ids) for example in batch)
        recent.append(loss.item())
        if step % 25 == 0 or step == len(plan):
            seconds = time.monotonic() - started
            print(
                f"step {step:5d}/{len(plan)}  loss {sum(recent) / len(recent):.3f}  {tokens:,} tokens  "
                f"{tokens / seconds:,.0f} tok/s  {seconds:.0f} s, {seconds / step * (len(plan) - step):.0f} s to go",
                flush=True,
            )
            recent = []
    total = weight = 0.0
    for batch in batches(held_out, recipe, rng):
        data = arrays(batch)
        mean: Any = loss_of(*data).item()
        total += mean * data[2].size
        weight += data[2].size
    return model, total / weight


def write(folder: Path, recipe: Recipe, config: dict[str, Any], tokenizer: Tokenizer, model: Any) -> int:
    """Write the model folder, replacing what is there; returns its size in bytes."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".yardling-") as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        weights = {name: value.astype(mx.bfloat16) for name, value in tree_flatten(model.parameters())}
        mx.save_safetensors(str(new / "model.safetensors"), weights, metadata={"format": "mlx"})
        tokenizer.save(str(new / "tokenizer.json"), pretty=False)
        end, end_of_text = config["eos_token_id"], config["pad_token_id"]
        _write_json(new / "config.json", config)
        _write_json(
            new / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": None,
                "eos_token": END,
                "pad_token": END_OF_TEXT,
                "model_max_length": CONTEXT,
                "clean_up_tokenization_spaces": False,
                "chat_template": TEMPLATE,
            },
        )
        _write_json(
            new / "generation_config.json",
            {"eos_token_id": [end, end_of_text], "pad_token_id": end_of_text, "do_sample": True,
             "temperature": 0.3, "top_p": 0.9, "max_new_tokens": 256},
        )  # fmt: skip
        size = sum(file.stat().st_size for file in new.iterdir())
        if size > SIZE_LIMIT:
            raise SystemExit(f"the model folder takes {size:,} bytes, more than {SIZE_LIMIT:,}")
        if folder.exists():
            folder.rename(Path(temporary, "old"))
        new.rename(folder)
    return size


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_template(folder: Path, sample: Sequence[Conversation]) -> None:
    """Fail unless the chat template of the written tokenizer gives the text that the model was trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    for conversation in sample:
        expected = "".join(text for text, _ in segments(conversation))
        tools = list(conversation.tools) or None
        given = tokenizer.apply_chat_template(list(conversation.messages), tools=tools, tokenize=False)
        if given != expected:
            raise SystemExit(f"the chat template differs from the training text:\n{given!r}\n{expected!r}")


def train(recipe: Recipe, out: Path) -> None:
    """Make the corpus, train tokenizer and model, and write the model folder."""
    reason = fast_blas.load(threads=1)
    print(
        "matrix products: OpenBLAS" if reason is None else f"matrix products: as MLX does them ({reason})", flush=True
    )
    started = time.monotonic()
    corpus = list(conversations(recipe.seed, recipe.conversations))
    tokenizer = train_tokenizer(recipe, corpus[:12_000])
    examples = [example for item in corpus if len((example := encode(tokenizer, item)).ids) <= recipe.longest]
    held = list(conversations(recipe.seed + 1, 300))
    held_out = [example for item in held if len((example := encode(tokenizer, item)).ids) <= recipe.longest]
    tokens = sum(len(example.ids) for example in examples)
    learned = sum(sum(example.targets) for example in examples)
    print(
        f"{len(examples):,} of {len(corpus):,} conversations, {tokens:,} tokens, {learned:,} of them by the assistant; "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )
    config = model_config(recipe, tokenizer)
    model, loss = fit(recipe, config, examples, held_out)
    size = write(out, recipe, config, tokenizer, model)
    check_template(out, held)
    print(f"loss on {len(held_out)} new conversations: {loss:.3f} (perplexity {math.exp(loss):.2f})")
    print(f"{out}: {size:,} bytes; {time.monotonic() - started:.0f} s in all")


def evaluate(folder: Path) -> None:
    """Print greedy answers to the questions of `questions.py`."""
    fast_blas.load()
    from mlx_lm import load, stream_generate

    model, tokenizer = load(str(folder))
    for messages, tools in QUESTIONS:
        prompt = tokenizer.apply_chat_template(list(messages), tools=tools, add_generation_prompt=True)
        parts = list(stream_generate(model, tokenizer, prompt, max_tokens=200))
        print(f"> {messages[-1]['content']}")
        print(
            "".join(part.text for part in parts)
            + ("" if parts[-1].finish_reason == "stop" else " [no stop token]")
            + "\n"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    usual = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m model_servers.bundled.train", description="Train yardling, or try it."
    )
    parser.add_argument("--out", type=Path, help="folder to write the new model to; what it holds is replaced")
    parser.add_argument("--eval", action="store_true", help="print greedy answers to unseen questions")
    parser.add_argument(
        "--model", type=Path, help="folder of the model for --eval without --out (default: the bundled one)"
    )
    parser.add_argument("--seed", type=int, default=usual.seed, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--conversations",
        type=int,
        default=usual.conversations,
        help="corpus size, which sets the time (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.out is None and not options.eval:
        parser.error("nothing to do: give --out DIR, --eval, or both")
    if options.out is not None:
        train(replace(usual, seed=options.seed, conversations=options.conversations), options.out)
    if options.eval:
        evaluate(options.out or options.model or path())


if __name__ == "__main__":
    main()
