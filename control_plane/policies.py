"""Settings as the policies of the pure rooms."""

from __future__ import annotations

from collections.abc import Mapping

from control_plane.config import ControlPlaneSettings, SelectionSettings
from control_plane.domain.task import Priority
from control_plane.fleet.registry import FleetPolicy, InitialStats
from control_plane.scheduling.breaker import BreakerPolicy
from control_plane.scheduling.stats import StatsPolicy
from control_plane.selection.policy import Policy, Weights
from modelyard.program.settings import SettingsError


def fleet_policy(settings: ControlPlaneSettings) -> FleetPolicy:
    """How leases, breakers and statistics behave."""
    statistics, breaker = settings.statistics, settings.breaker
    return FleetPolicy(
        lease_duration=settings.fleet.lease_duration,
        forget_after=settings.fleet.forget_after,
        warm_up=settings.fleet.warm_up,
        stats=StatsPolicy(
            alpha=statistics.alpha,
            recovery_half_life=statistics.recovery_half_life,
            initial_success=statistics.initial_success,
        ),
        breaker=BreakerPolicy(failures=breaker.failures, pause=breaker.pause, pause_cap=breaker.pause_cap),
        initial={
            model: InitialStats(given.success, given.ttft, given.tpot)
            for model, given in settings.model_initial_stats.items()
        },
    )


def class_policies(selection: SelectionSettings) -> dict[Priority, Policy]:
    """Of classes with weights of their own. Raises SettingsError."""
    policies = {}
    for priority in Priority:
        own = getattr(selection.class_weights, priority.name.lower())
        if own:
            try:
                policies[priority] = selection_policy(selection, own)
            except ValueError as error:
                raise SettingsError(f"selection.class_weights.{priority.name.lower()}: {error}") from None
    return policies


def selection_policy(selection: SelectionSettings, weights: Mapping[str, float] | None = None) -> Policy:
    """How servers are chosen, with these weights in place of those of the settings. Raises ValueError."""
    return Policy(
        weights=Weights(**{**selection.weights.model_dump(), **(weights or {})}),
        availability_threshold=selection.availability_threshold,
        ttft_objective_s=selection.ttft_objective,
        ttft_objective_per_prompt_token_s=selection.ttft_objective_per_prompt_token,
        tpot_objective_s=selection.tpot_objective,
        late_binding_s=selection.late_binding,
        latency_reference_s=selection.latency_reference,
        ttft_prior_s=selection.prior_ttft,
        tpot_prior_s=selection.prior_tpot,
        load_time_prior_s=selection.prior_load_time,
        cost_reference_usd=selection.cost_reference_usd,
        expected_output_tokens=selection.expected_output_tokens,
        provider_preference=selection.provider_preference,  # type: ignore[arg-type]
        spill_usd=selection.spill_usd,
        spill_below=selection.spill_below,
        exploration=selection.exploration,
        exploration_margin=selection.exploration_margin,
    )
