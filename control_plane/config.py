"""Settings of the control plane, section `control_plane` of modelyard.yaml.

The table in README.md is generated from this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from control_plane import initial_stats
from control_plane.scheduling.budgets import Budget, Unit, Window
from control_plane.tasks.callbacks import Pattern
from modelyard.program.settings import Settings
from modelyard.rpc.validation import check_tenant

SECTION = "control_plane"
PROGRAM = "modelyard control-plane"

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]


class FleetSettings(Settings):
    report_interval: PositiveSeconds = Field(1.0, description="Seconds between two reports of a model server.")
    lease_duration: PositiveSeconds = Field(
        3.0, description="Seconds after its last report at which a model server is LOST; at least twice the interval."
    )
    warm_up: Seconds = Field(
        2.0, description="Seconds after the start during which an empty-handed refusal is UNAVAILABLE, not final."
    )
    forget_after: Seconds = Field(600.0, description="Seconds after which a LOST server is no longer listed.")

    @model_validator(mode="after")
    def _lease_outlives_a_report(self) -> FleetSettings:
        if self.lease_duration < 2 * self.report_interval:
            raise ValueError("lease_duration must be at least twice report_interval, or a single late report loses it")
        return self


class QueueBounds(Settings):
    low: int = Field(4096, ge=0, description="Most waiting requests of priority low.")
    normal: int = Field(2048, ge=0, description="Most waiting requests of priority normal.")
    high: int = Field(1024, ge=0, description="Most waiting requests of priority high.")
    critical: int = Field(512, ge=0, description="Most waiting requests of priority critical.")


class QueueTimeouts(Settings):
    low: PositiveSeconds = Field(300.0, description="Seconds that a request of priority low may wait.")
    normal: PositiveSeconds = Field(60.0, description="Seconds that a request of priority normal may wait.")
    high: PositiveSeconds = Field(30.0, description="Seconds that a request of priority high may wait.")
    critical: PositiveSeconds = Field(30.0, description="Seconds that a request of priority critical may wait.")


class QueueFloors(Settings):
    low: Share = Field(0.05, description="Share of the service that waiting requests of priority low get at least.")
    normal: Share = Field(0.1, description="Share that waiting requests of priority normal get at least.")
    high: Share = Field(0.0, description="Share that waiting requests of priority high get at least.")
    critical: Share = Field(0.0, description="Share that waiting requests of priority critical get at least.")

    @model_validator(mode="after")
    def _leave_something(self) -> QueueFloors:
        if sum(getattr(self, name) for name in type(self).model_fields) >= 1:
            raise ValueError("together they must be less than 1")
        return self


class QueueSettings(Settings):
    bound: QueueBounds = QueueBounds()
    floor: QueueFloors = QueueFloors()
    timeout: QueueTimeouts = QueueTimeouts()
    max_bytes: int = Field(512 * 1024 * 1024, ge=0, description="Most bytes of all waiting requests together.")


class SelectionWeights(Settings):
    capability: Weight = Field(3.0, description="Weight of the model's score for the kind of work.")
    success: Weight = Field(2.0, description="Weight of the success rate.")
    latency: Weight = Field(3.0, description="Weight of the expected latency.")
    cost: Weight = Field(1.0, description="Weight of the expected price.")
    load: Weight = Field(2.0, description="Weight of the share of free slots.")
    provider: Weight = Field(1.0, description="Weight of the provider preference.")

    @model_validator(mode="after")
    def _something_counts(self) -> SelectionWeights:
        if not any(getattr(self, name) for name in type(self).model_fields):
            raise ValueError("at least one weight must be above 0")
        return self


Scorer = Literal["capability", "success", "latency", "cost", "load", "provider"]


class ClassWeights(Settings):
    low: dict[Scorer, Weight] = Field(default_factory=dict, description="Weights for requests of priority low.")
    normal: dict[Scorer, Weight] = Field(default_factory=dict, description="Weights for those of priority normal.")
    high: dict[Scorer, Weight] = Field(default_factory=dict, description="Weights for those of priority high.")
    critical: dict[Scorer, Weight] = Field(default_factory=dict, description="Weights for those of priority critical.")


class SelectionSettings(Settings):
    weights: SelectionWeights = SelectionWeights()
    class_weights: ClassWeights = Field(
        ClassWeights(), description="Weights by priority, in place of those; a preset's own go before both."
    )
    spill_usd: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Models that cost money are kept for what free ones cannot serve in time, up to so many US dollars "
        "a request. None: the score decides.",
    )
    spill_below: Share = Field(0.5, description="Chance to meet the objectives at home below which that is so.")
    exploration: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.0, description="Share of requests that go to a server about as good as the best, to learn of it."
    )
    exploration_margin: Share = Field(0.05, description="By how much the score of such a server may be less.")
    availability_threshold: Share = Field(
        0.2, description="A server and model whose success rate is lower are not chosen."
    )
    ttft_objective: PositiveSeconds = Field(
        2.0, description="Seconds to the first token within which a request is served well, but for its prompt."
    )
    ttft_objective_per_prompt_token: Seconds = Field(0.001, description="Seconds more for each token of the prompt.")
    tpot_objective: PositiveSeconds = Field(
        0.15, description="Seconds per output token within which a request is served well."
    )
    late_binding: PositiveSeconds = Field(
        0.05,
        description="A server whose prefill is expected to be busy for more than these seconds gets none: they wait "
        "where they can still go elsewhere.",
    )
    latency_reference: PositiveSeconds = Field(5.0, description="Expected seconds at which the latency score is 0.5.")
    cost_reference_usd: Annotated[float, Field(gt=0)] = Field(
        0.01, description="Expected US dollars per request at which the cost score is 0.5."
    )
    prior_ttft: PositiveSeconds = Field(0.5, description="Time to first token assumed before anything was measured.")
    prior_tpot: PositiveSeconds = Field(0.05, description="Time per output token assumed before measurement.")
    prior_load_time: Seconds = Field(
        10.0, description="Seconds assumed for loading a cold model whose server does not know how long it takes."
    )
    expected_output_tokens: int = Field(256, ge=1, description="Output length assumed where max_tokens is not given.")
    provider_preference: dict[str, Share] = Field(
        default_factory=dict, description="Preference per provider, 0 to 1; 1 for those not named."
    )


class StatisticsSettings(Settings):
    alpha: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="Weight of the newest observation.")
    recovery_half_life: PositiveSeconds = Field(
        60.0, description="Seconds in which an unused success rate gets half-way back to its start."
    )
    initial_success: Share = Field(1.0, description="Success rate before anything was observed.")


class BreakerSettings(Settings):
    failures: int = Field(5, ge=1, description="Consecutive failures that open the circuit breaker.")
    pause: PositiveSeconds = Field(1.0, description="Seconds until the first trial; doubles with each failed trial.")
    pause_cap: PositiveSeconds = Field(30.0, description="Longest pause in seconds.")


class RetrySettings(Settings):
    max_attempts: int = Field(3, ge=1, le=10, description="Most attempts per request, the first one included.")
    base: Seconds = Field(0.02, description="Seconds before the first retry; the actual delay is random below it.")
    factor: Annotated[float, Field(ge=1)] = Field(2.0, description="Growth of the delay per retry.")
    cap: Seconds = Field(2.0, description="Longest delay in seconds.")
    hedging: Share = Field(
        0.0,
        description="Share of streamed requests for which a second server is asked when nine of ten would have had "
        "their first token; the first to answer goes on, the other is told to stop.",
    )


class LimitSettings(Settings):
    max_request_bytes: int = Field(8 * 1024 * 1024, ge=1024, description="Largest request.")
    max_generation: PositiveSeconds = Field(
        600.0, description="Seconds after which a request ends when its caller gave no deadline, or a later one."
    )
    ticket_lifetime: PositiveSeconds = Field(
        5.0, description="Seconds in which a client must have begun to use a ticket of Assign."
    )
    ticket_ahead_lifetime: PositiveSeconds = Field(
        1.0,
        description="The same for a ticket that was asked for ahead of need; never longer than `ticket_lifetime`.",
    )
    write_timeout: PositiveSeconds = Field(
        30.0, description="Seconds that a client may leave its stream unread before it is cut off."
    )


class CallbackRetrySettings(Settings):
    base: Seconds = Field(5.0, description="Seconds before a callback is sent again; half of each pause is random.")
    factor: Annotated[float, Field(ge=1, le=100)] = Field(3.0, description="Growth of the pause per attempt.")
    cap: Seconds = Field(6 * 3600.0, description="Longest pause in seconds.")


class CallbackSettings(Settings):
    hosts: tuple[str, ...] = Field(
        (),
        description="Public hosts that callbacks may go to: `hooks.example.org`, `*.example.org` or `*`, "
        "with `:port` or `:*` where it is not 443. Empty: tasks with callbacks are refused.",
    )
    private_hosts: tuple[str, ...] = Field(
        (), description="Hosts that callbacks may go to even where their addresses are private, loopback or link-local."
    )
    insecure_loopback: bool = Field(
        False, description="Allow http for hosts on the loopback interface that `private_hosts` names."
    )
    secret_env: str = Field(
        "MODELYARD_CALLBACK_SECRETS",
        min_length=1,
        description="Environment variable with the secrets that callbacks are signed with: `whsec_` and 24 or more "
        "bytes in base64, several separated by spaces, the newest first.",
    )
    secret_file: str = Field("", description="File with the secrets instead; read again for each callback.")
    max_attempts: int = Field(12, ge=1, le=100, description="Attempts after which a callback is kept as dead.")
    timeout: PositiveSeconds = Field(15.0, description="Seconds that one attempt may take.")
    concurrency: int = Field(32, ge=1, le=1000, description="Most callbacks that are sent at the same time.")
    concurrency_per_host: int = Field(4, ge=1, le=1000, description="Most of them to one host.")
    retry: CallbackRetrySettings = CallbackRetrySettings()

    @field_validator("hosts", "private_hosts")
    @classmethod
    def _are_hosts(cls, given: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for text in given:
            if Pattern.read(text).wild and info.field_name == "private_hosts":
                raise ValueError(f"{text!r}: hosts with private addresses are named one by one")
        return given


class TaskRetrySettings(Settings):
    base: Seconds = Field(
        1.0, description="Seconds before a task's second attempt, at most; the actual delay is random, at least half."
    )
    factor: Annotated[float, Field(ge=1)] = Field(2.0, description="Growth of that delay per failed attempt.")
    cap: Seconds = Field(60.0, description="Longest such delay in seconds.")


class TaskSettings(Settings):
    store: str = Field(
        "auto",
        description="Database of durable tasks: `sqlite:///PATH`, `postgresql://USER@HOST/NAME`, `auto` for SQLite in "
        "the user's state folder, or empty for no tasks.",
    )
    workers: int = Field(256, ge=1, le=100_000, description="Most tasks that this control plane has in hand.")
    max_attempts: int = Field(5, ge=1, le=100, description="Most attempts of a task that names no number itself.")
    retry: TaskRetrySettings = TaskRetrySettings()
    ageing: PositiveSeconds = Field(60.0, description="Seconds of waiting that raise a task's priority by one class.")
    lease: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        10.0, description="Seconds after which another control plane takes over the tasks of one that is not heard of."
    )
    max_lost: int = Field(
        10, ge=1, description="Times that a task may lose its control plane before it has failed with LEASE_LOST."
    )
    retention: PositiveSeconds = Field(
        7 * 86400.0, description="Seconds that terminal tasks, their results and idempotency keys are kept."
    )
    callbacks: CallbackSettings = CallbackSettings()


class PredictorSettings(Settings):
    dir: Path | None = Field(
        None,
        description="Folder of trained predictors, see `modelyard predictor`. Empty: beside the file of the task "
        "store, `tasks.predictors` for `tasks.db`; none for PostgreSQL. What is put in force there holds within 2 s.",
    )


class ForecastSettings(Settings):
    half_life: PositiveSeconds = Field(
        600.0, description="Seconds after which an arrival counts half as much for how busy it is just now."
    )
    warm_ahead: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0,
        description="Have a cold model loaded when so many requests are expected for it within its load time and "
        "`forecast.margin`; 0: never.",
    )
    margin: PositiveSeconds = Field(60.0, description="Seconds that are looked ahead beyond the load time of a model.")


Usd = Annotated[float, Field(ge=0, le=9e9, allow_inf_nan=False)]
TokenCount = Annotated[int, Field(ge=0, lt=2**63)]


class BudgetLimits(Settings):
    usd_per_hour: Usd | None = Field(None, description="US dollars in an hour; empty: no limit.")
    usd_per_day: Usd | None = Field(None, description="US dollars in a day (UTC).")
    usd_per_month: Usd | None = Field(None, description="US dollars in a calendar month (UTC).")
    usd_total: Usd | None = Field(None, description="US dollars for all time.")
    tokens_per_hour: TokenCount | None = Field(None, description="Tokens of prompts and answers in an hour.")
    tokens_per_day: TokenCount | None = Field(None, description="Tokens in a day (UTC).")
    tokens_per_month: TokenCount | None = Field(None, description="Tokens in a calendar month (UTC).")
    tokens_total: TokenCount | None = Field(None, description="Tokens for all time.")

    def budgets(self) -> tuple[Budget, ...]:
        """The limits that are given."""
        units = {"usd": (Unit.NANO_USD, 1e9), "tokens": (Unit.TOKENS, 1)}
        return tuple(
            Budget(units[unit][0], Window(period.removeprefix("per_")), round(given * units[unit][1]))
            for name in type(self).model_fields
            if (given := getattr(self, name)) is not None
            for unit, _, period in [name.partition("_")]
        )


class BudgetSettings(Settings):
    default: BudgetLimits = BudgetLimits()
    tenants: dict[str, BudgetLimits] = Field(
        default_factory=dict,
        description="Limits of single tenants, with the keys of `budgets.default`, which does not hold for them: "
        "`{team-a: {usd_per_day: 5}, internal: {}}`.",
    )
    max_output_tokens: int = Field(
        4096,
        ge=1,
        description="Most tokens of an answer whose request sets no max_tokens, for tenants with a budget: what is set "
        "aside for it must be enough.",
    )
    prompt_factor: Annotated[float, Field(ge=1, le=100)] = Field(
        4.0,
        description="Tokens set aside per estimated token of a prompt; 4 is one per byte, which no tokenizer exceeds. "
        "Less lets more requests run at once where a budget is nearly used up, and may exceed it.",
    )
    usage_retention: PositiveSeconds = Field(400 * 86400.0, description="Seconds that usage is kept.")

    @field_validator("tenants")
    @classmethod
    def _are_tenants(cls, given: dict[str, BudgetLimits]) -> dict[str, BudgetLimits]:
        for name in given:
            if violations := check_tenant(name):
                raise ValueError(f"{name!r}: {violations[0].description}")
        return given

    @property
    def any(self) -> bool:
        """Whether anybody has a budget."""
        return any(limits.budgets() for limits in (self.default, *self.tenants.values()))


ALIASES = {"MODELS_DIR": "models_dir", "DEFAULT_MODEL_CONFIG": "default_preset", "LLM_PROVIDER": "default_provider"}
"""Environment variables without modelyard's prefix, and the settings that they mean."""


