"""One row on its way through the server, and what it is told of itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.generation.row import Ending, TokenScore
from lora_rt.core.requests.running import RequestRow
from lora_rt.errors import LoraRtError


@dataclass(frozen=True, slots=True)
class Said:
    """New text of a row, the scores of the tokens that have made it, and the count of new tokens, whose text may come
    with a later one.
    """

    text: str
    tokens: int
    scores: Sequence[TokenScore] = ()


@dataclass(frozen=True, slots=True)
class Over:
    """The end of a row: why, and the error where it is one."""

    ending: Ending | None
    error: LoraRtError | None = None


Event = Said | Over
Listener = Callable[["Ticket", Event], None]
Events = Sequence[tuple["Ticket", Event]]


@dataclass(eq=False, slots=True)
class Ticket:
    """One row.

    Args:
        number: in the order of arrival; whoever came first is served first.
        row: what is decoded.
        need: tokens that it may come to.
        deadline: when it is given up, by `time.monotonic`.
        listener: told of every event by `hand_out`, in whichever thread that runs; it must return at once.
        cached: tokens of its prompt that did not have to be read.
    """

    number: int
    row: RequestRow
    need: int
    deadline: float
    listener: Listener
    adapters: set[ResidentAdapter] = field(default_factory=set)
    arrived: float = field(default_factory=time.monotonic)
    said: int = 0
    cached: int = 0
    spoke: float = 0.0
    over: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)


def hand_out(events: Events) -> None:
    """Tell the listeners."""
    for ticket, event in events:
        ticket.listener(ticket, event)
