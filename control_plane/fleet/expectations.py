"""What is expected of every server and of every request on one: how soon, how fast, how long, and what caches hold.

Keeps the columns of the candidate table that foretell, learns from what becomes of the requests. Belongs to the fleet:
every method is a single step of its event loop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import msgspec

from control_plane.domain.model import ModelCard, ModelState, ServerId
from control_plane.domain.request import RouteRequest
from control_plane.domain.task import Feature
from control_plane.fleet.judgements import Judgements
from control_plane.fleet.server import Expected, Flight, Outcome, OutcomeKind, Pair, Server
from control_plane.prediction.features import Coefficients, Features, Kin, RowKey, ttft
from control_plane.prediction.latency import FADES, LatencyModel
from control_plane.prediction.output_length import OutputLength
from control_plane.prediction.state import HistogramState, LatencyState, TallyState
from control_plane.prefix.cache import CacheRow
from control_plane.prefix.index import Floats, PrefixIndex
from control_plane.selection.table import CandidateTable

log = logging.getLogger(__name__)

# A first token is too late after so many times what nine of ten are expected to take, and after so many seconds.
_OVERDUE = 2.0
_OVERDUE_SOONEST = 1.0
# While it goes on waiting, whether another server would be sooner is looked at again after this share of the time.
_ASKED_AGAIN = 0.25
# Observations before it is known how long that takes. Till then nobody is waited for longer than the objective.
_EVIDENCE = 0.5

# Names of what is kept: of all rows together, and of each.
_COMMON, _ROW, _LENGTHS, _SUCCESS = "latency", "latency/", "lengths", "success"
_ROWS_AT_ONCE = 256


class Expectations:
    """Owner of the predictors."""

    def __init__(self) -> None:
        self.judgements = Judgements()
        self._latency = LatencyModel()
        self._coefficients: dict[RowKey, Coefficients[float]] = {}
        """Of every row of the table, as the table has them, and of some that are gone."""
        self._stale_at: dict[RowKey, float] = {}
        """Monotonic seconds from when what time changes of them is worth looking at."""
        self._lengths = OutputLength()
        self._prefixes = PrefixIndex()
        self._table = CandidateTable([])
        self._unkept: dict[RowKey, None] = {}
        """Rows that have learned since what they know was handed out."""
        self._handed: list[RowKey] = []
        """Those that were handed out, and are not known to be kept."""
        self.caches_prefixes = False
        """Whether some model here keeps the beginnings of prompts."""

    # ----------------------------------------------------------------- rows ---

    def declare(self, server: Server, card: ModelCard, pair: Pair, now: float) -> None:
        """A server holds a model; what is known beforehand of its speed counts until it is measured."""
        kin = Kin(
            server.report.engine, server.report.hardware.device, card.name, card.fingerprint,
            ttft=pair.stats.ttft or card.ttft, tpot=pair.stats.tpot or card.tpot,
        )  # fmt: skip
        self._latency.declare((server.id, card.name, card.provider), kin, now)

    def forget(self, server_id: ServerId, card: ModelCard) -> None:
        """A server holds a model no more."""
        self._latency.forget((server_id, card.name, card.provider))

    def rebuilt(self, table: CandidateTable, servers: Mapping[ServerId, Server], now: float) -> None:
        """There is a new table."""
        self._table = table
        if len(self._coefficients) > 2 * len(table):
            keys = {(row.server_id, row.card.name, row.card.provider) for row in table.rows}
            self._coefficients = {key: value for key, value in self._coefficients.items() if key in keys}
            self._stale_at = {key: value for key, value in self._stale_at.items() if key in keys}
        self.judgements.rebuilt(table, now)
        self.caches_prefixes = any(Feature.PREFIX_CACHE in row.card.features for row in table.rows)
        self._prefixes.align(
            CacheRow(
                row.server_id,
                row.card.name,
                row.card.provider,
                servers[row.server_id].report.identity.instance_id,
                row.card.fingerprint,
                caches=Feature.PREFIX_CACHE in row.card.features,
                resident=row.card.state in (ModelState.WARM, ModelState.LOADING),
            )
            for row in table.rows
        )

    def predict(self, key: RowKey, now: float) -> None:
        """Bring what is expected of a row up to date."""
        row = self._table.find(*key)
        if row is not None:
            self._coefficients[key] = coefficients = self._latency.coefficients(key, now)
            self._stale_at[key] = now + FADES
            self._table.set_prediction(row, coefficients)

    def show(self, key: RowKey, now: float) -> None:
        """Write what is expected of a row to the table once more, brought up to date if it need be."""
        if self._latency.has_moved(key) or now >= self._stale_at.get(key, -math.inf):
            self.predict(key, now)
        elif (row := self._table.find(*key)) is not None:
            self._table.set_prediction(row, self._coefficients[key])

    def cached(self, request: RouteRequest) -> Floats | None:
        """Tokens of the prompt that each row of the table is expected to have in its prefix cache, shape (rows,)."""
        return self._prefixes.match(request.blocks) if request.blocks is not None else None

    # -------------------------------------------------------------- flights ---

    def begin(self, flight: Flight, row: int, now: float, cached: float, patience: float) -> None:
        """A flight begins on a row of the table, which is expected to have so many tokens of its prompt `cached`. One
        of which little is known is given `patience` seconds for the first token."""
        request, server = flight.request, flight.server
        if request is None:
            return
        flight.expected = expected = self._expected(flight, request, row, now, cached, patience)
        if request.blocks is not None:
            expected.credit = self._prefixes.dispatch(flight.row_key, request.blocks)
        if flight.ahead:
            server.idle.add(flight)
            return
        server.prefilling.add(flight)
        server.lane_until = max(server.lane_until, now) + expected.lane

    def first_token(self, flight: Flight, now: float) -> bool:
        """The server may begin with the next prompt; whether that is news."""
        server = flight.server
        if not server.prefilling.discard(flight):
            return False
        flight.expected.end_at += now - flight.expected.first_at
        server.lane_until = now + max(0.0, server.prefilling.seconds) if server.prefilling else 0.0
        return True

    def end(self, flight: Flight, outcome: Outcome, now: float) -> None:
        """A flight has ended; of one that has succeeded there is much to learn."""
        flight.server.idle.discard(flight)
        begun = not self.first_token(flight, now)
        succeeded = outcome.kind is OutcomeKind.SUCCESS
        if succeeded and flight.request is not None:
            self._learn(flight, flight.request, outcome, now)
            self.judgements.answered(flight.request, flight.model, now)
        credit, flight.expected.credit = flight.expected.credit, None
        if credit is not None:
            if begun or succeeded:
                self._prefixes.confirm(credit)
            else:
                self._prefixes.abandon(credit)

    def refresh(self, server: Server, now: float) -> None:
        """Bring the columns up to date that tell what a server is at."""
        slot_at = math.nan
        if server.flights and len(server.flights) + server.report.load.foreign >= server.report.load.slots:
            # Whatever has outlived its expectation may go on for a quarter of the time that it has taken.
            slot_at = min(max(flight.expected.end_at, now + (now - flight.began) / 4) for flight in server.flights)
        self._table.set_work(
            server.id,
            streams=max(0, _decoding(server)) + server.report.load.foreign,
            lane_until=server.lane_until,
            slot_at=slot_at,
        )

    def tick(self, servers: Iterable[Server], now: float) -> None:
        """Let time pass: what it alone changes of a prediction reaches the table, and first tokens are overdue."""
        self.judgements.tick(now)
        for key in self._latency.moved(now):
            self.predict(key, now)
        for server in servers:
            if server.prefilling and now >= min(server.lane_until, next(iter(server.prefilling)).expected.overdue_at):
                self._overdue(server, now)

    # ------------------------------------------------------------- survival ---

    def knowledge(self, now: float) -> dict[str, str]:
        """What has been learned and is not `kept`, JSON by name: for the next process to `know`."""
        self._unkept.update(dict.fromkeys(self._handed))
        keys = self._handed = list(self._unkept)[:_ROWS_AT_ONCE]
        if not keys and not self.judgements.unkept:
            return {}
        for key in keys:
            del self._unkept[key]
        state = self._latency.state(now, keys)
        parts: dict[str, object] = {_COMMON: replace(state, rows=())}
        parts.update({f"{_ROW}{'/'.join(row.key)}": replace(state, rows=(row,), groups=()) for row in state.rows})
        parts[_LENGTHS] = self._lengths.state()
        parts[_SUCCESS] = self.judgements.success.state(now)
        return {name: msgspec.json.encode(part).decode() for name, part in parts.items()}

    def kept(self) -> None:
        """What was handed out last is kept."""
        self._handed, self.judgements.unkept = [], False

    def know(self, entries: Mapping[str, str], now: float) -> None:
        """Take over what an earlier process has learned. What cannot be read is left out."""
        unread = 0
        for name in sorted(entries, key=lambda name: name == _COMMON):  # the newest state of all rows has the last word
            try:
                if name == _LENGTHS:
                    self._lengths.restore(msgspec.json.decode(entries[name], type=tuple[HistogramState, ...]))
                elif name == _SUCCESS:
                    self.judgements.restore(msgspec.json.decode(entries[name], type=tuple[TallyState, ...]), now)
                elif name == _COMMON or name.startswith(_ROW):
                    self._latency.restore(msgspec.json.decode(entries[name], type=LatencyState), now)
            except msgspec.MsgspecError:
                unread += 1
        if unread:
            log.warning("%d entries of what was learned cannot be read and are left out", unread)

    # -------------------------------------------------------------- private ---

    def _expected(
        self, flight: Flight, request: RouteRequest, row: int, now: float, cached: float, patience: float
    ) -> Expected:
        server, load, table = flight.server, flight.server.report.load, self._table
        backlog = server.prefilling.backlog(now)
        streams = _decoding(server) + load.foreign
        features = Features(
            request.prompt_tokens, cached, backlog, streams, load.waiting, load.kv_cache_utilization, flight.cold
        )
        coefficients = self._coefficients[flight.row_key]
        uncached = features.uncached_tokens
        first = ttft(coefficients, uncached, backlog, float(load.waiting))
        each = coefficients.tpot_base + coefficients.tpot_per_stream * streams
        first_at = now + max(0.0, server.lane_until - now) + ttft(coefficients, uncached, 0.0, 0.0)
        overdue_at = slow_at = math.inf
        if flight.cold:
            first_at += float(table.load_time[row]) if table.load_time[row] > 0 else 0.0
        else:
            longest = math.inf if coefficients.evidence >= _EVIDENCE else patience
            slow_at = first_at + first * (coefficients.ttft_spread[-1] - 1.0)
            # Even if nothing of the prompt is cached: that is no failure, and only its answer tells.
            # Of a server that has just failed that is not hoped for.
            tokens = uncached if flight.pair.breaker.doubtful else request.prompt_tokens
            longer = ttft(coefficients, tokens, backlog, float(load.waiting))
            late = _OVERDUE * longer * coefficients.ttft_spread[-1]
            overdue_at = now + min(longest, max(_OVERDUE_SOONEST, late))
        lane = coefficients.per_prompt_token * uncached
        decoding = self._lengths.expect(request.task_type, flight.model, request.max_tokens).mean * each
        return Expected(
            features=features,
            ttft=first,
            tpot=each,
            first_at=first_at,
            end_at=first_at + decoding,
            slow_at=slow_at,
            overdue_at=overdue_at,
            work=lane + decoding / max(load.slots, 1),
            uncached=uncached,
            lane=lane,
        )

    def _overdue(self, server: Server, now: float) -> None:
        """Prompts that should be through are not, as far as is known."""
        if now >= server.lane_until and not any(flight.on_overdue for flight in server.prefilling):
            server.prefilling.clear()  # nobody will tell of their first tokens
        for flight in list(server.prefilling):
            if flight.on_overdue is not None and now >= flight.expected.overdue_at:
                log.info("%s: no first token after %.1f s", server.id, now - flight.began)
                flight.expected.overdue_at = now + _ASKED_AGAIN * (now - flight.began)
                flight.on_overdue()
        for flight in server.prefilling:
            if flight.on_overdue is not None:
                self._latency.overdue(flight.row_key, flight.expected.features, now - flight.began, now)
                # It may take as long again as it has been late.
                server.lane_until = now + (now - flight.expected.first_at) / 2 + flight.expected.lane
                self.predict(flight.row_key, now)
                break
        self.refresh(server, now)

    def _learn(self, flight: Flight, request: RouteRequest, outcome: Outcome, now: float) -> None:
        expected, used = flight.expected, flight.charge.used
        features = expected.features
        if used is not None and used.whole and used.prompt:
            if expected.credit is not None:
                self._prefixes.finish(expected.credit, used.cached_prompt, used.prompt)
                expected.credit = None
            features = Features(
                used.prompt, used.cached_prompt, features.backlog_tokens, features.streams, features.waiting,
                features.kv, features.cold,
            )  # fmt: skip
        self._latency.observe(
            flight.row_key, features, outcome.ttft, outcome.tpot, now,
            promised_ttft=expected.ttft, promised_tpot=expected.tpot,
        )  # fmt: skip
        self._unkept[flight.row_key] = None
        if used is not None and used.whole and used.completion:
            self._lengths.observe(request.task_type, flight.model, used.completion)


def _decoding(server: Server) -> int:
    """Requests that have their first token, as far as is known."""
    return len(server.flights) - len(server.prefilling) - len(server.idle)
