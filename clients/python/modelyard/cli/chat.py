"""`modelyard chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli import output
from modelyard.cli.connection import told
from modelyard.cli.errors import words
from modelyard.cli.generate import AnswerPrinter, answer, statistics
from modelyard.cli.options import chat_options, direct_option, tenant_option, timeout_option
from modelyard.cli.session import ClientSettings, Session, client_settings

if TYPE_CHECKING:
    from modelyard.client import AsyncClient, Message

HELP = """\
/reset         forget the conversation
/model [NAME]  only this model from now on; without a name: any
/explain       show the decision behind each answer, or no more
/quit          leave, as does Ctrl-D
Ctrl-C         stop the current answer"""


@click.command("chat")
@chat_options
@timeout_option
@direct_option
@tenant_option
@click.pass_obj
def chat(session: Session, /, timeout: float | None, **options: Any) -> None:
    """Talk with the fleet, turn by turn. /help lists what can be said besides."""
    settings = client_settings(session)
    given = {name: value for name, value in options.items() if value is not None}
    given["timeout"] = timeout
    conversation = Conversation(given)
    if output.is_terminal(sys.stdin):
        _edit_lines()
        output.note(f"Talking with the fleet at {settings.address}. /help for help, Ctrl-D to leave.")
    with asyncio.Runner() as runner:
        client = runner.run(_connect(settings, session.tenant))
        try:
            while (line := _ask()) is not None:
                if not line:
                    continue
                if line.startswith("/"):
                    if not conversation.command(line):
                        break
                    continue
                try:
                    runner.run(conversation.turn(client, line, settings.address))
                except KeyboardInterrupt:
                    output.note("stopped")
        finally:
            runner.run(client.close())


async def _connect(settings: ClientSettings, tenant: str | None) -> AsyncClient:
    from modelyard.client import AsyncClient

    return AsyncClient(settings.address, timeout=settings.timeout, tenant=tenant, direct=settings.direct)


def _edit_lines() -> None:
    try:
        import readline  # noqa: F401 - gives input() history and editing
    except ImportError:
        pass


def _ask() -> str | None:
    """The next line; None at the end of the input."""
    terminal = output.is_terminal(sys.stdin) and output.is_terminal(sys.stdout)
    while True:
        try:
            return input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return None
        except KeyboardInterrupt:
            print()  # as in a shell: the line is dropped


@dataclass(slots=True)
class Conversation:
    """What was said so far, and how to ask."""

    options: dict[str, Any]
    messages: list[Message] = field(default_factory=list)
    explain: bool = False

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; False to leave."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/quit":
            return False
        if word == "/reset":
            self.messages.clear()
            output.note("forgotten")
        elif word == "/explain":
            self.explain = not self.explain
            output.note(f"decisions are {'shown' if self.explain else 'not shown'}")
        elif word == "/model":
            self.options.pop("model", None)
            if rest:
                self.options["model"] = rest
            output.note(f"model: {rest or 'any'}")
        elif word == "/help":
            output.note(HELP)
        else:
            output.note(f"{word} is not known; /help lists what is")
        return True

    async def turn(self, client: AsyncClient, line: str, address: str) -> None:
        """One question and its answer; a failed or stopped turn is forgotten."""
        from modelyard.client import Message, ModelyardError

        asked = [*self.messages, Message("user", line)]
        try:
            result = await answer(
                client, asked, {**self.options, "explain": self.explain}, AnswerPrinter(explain=self.explain)
            )
        except ModelyardError as error:
            output.problem((await told(error, address)).line())
        except (ValueError, TypeError) as error:
            output.problem(words(error))
        else:
            self.messages = [*asked, result.message]
            if output.is_terminal(sys.stderr):
                output.note(statistics(result))
