"""Parts of the MLX engine that work without a model: answers, prompt cache, sampling, grammar, settings, imports."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import ValidationError

from model_servers.engine import (
    Delta,
    EngineFailed,
    FinishReason,
    GenerationRequest,
    Image,
    Message,
    Role,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCall,
    Unsupported,
)
from model_servers.engines._mlx.answer import Answer, Detokenizer
from model_servers.engines._mlx.jobs import EmbedJob
from model_servers.engines._mlx.loading import import_mlx, most_bytes_per_token
from model_servers.engines._mlx.markup import Marks, MarkupReader
from model_servers.engines._mlx.prefixes import PrefixCache
from model_servers.engines._mlx.prompting import pieces, weight
from model_servers.engines.mlx import MlxSettings, plugin

# ---------------------------------------------------------------- imports ---


def test_importing_the_module_is_light() -> None:
    code = (
        "import sys, model_servers.engines.mlx\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'tokenizers', 'llguidance', 'huggingface_hub'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_a_missing_library_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(EngineFailed, match=r"pip install 'modelyard\[mlx\]'"):
        import_mlx(fast_blas=False)


def test_the_plugin_and_its_settings() -> None:
    assert (plugin.name, plugin.extra) == ("mlx", "mlx")
    assert all(field.description for field in MlxSettings.model_fields.values())
    assert MlxSettings().model == "bundled"
    with pytest.raises(ValidationError):
        MlxSettings.model_validate({"slots": 0})
    with pytest.raises(ValidationError):
        MlxSettings.model_validate({"slotz": 1})


# ---------------------------------------------------------------- answers ---


@dataclass
class Letters:
    """A tokenizer whose tokens are strings, by index, with mlx_lm's streaming interface."""

    vocabulary: list[str]
    last_segment: str = ""

    @property
    def detokenizer(self) -> Letters:
        return self

    def add_token(self, token: int) -> None:
        self.last_segment = self.vocabulary[token]


def answer(*vocabulary: str, stops: tuple[str, ...] = (), marks: Marks | None = None) -> Answer:
    detokenizer = Detokenizer(Letters(list(vocabulary)), frozenset({99}))
    return Answer(detokenizer, stops, MarkupReader(marks) if marks else None)


def test_tokens_that_are_held_back_are_counted_with_the_text() -> None:
    one = answer("ab", "#", "#x", stops=("##!",))
    assert one.push(0) == (Delta(text="ab", tokens=1), False)
    assert one.push(1) == (None, False)
    assert one.push(2) == (Delta(text="##x", tokens=2), False)
    assert one.finish(FinishReason.LENGTH) == (None, FinishReason.LENGTH)


def test_a_stop_string_ends_the_answer_and_drops_what_follows() -> None:
    one = answer("so EN", "D and more", stops=("END",))
    assert one.push(0) == (Delta(text="so ", tokens=1), False)
    delta, stopped = one.push(1)
    assert stopped
    assert delta is not None
    assert (delta.text, delta.tokens) == ("", 1)
    assert one.finish(FinishReason.STOP) == (None, FinishReason.STOP)


def test_held_text_comes_out_at_the_end() -> None:
    one = answer("x", "EN", stops=("END",))
    one.push(0)
    assert one.push(1) == (None, False)
    delta, reason = one.finish(FinishReason.LENGTH)
    assert delta == Delta(text="EN", tokens=1)
    assert reason is FinishReason.LENGTH


def test_logprobs_stay_with_their_tokens_and_control_tokens_have_no_text() -> None:
    one = answer("a", "b")
    entry = TokenLogprob("a", -0.5)
    assert one.push(99) == (None, False)
    assert one.push(0, entry) == (Delta(text="a", tokens=2, logprobs=(entry,)), False)


def test_a_finished_call_changes_the_reason_a_cut_one_does_not() -> None:
    marks = Marks(call_start="<c>", call_end="</c>")
    parts = ("Hm. <c>", '{"name": "f", "arguments": {', '"a": 1}}</c>')
    one = answer(*parts, marks=marks, stops=("1",))  # stop strings do not reach into arguments
    deltas = [one.push(token)[0] for token in range(3)]
    assert [delta.text for delta in deltas if delta] == ["Hm. ", "", ""]
    calls = [call for delta in deltas if delta for call in delta.tool_calls]
    assert [call.name for call in calls] == ["f", "", ""]
    assert {call.index for call in calls} == {0}
    assert calls[0].id.startswith("call_")
    assert "".join(call.arguments_json for call in calls) == '{"a": 1}'
    assert one.finish(FinishReason.STOP)[1] is FinishReason.TOOL_CALLS

    cut = answer(*parts, marks=marks)
    cut.push(0)
    cut.push(1)
    assert cut.finish(FinishReason.LENGTH)[1] is FinishReason.LENGTH


