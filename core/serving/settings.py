"""What an operator decides: where it listens, who may connect, and how much a client may ask for."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field

from lora_rt.errors import LoraRtError

MEGABYTE = 1 << 20


class ServeError(LoraRtError):
    """A server that can't be started as it is told to."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of everything."""

    rows: int = 16  # that are decoded at once
    queue: int = 64  # rows that wait, at most; whoever comes then is told to come again
    tokens: int | None = None  # of a prompt and its answer; None is what the base takes
    answer_tokens: int = 512  # of an answer for which the client names no limit
    answers: int = 8  # to one request (`n`, times the prompts of a completion)
    messages: int = 256  # of a chat
    terms: int = 16  # of a composition
    body: int = 2 * MEGABYTE  # bytes of a request
    deadline: float = 600.0  # seconds from a request's arrival to the end of its answer
    chunk: int = 128  # tokens of a newcomer's prompt that are read in one step: the others wait no longer than that
    # Tokens of all newcomers that one step reads while somebody speaks or a prompt takes several; else twice as many.
    reading: int = 512
    kv_bytes: int | None = None  # of the keys and values of all rows; None is half of what is free at the start
    prefix_bytes: int = 256 * MEGABYTE  # of keys and values kept for prompts that begin alike; 0 keeps none
    adapter_bytes: int = 1024 * MEGABYTE  # of adapters that stay in memory though nobody uses them

    def check(self) -> None:
        """Raises ServeError that names every limit that makes no sense."""
        least = {"rows": 1, "queue": 0, "answer_tokens": 1, "answers": 1, "messages": 1, "terms": 1, "body": 1}
        least |= {"chunk": 1, "reading": 1, "prefix_bytes": 0, "adapter_bytes": 0}
        problems = [f"{name} is {getattr(self, name)}" for name, low in least.items() if getattr(self, name) < low]
        problems += [f"{name} is {value}" for name in ("tokens", "kv_bytes") if (value := getattr(self, name)) == 0]
        if not 0 < self.deadline < float("inf"):
            problems.append(f"deadline is {self.deadline}")
        if problems:
            raise ServeError(f"these limits leave no room: {', '.join(problems)}", next_step="Give larger limits")


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Where the server listens and whom it serves."""

    host: str = "127.0.0.1"  # an address of this machine
    port: int = 8000  # 0 is any free one
    api_key: str = ""  # what clients have to send as `Authorization: Bearer ...`; empty asks for nothing
    admin_key: str = ""  # opens `/admin`, which there is not without one
    pin: tuple[str, ...] = ()  # names of adapters that are loaded at the start and stay
    # References, exactly as written here, that clients may use beside names: paths, and repositories of the Hub.
    allow: frozenset[str] = frozenset()
    log_prompts: bool = False  # and answers, too
    drain: float = 30.0  # seconds that running answers get after SIGTERM
    deterministic: bool = False  # give every row passes of its own (see `Runtime.generate`), and keep no prefixes
    limits: Limits = field(default_factory=Limits)

    @property
    def loopback(self) -> bool:
        """Whether nobody but this machine can connect."""
        return self.host == "localhost" or is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether this is an address that leads to this machine alone."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def listen(settings: ServeSettings) -> socket.socket:
    """The socket, bound.

    Raises:
        ServeError: somebody else has the port, or there is no such address here.
    """
    found: socket.socket | None = None
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((settings.host, settings.port))
    except OSError as error:
        if found is not None:
            found.close()
        text = f"can't listen on {settings.host}:{settings.port}: {error.strerror or error}"
        raise ServeError(text, next_step="Choose another --port or --host") from error
    return found
