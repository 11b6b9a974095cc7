"""Where a key comes from. It is never part of the settings, of a message or of a log."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from model_servers.engine import EngineFailed


class Key:
    """A key in an environment variable or in a file; neither: no key."""

    def __init__(
        self, variable: str = "", file: str = "", *, header: str = "Authorization", env: Mapping[str, str] | None = None
    ) -> None:
        """`header`: "Authorization" carries the key as a bearer token, any other as it is."""
        self._variable = "" if file else variable
        self._file = Path(file).expanduser() if file else None
        self._header = header
        self._env = os.environ if env is None else env
        self._headers: dict[str, str] = {}

    @property
    def origin(self) -> str:
        """For people; empty if there is no key."""
        if self._file is not None:
            return f"the file {self._file}"
        return f"the environment variable {self._variable}" if self._variable else ""

    def read(self) -> None:
        """Take the key as it is now: files may be renewed. Raises EngineFailed with a cure."""
        if not self.origin:
            return
        if self._file is not None:
            try:
                text = self._file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise EngineFailed(f"the key cannot be read from {self._file}: {type(error).__name__}") from None
        else:
            text = self._env.get(self._variable, "").strip()
        if not text:
            raise EngineFailed(f"there is no key in {self.origin}: put it there, or name another api_key_env")
        if not text.isascii() or not text.isprintable():
            raise EngineFailed(f"what stands in {self.origin} is no key")
        self._headers = {self._header: f"Bearer {text}" if self._header.lower() == "authorization" else text}

    def headers(self) -> dict[str, str]:
        return self._headers