def with_aliases(env: Mapping[str, str]) -> dict[str, str]:
    """The environment, with each alias under its full name too; a full name that is set takes precedence."""
    full = {f"MODELYARD_{SECTION}_{key}".upper(): env[alias] for alias, key in ALIASES.items() if env.get(alias)}
    return {**full, **env}


class GatewaySettings(Settings):
    host: str = Field(
        "127.0.0.1", description="Address of the OpenAI-compatible gateway. Anything but loopback opens it."
    )
    port: int = Field(7462, ge=-1, le=65535, description="HTTP port of the gateway; 0 takes a free one, -1 turns off.")
    body_timeout: PositiveSeconds = Field(30.0, description="Seconds in which the body of an HTTP request must arrive.")


class AgentWeights(Settings):
    capability: Weight = Field(3.0, description="Weight of how well an agent fits a task.")
    experience: Weight = Field(1.0, description="Weight of its successes in this kind of task.")
    availability: Weight = Field(2.0, description="Weight of its share of free places.")
    success: Weight = Field(2.0, description="Weight of its success rate in all tasks.")
    speed: Weight = Field(1.0, description="Weight of its pace in this kind of task, compared with the other agents'.")

    @model_validator(mode="after")
    def _something_counts(self) -> AgentWeights:
        if not any(getattr(self, name) for name in type(self).model_fields):
            raise ValueError("at least one weight must be above 0")
        return self