def test_characters_split_between_tokens_wait_for_their_end() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([], trainer)

    class Wrapper:
        backend_tokenizer = backend

    text = " naïve 🙂 text"
    tokens = backend.encode(text).ids
    assert len(tokens) > len(text)  # one token per byte
    detokenizer = Detokenizer(Wrapper(), frozenset())
    parts = [detokenizer.push(token) for token in tokens]
    assert "".join(parts) == text  # with the space at the beginning
    assert "\ufffd" not in "".join(parts)
    broken = Detokenizer(Wrapper(), frozenset())
    smile = backend.encode("🙂").ids
    assert [broken.push(token) for token in smile[:3]] == ["", "", ""]
    assert broken.push(backend.encode("x").ids[0]).endswith("x")


# ------------------------------------------------------------ prompt cache ---


class Layer:
    """One layer's cache: as many tokens as `offset` says, eight bytes each."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.keys = None

    @property
    def nbytes(self) -> int:
        return 8 * self.offset


def trim(cache: list[Layer], count: int) -> None:
    for layer in cache:
        layer.offset -= count


def prefix_cache(entries: int = 4, nbytes: int = 10_000, trimmable: bool = True) -> PrefixCache:
    return PrefixCache(entries, nbytes, lambda cache: trimmable, trim)


def lengths(cache: PrefixCache, tokens: list[int]) -> tuple[int | None, int]:
    """(tokens in the cache that comes back, tokens said to be cached)."""
    found, length = cache.fetch(tokens)
    return (None if found is None else found[0].offset), length


def test_the_longest_beginning_is_found_and_trimmed() -> None:
    cache = prefix_cache()
    cache.insert([1, 2, 3, 4], [Layer(4)])
    cache.insert([1, 2, 9], [Layer(3)])
    assert lengths(cache, [1, 2, 3, 7]) == (3, 3)
    assert lengths(cache, [1, 2, 3, 4, 5]) == (4, 4)
    assert lengths(cache, [5, 6]) == (None, 0)
    # One token is always computed anew: generation starts from its logits.
    assert lengths(cache, [1, 2, 3, 4]) == (3, 3)
    assert lengths(cache, [1]) == (None, 0)
    # Trimming was done on copies.
    assert lengths(cache, [1, 2, 3, 4, 5]) == (4, 4)


def test_a_longer_entry_replaces_its_own_beginning() -> None:
    cache = prefix_cache()
    cache.insert([1, 2], [Layer(2)])
    cache.insert([1, 2, 3], [Layer(3)])
    cache.insert([1, 2], [Layer(2)])
    assert len(cache) == 1
    assert cache.nbytes == 24


def test_caches_that_cannot_be_trimmed_serve_whole_only() -> None:
    cache = prefix_cache(trimmable=False)
    cache.insert([1, 2, 3], [Layer(3)])
    assert lengths(cache, [1, 2, 3]) == (None, 0)
    assert lengths(cache, [1, 2, 4]) == (None, 0)
    assert lengths(cache, [1, 2, 3, 4]) == (3, 3)


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = prefix_cache(entries=2)
    cache.insert([1, 1], [Layer(2)])
    cache.insert([2, 2, 2], [Layer(3)])
    cache.fetch([1, 1, 5])
    cache.insert([3, 3], [Layer(2)])
    assert lengths(cache, [1, 1, 5])[1] == 2
    assert lengths(cache, [2, 2, 2, 5])[1] == 0
    assert lengths(cache, [3, 3, 5])[1] == 2


def test_bytes_are_bounded_and_zero_disables() -> None:
    cache = prefix_cache(nbytes=40)
    cache.insert([1, 1, 1], [Layer(3)])
    cache.insert([2, 2, 2], [Layer(3)])
    assert len(cache) == 1
    assert cache.nbytes <= 40
    cache.insert([3] * 9, [Layer(9)])
    assert lengths(cache, [3] * 10)[1] == 0
    for off in (prefix_cache(entries=0), prefix_cache(nbytes=0)):
        off.insert([1], [Layer(1)])
        assert (len(off), off.enabled) == (0, False)


# --------------------------------------------------------------- embedding ---


def test_embedding_goes_in_groups_of_bounded_size() -> None:
    job = EmbedJob([[1], [1] * 9, [1] * 4, [1] * 30], sink=None)  # type: ignore[arg-type]
    groups = []
    while not job.done:
        group = job.next_group(10)
        groups.append(group)
        job.vectors.update((index, [float(index)]) for index in group)
    assert groups == [[3], [1], [2, 0]]
    assert job.result() == [[0.0], [1.0], [2.0], [3.0]]


# ---------------------------------------------------------------- sampling ---


@pytest.fixture
def sampling_module() -> Any:
    if importlib.util.find_spec("mlx_lm") is None:
        pytest.skip("the extra mlx is not installed")
    import_mlx()
    from model_servers.engines._mlx import sampling

    return sampling


def draws(module: Any, asked: Sampling, logits: list[float], count: int = 200) -> list[int]:
    import mlx.core as mx

    sampler = module.make_sampler(asked)
    row = mx.array([logits])
    row = row - mx.logsumexp(row, axis=-1, keepdims=True)
    return [int(sampler(row).item()) for _ in range(count)]


def test_draws_follow_the_parameters(sampling_module: Any) -> None:
    logits = [3.0, 2.0, 1.0, -1.0]  # probabilities about 0.66, 0.24, 0.09, 0.01
    assert set(draws(sampling_module, Sampling(temperature=0.0), logits)) == {0}
    assert set(draws(sampling_module, Sampling(temperature=5.0, seed=1), logits)) == {0, 1, 2, 3}
    assert set(draws(sampling_module, Sampling(temperature=5.0, top_k=2, seed=1), logits)) == {0, 1}
    assert set(draws(sampling_module, Sampling(temperature=5.0, top_k=9, seed=1), logits)) == {0, 1, 2, 3}
    assert set(draws(sampling_module, Sampling(temperature=1.0, top_p=0.6, seed=1), logits)) == {0}
    assert set(draws(sampling_module, Sampling(temperature=1.0, top_p=0.8, seed=1), logits)) == {0, 1}
    assert set(draws(sampling_module, Sampling(temperature=1.0, min_p=0.1, seed=1), logits)) == {0, 1, 2}
    assert set(draws(sampling_module, Sampling(temperature=1.0, min_p=0.3, seed=1), logits)) == {0, 1}
    share = draws(sampling_module, Sampling(temperature=1.0, seed=3), logits, 1000).count(0) / 1000
    assert share == pytest.approx(0.66, abs=0.05)


def test_a_seed_fixes_the_sequence_of_draws(sampling_module: Any) -> None:
    logits = [0.1 * n for n in range(20)]
    big = (1 << 64) - 1
    assert draws(sampling_module, Sampling(temperature=1.0, seed=big), logits, 20) == draws(
        sampling_module, Sampling(temperature=1.0, seed=big), logits, 20
    )
    assert len(set(draws(sampling_module, Sampling(temperature=1.0, seed=1), logits, 20))) > 3


def test_penalties_by_the_formula(sampling_module: Any) -> None:
    import mlx.core as mx

    asked = Sampling(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    penalize = sampling_module.make_penalties(asked, [0, 3, 3])
    logits = mx.array([[1.0, 2.0, -1.0, -2.0]])
    # Before the first token: only the prompt counts, and only for the repetition penalty.
    assert penalize(mx.array([0, 3, 3]), logits).tolist() == [[0.5, 2.0, -1.0, -4.0]]
    penalize(mx.array([0, 3, 3, 1]), logits)
    twice = penalize(mx.array([0, 3, 3, 1, 1]), logits)
    assert twice.tolist() == [[0.5, 1.0 - 2 * 0.5 - 0.25, -1.0, -4.0]]
    assert sampling_module.make_penalties(Sampling(repetition_penalty=1.0), [1]) is None


def test_a_fault_in_a_processor_is_kept_and_changes_nothing(sampling_module: Any) -> None:
    import mlx.core as mx

    def broken(context: Any, logits: Any) -> Any:
        raise ValueError("oops")

    guard = sampling_module.Guarded([lambda context, logits: logits + 1, broken])
    logits = mx.array([[1.0, 2.0]])
    assert guard(mx.array([1]), logits).tolist() == [[1.0, 2.0]]
    assert str(guard.failure) == "oops"
    assert guard(mx.array([1]), logits).tolist() == [[1.0, 2.0]]


def test_recorded_logprobs_come_in_order(sampling_module: Any) -> None:
    import mlx.core as mx

    recorder = sampling_module.LogprobRecorder(2, str)
    recorder(mx.array([0]), mx.log(mx.array([[0.5, 0.25, 0.25]])))
    recorder(mx.array([0]), mx.log(mx.array([[0.1, 0.1, 0.8]])) + 7.0)
    first, second = recorder.take(1), recorder.take(2)
    assert (first.token, [name for name, _ in first.top]) == ("1", ["0", "1"])
    assert first.logprob == pytest.approx(-1.3863, abs=1e-3)
    assert second.logprob == pytest.approx(-0.2231, abs=1e-3)


# ----------------------------------------------------------------- grammar ---


def test_schemas_of_forced_calls() -> None:
    pytest.importorskip("llguidance")
    import json

    from model_servers.engines._mlx import grammar

    inner = '{"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "integer"}}}'
    schema = json.loads(grammar.call_schema([Tool("f", parameters_schema=inner), Tool("g")]))
    assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == ["f", "g"]
    assert schema["$defs"]["tool0"]["properties"]["a"]["$ref"] == "#/$defs/tool0/$defs/x"
    assert schema["$defs"]["tool1"]["additionalProperties"] is False
    for wrong in ("[1]", "{"):
        with pytest.raises(Unsupported, match="'f'"):
            grammar.call_schema([Tool("f", parameters_schema=wrong)])


@pytest.mark.parametrize(
    ("schema", "accepted"),
    [
        ('{"multipleOf": 4999}', True),
        ('{"multipleOf": 5001}', False),
        ('{"multipleOf": 1000000000}', True),
        ('{"multipleOf": 1' + "0" * 400 + "}", False),
        ('{"multipleOf": NaN}', True),
        ('{"properties": {"a": {"multipleOf": 0.001}, "b": {"multipleOf": 7}}}', True),
        ('{"allOf": [{"multipleOf": 71}, {"multipleOf": 73}]}', False),
        ('{"allOf": [{"multipleOf": 1e-300}, {"multipleOf": 1e300}]}', False),
    ],
)
def test_automata_for_multiples_are_bounded(schema: str, accepted: bool) -> None:
    pytest.importorskip("llguidance")
    from model_servers.engines._mlx import grammar

    with nullcontext() if accepted else pytest.raises(Unsupported, match="multipleOf"):
        grammar.check_schema(schema, "f")


# --------------------------------------------------------------- tokenizing ---


class Wrapper:
    def __init__(self, described: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self.backend_tokenizer = Tokenizer.from_str(json.dumps(described))


def described(**changes: Any) -> dict[str, Any]:
    """A tokenizer over bytes with two merges: "ab" and "abab"."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = {letter: n for n, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary = {**alphabet, "ab": 256, "abab": 257}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], ["ab", "ab"]], "byte_fallback": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    base = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    return {**base, "pre_tokenizer": level, "post_processor": None, "decoder": None, "model": model, **changes}


