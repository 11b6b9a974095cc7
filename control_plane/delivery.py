"""What sends callbacks, put together from the settings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from control_plane.config import CallbackSettings
from control_plane.tasks.callbacks import DeliveryRecord, Repetition, Rules, read_secrets
from control_plane.tasks.deliverer import Deliverer
from modelyard.program.settings import SettingsError

if TYPE_CHECKING:
    from control_plane.tasks.deliveries import Deliveries


def rules(settings: CallbackSettings) -> Rules:
    """Where callbacks may go."""
    return Rules.of(settings.hosts, settings.private_hosts, settings.insecure_loopback)


def secrets(settings: CallbackSettings, env: Mapping[str, str]) -> tuple[bytes, ...]:
    """What callbacks are signed with, as it is now. Raises ValueError, which names where they come from."""
    if settings.secret_file:
        origin = f"the file {settings.secret_file} (tasks.callbacks.secret_file)"
        try:
            text = Path(settings.secret_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{origin} cannot be read: {type(error).__name__}") from None
    else:
        origin = f"the environment variable {settings.secret_env} (tasks.callbacks.secret_env)"
        text = env.get(settings.secret_env, "")
    try:
        return read_secrets(text)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def check(settings: CallbackSettings, env: Mapping[str, str]) -> None:
    """Raises SettingsError if callbacks are wanted that could not be signed."""
    if not rules(settings).open:
        return
    try:
        secrets(settings, env)
    except ValueError as error:
        raise SettingsError(f"callbacks must be signed: {error}") from None


def deliverer(
    settings: CallbackSettings,
    env: Mapping[str, str],
    deliveries: Deliveries,
    render: Callable[[DeliveryRecord], Awaitable[bytes | None]],
    outcome: Callable[[str], None],
) -> Deliverer | None:
    """None: no host is allowed, nothing is sent."""
    allowed = rules(settings)
    if not allowed.open:
        return None
    retry = settings.retry
    return Deliverer(
        deliveries,
        render,
        allowed,
        lambda: secrets(settings, env),
        Repetition(settings.max_attempts, retry.base, retry.factor, retry.cap),
        timeout=settings.timeout,
        most=settings.concurrency,
        most_per_host=settings.concurrency_per_host,
        outcome=outcome,
    )
