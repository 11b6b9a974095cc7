"""What callbacks may be sent where, and how they are signed. Pure: no I/O, no clock.

Signatures are those of Standard Webhooks 1.0 (https://www.standardwebhooks.com): HMAC-SHA256 over
"<webhook-id>.<webhook-timestamp>.<body>".
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from control_plane.tasks.model import TaskId, TaskState, Tenant

MAX_URL_CHARACTERS = 2000
MIN_SECRET_BYTES = 24
"""As the specification asks."""

# One strict reading of URLs. Whatever another parser could take for another host is not a URL here: user and
# password, backslashes, spaces, control characters, fragments.
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9](?:[a-z0-9._-]{0,251}[a-z0-9])?|\[[0-9a-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[!$-;=?-Z_a-z~%]*)?(?P<query>\?[!$-;=?-Z_a-z~%]*)?",
    re.IGNORECASE,
)
_HOST = re.compile(r"(?:\*\.)?[a-z0-9](?:[a-z0-9._-]{0,251}[a-z0-9])?|\*|\[[0-9a-f:.]{2,45}\]")
# What ends so is an address to every resolver, or to none: "127.1", "2130706433", "0x7f.1".
_NUMERIC = re.compile(r"(?:^|\.)(?:[0-9]+|0x[0-9a-f]*)$")
_LOOPBACK_NAMES = frozenset({"localhost"})
_PORTS = {"https": 443, "http": 80}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class CallbackState(IntEnum):
    """Numbers equal those of the contract."""

    PENDING = 1
    DELIVERED = 2
    DEAD = 3


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A callback as the store keeps it."""

    id: str
    """The `webhook-id`."""
    task_id: TaskId
    tenant: Tenant
    epoch: int
    """Of the task in its terminal state."""
    task_state: TaskState
    url: str
    state: CallbackState
    attempts: int
    created_at: float
    due_at: float
    """While it is pending: when the next attempt is due, or how long the running one is left alone."""
    finished_at: float | None = None
    failure: str = ""


# ------------------------------------------------------------------- where ---


class NotAllowed(Exception):
    """The address is not one that callbacks may be sent to; the message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL, read."""

    scheme: str
    host: str
    """Lower case; an IPv6 address without brackets."""
    port: int

    @property
    def origin(self) -> str:
        """Host and port, to count what runs against it."""
        return f"{self.host}:{self.port}"


def read(url: str) -> Target:
    """Raises NotAllowed if it is no URL that means the same to everybody."""
    if len(url) > MAX_URL_CHARACTERS:
        raise NotAllowed(f"must have at most {MAX_URL_CHARACTERS} characters")
    found = _URL.fullmatch(url)
    if found is None:
        raise NotAllowed("must be https://host/path in ASCII, without user, password and fragment")
    scheme, host = found["scheme"].lower(), found["host"].lower().strip("[]")
    port = int(found["port"]) if found["port"] else _PORTS[scheme]
    if not 1 <= port <= 65535:
        raise NotAllowed(f"has no port {port}")
    if literal(host) is None and (":" in host or _NUMERIC.search(host)):
        raise NotAllowed("has no valid IP address")
    return Target(scheme, host, port)


def origin_of(url: str) -> str:
    """Host and port of a URL; the same for all that are none."""
    try:
        return read(url).origin
    except NotAllowed:
        return ""


def without_query(url: str) -> str:
    """What may be shown of a URL: its query may hold a secret."""
    return url.partition("?")[0]


