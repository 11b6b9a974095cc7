"""What a run says of a policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from control_plane.simulation.harness import HostUse, Outcome, Result


@dataclass(frozen=True, slots=True)
class Objective:
    """What a client is content with; times in seconds."""

    ttft: float = 2.0
    ttft_per_token: float = 0.001
    """Per prompt token, on top."""
    tpot: float = 0.15
    """Mean over the answer."""

    def patience(self, prompt_tokens: int) -> float:
        """Longest TTFT."""
        return self.ttft + self.ttft_per_token * prompt_tokens

    def met(self, outcome: Outcome) -> bool:
        return (
            not outcome.error and outcome.ttft <= self.patience(outcome.job.prompt_tokens) and outcome.tpot <= self.tpot
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """Shares are of all requests, times in seconds."""

    requests: int
    goodput: float
    """Share of requests within the objective."""
    ttft_p50: float
    ttft_p99: float
    """A request that never got a token counts with the client's time-out."""
    tpot_p50: float
    tpot_p99: float
    """Of complete answers."""
    errors: float
    """Share without a complete answer, for whatever reason; those cut are among them."""
    unanswered: float
    """Share of errors without a first token: what another host might have spared the client."""
    truncated: float
    """Share whose stream ended between its first and its last token for another reason than that the client left."""
    silent: float
    """Share of those truncated without being told."""
    prefix_hits: float
    """Share of the prompt tokens that were found in a cache, of requests that got a token."""
    attempts: float
    """Mean per request."""
    kinds: dict[str, int]
    """Failed requests by kind."""
    hosts: tuple[HostUse, ...]


def summary(result: Result, objective: Objective = Objective()) -> Summary:
    outcomes = result.outcomes
    count = len(outcomes)
    ttft = np.minimum(np.array([outcome.ttft for outcome in outcomes]), result.settings.client_timeout)
    complete = [outcome for outcome in outcomes if not outcome.error]
    tpot = np.array([outcome.tpot for outcome in complete if outcome.tokens > 1] or [0.0])
    answered = [outcome for outcome in outcomes if outcome.host]
    kinds: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error:
            kinds[outcome.error] = kinds.get(outcome.error, 0) + 1
    return Summary(
        requests=count,
        goodput=sum(map(objective.met, outcomes)) / count,
        ttft_p50=float(np.quantile(ttft, 0.5)),
        ttft_p99=float(np.quantile(ttft, 0.99)),
        tpot_p50=float(np.quantile(tpot, 0.5)),
        tpot_p99=float(np.quantile(tpot, 0.99)),
        errors=(count - len(complete)) / count,
        unanswered=sum(bool(outcome.error) and not outcome.host for outcome in outcomes) / count,
        truncated=sum(outcome.cut for outcome in outcomes) / count,
        silent=sum(outcome.silent for outcome in outcomes) / count,
        prefix_hits=sum(outcome.cached for outcome in answered)
        / max(sum(outcome.job.prompt_tokens for outcome in answered), 1),
        attempts=sum(outcome.attempts for outcome in outcomes) / count,
        kinds=dict(sorted(kinds.items())),
        hosts=result.hosts,
    )
