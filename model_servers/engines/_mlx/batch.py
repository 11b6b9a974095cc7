"""The continuous batch: sequences in, one token for each of them per step. Lives on the engine thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from model_servers.engine import Delta, EngineError, EngineFailed, Finished, FinishReason, Usage
from model_servers.engines._mlx import sampling
from model_servers.engines._mlx.jobs import Job, Outbox
from model_servers.engines._mlx.loading import Model
from model_servers.engines._mlx.prefixes import PrefixCache
from model_servers.engines._mlx.settings import MlxSettings
from modelyard.program import privacy

log = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 3
"""Consecutive failing steps after which the engine gives up: then it is not one request's fault."""


class Batch:
    """mlx_lm's BatchGenerator with everything that it leaves to its user."""

    def __init__(self, model: Model, settings: MlxSettings, clock: Callable[[], float]) -> None:
        self._model = model
        self._settings = settings
        self._clock = clock
        self._generator = self._new_generator()
        self._prefixes = PrefixCache(
            settings.prompt_cache_entries, settings.prompt_cache_bytes, can_trim_prompt_cache, trim_prompt_cache
        )
        self._failed_steps = 0
        self.steps = 0
        """Steps that computed something."""
        self.running: dict[int, Job] = {}
        """By the generator's id of the sequence."""

    def _new_generator(self) -> Any:
        slots = self._settings.slots
        return BatchGenerator(
            self._model.network,
            stop_tokens=[[token] for token in sorted(self._model.eos)],
            completion_batch_size=slots,
            prefill_batch_size=min(slots, 8),
            prefill_step_size=self._model.step_tokens,
            stream=mx.default_stream(mx.default_device()),
        )

    @property
    def full(self) -> bool:
        return len(self.running) >= self._settings.slots

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values running sequences hold, or will hold once their prompt is computed."""
        return sum(len(job.plan.prompt) + job.made for job in self.running.values())

    @property
    def memory_used(self) -> int:
        return int(mx.get_active_memory())

    def remove(self, job: Job) -> None:
        """Takes a sequence out wherever it is, prefill included; its slot is free at once."""
        for uid, running in self.running.items():
            if running is job:
                self._generator.remove([uid])
                del self.running[uid]
                return

    def close(self) -> None:
        self._prefixes.clear()
        self._generator.close()

    def admit(self, job: Job, outbox: Outbox) -> None:
        """Gives a waiting job a slot. There must be a free one."""
        plan = job.plan
        job.started = self._clock()
        processors: list[Any] = []
        if plan.sampling.logprobs:
            job.recorder = sampling.LogprobRecorder(plan.sampling.top_logprobs, self._model.text_of)
            processors.append(job.recorder)
        try:
            penalties = sampling.make_penalties(plan.sampling, plan.prompt)
            processors += [processor for processor in (penalties, plan.constraint) if processor is not None]
            job.guard = sampling.Guarded(processors) if processors else None
            cache, job.cached = self._prefixes.fetch(plan.prompt)
            (uid,) = self._generator.insert(
                [plan.prompt[job.cached :]],
                [plan.max_tokens],
                caches=None if cache is None else [cache],
                all_tokens=[plan.prompt[: job.cached]],
                samplers=[sampling.make_sampler(plan.sampling)],
                logits_processors=[[job.guard] if job.guard else []],
            )
        except Exception as error:  # only this request has been touched
            log.error("a request could not be inserted: %s", privacy.where(error))
            outbox.append((job.sink, EngineFailed(f"the request could not be started ({privacy.kind(error)})")))
            return
        self.running[uid] = job

    def step(self, outbox: Outbox) -> None:
        """Computes the next token of every sequence and the next piece of every prompt.

        Raises what MLX raised when that has happened too often in a row.
        """
        try:
            prompts, responses = self._generator.next()
        except Exception as error:
            # The batch is one computation: which sequence is to blame cannot be told, and its caches are lost.
            log.error("a generation step failed: %s", privacy.where(error))
            self._failed_steps += 1
            if self._failed_steps >= _MAX_FAILED_STEPS:
                raise
            for job in self.running.values():
                outbox.append((job.sink, EngineFailed(f"a generation step failed ({privacy.kind(error)})")))
            self.running.clear()
            self._prefixes.clear()  # a likely reason is memory
            self._generator.close()
            self._generator = self._new_generator()
            return
        self._failed_steps = 0
        self.steps += bool(prompts or responses)
        for response in responses:
            current = self.running.get(response.uid)
            if current is not None:
                try:
                    self._take_token(current, response, outbox)
                except Exception as error:  # reading one answer concerns that answer only
                    log.error("an answer could not be read: %s", privacy.where(error))
                    failed = EngineFailed(f"the answer could not be read ({privacy.kind(error)})")
                    self._drop(response, failed, outbox)

    def _take_token(self, job: Job, response: Any, outbox: Outbox) -> None:
        if job.guard is not None and job.guard.failure is not None:
            self._drop(response, _sampling_failed(job.guard.failure), outbox)
            return
        job.made += 1
        delta, stopped = None, False
        if response.finish_reason != "stop":  # "stop" is the end-of-text token, which has no text
            entry = None if job.recorder is None else job.recorder.take(response.token)
            delta, stopped = job.plan.answer.push(response.token, entry)
        constraint = job.plan.constraint
        complete = constraint is not None and constraint.finished
        if response.finish_reason is None and not stopped and not complete:
            if delta is not None:
                outbox.append((job.sink, delta))
            return
        ended = stopped or complete or response.finish_reason == "stop"
        self._finish(job, response, FinishReason.STOP if ended else FinishReason.LENGTH, delta, outbox)

    def _finish(self, job: Job, response: Any, reason: FinishReason, last: Delta | None, outbox: Outbox) -> None:
        """`last`: what the last token completed."""
        del self.running[response.uid]
        if response.finish_reason is not None:
            cache, tokens = response.prompt_cache, response.all_tokens
        elif self._prefixes.enabled:
            removed = self._generator.remove([response.uid], return_prompt_caches=True)
            cache, tokens = removed[response.uid]
        else:
            self._generator.remove([response.uid])
            cache, tokens = None, []
        answer = job.plan.answer
        held_back, reason = answer.finish(reason)
        if held_back is not None:
            if last is not None:
                outbox.append((job.sink, last))
            last = held_back
        usage = Usage(
            prompt_tokens=len(job.plan.prompt),
            cached_prompt_tokens=job.cached,
            completion_tokens=job.made,
            reasoning_tokens=answer.reasoning_tokens,
        )
        queued = max(0.0, job.started - job.submitted)
        outbox.append((job.sink, Finished(reason, usage, queued=queued, last=last)))
        if cache is not None and self._prefixes.enabled:
            # Evaluated, or the entry would keep the whole batch's arrays alive.
            mx.eval([layer.state for layer in cache])
            self._prefixes.insert(tokens, cache)

    def _drop(self, response: Any, error: EngineError, outbox: Outbox) -> None:
        job = self.running.pop(response.uid, None)
        if response.finish_reason is None:
            self._generator.remove([response.uid])
        if job is not None:
            outbox.append((job.sink, error))


def _sampling_failed(failure: Exception) -> EngineError:
    if isinstance(failure, EngineError):
        return failure  # the grammar's: its schema is to blame
    log.error("sampling failed: %s", privacy.where(failure))
    return EngineFailed(f"sampling failed ({privacy.kind(failure)})")
