"""Every pair of server and model as columns, so that filters and scorers run over all of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from control_plane.domain.model import ModelCard, ModelName, ModelState, Price, Provider, ServerId
from control_plane.domain.task import TaskType
from control_plane.prediction.features import Coefficients

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
Column = TypeVar("Column", Floats, Mask)

UNKNOWN_SIGMA = 0.5
"""Standard deviation of ln(measured / predicted) where nothing was learned: 95% are within a factor of 2.7."""
_LEAST_SIGMA = 0.05
_OF_ROWS = ("breaker_open", "success", "ttft", "per_prompt_token", "tpot", "tpot_per_stream", "service")
_KEPT = 256
"""Columns kept by `once`."""
_NINE_OF_TEN = NormalDist().inv_cdf(0.9)

_TO_BE_LOADED = frozenset({ModelState.COLD, ModelState.LOADING})
_GONE = frozenset({ModelState.ABSENT, ModelState.FAILED})


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """One model on one server."""

    server_id: ServerId
    card: ModelCard
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the server."""


class CandidateTable:
    """Rows sorted by (server, model, provider), so that the first of equals has the least id.

    Every column has shape (rows,). Static columns hold for the life of the table: the owner builds a new one when
    a server or a model comes, goes or changes. Dynamic columns are changed in place through the methods, by the owner
    only and never while `select` runs (nothing awaits in between). A new table starts with no server ready.

    Raises:
        ValueError: two rows have the same server, model and provider.
    """

    __slots__ = (
        "_index",
        "_kept",
        "_least_success",
        "_names",
        "_qualified",
        "_said",
        "_span_of_row",
        "_unmeasured",
        "_unpredicted",
        "able",
        "breaker_open",
        "capability",
        "cold",
        "completion_price",
        "context_length",
        "dearest",
        "draining",
        "emptiness",
        "features",
        "free",
        "good",
        "here",
        "lane_until",
        "load_time",
        "load_times_known",
        "longest",
        "model_code",
        "model_codes",
        "obtainable",
        "offers",
        "paid",
        "per_prompt_token",
        "per_slot",
        "prompt_price",
        "provider_code",
        "provider_codes",
        "quality",
        "ready",
        "rows",
        "service",
        "shortest",
        "sigmas",
        "slot_at",
        "slots",
        "spans",
        "streams",
        "success",
        "tpot",
        "tpot_per_stream",
        "ttft",
        "waiting",
        "warm",
    )

    def __init__(self, rows: Iterable[CandidateRow] = ()) -> None:
        self.rows: tuple[CandidateRow, ...] = tuple(
            sorted(rows, key=lambda row: (row.server_id, row.card.name, row.card.provider))
        )
        cards = [row.card for row in self.rows]
        size = len(cards)
        self._index = {
            (row.server_id, row.card.name, row.card.provider): number for number, row in enumerate(self.rows)
        }
        if len(self._index) != size:
            raise ValueError("two rows have the same server, model and provider")
        self.spans: dict[ServerId, slice] = _spans(self.rows)
        """The rows of each server; adjacent, as rows are sorted."""
        self._span_of_row = [self.spans[row.server_id] for row in self.rows]
        self._names = frozenset(card.name for card in cards)
        self._kept: dict[Hashable, Any] = {}
        self._said: dict[ServerId, tuple[bool, bool, int, int]] = {}
        """What `set_server` was told last."""
        self._qualified = {card.id: (card.name, card.provider) for card in cards}

        # Static columns.
        self.model_codes: dict[ModelName, int] = {name: code for code, name in enumerate(sorted(self._names))}
        self.provider_codes: dict[Provider, int] = {
            provider: code for code, provider in enumerate(sorted({card.provider for card in cards}))
        }
        self.model_code: Ints = np.array([self.model_codes[card.name] for card in cards], dtype=np.int64)
        self.provider_code: Ints = np.array([self.provider_codes[card.provider] for card in cards], dtype=np.int64)
        self.context_length: Ints = np.array([card.context_length for card in cards], dtype=np.int64)
        self.features: Ints = np.array([int(card.features) for card in cards], dtype=np.int64)
        self.prompt_price: Floats = np.array([card.price.prompt for card in cards], dtype=np.float64)
        """US dollars per million tokens."""
        self.completion_price: Floats = np.array([card.price.completion for card in cards], dtype=np.float64)
        """US dollars per million tokens."""
        self.dearest = Price(
            max((card.price.prompt for card in cards), default=0.0),
            completion=max((card.price.completion for card in cards), default=0.0),
        )
        """No row costs more."""
        self.paid: Mask | None = None
        """Costs money. None: nothing does."""
        if self.dearest.prompt or self.dearest.completion:
            self.paid = np.asarray((self.prompt_price > 0) | (self.completion_price > 0), dtype=np.bool_)
        self.longest = max((card.context_length for card in cards), default=0)
        """No row has a longer context."""
        self.shortest = min((card.context_length for card in cards), default=0)
        """No row has a shorter one."""
        scores = _capabilities(cards)
        self.offers: dict[TaskType, Mask] = {task: column > -math.inf for task, column in scores.items()}
        self.capability: dict[TaskType, Floats] = {
            task: np.clip(np.nan_to_num(column, nan=0.0), 0.0, 1.0) for task, column in scores.items()
        }
        """[0, 1]; 0 where the kind of work is not offered."""
        # None where all rows are the same: most fleets are warm at most times, and that should cost nothing.
        self.here: Mask | None = _unless_all(card.state.serves for card in cards)
        """Requests can be sent: the model is not absent, on its way or failed. None: all are here."""
        self.obtainable: Mask | None = _unless_all(card.state not in _GONE for card in cards)
        """The model is here, or on its way so that waiting helps. None: all are."""
        to_be_loaded = [card.state in _TO_BE_LOADED for card in cards]
        self.cold: Mask | None = np.array(to_be_loaded, dtype=np.bool_) if any(to_be_loaded) else None
        """A request has to wait until the model is loaded. None: no model is cold."""
        self.warm: Mask | None = None if self.cold is None else ~self.cold
        """The others. None: all are."""
        self.load_time: Floats = np.array(
            [_seconds(card.load_time) if card.state in _TO_BE_LOADED else 0.0 for card in cards], dtype=np.float64
        )
        """Seconds until a cold model is loaded, NaN: not known; 0 for others."""
        self.load_times_known = not np.isnan(self.load_time).any()

        # Dynamic columns.
        self.ready: Mask = np.zeros(size, dtype=np.bool_)
        """The server is LIVE and its engine is ready."""
        self.draining: Mask = np.zeros(size, dtype=np.bool_)
        self.breaker_open: Mask = np.zeros(size, dtype=np.bool_)
        self.able: Mask = np.zeros(size, dtype=np.bool_)
        """Ready, not draining, the model is here, and no breaker holds it back."""
        self.success: Floats = np.ones(size, dtype=np.float64)
        """[0, 1]."""
        self._least_success = 1.0
        """No row has less."""
        self.good: dict[TaskType, Floats] = {}
        """Expected share of good answers among those to a kind of work, [0, 1]; missing: nobody has complained."""
        self.quality: dict[TaskType, Floats] = dict(self.capability)
        """`capability` times `good`."""
        self.ttft: Floats = np.array([_seconds(card.ttft) for card in cards], dtype=np.float64)
        """Seconds to the first token of an idle server, without those of `per_prompt_token`; NaN: not known."""
        self.per_prompt_token: Floats = np.zeros(size, dtype=np.float64)
        """Seconds per token of the prompt that is not in the server's prefix cache."""
        self.tpot: Floats = np.array([_seconds(card.tpot) for card in cards], dtype=np.float64)
        """Seconds per token of a single stream; NaN: not known."""
        self.tpot_per_stream: Floats = np.zeros(size, dtype=np.float64)
        """Seconds per token more for each other stream."""
        self.sigmas: Floats = np.full((2, size), UNKNOWN_SIGMA, dtype=np.float64)
        """Standard deviation of ln(ttft / predicted) and ln(tpot / predicted), shape (2, rows)."""
        self._unpredicted = set(range(size))
        self.service: Floats = np.full(size, math.nan, dtype=np.float64)
        """Seconds that a request holds its slot; NaN: never measured."""
        self._unmeasured = set(range(size))
        self.slots: Ints = np.zeros(size, dtype=np.int64)
        self.per_slot: Floats = np.ones(size, dtype=np.float64)
        """1 / slots; 1 where there are none."""
        self.free: Ints = np.zeros(size, dtype=np.int64)
        """Free slots of the row's server. Below 0 while more is running than there are slots."""
        self.waiting: Ints = np.zeros(size, dtype=np.int64)
        """Requests that the server has accepted and not started."""
        self.emptiness: Floats = np.zeros(size, dtype=np.float64)
        """(free - waiting) / slots, clamped to [0, 1]."""
        self.streams: Floats = np.zeros(size, dtype=np.float64)
        """Requests of the row's server that are decoding."""
        self.lane_until: Floats = np.zeros(size, dtype=np.float64)
        """Monotonic seconds when the server is expected to be through with the prompts of those before."""
        self.slot_at: Floats = np.full(size, math.nan, dtype=np.float64)
        """Monotonic seconds when the next slot is expected to be free, where none is; NaN: not known."""

    def __len__(self) -> int:
        return len(self.rows)

    # ------------------------------------------------------------- look-up ---

    def index(self, server_id: ServerId, model: ModelName, provider: Provider) -> int:
        """The row of a pair. Raises KeyError if the table has none."""
        return self._index[server_id, model, provider]

    def find(self, server_id: ServerId, model: ModelName, provider: Provider) -> int | None:
        """The row of a pair; None if the table has none."""
        return self._index.get((server_id, model, provider))

    def knows_model(self, name: str) -> bool:
        """Whether any server has a model of this name."""
        return name in self._names

    def resolve(self, model: str) -> tuple[ModelName, Provider | None] | None:
        """What a client means by "name" or "provider/name"; None if no server has it.

        A name may contain "/" itself, so an exact name goes first.
        """
        if model in self._names:
            return ModelName(model), None
        return self._qualified.get(model)

    def once(self, key: Hashable, column: Callable[[], Column]) -> Column:
        """A column made of static ones, and of `quality`, kept under a key that says of what else. Not to be written
        to."""
        kept: Column | None = self._kept.get(key)
        if kept is None:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            kept = self._kept[key] = column()
        return kept

    # ------------------------------------------------------------- changes ---

    def carry(self, before: CandidateTable) -> list[int]:
        """Take over what another table was told of the rows with the very same card, but for what belongs to servers.
        Returns the numbers of the others."""
        kept: list[int] = []
        known: list[int] = []
        fresh: list[int] = []
        for (key, number), row in zip(self._index.items(), self.rows, strict=True):
            old = before._index.get(key)
            if old is not None and before.rows[old].card is row.card:
                kept.append(number)
                known.append(old)
            else:
                fresh.append(number)
        for name in _OF_ROWS:
            getattr(self, name)[kept] = getattr(before, name)[known]
        self._least_success = before._least_success
        self.sigmas[:, kept] = before.sigmas[:, known]
        self._unpredicted = {*fresh, *(new for new, old in zip(kept, known, strict=True) if old in before._unpredicted)}
        self._unmeasured = {*fresh, *(new for new, old in zip(kept, known, strict=True) if old in before._unmeasured)}
        return fresh

    def set_server(
        self, server_id: ServerId, *, ready: bool, draining: bool, slots: int, used: int, waiting: int
    ) -> None:
        """State and load of a server, onto all its rows. A server without rows (no models yet) is ignored."""
        span = self.spans.get(server_id)
        if span is None:
            return
        said = ready, draining, slots, waiting
        if self._said.get(server_id) != said:  # most of the time only what is used has changed
            self._said[server_id] = said
            self.ready[span] = ready
            self.draining[span] = draining
            self.slots[span] = slots
            self.per_slot[span] = 1.0 / max(slots, 1)
            self.waiting[span] = waiting
            self._set_able(span)
        self._set_free(span, slots - used)

    def set_stats(
        self,
        server_id: ServerId,
        model: ModelName,
        provider: Provider,
        *,
        success: float,
        ttft: float | None,
        tpot: float | None,
        service: float | None = None,
    ) -> None:
        """What the control plane measured of a pair: success rate, seconds to first token, seconds per token, seconds
        per request.

        None, NaN: not measured here, so that the server's own measurement holds. Raises KeyError: no such row.
        """
        row = self._index[server_id, model, provider]
        card = self.rows[row].card
        self._unpredicted.add(row)
        self._set_success(row, success)
        self.ttft[row] = _seconds(ttft, card.ttft)
        self.tpot[row] = _seconds(tpot, card.tpot)
        self.service[row] = seconds = _seconds(service)
        if seconds == seconds:
            self._unmeasured.discard(row)
        else:
            self._unmeasured.add(row)

    def set_success(self, server_id: ServerId, model: ModelName, provider: Provider, success: float) -> None:
        """The success rate of a pair alone. Raises KeyError: no such row."""
        self._set_success(self._index[server_id, model, provider], success)

    def _set_success(self, row: int, success: float) -> None:
        self.success[row] = value = _unit(success)
        self._least_success = min(self._least_success, value)

    def all_succeed(self, share: float) -> bool:
        """Whether no row has a success rate below that."""
        if self._least_success < share:
            self._least_success = float(self.success.min(initial=1.0))
        return self._least_success >= share

    def set_prediction(self, row: int, coefficients: Coefficients[float]) -> None:
        """What is expected of a row, in place of what was measured."""
        self.ttft[row] = coefficients.base
        self.per_prompt_token[row] = coefficients.per_prompt_token
        self.tpot[row] = coefficients.tpot_base
        self.tpot_per_stream[row] = coefficients.tpot_per_stream
        self.sigmas[0, row] = sigma(coefficients.ttft_spread)
        self.sigmas[1, row] = sigma(coefficients.tpot_spread)
        self._unpredicted.discard(row)

    def set_good(self, model: ModelName, task: TaskType, share: float) -> None:
        """The expected share of good answers of a model to a kind of work."""
        good = self.good.get(task)
        if good is None:
            good = self.good[task] = np.ones(len(self), dtype=np.float64)
        good[self.model_code == self.model_codes[model]] = _unit(share)
        self.quality[task] = self.capability[task] * good
        self._kept.clear()

    @property
    def measured(self) -> bool:
        """Whether every row has a service time: `service` has no NaN."""
        return not self._unmeasured

    @property
    def predicted(self) -> bool:
        """Whether every row has a prediction: no column of `ttft` and `tpot` is NaN."""
        return not self._unpredicted

    def set_work(self, server_id: ServerId, *, streams: float, lane_until: float, slot_at: float) -> None:
        """What a server is at, onto all its rows: see the columns."""
        span = self.spans.get(server_id)
        if span is not None:
            self.streams[span] = streams
            self.lane_until[span] = lane_until
            self.slot_at[span] = slot_at

    def span(self, row: int) -> slice:
        """The rows of the row's server."""
        return self._span_of_row[row]

    def set_breaker(self, server_id: ServerId, model: ModelName, provider: Provider, *, open: bool) -> None:
        """Whether the breaker of a pair holds requests back now. Raises KeyError: no such row."""
        row = self._index[server_id, model, provider]
        if self.breaker_open[row] != open:
            self.breaker_open[row] = open
            self._set_able(slice(row, row + 1))

    def take(self, row: int) -> None:
        """One slot less on the server of this row."""
        self._set_free(self._span_of_row[row], int(self.free[row]) - 1)

    def give(self, row: int) -> None:
        """One slot more on the server of this row."""
        self._set_free(self._span_of_row[row], int(self.free[row]) + 1)

    def _set_free(self, span: slice, free: int) -> None:
        self.free[span] = free
        first = span.start
        share = (free - int(self.waiting[first])) / max(int(self.slots[first]), 1)
        self.emptiness[span] = min(1.0, max(0.0, share))

    def _set_able(self, span: slice) -> None:
        able = self.ready[span] & ~self.draining[span]
        able &= ~self.breaker_open[span]
        self.able[span] = able if self.here is None else able & self.here[span]