class AgentMatchSettings(Settings):
    skills: Weight = Field(2.0, description="Weight of the required skills, all together.")
    description: Weight = Field(1.0, description="Weight of the similarity of the descriptions.")
    task_type: Weight = Field(1.0, description="Weight of the score for the kind of task.")
    skill_threshold: Share = Field(
        0.75, description="Similarity of words from which an offered skill is the required one; 1: only another form."
    )
    skill_embedding_threshold: Share | None = Field(
        None,
        description="Cosine of embeddings from which it is, too. Empty: never, for what a cosine means depends on the "
        "model.",
    )


class AgentEmbeddingSettings(Settings):
    enabled: bool = Field(True, description="Compare descriptions by embeddings; off: always by words.")
    model: str = Field(
        "", description="Model that descriptions are compared with. Empty: the cheapest of the fleet that embeds."
    )
    timeout: PositiveSeconds = Field(1.0, description="Seconds after which they are compared by words instead.")
    cache: int = Field(4096, ge=1, description="Embeddings that are kept in memory.")


class AgentSettings(Settings):
    ttl: Annotated[float, Field(ge=1, le=3600)] = Field(
        30.0, description="Seconds that an agent is there without another word, where it says nothing else."
    )
    forget_after: Seconds = Field(
        600.0, description="Seconds after the end of its lease at which an agent is no longer listed."
    )
    warm_up: Seconds = Field(
        10.0, description="Seconds after the start during which it is not final that no agent can do a task."
    )
    assignment_timeout: Annotated[float, Field(ge=1, le=7 * 86400)] = Field(
        600.0, description="Seconds within which an assignment must be reported, where the request says nothing else."
    )
    max_agents: int = Field(500, ge=1, le=2000, description="Most agents of a tenant; of all, 2,000.")
    half_life: PositiveSeconds = Field(14 * 86400.0, description="Seconds in which what was learned counts half.")
    shrinkage: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        4.0, description="Tasks that an agent must have had to be judged half by itself, half as an average one."
    )
    weights: AgentWeights = AgentWeights()
    match: AgentMatchSettings = AgentMatchSettings()
    embedding: AgentEmbeddingSettings = AgentEmbeddingSettings()


