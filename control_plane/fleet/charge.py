"""What one attempt is reckoned with: set aside when it gets its server, known when it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from control_plane.domain.task import TaskType
from control_plane.scheduling.budgets import Reservation


class Used(NamedTuple):
    """Tokens of an attempt."""

    prompt: int
    cached_prompt: int
    completion: int
    whole: bool = True
    """The server has counted them at the end of its answer. False: it broke off, they are estimated."""


@dataclass(eq=False, slots=True)
class Charge:
    """Belongs to a flight. Whoever carries the attempt out says what becomes of it before it is released."""

    tenant: str = "default"
    task_type: TaskType = TaskType.CHAT
    prompt_tokens: int = 0
    """Estimated."""
    output_limit: int | None = None
    """Most tokens of the answer, where the request leaves that open: what is set aside covers no more."""
    reservation: Reservation | None = None
    """None: its tenant has no budgets."""
    used: Used | None = None
    sent: bool = False
    unheard: bool = False
    """Nobody will say what it has used."""

    def begin(self) -> None:
        """The request goes to the server now."""
        self.sent = True

    def count(self, prompt: int, cached_prompt: int, completion: int) -> None:
        """The server has told what its answer took."""
        self.used = Used(prompt, min(cached_prompt, prompt), completion)

    def break_off(self, tokens: int) -> None:
        """The attempt ended without that; so many tokens had come."""
        self.used = Used(self.prompt_tokens, 0, tokens, whole=False)

    def give_up(self) -> None:
        """What becomes of the attempt will not be known: it may go on elsewhere, so all that was set aside counts as
        spent."""
        self.break_off(0)
        self.unheard = True