def sigma(spread: tuple[float, ...]) -> float:
    """Standard deviation of ln(measured / predicted) from quantile / median at the levels 0.5 and 0.9."""
    return max(_LEAST_SIGMA, math.log(max(1.0, spread[-1] / spread[0])) / _NINE_OF_TEN)


def _spans(rows: tuple[CandidateRow, ...]) -> dict[ServerId, slice]:
    spans: dict[ServerId, slice] = {}
    for number, row in enumerate(rows):
        begun = spans.get(row.server_id)
        spans[row.server_id] = slice(begun.start if begun else number, number + 1)
    return spans


def _unless_all(values: Iterable[bool]) -> Mask | None:
    """The column; None if every value is True."""
    column = np.fromiter(values, dtype=np.bool_)
    return None if column.all() else column


def _capabilities(cards: Sequence[ModelCard]) -> dict[TaskType, Floats]:
    """What the cards say of each kind of work, each of shape (rows,); -inf: nothing."""
    tasks = tuple(TaskType)
    said = [[card.capabilities.get(task, -math.inf) for task in tasks] for card in cards]
    columns = np.array(said, dtype=np.float64).reshape(len(cards), len(tasks)).T
    return {task: np.ascontiguousarray(column) for task, column in zip(tasks, columns, strict=True)}


def _unit(value: float) -> float:
    """Clamped to [0, 1]; NaN counts as 0, for what is not known must not be chosen for it."""
    return min(1.0, max(0.0, value)) if value == value else 0.0


def _seconds(*measured: float | None) -> float:
    """The first that is a duration, else NaN."""
    for value in measured:
        if value is not None and 0 <= value < math.inf:
            return value
    return math.nan