def literal(host: str) -> Address | None:
    """The IP address that a host is written as; None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, in whatever disguise."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = [*(address.teredo or ()), *([address.sixtofour] if address.sixtofour else ())]
        if not all(map(is_public, inner)):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


@dataclass(frozen=True, slots=True)
class Pattern:
    """A host of the settings: "hooks.example.org", "*.example.org", "*", each also with ":port" or ":*"; without it
    the port of the scheme."""

    host: str
    port: int | None
    any_port: bool = False

    @classmethod
    def read(cls, text: str) -> Pattern:
        """Raises ValueError."""
        host, port = text.lower(), ""
        if not host.endswith("]"):
            before, colon, after = host.rpartition(":")
            if colon and (not before.count(":") or before.endswith("]")):
                host, port = before, after
        if not _HOST.fullmatch(host) or (host.startswith("[") and literal(host.strip("[]")) is None):
            raise ValueError(f'{text!r} is no host: give "host", "*.domain" or "*", optionally with ":port" or ":*"')
        if port and port != "*" and not (port.isdecimal() and 1 <= int(port) <= 65535):
            raise ValueError(f"{text!r} has no valid port")
        return cls(host.strip("[]"), int(port) if port.isdecimal() else None, port == "*")

    @property
    def wild(self) -> bool:
        return self.host.startswith("*")

    def matches(self, target: Target) -> bool:
        if not self.any_port and target.port != (_PORTS[target.scheme] if self.port is None else self.port):
            return False
        if self.host == "*":
            return True
        return target.host.endswith(self.host[1:]) if self.wild else target.host == self.host


@dataclass(frozen=True, slots=True)
class Rules:
    """Where callbacks may go."""

    hosts: tuple[Pattern, ...] = ()
    """Of the public internet."""
    private_hosts: tuple[Pattern, ...] = ()
    """That may also have private addresses."""
    insecure_loopback: bool = False
    """http on the loopback interface is allowed."""

    @classmethod
    def of(cls, hosts: Iterable[str], private_hosts: Iterable[str], insecure_loopback: bool) -> Rules:
        """Raises ValueError."""
        return cls(tuple(map(Pattern.read, hosts)), tuple(map(Pattern.read, private_hosts)), insecure_loopback)

    @property
    def open(self) -> bool:
        """Whether there is any host that callbacks may go to."""
        return bool(self.hosts or self.private_hosts)

    def check(self, url: str) -> Target:
        """The target of a URL. Raises NotAllowed. Names are not resolved: see `check_address`."""
        if not self.open:
            raise NotAllowed("callbacks are turned off here: the setting tasks.callbacks.hosts names no host")
        target = read(url)
        if not any(pattern.matches(target) for pattern in (*self.hosts, *self.private_hosts)):
            raise NotAllowed(f"the setting tasks.callbacks.hosts does not allow {target.origin}")
        if target.scheme == "http" and not (self.insecure_loopback and _may_be_loopback(target.host)):
            raise NotAllowed(
                "must be https (http is for loopback only, with the setting tasks.callbacks.insecure_loopback)"
            )
        if (address := literal(target.host)) is not None:
            self.check_address(target, address)
        return target

    def check_address(self, target: Target, address: Address) -> None:
        """An address that the host of a target has. Raises NotAllowed."""
        if target.scheme == "http" and not address.is_loopback:
            raise NotAllowed(f"{target.host} is not on the loopback interface, http is for that only")
        if not is_public(address) and not any(pattern.matches(target) for pattern in self.private_hosts):
            raise NotAllowed(
                f"{target.host} has an address that is not public: only tasks.callbacks.private_hosts can allow that"
            )


def _may_be_loopback(host: str) -> bool:
    address = literal(host)
    return host in _LOOPBACK_NAMES if address is None else address.is_loopback


# ------------------------------------------------------------------ signed ---


def read_secrets(text: str) -> tuple[bytes, ...]:
    """Secrets "whsec_<base64>", separated by white space or commas, the newest first. Raises ValueError, which never
    quotes them."""
    found = []
    for number, word in enumerate(text.replace(",", " ").split(), 1):
        try:
            secret = base64.b64decode(word.removeprefix("whsec_"), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"secret {number} is not base64: make one with `openssl rand -base64 32`") from None
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"secret {number} has {len(secret)} bytes, it needs {MIN_SECRET_BYTES} or more")
        found.append(secret)
    if not found:
        raise ValueError("there is no secret")
    return tuple(found)


def headers(id: str, at: float, body: bytes, secrets: Sequence[bytes]) -> dict[str, str]:
    """The headers of a delivery at a time (seconds since the epoch), signed with every secret."""
    timestamp = str(int(at))
    signed = f"{id}.{timestamp}.".encode() + body
    signatures = (base64.b64encode(hmac.digest(secret, signed, "sha256")).decode() for secret in secrets)
    return {
        "content-type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


# ------------------------------------------------------------------- again ---


@dataclass(frozen=True, slots=True)
class Repetition:
    """How often and how soon what failed is sent again: exponential backoff, half of it random."""

    max_attempts: int
    base: float
    """Longest pause after the first attempt, seconds."""
    factor: float
    cap: float
    """Longest pause of all, seconds."""

    def pause(self, attempt: int, jitter01: float, asked: float | None = None) -> float | None:
        """Seconds until the next attempt after number `attempt` (from 1) has failed; None: there is none.

        `asked` is what the receiver asked for (Retry-After), heeded up to the cap.
        """
        if attempt >= self.max_attempts:
            return None
        longest = self.base
        for _ in range(attempt - 1):
            longest *= self.factor
            if longest >= self.cap:
                break
        pause = min(longest, self.cap) * (0.5 + 0.5 * jitter01)
        return max(pause, min(asked, self.cap)) if asked is not None else pause


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one attempt."""

    accepted: bool
    failure: str = ""
    """Why not: for people, without anything that the receiver wrote."""
    final: bool = False
    """Another attempt cannot help."""
    retry_after: float | None = None


def answer(status: int, retry_after: str = "") -> Answer:
    """What an HTTP status means."""
    if 200 <= status < 300:
        return Answer(True)
    if status == 410:
        return Answer(False, "410 Gone: the receiver wants no more", final=True)
    if 300 <= status < 400:
        return Answer(False, f"{status}: redirects are not followed")
    asked = float(retry_after) if retry_after.isdecimal() and len(retry_after) < 8 else None
    return Answer(False, f"the receiver answered {status}", retry_after=asked)
