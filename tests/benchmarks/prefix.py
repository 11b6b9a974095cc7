"""Prefix locality: times, memory, and how well the index tells what real caches hold.

`python -m tests.benchmarks.prefix [--trace mooncake.jsonl] [--json]`

A trace has a JSON object a line with `input_length` and `hash_ids`, one id for each 512 tokens of the prompt. It is
replayed over servers with least-recently-used caches of 512-token blocks, of sizes that the index is told or not. Each
request goes to the server where the index expects most, or to the next in turn where that is little, is credited at
once, and its result comes when `IN_FLIGHT` more have been sent. Without a trace one is made up: conversations.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, thread_time

import numpy as np

from control_plane.api.prompt_blocks import prompt_blocks
from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.prefix.blocks import Blocks, known_blocks
from control_plane.prefix.cache import CacheRow, Credit, PrefixPolicy
from control_plane.prefix.index import PrefixIndex
from modelyard.v1.generation_pb2 import ROLE_SYSTEM, ROLE_USER, ContentPart, GenerationInput, Message
from tests.unit.prefix.builders import TrueCache

IN_FLIGHT = 8
BLOCK = 512
SERVERS = 4


@dataclass(frozen=True)
class Replay:
    """One trace against caches of one size."""

    capacity: int
    """True, tokens."""
    told: bool
    believed: float
    """Mean over the servers at the end."""
    hit_rate: float
    """True cached tokens of all prompt tokens."""
    best_hit_rate: float
    """The same if the choice knew the true caches."""
    predicted: float
    """Sum of predictions / sum of true cached tokens, over the last three quarters."""
    error: float
    """Mean absolute error of a prediction, as a share of the prompt, same requests."""
    misled: float
    """Share of requests of which more than a tenth of the prompt was predicted in vain."""


def made_up(requests: int = 4000) -> list[Blocks]:
    """Conversations of some turns, each with one of a few beginnings, interleaved at random."""
    source = random.Random(1)
    fresh = iter(range(10**9))
    beginnings = [[next(fresh) for _ in range(source.choice((2, 4, 8, 20)))] for _ in range(6)]
    talks = [list(source.choice(beginnings)) for _ in range(60)]
    prompts = []
    for _ in range(requests):
        number = source.randrange(len(talks))
        talks[number] += [next(fresh) for _ in range(source.randint(1, 6))]
        # The last block is not full, so it is no block of a longer prompt.
        prompts.append(
            known_blocks([*talks[number], next(fresh)], len(talks[number]) * BLOCK + source.randrange(1, BLOCK))
        )
        if len(talks[number]) > 60 or source.random() < 0.05:
            talks[number] = list(source.choice(beginnings))
    return prompts


def read(path: Path) -> list[Blocks]:
    """The prompts of a trace."""
    prompts = []
    with path.open() as lines:
        for line in lines:
            request = json.loads(line)
            prompts.append(known_blocks(request["hash_ids"], max(request["input_length"], 1), BLOCK))
    return prompts


def replay(prompts: Sequence[Blocks], capacity: int, told: bool) -> Replay:
    rows = [
        CacheRow(ServerId(f"s{number}"), ModelName("m"), Provider("p"), capacity=capacity if told else None)
        for number in range(SERVERS)
    ]
    index = PrefixIndex()
    index.align(rows)
    caches = [TrueCache(capacity) for _ in rows]
    flights: deque[tuple[Credit, int, int]] = deque()
    found_all = prompt_all = 0
    told_all: list[tuple[float, float, int]] = []
    for turn, blocks in enumerate(prompts):
        expected = index.match(blocks)
        best = int(np.argmax(expected))
        chosen = best if expected[best] > 0.1 * blocks.tokens else turn % SERVERS
        credit = index.dispatch(rows[chosen].key, blocks)
        found = caches[chosen].serve(blocks)
        if credit is not None:
            flights.append((credit, found, blocks.tokens))
        if len(flights) > IN_FLIGHT:
            index.finish(*flights.popleft())
        found_all += found
        prompt_all += blocks.tokens
        told_all.append((float(expected[chosen]), found, blocks.tokens))
    late = np.array(told_all[len(told_all) // 4 :])
    off = late[:, 0] - late[:, 1]
    return Replay(
        capacity=capacity,
        told=told,
        believed=float(np.mean([index.capacity(row.key) for row in rows])),
        hit_rate=found_all / prompt_all,
        best_hit_rate=_knowing(prompts, capacity),
        predicted=float(late[:, 0].sum() / max(late[:, 1].sum(), 1)),
        error=float(np.mean(np.abs(off) / late[:, 2])),
        misled=float(np.mean(off > 0.1 * late[:, 2])),
    )


def _knowing(prompts: Sequence[Blocks], capacity: int) -> float:
    caches = [TrueCache(capacity) for _ in range(SERVERS)]
    found_all = prompt_all = 0
    for turn, blocks in enumerate(prompts):
        matches = [cache.look_up(blocks) for cache in caches]
        best = int(np.argmax(matches))
        chosen = best if matches[best] > 0.1 * blocks.tokens else turn % SERVERS
        found_all += caches[chosen].serve(blocks)
        prompt_all += blocks.tokens
    return found_all / prompt_all


# ------------------------------------------------------------------- times ---


def microseconds(call: Callable[[], object], times: int) -> float:
    """Median CPU time of a call: other programs on the machine do not count."""
    call()
    taken = []
    for _ in range(times):
        begun = thread_time()
        call()
        taken.append(thread_time() - begun)
    return float(np.median(taken)) * 1e6


def chat(messages: int, size: int) -> GenerationInput:
    return GenerationInput(
        messages=[
            Message(role=ROLE_USER if number else ROLE_SYSTEM, content=[ContentPart(text="word " * (size // 5))])
            for number in range(messages)
        ]
    )


def full_index(rows: int, blocks_each: int, shared: int) -> tuple[PrefixIndex, list[CacheRow], Blocks]:
    """An index whose rows each hold a conversation of their own after `shared` blocks that all hold; and the
    conversation of the first row."""
    index = PrefixIndex(PrefixPolicy(max_entries=10**7, capacity=10**6))
    table = [CacheRow(ServerId(f"s{number:05}"), ModelName("m"), Provider("p")) for number in range(rows)]
    index.align(table)
    start = tuple((number << 40) + 1 for number in range(shared))
    talks = []
    for number, row in enumerate(table):
        # Rows leave what they share at different depths, as conversations over several system prompts do.
        own = shared - number % 10
        ids = start[:own] + tuple((number << 20) + (1 << 62) + place for place in range(blocks_each - own))
        talks.append(known_blocks(ids, len(ids) * 64, 64))
        index.dispatch(row.key, talks[-1])
    return index, table, talks[0]


def times() -> dict[str, float]:
    """Microseconds by name of the measurement."""
    results = {}
    secret = b"s" * 32
    for name, source in (
        ("4 messages, 1.6 KB", chat(4, 400)),
        ("10 messages, 10 KB", chat(10, 1000)),
        ("1 message, 1 MB", chat(1, 1 << 20)),
    ):
        read = GenerationInput.FromString(source.SerializeToString())
        results[f"prompt_blocks, {name}"] = microseconds(lambda r=read: prompt_blocks(r, secret, "acme"), 200)
    for rows in (1, 100, 1000, 10_000):
        index, table, blocks = full_index(rows, 40, 20)
        results[f"match, {rows} rows, 40 blocks"] = microseconds(lambda i=index, b=blocks: i.match(b), 500)
    index, table, blocks = full_index(100, 40, 20)

    def whole(fresh: Iterable[Blocks] = iter([])) -> None:
        talk = next(fresh, blocks)
        credit = index.dispatch(table[0].key, talk)
        assert credit is not None
        index.finish(credit, talk.tokens // 2, talk.tokens)

    results["dispatch and finish, 40 known blocks"] = microseconds(whole, 500)
    fresh = iter([known_blocks([(1 << 61) + (n << 10) + i for i in range(40)], 2560, 64) for n in range(600)])
    results["dispatch and finish, 40 new blocks"] = microseconds(lambda: whole(fresh), 500)
    index, table, _ = full_index(10_000, 2, 2)
    results["align, 10000 rows, nothing new"] = microseconds(lambda: index.align(table), 20)
    return results


def bytes_per_entry(rows: int, blocks_each: int, shared: int) -> float:
    """Memory for each block of each row, with all that belongs to it."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index, _, _ = full_index(rows, 1, 1)
    empty = tracemalloc.get_traced_memory()[0] - before
    del index
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    index, _, _ = full_index(rows, blocks_each, shared)
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return (taken - empty) / index.entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="JSON lines with input_length and hash_ids; default: made up")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    arguments = parser.parse_args()
    prompts = read(arguments.trace) if arguments.trace else made_up()
    begun = perf_counter()
    replays = [
        replay(prompts, capacity, told)
        for capacity in (5_000, 20_000, 100_000, 500_000, 3_000_000)
        for told in (False, True)
    ]
    taken = perf_counter() - begun
    measured = times()
    memory = {
        "bytes an entry, 100 rows, blocks of one row": bytes_per_entry(100, 1000, 10),
        "bytes an entry, 100 rows, shared by all": bytes_per_entry(100, 1000, 1000),
        "bytes an entry, 10000 rows, blocks of one row": bytes_per_entry(10_000, 20, 10),
    }
    if arguments.json:
        print(json.dumps({"replay": [asdict(row) for row in replays], "times": measured, "memory": memory}))
        return
    print(f"{len(prompts)} prompts over {SERVERS} servers, {taken:.1f} s in all")
    print("    capacity  told   believed  hit rate  (knowing)  predicted/true  error  misled")
    for row in replays:
        print(
            f"{row.capacity:12,}  {'yes' if row.told else 'no':4}{row.believed:11,.0f}  {row.hit_rate:8.3f}  "
            f"{row.best_hit_rate:9.3f}  {row.predicted:14.3f}  {row.error:5.3f}  {row.misled:6.3f}"
        )
    for name, value in measured.items():
        print(f"{name:50} {value:9.1f} µs")
    for name, value in memory.items():
        print(f"{name:50} {value:9.0f}")


if __name__ == "__main__":
    main()
