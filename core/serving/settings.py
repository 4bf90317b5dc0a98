"""What an operator decides: who may connect, and how much a client may ask for."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from lora_rt.errors import LoraRtError

MEGABYTE = 1 << 20


class ServeError(LoraRtError):
    """A server that can't be started as it is told to."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of everything.

    Args:
        rows: that are decoded at once.
        queue: rows that wait, at most; whoever comes then is told to come again.
        tokens: of a prompt and its answer; None is what the base takes.
        answer_tokens: of an answer for which the client names no limit.
        answers: to one request (`n`, times the prompts of a completion).
        messages: of a chat.
        terms: of a composition.
        body: bytes of a request.
        deadline: seconds from a request's arrival to the end of its answer.
        chunk: tokens of a newcomer's prompt that are read in one step, so that the others wait no longer than that.
        reading: tokens of all newcomers that are read in one step, while somebody speaks or a prompt takes several;
            twice as many otherwise.
        kv_bytes: of the keys and values of all rows; None is half of what is free at the start.
        prefix_bytes: of keys and values that are kept for prompts that begin alike; 0 keeps none.
        adapter_bytes: of adapters that stay in memory though nobody uses them.
    """

    rows: int = 16
    queue: int = 64
    tokens: int | None = None
    answer_tokens: int = 512
    answers: int = 8
    messages: int = 256
    terms: int = 16
    body: int = 2 * MEGABYTE
    deadline: float = 600.0
    chunk: int = 128
    reading: int = 512
    kv_bytes: int | None = None
    prefix_bytes: int = 256 * MEGABYTE
    adapter_bytes: int = 1024 * MEGABYTE

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
    """Where the server listens and whom it serves.

    Args:
        host, port: an address of this machine; port 0 is any free one.
        api_key: what clients have to send as `Authorization: Bearer ...`; nothing is asked for where it is empty.
        admin_key: opens `/admin`, which there is not without one.
        pin: names of adapters that are loaded at the start and stay.
        allow: references, exactly as written here, that clients may use beside names: paths, and repositories of the
            Hub.
        log_prompts: write prompts and answers into the log.
        drain: seconds that running answers get after SIGTERM.
        deterministic: give every row forward passes of its own (see `Runtime.generate`), and keep no prefixes.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    admin_key: str = ""
    pin: tuple[str, ...] = ()
    allow: frozenset[str] = frozenset()
    log_prompts: bool = False
    drain: float = 30.0
    deterministic: bool = False
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