def added(**changes: Any) -> dict[str, Any]:
    token = {"id": 258, "content": "<end>", "single_word": False, "lstrip": False, "rstrip": False}
    return {**token, "normalized": False, "special": True, **changes}


def split(behavior: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": behavior, "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, described()["pre_tokenizer"]]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4),
        ({"added_tokens": [added()]}, 5),
        ({"normalizer": {"type": "NFC"}}, 16),
        ({"pre_tokenizer": split("Isolated")}, 4),
        # These may swallow text without end.
        ({"added_tokens": [added(rstrip=True)]}, None),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, None),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}}, None),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": ""}}, None),
        ({"pre_tokenizer": split("Removed")}, None),
        ({"model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}}, None),
    ],
)
def test_how_much_text_a_token_can_stand_for(changes: dict[str, Any], expected: int | None) -> None:
    pytest.importorskip("tokenizers")
    wrapper = Wrapper(described(**changes))
    assert most_bytes_per_token(wrapper) == expected
    if expected is not None:
        for text in ("abababab" * 20, "e\u0301\u0308 <end> \U0001f600" * 20, "\u1100\u1161\u11a8" * 30):
            assert len(wrapper.backend_tokenizer.encode(text).ids) * expected >= len(text.encode())


def test_texts_are_taken_in_pieces_of_bounded_size() -> None:
    texts = ["a" * 5, "b" * 5, "c" * 30, "", "d", "e" * 10]
    assert [list(piece) for piece in pieces(texts, 10)] == [texts[:2], texts[2:3], texts[3:5], texts[5:]]
    assert list(pieces([], 10)) == []


def test_everything_that_is_read_counts_as_work() -> None:
    message = Message(
        Role.USER, ("12345", Image(b"x" * 100, "image/png"), "6"), tool_calls=(ToolCall("i", "f", "1234"),)
    )
    assert weight(GenerationRequest("m", messages=(message,))) == 10
    assert weight(GenerationRequest("m", prompt="123", json_schema="{}")) == 3 + 8 * 2
    assert weight(GenerationRequest("m", prompt="", tools=(Tool("f", "12", "{}"),))) == 2 + 8 * 2
