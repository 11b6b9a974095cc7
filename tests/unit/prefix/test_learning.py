"""What results teach: how large a cache is, and how far the index is to be trusted."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

import pytest

from control_plane.prefix.blocks import Blocks, own_blocks
from control_plane.prefix.cache import CacheRow, Credit
from control_plane.prefix.index import PrefixIndex
from modelyard.rpc.prompts import BLOCK_ENDS, BLOCK_TOKENS, digests
from tests.unit.prefix.builders import SIZE, TrueCache, indexed, prompt, row

A = row("a")


def conversations(number: int, turns: int, seed: int = 1) -> Iterator[Blocks]:
    """Prompts of conversations that grow by one to four blocks a turn, and now and then begin anew."""
    source = random.Random(seed)
    talks = [[f"talk {talk}"] for talk in range(number)]
    for turn in range(turns):
        talk = source.randrange(number)
        if len(talks[talk]) > 30:
            talks[talk] = [f"talk {talk} from {turn}"]
        talks[talk] += [f"{turn} {step}" for step in range(source.randint(1, 4))]
        yield prompt(talks[talk])


def serve(index: PrefixIndex, cache: TrueCache, prompts: Iterator[Blocks], of: CacheRow = A) -> list[tuple[float, int]]:
    """Send all prompts to one row, four at the same time; returns what was expected and what was found of each."""
    seen = []
    waiting: deque[tuple[Credit, int, int]] = deque()
    for blocks in prompts:
        expected = float(index.match(blocks)[0])
        credit = index.dispatch(of.key, blocks)
        found = cache.serve(blocks)
        assert credit is not None
        waiting.append((credit, found, blocks.tokens))
        if len(waiting) > 3:
            index.finish(*waiting.popleft())
        seen.append((expected, found))
    return seen


@pytest.mark.parametrize(
    ("true", "begins_with"),
    [(3_000, 1_000), (3_000, 300_000), (10_000, 1_000), (10_000, 8_000), (10_000, 30_000), (10_000, 300_000)],
)
def test_capacity_is_found_from_above_and_from_below(true: int, begins_with: int) -> None:
    index = indexed(A, capacity=begins_with, least_capacity=1_000)
    seen = serve(index, TrueCache(true), conversations(20, 2_000))
    assert index.capacity(A.key) == pytest.approx(true, rel=0.15)
    late = seen[1_200:]
    assert sum(expected for expected, _ in late) == pytest.approx(sum(found for _, found in late), rel=0.05)
    assert sum(abs(expected - found) for expected, found in late) < 0.05 * sum(found for _, found in late)


def test_a_capacity_that_is_told_is_taken_and_corrected() -> None:
    told = row("a", capacity=30_000)
    index = indexed(told)
    assert index.capacity(A.key) == 30_000
    index.align([row("a", capacity=40_000)])
    assert index.capacity(A.key) == 40_000
    serve(index, TrueCache(5_000), conversations(20, 1_500))
    learned = index.capacity(A.key)
    assert learned == pytest.approx(5_000, rel=0.15)
    index.align([row("a", capacity=40_000)])  # the same word again is no news
    assert index.capacity(A.key) == learned
    index.align([row("a", capacity=None)])
    assert index.capacity(A.key) == learned


def test_right_predictions_change_nothing() -> None:
    index = indexed(row("a", capacity=4_000))
    seen = serve(index, TrueCache(4_000), conversations(20, 500))
    assert index.capacity(A.key) == 4_000 and index.trust(A.key) == 1
    assert all(expected == found for expected, found in seen)


def test_what_is_never_reported_is_soon_expected_no_more_and_comes_back() -> None:
    index = indexed(A)
    talk = prompt(range(20))

    def send(found: int) -> None:
        credit = index.dispatch(A.key, talk)
        assert credit is not None
        index.finish(credit, found, talk.tokens)

    send(0)
    assert index.match(talk)[0] == talk.tokens
    for _ in range(5):
        send(0)
    assert index.match(talk)[0] < 0.5 * talk.tokens
    for _ in range(50):
        send(0)
    assert index.match(talk)[0] < 0.02 * talk.tokens
    for _ in range(60):
        send(talk.tokens)
    assert index.match(talk)[0] > 0.9 * talk.tokens


def test_expected_is_what_is_found_on_the_average() -> None:
    """A server that has what was predicted only every third time, whatever the reason."""
    index, source = indexed(A, memory=0.98), random.Random(2)
    expected = found = 0.0
    for number in range(600):
        talk = prompt([f"talk {number // 2}", *range(20)])
        length = float(index.match(talk)[0])
        credit = index.dispatch(A.key, talk)
        assert credit is not None
        there = credit.matched if source.random() < 1 / 3 else 0
        index.finish(credit, there, talk.tokens)
        if number > 100:
            expected, found = expected + length, found + there
    assert expected == pytest.approx(found, rel=0.15)


def test_answers_that_are_cached_too_make_more_expected_but_never_more_than_there_is() -> None:
    index = indexed(A)
    for talk in range(30):
        question = index.dispatch(A.key, prompt([talk, *range(3)]))
        assert question is not None
        index.finish(question, 0, 4 * SIZE)
        whole = prompt([talk, *range(9)])
        after_the_answer = index.dispatch(A.key, whole)
        assert after_the_answer is not None
        index.finish(after_the_answer, 6 * SIZE, 10 * SIZE)
    assert index.trust(A.key) == pytest.approx(1.5, abs=0.1)
    assert index.match(whole).tolist() == [whole.tokens]


def test_a_request_that_came_before_the_prompt_was_processed_speaks_against_nothing() -> None:
    index = indexed(A, capacity=10_000)
    first = index.dispatch(A.key, prompt(range(50)))
    second = index.dispatch(A.key, prompt(range(50)))
    assert first is not None and second is not None and second.matched == 50 * SIZE
    index.finish(second, 0, 50 * SIZE)
    assert index.capacity(A.key) == 10_000
    third = index.dispatch(A.key, prompt(range(50)))
    assert third is not None
    index.finish(third, 0, 50 * SIZE)
    assert index.capacity(A.key) < 10_000


def test_a_broken_stream_proves_that_its_prompt_was_processed() -> None:
    index = indexed(A, capacity=10_000)
    first = index.dispatch(A.key, prompt(range(50)))
    assert first is not None
    index.confirm(first)
    second = index.dispatch(A.key, prompt(range(50)))
    assert second is not None
    index.finish(second, 0, 50 * SIZE)
    assert index.capacity(A.key) < 10_000


def test_what_comes_after_a_restart_says_nothing_of_the_cache_before() -> None:
    index = indexed(A)
    credit = index.dispatch(A.key, prompt(range(50)))
    again = index.dispatch(A.key, prompt(range(50)))
    assert credit is not None and again is not None
    index.clear(A.key)
    before = index.capacity(A.key), index.trust(A.key)
    index.finish(again, 0, 50 * SIZE)
    index.abandon(credit)
    assert (index.capacity(A.key), index.trust(A.key)) == before
    assert index.match(prompt(range(50))).tolist() == [0]


def test_a_server_counts_in_tokens_of_its_own() -> None:
    """Estimates that are a third too high, of texts whose parts are not equally dense, are no miss."""
    index = indexed(A, capacity=100_000)
    text = b"word " * 4_000
    for turn in range(10, 40):
        blocks = own_blocks(digests(text[: turn * 500]), BLOCK_TOKENS, BLOCK_ENDS, turn * 125, b"secret", "acme")
        credit = index.dispatch(A.key, blocks)
        assert credit is not None
        own = int(blocks.tokens * 0.75)
        index.finish(credit, int(credit.matched * 0.75 * (1.15 if turn % 2 else 0.85)), own)
    assert index.capacity(A.key) == 100_000
    assert index.trust(A.key) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("cached", "of"), [(0, 0), (500, 100)])
def test_absurd_counts_are_survived(cached: int, of: int) -> None:
    index = indexed(A)
    for _ in range(3):
        credit = index.dispatch(A.key, prompt("chat"))
        assert credit is not None
        index.finish(credit, cached, of)
    assert index.match(prompt("chat")).tolist() == [4 * SIZE]
