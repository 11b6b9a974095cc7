"""PrefixIndex against a plain model of the same, and what bounds it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.prefix.blocks import Blocks, known_blocks
from control_plane.prefix.cache import Credit, PrefixPolicy
from control_plane.prefix.index import PrefixIndex
from tests.unit.prefix.builders import SIZE, TrueCache, indexed, prompt, row

SERVERS = tuple(f"s{number}" for number in range(12))
CAPACITY = 6 * SIZE
ENDS = ("finish", "abandon", "confirm")

paths = st.lists(st.integers(0, 2), max_size=9).map(tuple)
dispatches = st.tuples(st.just("dispatch"), st.sampled_from(SERVERS), paths)
steps = st.one_of(
    *[dispatches] * 5,
    st.tuples(st.just("clear"), st.sampled_from(SERVERS), st.none()),
    st.tuples(st.just("restart"), st.sampled_from(SERVERS), st.none()),
    st.tuples(st.just("align"), st.none(), st.permutations(SERVERS).flatmap(lambda p: st.sampled_from([p, p[:4]]))),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(steps, max_size=40), st.lists(paths, min_size=1, max_size=5))
def test_it_says_what_a_plain_model_says(happened: list[tuple[str, str, object]], asked: list[tuple[int, ...]]) -> None:
    table = {server: row(server, capacity=CAPACITY, instance="0") for server in SERVERS}
    index = indexed(*table.values())
    plain = {server: TrueCache(CAPACITY) for server in SERVERS}
    order = list(SERVERS)
    for turn, (what, server, of) in enumerate(happened):
        if what != "align" and server not in order:
            continue
        if what == "dispatch":
            blocks = prompt(of)  # type: ignore[arg-type]
            credit = index.dispatch(table[server].key, blocks)
            found = plain[server].serve(blocks)
            if credit is not None:
                assert credit.matched == found
                index.finish(credit, found, blocks.tokens)
        elif what == "clear":
            index.clear(table[server].key)
            plain[server].clear()
        elif what == "restart":
            table[server] = row(server, capacity=CAPACITY, instance=str(turn + 1))
            index.align([table[name] for name in order])
            plain[server].clear()
        else:
            order = list(of)  # type: ignore[call-overload]
            index.align([table[name] for name in order])
    for path in asked:
        blocks = prompt(path)
        assert index.match(blocks).tolist() == [plain[server].look_up(blocks) for server in order]
        for server in order:
            assert index.matched(table[server].key, blocks) == plain[server].look_up(blocks)
    assert index.entries >= sum(len(cache.blocks) for server, cache in plain.items() if server in order)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SERVERS), paths), max_size=30), paths)
def test_a_longer_prompt_never_matches_less(sent: list[tuple[str, tuple[int, ...]]], path: tuple[int, ...]) -> None:
    table = {server: row(server, capacity=CAPACITY) for server in SERVERS}
    index = indexed(*table.values())
    for server, of in sent:
        index.dispatch(table[server].key, prompt(of))
    before = np.zeros(len(SERVERS))
    for depth in range(len(path) + 1):
        lengths = index.match(prompt(path[:depth]))
        assert (lengths >= before).all() and (lengths <= depth * SIZE).all()
        before = lengths


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(SERVERS), paths, st.sampled_from(["finish", "abandon", "confirm"])), max_size=40
    ),
    st.integers(1, 30),
)
def test_all_rows_together_remember_no_more_than_they_may(
    sent: list[tuple[str, tuple[int, ...], str]], most: int
) -> None:
    table = {server: row(server) for server in SERVERS}
    index = indexed(*table.values(), max_entries=most)
    waiting: list[Credit] = []
    for server, path, end in sent:
        credit = index.dispatch(table[server].key, prompt(path))
        assert index.entries <= most
        if credit is not None:
            waiting.append(credit)
        if len(waiting) > 3:
            credit = waiting.pop(0)
            if end == "finish":
                index.finish(credit, credit.matched // 2, credit.blocks.tokens)
            elif end == "confirm":
                index.confirm(credit)
            else:
                index.abandon(credit)
        for name in SERVERS:  # both ways to ask agree
            expected = index.matched(table[name].key, prompt(path)) * index.trust(table[name].key)
            assert index.match(prompt(path))[SERVERS.index(name)] == pytest.approx(expected)
    for name in SERVERS:
        index.clear(table[name].key)
    assert index.entries == index.blocks == 0


def test_what_was_used_longest_ago_on_any_row_is_forgotten_first() -> None:
    a, b = row("a"), row("b")
    index = indexed(a, b, max_entries=6)
    index.dispatch(a.key, prompt("old"))
    index.dispatch(b.key, prompt("new"))
    index.dispatch(b.key, prompt("two"))
    assert index.match(prompt("old")).tolist() == [0, 0]
    assert index.match(prompt("new")).tolist() == [0, 3 * SIZE]
    assert index.match(prompt("two")).tolist() == [0, 3 * SIZE]


def test_a_dispatch_counts_at_once_and_only_where_it_went() -> None:
    a, b = row("a"), row("b")
    index = indexed(a, b)
    assert index.match(prompt("chat")).tolist() == [0, 0]
    index.dispatch(b.key, prompt("chat"))
    assert index.match(prompt("chat")).tolist() == [0, 4 * SIZE]
    assert index.match(prompt("chart")).tolist() == [0, 3 * SIZE]
    assert index.match(prompt("hat")).tolist() == [0, 0]


def test_rows_keep_what_is_theirs_wherever_they_are_in_the_table() -> None:
    a, b, c = row("a"), row("b"), row("c")
    index = indexed(b)
    index.dispatch(b.key, prompt("chat"))
    index.align([a, b, c])
    assert index.match(prompt("chat")).tolist() == [0, 4 * SIZE, 0]
    index.align([a])
    assert index.match(prompt("chat")).tolist() == [0]
    index.align([b, a])
    assert index.match(prompt("chat")).tolist() == [4 * SIZE, 0]


def test_of_rows_that_are_gone_some_are_remembered() -> None:
    index = PrefixIndex()
    for number in range(500):
        gone = row(f"s{number}")
        index.align([gone])
        index.dispatch(gone.key, prompt("chat"))
    assert index.entries == 65 * 4
    index.align([row("s499"), row("s450"), row("s3")])
    assert index.match(prompt("chat")).tolist() == [4 * SIZE, 4 * SIZE, 0]


def test_a_row_without_prefix_cache_is_worth_nothing() -> None:
    plain, caching = row("a", caches=False), row("b")
    index = indexed(plain, caching)
    assert index.dispatch(plain.key, prompt("chat")) is None
    assert index.match(prompt("chat")).tolist() == [0, 0] and index.entries == 0
    index.dispatch(caching.key, prompt("chat"))
    index.align([plain, row("b", caches=False)])
    assert index.match(prompt("chat")).tolist() == [0, 0] and index.entries == 0


def test_an_unknown_row_and_a_prompt_without_blocks_leave_nothing() -> None:
    index = indexed(row("a"))
    assert index.dispatch(row("b").key, prompt("chat")) is None
    assert index.dispatch(row("a").key, Blocks((), (), (), 5)) is None
    assert index.match(Blocks((), (), (), 5)).tolist() == [0]
    assert index.matched(row("b").key, prompt("chat")) == 0 and index.capacity(row("b").key) == 0


def test_unloading_empties_the_cache_and_loading_does_not() -> None:
    index = indexed(row("a", resident=False))
    index.dispatch(row("a").key, prompt("chat"))  # makes it load
    index.align([row("a", resident=False)])
    index.align([row("a", resident=True)])
    assert index.match(prompt("chat")).tolist() == [4 * SIZE]
    index.align([row("a", resident=False)])
    assert index.match(prompt("chat")).tolist() == [0]


def test_a_server_that_is_started_anew_has_an_empty_cache() -> None:
    index = indexed(row("a", instance="1"), row("b", instance="1"))
    for server in ("a", "b"):
        index.dispatch(row(server).key, prompt("chat"))
    index.align([row("a", instance="2"), row("b", instance="1")])
    assert index.match(prompt("chat")).tolist() == [0, 4 * SIZE] and index.blocks == 4


def test_another_fingerprint_is_another_model() -> None:
    index = indexed(row("a", fingerprint="q4"))
    credit = index.dispatch(row("a").key, prompt("chat"))
    again = index.dispatch(row("a").key, prompt("chat"))
    assert credit is not None and again is not None
    index.finish(again, 0, 256)
    assert index.trust(row("a").key) < 1
    index.align([row("a", fingerprint="q8")])
    assert index.match(prompt("chat")).tolist() == [0] and index.trust(row("a").key) == 1
    index.finish(credit, 0, 256)  # of the one before: says nothing of this one
    index.abandon(again)
    assert index.trust(row("a").key) == 1 and index.entries == 0


def test_an_abandoned_request_left_nothing() -> None:
    a = row("a")
    index = indexed(a)
    first = index.dispatch(a.key, prompt("chat"))
    assert first is not None
    index.finish(first, 0, 256)
    longer = index.dispatch(a.key, prompt("chat and more"))
    assert longer is not None
    index.abandon(longer)
    assert index.match(prompt("chat and more")).tolist() == [4 * SIZE] and index.entries == 4


def test_what_a_later_request_brings_stays_when_the_first_is_abandoned() -> None:
    a = row("a")
    index = indexed(a)
    first = index.dispatch(a.key, prompt("chat one"))
    index.dispatch(a.key, prompt("chat two"))
    assert first is not None
    index.abandon(first)
    assert index.match(prompt("chat one")).tolist() == [5 * SIZE]
    assert index.match(prompt("chat two")).tolist() == [8 * SIZE]


def test_the_tail_of_a_prompt_goes_before_its_head() -> None:
    a = row("a", capacity=10 * SIZE)
    index = indexed(a)
    index.dispatch(a.key, prompt("abcdefgh"))
    index.dispatch(a.key, prompt("12345"))
    assert index.match(prompt("abcdefgh")).tolist() == [5 * SIZE]
    assert index.match(prompt("12345")).tolist() == [5 * SIZE]
    index.dispatch(a.key, prompt(range(100)))
    assert index.match(prompt(range(100))).tolist() == [10 * SIZE]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.data())
def test_many_rows_are_asked_at_once(rows: int, data: st.DataObject) -> None:
    table = [row(f"s{number:03}") for number in range(rows)]
    index = indexed(*table)
    depths = data.draw(st.lists(st.integers(0, 12), min_size=rows, max_size=rows))
    for of, depth in zip(table, depths, strict=True):
        index.dispatch(of.key, prompt(("shared",) * depth))
    assert index.match(prompt(("shared",) * 12)).tolist() == [depth * SIZE for depth in depths]


def test_a_block_takes_about_as_much_memory_as_is_documented() -> None:
    most, table = 5_000, [row(f"s{number}") for number in range(10)]
    tracemalloc.start()
    try:
        index = indexed(*table, max_entries=most)

        def fill(round_: int) -> int:
            for number in range(800):
                ids = [(1 << 62) + (round_ << 40) + (number << 8) + place for place in range(30)]
                index.dispatch(table[number % 10].key, known_blocks(ids, 30 * SIZE, SIZE))
            assert index.entries == most
            return tracemalloc.get_traced_memory()[0]

        first = fill(0)
        later = fill(1)
    finally:
        tracemalloc.stop()
    assert first < 300 * most and later < 1.1 * first


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("max_entries", 0),
        ("capacity", 0),
        ("least_capacity", 0),
        ("ghosts", -0.1),
        ("ghosts", float("inf")),
        ("memory", 1.0),
    ],
)
def test_a_bad_value_is_named(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=name):
        PrefixPolicy(**{name: bad})  # type: ignore[arg-type]
