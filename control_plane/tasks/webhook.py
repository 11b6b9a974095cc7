"""Sends callbacks. Imported when there is one to send: aiohttp takes memory."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from importlib.metadata import version

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from control_plane.tasks.callbacks import Answer, NotAllowed, Rules, Target, answer

_MOST_ANSWER = 16 << 10
"""Bytes read of an answer, so that its connection can be used again; a longer one is cut off."""
_KEEP_ALIVE = 15.0


class _Checked(AbstractResolver):
    """Resolves names, each time anew, to addresses that the rules allow. What is checked is what is connected to."""

    def __init__(self, rules: Rules, scheme: str) -> None:
        self._rules = rules
        self._scheme = scheme

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises NotAllowed if only one of the addresses is not allowed, OSError if there is none."""
        target = Target(self._scheme, host.lower(), port)
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
        results = []
        for family_, _, protocol, _, address in found:
            ip = str(address[0])
            self._rules.check_address(target, ipaddress.ip_address(ip.partition("%")[0]))
            results.append(
                ResolveResult(
                    hostname=host,
                    host=ip,
                    port=port,
                    family=family_,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        return results

    async def close(self) -> None:
        pass


class Sender:
    """Connections to receivers."""

    def __init__(self, rules: Rules, timeout: float) -> None:
        self._rules = rules
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    def _session(self, scheme: str) -> aiohttp.ClientSession:
        if scheme not in self._sessions:
            self._sessions[scheme] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=_Checked(self._rules, scheme),
                    ssl=ssl.create_default_context() if scheme == "https" else True,
                    use_dns_cache=False,
                    limit=0,
                    keepalive_timeout=_KEEP_ALIVE,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=self._timeout,
                auto_decompress=False,
                headers={"user-agent": f"modelyard/{version('modelyard')}"},
            )
        return self._sessions[scheme]

    async def send(self, url: str, headers: dict[str, str], body: bytes) -> Answer:
        """One attempt. Raises nothing but what cancels it."""
        try:
            session = self._session(self._rules.check(url).scheme)
        except NotAllowed as refused:
            return Answer(False, f"not sent: the address {refused}", final=True)
        try:
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                said = answer(response.status, response.headers.get("retry-after", ""))
                await _swallow(response)
                return said
        except NotAllowed as refused:  # names may be resolved to another address the next time
            return Answer(False, f"not sent: {refused}")
        except TimeoutError:
            return Answer(False, f"no answer within {self._timeout.total:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # Its text may quote what the receiver wrote.
            return Answer(False, f"could not be sent: {_kind(error)}")

    async def close(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            await session.close()


async def _swallow(response: aiohttp.ClientResponse) -> None:
    """Take a short answer off the connection, so that it can be used again; what comes of it does not matter."""
    left = _MOST_ANSWER
    try:
        while left > 0 and (piece := await response.content.read(left)):
            left -= len(piece)
    except (aiohttp.ClientError, OSError):
        pass
    if left <= 0:
        response.close()


def _kind(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "the receiver's certificate is not trusted"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the name cannot be resolved"
    if isinstance(error, aiohttp.ClientSSLError):
        return "TLS failed"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "the receiver cannot be connected to"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionError):
        return "the connection broke"
    return type(error).__name__
