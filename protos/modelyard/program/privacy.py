"""What may be told of a failure. The rule, for every program of modelyard:

- Prompts, answers and what belongs to them (schemas, tools, images) are never logged, at no level.
- The text of an exception that is not ours may hold them. Logs and statuses get its type and where it was raised, from
  the functions here, and nothing else of it.
- The message of a Refusal is for the caller, who knows the request. It may quote it, so logs get the reason only.
"""

from __future__ import annotations

import traceback


def kind(error: BaseException) -> str:
    """The type of an exception, all that a message may say of it: "ValueError"."""
    return type(error).__qualname__


def where(error: BaseException) -> str:
    """For logs: the type and the stack of an exception and of those behind it, without their texts."""
    parts: list[str] = []
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        frames = "".join(traceback.format_tb(link.__traceback__)).rstrip()
        parts.append(f"{kind(link)}\n{frames}" if frames else kind(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\nbehind it: ".join(parts)