class ControlPlaneSettings(Settings):
    host: str = Field("127.0.0.1", description="Address to listen on. Anything but loopback opens it to the network.")
    port: Port = Field(7460, description="gRPC port; 0 takes a free one.")
    metrics_port: int = Field(7461, ge=-1, le=65535, description="Port of /metrics; 0 takes a free one, -1 turns off.")
    gateway: GatewaySettings = GatewaySettings()
    models_dir: Path | None = Field(
        None,
        description="Folder of model definitions, one YAML file per provider, and of presets. "
        "Read again when a file changes. `MODELS_DIR` is understood as well.",
    )
    default_preset: str = Field(
        "", description="Preset of requests that name none. `DEFAULT_MODEL_CONFIG` is understood as well."
    )
    default_provider: str = Field(
        "",
        description="Provider whose entry in a preset holds where a request names neither model nor provider. "
        "`LLM_PROVIDER` is understood as well.",
    )
    fleet: FleetSettings = FleetSettings()
    queue: QueueSettings = QueueSettings()
    selection: SelectionSettings = SelectionSettings()
    statistics: StatisticsSettings = StatisticsSettings()
    breaker: BreakerSettings = BreakerSettings()
    retry: RetrySettings = RetrySettings()
    limits: LimitSettings = LimitSettings()
    tasks: TaskSettings = TaskSettings()
    budgets: BudgetSettings = BudgetSettings()
    agents: AgentSettings = AgentSettings()
    predictors: PredictorSettings = PredictorSettings()
    forecast: ForecastSettings = ForecastSettings()
    model_initial_stats: dict[str, initial_stats.InitialStats] = Field(
        default_factory=dict,
        description='What is assumed per model ("name" or "provider/name") until it is measured: `success` 0 to 1, '
        "`ttft` and `tpot` in seconds. A definition's `initial` takes precedence.",
    )
    drain_grace: Seconds = Field(30.0, description="Seconds that running requests get when the program is stopped.")
    debug: bool = Field(
        False, description="Log at level debug, with why each task was given to its server. Never what is in it."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity logged.")
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people or for machines.")
    watch_parent: bool = Field(False, description="Stop when standard input ends (used by `modelyard up`).")
